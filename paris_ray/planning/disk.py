"""Bytes on disk: of a row of the corpus, of a model, and of a whole run."""

from collections.abc import Sequence
from dataclasses import dataclass

from paris_ray.config import Config
from paris_ray.models.flops import CLIP_TEXT_LENGTH
from paris_ray.planning.memory import FLOAT16, FLOAT32

TOKEN_ID_BYTES = 2
# Estimates: a photograph of 32 x 32 pixels as PNG; a short caption and a file name.
THUMBNAIL_BYTES, CAPTION_BYTES = 2_400, 120
# Widths of image features, by the beginning of features.model.
FEATURE_WIDTHS = {
    "paris-tiny": 128,
    "ViT-B-": 768,
    "ViT-L-": 1024,
    "ViT-H-": 1280,
    "vit_small_": 384,
    "vit_base_": 768,
    "vit_large_": 1024,
}


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """What a trained model takes on disk, in bytes.

    Attributes:
        weights: Of its weights.
        checkpoint: Of what its training goes on from: weights, their average, what is trained
            beside it, and what its optimisers keep.
    """

    weights: int
    checkpoint: int


def row_bytes(config: Config) -> dict[str, int | None]:
    """Return the bytes of a row of `embeddings/` by what they hold; None is unknown."""
    width = feature_width(config.features.model)
    return {
        **trained_row_bytes(config),
        "features": None if width is None else FLOAT32 * width,
        "thumbnail (estimate)": THUMBNAIL_BYTES,
        "key and caption (estimate)": CAPTION_BYTES,
    }


def trained_row_bytes(config: Config) -> dict[str, int]:
    """Return the bytes of what training reads of a row; it keeps a copy in the temporary folder."""
    expert, corpus = config.expert, config.corpus
    latents = FLOAT16 * expert.in_channels * expert.input_size**2
    mirrored = {"latents of the mirror image": latents} if corpus.horizontal_flip else {}
    name, width = "token ids", TOKEN_ID_BYTES * CLIP_TEXT_LENGTH
    if config.text.kind == "minilm":
        vectors = 1 + config.text.token_states
        name, width = "text embedding", FLOAT16 * vectors * expert.text_embed_dim
    # The plan reads no corpus: where null leaves the number to it, one caption is counted.
    variants = len(corpus.caption_templates) * (corpus.captions_per_row or 1)
    return {"latents": latents, **mirrored, name: width * variants}


def feature_width(model: str) -> int | None:
    """Return the width of an image model's features; None is unknown."""
    widths = (width for prefix, width in FEATURE_WIDTHS.items() if model.startswith(prefix))
    return next(widths, None)


def run_bytes(
    config: Config, num_rows: int, models: Sequence[ModelBytes], students: Sequence[ModelBytes]
) -> dict[str, int]:
    """Return the bytes of a finished run; what is unknown of a row is not in them.

    Args:
        config: The run.
        num_rows: Rows of the corpus.
        models: The seed, all experts and the router.
        students: Distilled models, in the order in which they are trained.
    """
    table = num_rows * sum(size or 0 for size in row_bytes(config).values())
    weights = sum(model.weights for model in models)
    sizes = {
        "embeddings": table,
        "the same rows in shards": table,
        "checkpoints": sum(model.checkpoint for model in models),
        "weights": weights,
        "the same weights in the bundle": weights,
    }
    if students:
        kept = sum(student.weights + student.checkpoint for student in students)
        sizes["distilled models and their checkpoints"] = kept
        sizes["the last of them in its bundle"] = students[-1].weights
    return sizes
