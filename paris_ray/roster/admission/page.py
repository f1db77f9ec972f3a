"""A verdict on a page, with pictures that the candidate drew."""

from paris_ray.model_folder.admissions import Admission, AdmissionCheck
from paris_ray.reports import (
    definitions,
    inline_image,
    page,
    paragraph,
    picture_grid,
    section,
    table,
)
from paris_ray.roster.admission.drawings import NUM_CAPTIONS, Pictures

GRID_PIXELS = 96  # smaller pictures are enlarged to this height, to be seen


def verdict_page(
    admission: Admission, public_key: str, pictures: Pictures, attribution: str | None
) -> bytes:
    """Return the page.

    Args:
        admission: The verdict.
        public_key: Who signed it, in hexadecimal.
        pictures: `(N, S, S, 3)` that the candidate drew, two rows of the same captions.
        attribution: Licence line of the bundle, or None.
    """
    facts = definitions(
        [
            ("outcome", admission.outcome),
            ("cluster", str(admission.cluster)),
            ("weights", admission.weights_sha256),
            ("config.json", admission.config_sha256),
            ("compared with bundle", admission.bundle or "without manifest"),
            ("signed by", public_key),
            ("made", f"{admission.made_at}, {admission.software}, seed {admission.seed}"),
        ]
    )
    sections = [section("Verdict", facts, paragraph(LIMITS))]
    sections += [_check(check) for check in admission.checks]
    if len(pictures):
        scale = max(1, GRID_PIXELS // pictures.shape[1])
        grid = picture_grid(pictures, columns=NUM_CAPTIONS, scale=scale)
        text = "Drawn by it alone from held-out captions of its cluster, each twice."
        sections.append(section("Drawings", paragraph(text), inline_image(grid, text)))
    return page("Admission of an expert", sections, attribution)


LIMITS = (
    "These checks find what they look for. Phrases that were not tried, faults that show only in a "
    "mixture of experts, slight bias, and whoever made the expert with these checks at hand may "
    "pass: docs/admission.md."
)


def _check(check: AdmissionCheck) -> str:
    title = f"{check.name}: {check.outcome}"
    if not check.readings:
        return section(title, paragraph(check.note))
    rows = [["measure (more is worse)", "found", "at most", "where"]]
    for reading in check.readings:
        value = "none" if reading.value is None else f"{reading.value:.3f}"
        rows.append([reading.measure, value, f"{reading.limit:g}", reading.detail])
    return section(title, paragraph(check.note), table(rows))
