"""What a run takes beside what the papers tell of DDM and Paris: pictures, and days of an A100.

Paris claims 14 times fewer pictures and 16 times less computing than DDM (arXiv 2501.05450): 158
against 11 million, 1,176 against 72 days of an A100, of which it had 120 of an A40. How many FLOPs
that was is not known. Here an A40 is taken to have reached 30 % of its peak, as in the packaged
`paris_xl2`; then a day of an A100 is 6.5e18 FLOP, and FLOPs of any run can be told in such days.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from paris_ray.artifacts import LEDGER, MANIFEST, read_manifest
from paris_ray.config import Config
from paris_ray.errors import ArtifactError
from paris_ray.ledger import Taken, read_ledger
from paris_ray.planning.tables import number, scaled, table
from paris_ray.run import CLUSTERS, Run

PARIS_A40_DAYS, PARIS_A100_DAYS = 120, 72
A40_FLOPS, ASSUMED_MFU = 149.7e12, 0.3
A100_DAY_FLOPS = PARIS_A40_DAYS * 86_400 * ASSUMED_MFU * A40_FLOPS / PARIS_A100_DAYS
NO_DEVICE = "jobs that train nothing, by the clock"


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model was made of.

    Attributes:
        pictures: Of its corpus that were trained on.
        a100_days: Of computing.
    """

    pictures: float
    a100_days: float


DDM, PARIS = Cost(158e6, 1_176), Cost(11e6, PARIS_A100_DAYS)


def cost_of(pictures: int, flops: float) -> Cost:
    """Return the cost of a run by the FLOPs of its trainings."""
    return Cost(pictures, flops / A100_DAY_FLOPS)


def compare(name: str, cost: Cost) -> str:
    """Return a table of DDM, Paris and a run, and how many times less than DDM the others take."""
    rows = [["", "pictures", "DDM / this", "A100-days", "DDM / this"]]
    for title, each in (("DDM", DDM), ("Paris", PARIS), (name, cost)):
        fewer, less = _ratio(DDM.pictures, each.pictures), _ratio(DDM.a100_days, each.a100_days)
        rows.append([title, number(each.pictures), fewer, _amount(each.a100_days), less])
    note = f"A100-days of {name} are its FLOPs at the {A100_DAY_FLOPS:.3g} of a day of Paris's."
    return f"{table(rows)}\n{note}"


def ledger_of(config: Config) -> str:
    """Return what the artefacts of a run took, told by its folder.

    Raises:
        ArtifactError: if there is no ledger, or it is damaged.
    """
    run = Run(config)
    ledger = read_ledger(run.folder)
    if not ledger:
        raise ArtifactError(f"{run.folder.uri} has no {LEDGER}/: no stage of it has finished")
    pictures = 0
    if run.clusters.exists(MANIFEST):
        pictures = sum(read_manifest(run.clusters, CLUSTERS).facts["sizes"])
    return render_ledger(ledger, pictures)


def render_ledger(ledger: Mapping[str, Taken], pictures: int) -> str:
    """Return what a run took, artefact by artefact, by device and beside the papers.

    Args:
        ledger: By the artefact's place in the run.
        pictures: That experts were trained on.
    """
    rows = [["Artefact", "device", "hours", "samples", "FLOPs", "MB read", "MB written", "dollars"]]
    for place, taken in ledger.items():
        rows.append([place, taken.device or "", *_amounts(taken)])
    flops = sum(taken.flops for taken in ledger.values())
    return "\n\n".join(
        [table(rows), table(_by_device(ledger)), compare("this run", cost_of(pictures, flops))]
    )


def _amounts(taken: Taken) -> list[str]:
    moved = {way: sum(sizes.values()) for way, sizes in taken.bytes.items()}
    return [
        number(taken.hours, 3),
        number(taken.samples) if taken.device else "",
        scaled(taken.flops, "FLOP") if taken.device else "",
        *(number(moved[way] / 1e6, 1) if way in moved else "" for way in ("read", "written")),
        number(taken.dollars, 2),
    ]


def _by_device(ledger: Mapping[str, Taken]) -> list[list[str]]:
    """Return rows of the hours and dollars of each kind of device."""
    rows = [["Held", "hours", "dollars"]]
    for device in sorted({taken.device or "" for taken in ledger.values()}):
        part = [taken for taken in ledger.values() if (taken.device or "") == device]
        prices = [taken.dollars for taken in part if taken.dollars is not None]
        dollars = sum(prices) if len(prices) == len(part) else None
        hours = sum(taken.hours for taken in part)
        rows.append([device or NO_DEVICE, number(hours, 3), number(dollars, 2)])
    return rows


def _ratio(theirs: float, own: float) -> str:
    return _amount(theirs / own) if own else ""


def _amount(value: float) -> str:
    """Return a number of any size in few characters."""
    if value < 0.1:
        return f"{value:.3g}"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
