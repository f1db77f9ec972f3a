"""Which pictures, and how they are cut into clusters."""

import re
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from paris_ray.config.filters import FiltersConfig

# Labels of rows are named by columns or by the groups of another pattern (`corpora.labels`).
COLUMN_NAMES = re.compile(r"\w+(,\w+)*")

CorpusKind = Literal["scenes", "openmoji", "image_folder", "sidecars", "parquet", "webdataset"]
PACKAGED_KINDS = ("scenes", "openmoji")  # whose pictures come in packages: there is no path
PATH_KINDS = tuple(kind for kind in get_args(CorpusKind) if kind not in PACKAGED_KINDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """Which captioned images to read, and what counts as a bad row."""

    kind: CorpusKind = "openmoji"
    path: str | None = None  # folder, or folder of .parquet / .tar files; null: the packaged ones
    # Which files to read, where their names or folders tell splits apart; null: train, if there is
    # one; all: every file
    split: str | None = None
    # The column, field or extension of pictures (of names, in a metadata file) and of captions;
    # null: the usual names (docs/training.md)
    image_column: str | None = None
    caption_column: str | None = None
    image_size: int = 32  # pixels; the shorter side is resized, then the centre is cropped
    resize: Literal["lanczos", "adm"] = "lanczos"  # adm: halve with a box, then bicubic, as DiT
    horizontal_flip: bool = False  # also encode the mirror image; training draws one of the two
    limit: int | None = None  # keep only the first rows, in corpus order
    rows_per_shard: int = 64  # the unit of reading, of resuming and of one output file
    # Captions that are kept of a row, of which training draws one; null: as many as the first 256
    # rows have at most. Rows with fewer repeat theirs
    captions_per_row: int | None = None
    caption_templates: list[str] = field(default_factory=lambda: ["{}"])  # first = the caption
    attribution: str | None = None  # licence line to show beside pictures; packaged ones have one
    # Rows set aside before anything is fitted, to measure with: a share of the corpus, but at least
    # about 64 rows of a small one, up to a tenth of it; 0: none
    held_out_share: float = 0.02
    # What names groups that are withheld as a whole, and then the share is of groups: columns, such
    # as object,background, or a pattern with groups that is searched in the caption; null: rows.
    # Of kind scenes null means object,background and, of attributes, all four
    held_out_key: str | None = None
    # What the evaluation compares of drawn and asked pictures: columns, or a pattern with groups
    attributes: str | None = None
    # sRGB, 0 to 255, that shows through transparent pixels
    background: list[int] = field(default_factory=lambda: [255, 255, 255])
    max_image_bytes: int = 200_000_000  # a larger file is not decoded
    max_pixels: int = 64_000_000  # a larger image is taken for a decompression bomb
    max_bad_share: float = 0.1  # refuse to go on if more than this share is quarantined
    filters: FiltersConfig = field(default_factory=FiltersConfig)  # of the usable rows


def with_own_labels(corpus: CorpusConfig) -> CorpusConfig:
    """Return a corpus with the labels that a packaged one knows by itself, where none are given."""
    if corpus.kind != "scenes":
        return corpus
    return replace(
        corpus,
        held_out_key=corpus.held_out_key or "object,background",
        attributes=corpus.attributes or "object,colour,background,place",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Hierarchical spherical k-means: fine centres, then balanced coarse clusters."""

    num_clusters: int = 8
    # What is clustered. Pictures may agree in what is of no matter, as a background; captions name
    # what is shown: then every expert meets its subjects in all surroundings. both: side by side.
    # random: nothing, the hash of a row's key decides; what clustering must beat
    features: Literal["image", "caption", "both", "random"] = "image"
    remove_directions: int = 0  # first principal directions of the features to leave out
    num_fine: int = 128
    iterations: int = 50
    max_imbalance: float = 1.25  # the largest cluster may have this multiple of rows / clusters
    # Share of every expert's batches that is drawn from the whole corpus: rows written beside the
    # shards, so that experts do not forget what their cluster lacks; 0: as Paris has it
    shared_share: float = 0.0
    num_cpus: float = 1.0
    threads: int = 1
