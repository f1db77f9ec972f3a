"""Admission of an expert from a stranger: one check = one file, `verdict.py` over them.

    form.py       tensors: finite, and of a size like those of the other experts
    losses.py     held-out denoising losses, by cluster, by noise level and by word
    agreement.py  velocities at high noise, where all experts nearly agree
    drawings.py   pictures that it draws alone
    copies.py     pictures that are its training pictures
    triggers.py   words that move it far more than the others (vocabulary.py: which are tried)

No check asks the router: an expert that is seldom asked is examined like one that always is. Each
returns readings, of which more is worse; `limits.py` has the most that an honest expert has.
"""
