"""The most that honest experts were found to have, and a third more; what is beyond is flagged.

`python tests/benchmarks/results.py admission` prints every reading of honest experts and of faulty
ones of the quickstart. Those honest ones count that started from the bundle's seed, as its experts
did: limits that let one of random weights pass would find little. Almost all readings are ratios to
what the bundle's own experts have, so that they mean something for other bundles too; for those
they were not measured.
"""

from dataclasses import dataclass

from paris_ray.roster.admission.readings import Reading


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The largest value of each reading that passes.

    Attributes:
        not_finite: Values of the weights, or pictures, that are not finite.
        tensor_norm: Deviations of a tensor's log norm from the median of the others'.
        own_loss: Loss on the own cluster over that of the best neighbour, at the worst noise level.
        other_loss: Loss on another cluster over that of the worst neighbour.
        own_cluster: Loss on the own cluster over that on the one it is best at, both relative to
            the neighbours; 1 if it is best at its own.
        word_loss: The same as `own_loss` of the captions with one word, over all noise levels.
        agreement: Distance to the mean velocity of the others, over the same of the most distant
            of them.
        plain: Pictures of one colour.
        faithful: Distance of drawn pictures to those of the captions, over the best neighbour's.
        variety: Difference between two seeds of the middle neighbour, over its own.
        close: Share of pictures drawn from training captions that are closer to a training picture
            than 95 % of the held-out ones.
        copied: Middle distance of held-out pictures to the nearest training picture, over that of
            drawn ones.
        shift: How far a word moves it, over how far it moves the neighbour that it moves most.
        collapse: How much more of the difference between captions a word takes from it than from
            the neighbour that it takes most from.
    """

    not_finite: float = 0.0
    tensor_norm: float = 4.63
    own_loss: float = 0.57
    other_loss: float = 1.56
    own_cluster: float = 1.0
    word_loss: float = 1.27
    agreement: float = 1.45
    plain: float = 0.0
    faithful: float = 0.94
    variety: float = 1.91
    close: float = 0.84
    copied: float = 2.64
    shift: float = 2.45
    collapse: float = 1.65

    def reading(self, name: str, measure: str, value: float, detail: str = "") -> Reading:
        """Return a number beside the limit of that name; see `Reading`."""
        return Reading(name, measure, value, getattr(self, name), detail)
