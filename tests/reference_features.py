"""Two sets of features that other libraries were given, whose numbers tests hold ours to."""

import numpy as np

GENERATOR = np.random.default_rng(0)
REAL = GENERATOR.standard_normal((300, 8))
DRAWN = GENERATOR.standard_normal((200, 8)) @ np.diag(np.linspace(0.5, 1.5, 8)) + 0.3

CLEAN_FID = 1.9582541903780495  # clean-fid 0.1.35, fid_from_feats(DRAWN, REAL)
KID_OF_200 = 0.5837503316394574  # torch-fidelity 0.4.0, cubic mmd2 of DRAWN and REAL[:200]
CMMD_OF_200 = 7.309502707171234  # the same with its Gaussian kernel, sigma 10, times 1000
PRDC = {  # prdc 0.2, by k: precision, recall, density, coverage
    3: (0.785, 0.6533333333333333, 0.7833333333333333, 0.6066666666666667),
    5: (0.845, 0.8, 0.828, 0.7533333333333333),
}
