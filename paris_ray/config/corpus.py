"""Which pictures, and how they are cut into clusters."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """Which captioned images to read, and what counts as a bad row."""

    kind: Literal["openmoji", "image_folder", "parquet", "webdataset"] = "openmoji"
    path: str | None = None  # folder, or folder of .parquet / .tar files; null for openmoji
    image_size: int = 32  # pixels; the shorter side is resized, then the centre is cropped
    resize: Literal["lanczos", "adm"] = "lanczos"  # adm: halve with a box, then bicubic, as DiT
    horizontal_flip: bool = False  # also encode the mirror image; training draws one of the two
    limit: int | None = None  # keep only the first rows, in corpus order
    rows_per_shard: int = 64  # the unit of reading, of resuming and of one output file
    caption_templates: list[str] = field(default_factory=lambda: ["{}"])  # first = the caption
    attribution: str | None = None  # licence line to show beside pictures; openmoji has its own
    max_pixels: int = 64_000_000  # a larger image is taken for a decompression bomb
    max_bad_share: float = 0.1  # refuse to go on if more than this share is quarantined


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Hierarchical spherical k-means: fine centres, then balanced coarse clusters."""

    num_clusters: int = 8
    num_fine: int = 128
    iterations: int = 50
    max_imbalance: float = 1.25  # the largest cluster may have this multiple of rows / clusters
    num_cpus: float = 1.0
    threads: int = 1
