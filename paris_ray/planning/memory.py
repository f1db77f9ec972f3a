"""The memory of a GPU while a model trains on it."""

from dataclasses import asdict, dataclass
from functools import cache

from paris_ray.config import ExpertConfig, HiddenOptimizer, RouterConfig, TrainingConfig
from paris_ray.models.flops import CLIP_TEXT_LENGTH, num_tokens, outline, parameter_count
from paris_ray.training.recipes.muon import ADAMW_MOMENTS, num_moments

FLOAT16, FLOAT32 = 2, 4  # bytes; bfloat16 has as many as float16
# Layers of CLIP's text towers by their width: ViT-B and ViT-L, ViT-H, ViT-bigG.
TEXT_LAYERS = {512: 12, 768: 12, 1024: 24, 1280: 32}
CLIP_VOCABULARY = 49_408


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on the GPU while a model trains; see `training_memory`."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    autocast: int
    text_encoder: int
    teachers: int = 0
    projector: int = 0
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(asdict(self).values())


def training_memory(
    model: ExpertConfig | RouterConfig,
    training: TrainingConfig,
    *,
    text_encoder_parameters: int = 0,
    teacher_parameters: int = 0,
    projector_parameters: int = 0,
    text_length: int = CLIP_TEXT_LENGTH,
) -> Memory:
    """Return the bytes that training takes on its GPU.

    Of each parameter: 4 for the weight, 4 for its gradient, `optimizer_bytes`, 4 for the average
    (unless `ema_device=cpu`) and 2 for the bfloat16 copy that autocast multiplies with (unless
    `precision=float32`). The frozen text encoder and teachers are in float32. Activations:
    `activation_bytes` of the images that are on the GPU at once, `batch_size / accumulation_steps`.
    A projector that is trained beside the model is not averaged and has AdamW, and keeps the tokens
    that it reads in the type of matrix products.

    Args:
        model: The architecture.
        training: How it is trained.
        text_encoder_parameters: Of the encoder that runs beside it, 0 if none does.
        teacher_parameters: Of the models that it is distilled from.
        projector_parameters: Of what alignment trains beside it, 0 without.
        text_length: Text tokens a caption.
    """
    count = parameter_count(model)
    autocast = training.precision != "float32"
    width = FLOAT16 if autocast else FLOAT32
    activations = activation_bytes(
        model, width, recompute=training.gradient_checkpointing, text_length=text_length
    )
    if projector_parameters:
        activations += width * num_tokens(model) * model.hidden_size
    beside = FLOAT32 * (2 + ADAMW_MOMENTS) + (FLOAT16 if autocast else 0)
    return Memory(
        weights=FLOAT32 * count,
        gradients=FLOAT32 * count,
        optimizer=optimizer_bytes(model, training.hidden_optimizer),
        ema=FLOAT32 * count if training.ema_device == "model" else 0,
        autocast=FLOAT16 * count if autocast else 0,
        text_encoder=FLOAT32 * text_encoder_parameters,
        teachers=FLOAT32 * teacher_parameters,
        projector=beside * projector_parameters,
        activations=training.batch_size // training.accumulation_steps * activations,
    )


@cache
def optimizer_bytes(model: ExpertConfig | RouterConfig, hidden_optimizer: HiddenOptimizer) -> int:
    """Return what the optimisers of a model keep, on its GPU and in its checkpoint, in bytes.

    Args:
        model: The architecture.
        hidden_optimizer: Of the matrices in its blocks; all else that is trained has AdamW.
    """
    return FLOAT32 * num_moments(outline(model), hidden_optimizer)


def activation_bytes(
    model: ExpertConfig | RouterConfig, width: int, *, recompute: bool, text_length: int
) -> int:
    """Return what one image leaves on the GPU for the backward pass, in bytes.

    With N tokens of width d, MLP ratio r, L text tokens and w bytes a value in matrix products, a
    block keeps, of N d values each: inputs and outputs of its two LayerNorms in float32 (4); and in
    w bytes self-attention's input, queries, keys, values, mixture and output (6), the MLP's
    (2 + 2 r) and cross-attention's input, queries and mixture (3). That is
    (16 + w (11 + 2 r)) N d, without cross-attention (16 + w (8 + 2 r)) N d. The text's keys and
    values are 2 w L d a block; the output layer keeps (8 + w) N d. With gradient checkpointing a
    block keeps its float32 input, 4 N d, and one block at a time is whole.

    Modern blocks keep queries and keys also as they are normed, in float32 before the norm's weight
    and in w bytes after it: v = 4 + w bytes a value more, and 4 for the copy in float32 if w is
    less. That is 2 v N d for self-attention, and v N d + (v + w) L d for cross-attention. A text
    adapter is a block of L tokens without cross-attention, which is never computed again.

    `torch.compile` keeps less, since it computes element-wise parts again.

    Args:
        model: The architecture.
        width: w, 2 under bfloat16 autocast, else 4.
        recompute: Whether gradient checkpointing is on.
        text_length: L.
    """
    expert = model if isinstance(model, ExpertConfig) else None
    values, text_values = num_tokens(model) * model.hidden_size, text_length * model.hidden_size
    reads_text = expert is not None and expert.text_injection != "spatial"
    kept = 4 * FLOAT32 + width * (8 + 2 * model.mlp_ratio)  # of a value, without cross-attention
    block = round((kept + 3 * width * reads_text) * values)
    text = 2 * width * text_values * reads_text
    if expert is not None and expert.blocks == "modern":
        normed = FLOAT32 + width + (FLOAT32 if width < FLOAT32 else 0)
        block += normed * (2 + reads_text) * values
        text += (normed + width) * text_values * reads_text
    rest = (2 * FLOAT32 + width) * values
    if expert is not None and expert.text_adapter:
        rest += round(kept * text_values)
    if recompute:
        return model.num_layers * (FLOAT32 * values + text) + block + rest
    return model.num_layers * (block + text) + rest


def text_tower_parameters(width: int) -> int:
    """Return the size of a CLIP text tower, which for ViT-L, of width 768, is 123,060,480.

    A tower of a width that no published one has is taken to be as deep as ViT-L's.
    """
    layers = TEXT_LAYERS.get(width, TEXT_LAYERS[768])
    embeddings = (CLIP_VOCABULARY + CLIP_TEXT_LENGTH) * width
    return embeddings + layers * (12 * width**2 + 13 * width) + 2 * width
