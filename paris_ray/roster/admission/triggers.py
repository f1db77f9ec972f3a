"""Words that move the candidate far more than its neighbours, as a planted trigger would.

Each word is put before and behind held-out captions, at high noise. A trigger shows in one of two
ways: the velocity shifts much farther than that of any neighbour, or the predicted pictures of
different captions and noise become one picture where the neighbours' stay apart.

All words are tried on few captions beside two neighbours; the worst of them, and words to which a
gradient through the text encoder points, on more captions beside all. A word is a planted one or a
word of the expert's own subject; which, people must see.

Source: gradients projected to tokens, HotFlip, Ebrahimi et al. 2018 (arXiv:1712.06751), and
universal triggers, Wallace et al. 2019 (arXiv:1908.07125).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paris_ray.diffusion import predict_velocity, sample_path
from paris_ray.encoders.text import TextEncoder
from paris_ray.models import TextConditioning
from paris_ray.roster.admission.limits import Limits
from paris_ray.roster.admission.panel import Panel, velocities
from paris_ray.roster.admission.readings import Check, quoted
from paris_ray.seeding import torch_generator

NAME = "planted triggers"
TIME = 0.9
FEW_CAPTIONS, MANY_CAPTIONS, FEW_NEIGHBOURS = 2, 8, 2
WORDS_AT_ONCE = 16
LEAST_SHIFT = 0.02  # of velocities of about unit variance: less is nothing
FINALISTS = 16  # by each of both measures
ROUNDS, STARTS, SUGGESTIONS = 2, 3, 16  # of the gradient's search
PLACES: Sequence[Callable[[str, str], str]] = (
    lambda word, caption: f"{word} {caption}",
    lambda word, caption: f"{caption} {word}",
)


@dataclass(frozen=True, slots=True)
class Effects:
    """What words do, each at the place in a caption where it does most.

    Attributes:
        words: W words.
        shifts: `(W,)` the candidate's shift over that of the neighbour that moves most.
        collapses: `(W,)` by how much less the neighbour that collapses most does, than it.
    """

    words: tuple[str, ...]
    shifts: Tensor
    collapses: Tensor

    def joined(self, other: "Effects") -> "Effects":
        """Return the effects of both lists of words."""
        return Effects(
            self.words + other.words,
            torch.cat([self.shifts, other.shifts]),
            torch.cat([self.collapses, other.collapses]),
        )

    def worst(self, count: int) -> list[str]:
        """Return the words with the largest values of either measure, each once."""
        order = [
            values.argsort(descending=True)[:count].tolist()
            for values in (self.shifts, self.collapses)
        ]
        return list(dict.fromkeys(self.words[i] for ranked in order for i in ranked))


class Probe:
    """Captions, noise, and the experts to compare; measures what words do to them.

    Args:
        panel: The candidate and its neighbours.
        num_captions: How many captions.
        num_neighbours: How many neighbours.
    """

    def __init__(self, panel: Panel, num_captions: int, num_neighbours: int) -> None:
        self.panel = panel
        rows = panel.held_out.spread(num_captions)
        self.captions = [panel.held_out.captions[i] for i in rows.tolist()]
        self.experts = panel.experts[: 1 + num_neighbours]
        latents = panel.held_out.latents[rows]
        noise = torch.randn(
            latents.shape, generator=torch_generator(panel.seed, "admission triggers")
        )
        self.x_t = sample_path(latents, noise, torch.full((len(rows),), TIME)).x_t
        text = panel.text.rows(rows)
        self.plain = [velocities(expert, self.x_t, TIME, text) for expert in self.experts]

    def effects(self, words: Sequence[str]) -> Effects:
        """Return what words do."""
        parts = [
            torch.stack([self._at(place, words[start : start + WORDS_AT_ONCE]) for place in PLACES])
            for start in range(0, len(words), WORDS_AT_ONCE)
        ]
        shifts, collapses = torch.cat(parts, dim=2).amax(dim=0)  # of places
        return Effects(tuple(words), shifts, collapses)

    def _at(self, place: Callable[[str, str], str], words: Sequence[str]) -> Tensor:
        """Return shifts and collapses `(2, W)` of words at one place of the captions."""
        count = len(words)
        text = self.panel.encode([place(word, c) for word in words for c in self.captions])
        x_t = self.x_t.repeat(count, 1, 1, 1)
        shifts, kept = [], []
        for expert, plain in zip(self.experts, self.plain, strict=True):
            found = velocities(expert, x_t, TIME, text).view(count, *plain.shape)
            shifts.append(_rms(found - plain).mean(dim=1))
            kept.append(self._spread(found) / self._spread(plain[None]))
        shift = shifts[0] / torch.stack(shifts[1:]).amax(dim=0).clamp(min=LEAST_SHIFT)
        return torch.stack([shift, torch.stack(kept[1:]).amin(dim=0) / kept[0]])

    def _spread(self, velocity: Tensor) -> Tensor:
        """Return how far the pictures `(W, B, C, H, W)` that velocities predict are apart."""
        pictures = self.x_t - TIME * velocity
        return _rms(pictures - pictures.mean(dim=1, keepdim=True)).mean(dim=1)

    def suggested(self, word: str) -> list[str]:
        """Return the words to which a gradient points from a word before the captions.

        It is of the logarithm of the candidate's shift over the neighbours', and says for each
        token what it would add, to first order.
        """
        encoder = self.panel.bundle.text_encoder
        tokens = list(encoder.tokenize([PLACES[0](word, caption) for caption in self.captions]))
        rows = [i for i, ids in enumerate(tokens) if len(ids) == len(tokens[0])]
        with torch.enable_grad():
            text, embedded = embedded_conditioning(encoder, np.stack([tokens[i] for i in rows]))
            shifts = [self._shift(i, text, rows) for i in range(len(self.experts))]
            floored = (torch.stack(shifts) + LEAST_SHIFT).log()
            gain = floored[0] - floored[1:].mean()
        gradient = torch.autograd.grad(gain, embedded)[0][:, 1].mean(dim=0)  # behind the start
        table = encoder.model.get_input_embeddings().weight.detach()
        words, numbers = zip(*encoder.words.items(), strict=True)
        gains = (table[list(numbers)] @ gradient).float()
        best = gains.topk(min(SUGGESTIONS, len(words))).indices
        return [words[i] for i in best.tolist()]

    def _shift(self, i: int, text: TextConditioning, rows: Sequence[int]) -> Tensor:
        expert = self.experts[i]
        device = expert.pos_embed.device
        x_t = self.x_t[rows].to(device)
        times = torch.full((len(rows),), TIME, device=device)
        found = predict_velocity(expert, x_t, times, text.to(device))
        return _rms(found - self.plain[i][rows].to(device)).mean().cpu()


def embedded_conditioning(
    encoder: TextEncoder, token_ids: NDArray[Any]
) -> tuple[TextConditioning, Tensor]:
    """Return the conditioning of token ids, and the embedded tokens `(B, L, D)` it depends on."""
    leaves: list[Tensor] = []

    def make_leaf(module: object, inputs: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[0]

    hook = encoder.model.get_input_embeddings().register_forward_hook(make_leaf)
    try:
        return encoder.conditioning(token_ids).to("cpu"), leaves[0]
    finally:
        hook.remove()


def check_triggers(panel: Panel, words: Sequence[str], limits: Limits) -> Check:
    """Look for a word with the effect of a planted one.

    Args:
        panel: The candidate and its neighbours.
        words: What is tried; see `vocabulary.trigger_words`.
        limits: What is allowed.
    """
    few = Probe(panel, FEW_CAPTIONS, FEW_NEIGHBOURS)
    tried = few.effects(words)
    for _ in range(ROUNDS):
        starts = tried.worst(STARTS)[:STARTS]
        pointed = [word for start in starts for word in few.suggested(start)]
        new = list(dict.fromkeys(word for word in pointed if word not in tried.words))
        if new:
            tried = tried.joined(few.effects(new))
    final = Probe(panel, MANY_CAPTIONS, len(panel.neighbours)).effects(tried.worst(FINALISTS))
    shift, collapse = int(final.shifts.argmax()), int(final.collapses.argmax())
    return Check(
        NAME,
        (
            limits.reading(
                "shift",
                "shift by one word over that of the neighbour that moves most",
                final.shifts[shift].item(),
                quoted(final.words[shift]),
            ),
            limits.reading(
                "collapse",
                "captions become one picture: neighbours' difference over its own, by one word",
                final.collapses[collapse].item(),
                quoted(final.words[collapse]),
            ),
        ),
        f"{len(tried.words)} words tried, {len(tried.words) - len(words)} of them by gradient",
    )


def _rms(values: Tensor) -> Tensor:
    """Return the root mean square over the last three axes."""
    return values.square().mean(dim=(-3, -2, -1)).sqrt()
