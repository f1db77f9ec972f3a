"""From a class-conditional DiT to an expert: read a checkpoint, map it, say what changed.

DiT modulates block `l` by `Linear_l(SiLU(e(t) + y))`, with its time embedding `e` and the embedding
`y` of the class (AdaLN-Zero); an expert has one shared Linear and a table a block (AdaLN-Single).
How Paris converts is not known; what is done here makes every block DiT's own at one timestep:

* One `y` stands for all classes. It is added to the last bias of the time embedding, which so
  becomes `e(t) + y` at every time.
* The shared Linear is the mean of all `Linear_l`. The table of block `l` is what that lacks to
  DiT's modulation at `REFERENCE_TIMESTEP`; at other times the blocks are approximate.
* Cross-attention is new and silent. The final layer is new: DiT's predicts noise and its variance.

Timesteps are fed unchanged: 0 is data and 1000 noise for both (DiT's last one is 999). Equal times
are not equal noise, as DiT was trained on a linear-beta schedule and not on the straight path: that
is left to training. SiT's tensors have the same names, but its time runs the other way.

Source: DiT (arXiv 2212.09748); AdaLN-Single is PixArt-alpha's (arXiv 2310.00426).
"""

import argparse
import math
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from paris_ray.config import ExpertConfig, check_model
from paris_ray.errors import BundleError, ConfigError
from paris_ray.models.expert import Expert
from paris_ray.models.layers import FREQUENCY_DIM, sinusoid
from paris_ray.models.stored import check_stored
from paris_ray.seeding import derive_seed

ClassEmbedding = Literal["null", "mean"]
Treatment = Literal["kept", "mapped", "re-initialised"]

REFERENCE_TIMESTEP = 500.0  # on the 0..1000 scale
IMAGENET_CLASSES = 1000
CLIP_WIDTH = 768  # of the text encoder that Paris uses
# Shapes do not tell the number of heads: DiT-S, B and L have 64 channels each, DiT-XL has 72.
HEADS_OF_HIDDEN_SIZE = {384: 6, 768: 12, 1024: 16, 1152: 16}

# What DiT's trainer saves, the better weights first; and parts of names that are not DiT's: of
# DistributedDataParallel and torch.compile.
CHECKPOINT_KEYS = {"ema": "the averaged ones (ema)", "model": "the plain ones (model)"}
READ_LAYOUTS = f"read are a state dict, or one under the key {' or '.join(CHECKPOINT_KEYS)}"
WRAPPERS = ("module", "_orig_mod")

CLASS_TABLE = "y_embedder.embedding_table.weight"
ADALN = "blocks.*.adaLN_modulation.1"
TIME_BIAS = "time_embed.mlp.2.bias"
# Tensors of an expert and their names in a DiT; * stands for the number of the block.
DIT_NAMES = {
    "pos_embed": "pos_embed",
    "patch_embed.weight": "x_embedder.proj.weight",
    "patch_embed.bias": "x_embedder.proj.bias",
    "time_embed.mlp.0.weight": "t_embedder.mlp.0.weight",
    "time_embed.mlp.0.bias": "t_embedder.mlp.0.bias",
    "time_embed.mlp.2.weight": "t_embedder.mlp.2.weight",
    TIME_BIAS: "t_embedder.mlp.2.bias",
    "layers.*.attn.in_proj_weight": "blocks.*.attn.qkv.weight",
    "layers.*.attn.in_proj_bias": "blocks.*.attn.qkv.bias",
    "layers.*.attn.out_proj.weight": "blocks.*.attn.proj.weight",
    "layers.*.attn.out_proj.bias": "blocks.*.attn.proj.bias",
    "layers.*.mlp.0.weight": "blocks.*.mlp.fc1.weight",
    "layers.*.mlp.0.bias": "blocks.*.mlp.fc1.bias",
    "layers.*.mlp.2.weight": "blocks.*.mlp.fc2.weight",
    "layers.*.mlp.2.bias": "blocks.*.mlp.fc2.bias",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorGroup:
    """What became of one tensor of the expert, or of the same one in all its blocks.

    Attributes:
        treatment: Copied from DiT, computed from DiT, or as in a new expert.
        name: Name in the expert's state dict, with * for the number of the block.
        shape: Shape of each.
        count: How many there are.
        source: Where the values come from.
    """

    treatment: Treatment
    name: str
    shape: tuple[int, ...]
    count: int
    source: str

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors of the group."""
        return self.count * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class DiTCheckpoint:
    """The weights of a DiT that a file held.

    Attributes:
        state: State dict, under DiT's own names.
        source: Which of the file's weights they are.
    """

    state: dict[str, Tensor]
    source: str


@dataclass(frozen=True, slots=True)
class Conversion:
    """An expert made from a DiT, and what became of each of its tensors."""

    expert: Expert
    groups: tuple[TensorGroup, ...]


def read_dit(path: Path) -> DiTCheckpoint:
    """Return the weights of a facebookresearch/DiT checkpoint; nothing in the file is run.

    Args:
        path: A `.safetensors` or `.pt` file with a state dict, or with what DiT's trainer saves:
            of that the averaged weights (`ema`) are taken or, where there are none, `model`. What
            DistributedDataParallel and `torch.compile` put into names is left out. Memory is
            mapped where the format allows it.

    Raises:
        ConfigError: if there is no such file, or its name ends otherwise.
        BundleError: if it is damaged, holds more than weights, or claims more than its size.
    """
    if path.suffix not in (".safetensors", ".pt"):
        raise ConfigError(f"checkpoint={str(path)!r} is not allowed: a .safetensors or .pt file")
    if not path.is_file():
        raise ConfigError(f"checkpoint={str(path)!r} is not a file")
    state, source = _chosen(_load(path))
    if not isinstance(state, dict) or not state:
        raise BundleError(f"{path} holds no state dict ({source}): {READ_LAYOUTS}")
    for name, value in state.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise BundleError(
                f"{path}: entry {name!r} is not a dense floating-point tensor: {READ_LAYOUTS}"
            )
    # A tensor of stride 0 takes no room in the file, and terabytes once it is copied.
    claimed, size = sum(value.nbytes for value in state.values()), path.stat().st_size
    if claimed > size:
        raise BundleError(f"{path}: its tensors claim {claimed} bytes, but the file has {size}")
    return DiTCheckpoint(_unwrapped(path, state), source)


def _chosen(document: Any) -> tuple[Any, str]:
    """Return which part of a file is taken, and what it is called."""
    if isinstance(document, dict):
        for key, source in CHECKPOINT_KEYS.items():
            if document.get(key) is not None:
                return document[key], source
    return document, "the whole file"


def _unwrapped(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names that they have in a model that nothing is wrapped around."""
    names = {n: ".".join(part for part in n.split(".") if part not in WRAPPERS) for n in state}
    if len(set(names.values())) < len(names):
        raise BundleError(f"{path} has a tensor twice, with and without {' or '.join(WRAPPERS)}")
    return {names[name]: value for name, value in state.items()}


def _load(path: Path) -> Any:
    """Return what a file holds: tensors and plain containers, beside them DiT's `args`."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            is_zip = zipfile.is_zipfile(path)  # what torch wrote before 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        # torch's own message is left out: it advises to switch the protection off.
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"calls for {refused[1]}" if refused else "is damaged or no checkpoint of torch"
        allowed = "only tensors, plain containers and argparse.Namespace are read"
        raise BundleError(f"{path} {what}: {allowed}") from None
    except Exception as error:  # a hostile file can make the readers fail in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BundleError(f"{path} is damaged: {reason}") from None


def _is_plain(value: object) -> TypeGuard[Tensor]:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return value.device.type == "cpu" and value.is_floating_point()


def convert_dit(
    state: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    num_classes: int = IMAGENET_CLASSES,
    class_embedding: ClassEmbedding = "null",
    text_embed_dim: int = CLIP_WIDTH,
    seed: int = 0,
) -> Conversion:
    """Return the expert that a DiT becomes, in float32.

    Args:
        state: DiT's state dict. Size, depth, patches and grid follow from its shapes.
        num_heads: Attention heads; None: those of the published DiT of that width.
        num_classes: Classes that DiT was trained on, without the null class.
        class_embedding: What stands for the class: `null` is what DiT learned for dropped labels,
            `mean` is over all classes, which DiT never saw.
        text_embed_dim: Width of the text embeddings that the expert will read.
        seed: Decides the new tensors, which are those of a new expert of that seed.

    Raises:
        BundleError: if a tensor is missing, unknown, of a wrong shape or not finite.
        ConfigError: if a size is not allowed, or an argument does not fit the checkpoint.
    """
    config = _infer_config(state, num_heads, text_embed_dim)
    check_model("DiT", config)
    _check_tensors(state, config)
    tensors = {ours: state[theirs] for ours, theirs in _taken(config.num_layers).items()}
    tensors[TIME_BIAS] = tensors[TIME_BIAS] + _class_vector(state, num_classes, class_embedding)
    tensors |= _single_modulation(state, _time_condition(tensors), config.num_layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "initialise"))
        expert = Expert(config)
    expert.load_state_dict(expert.state_dict() | tensors)
    mapped = {
        TIME_BIAS: f"{DIT_NAMES[TIME_BIAS]} + class embedding ({class_embedding})",
        "t_block.1.weight": f"mean of {ADALN}.weight",
        "t_block.1.bias": f"mean of {ADALN}.bias",
        "layers.*.scale_shift_table": f"{ADALN} - mean, at timestep {REFERENCE_TIMESTEP:g}",
    }
    return Conversion(expert, _groups(expert, mapped, new=f"new, seed {seed}"))


def _infer_config(
    state: Mapping[str, Tensor], num_heads: int | None, text_embed_dim: int
) -> ExpertConfig:
    """Return the architecture that the shapes mean."""
    hidden_size, in_channels, patch_size, _ = _shape(state, "x_embedder.proj.weight", 4)
    num_patches = _shape(state, "pos_embed", 3)[1]
    grid = math.isqrt(num_patches)
    if grid**2 != num_patches:
        raise BundleError(f"DiT tensor 'pos_embed' has {num_patches} rows, allowed: a square")
    if num_heads is None and hidden_size not in HEADS_OF_HIDDEN_SIZE:
        published = ", ".join(map(str, HEADS_OF_HIDDEN_SIZE))
        raise ConfigError(
            f"num_heads must be given: hidden_size={hidden_size} is none of a published DiT "
            f"({published}), and shapes do not tell"
        )
    return ExpertConfig(
        input_size=grid * patch_size,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        num_layers=sum(bool(re.fullmatch(r"blocks\.\d+\.attn\.qkv\.weight", n)) for n in state),
        num_heads=HEADS_OF_HIDDEN_SIZE[hidden_size] if num_heads is None else num_heads,
        mlp_ratio=_shape(state, "blocks.0.mlp.fc1.weight", 2)[0] / hidden_size,
        text_embed_dim=text_embed_dim,
    )


def _shape(state: Mapping[str, Tensor], name: str, num_axes: int) -> tuple[int, ...]:
    if name not in state:
        raise BundleError(f"this is not the state dict of a DiT: tensor {name!r} is missing")
    shape = tuple(state[name].shape)
    if len(shape) != num_axes or 0 in shape:
        raise BundleError(f"DiT tensor {name!r} has shape {shape}, allowed: {num_axes} axes")
    return shape


def _check_tensors(state: Mapping[str, Tensor], config: ExpertConfig) -> None:
    """Check all names and shapes before any value is read."""
    expected = _dit_shapes(
        config,
        num_embeddings=_shape(state, CLASS_TABLE, 2)[0],
        num_outputs=_shape(state, "final_layer.linear.weight", 2)[0],
    )
    found = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise BundleError(
                f"DiT tensor {name!r} has shape {found.get(name, 'missing')}, "
                f"the other tensors mean {expected.get(name, 'none')}"
            )
    for name, value in state.items():
        check_stored(f"DiT tensor {name!r}", value)


def _dit_shapes(
    config: ExpertConfig, *, num_embeddings: int, num_outputs: int
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a DiT of the expert's architecture."""
    with torch.device("meta"):
        ours = Expert(config).state_dict()
    shapes = {theirs: tuple(ours[n].shape) for n, theirs in _taken(config.num_layers).items()}
    d = config.hidden_size
    for block in range(config.num_layers):
        adaln = ADALN.replace("*", str(block))
        shapes |= {f"{adaln}.weight": (6 * d, d), f"{adaln}.bias": (6 * d,)}
    return shapes | {
        CLASS_TABLE: (num_embeddings, d),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
        "final_layer.linear.weight": (num_outputs, d),
        "final_layer.linear.bias": (num_outputs,),
    }


def _taken(num_layers: int) -> dict[str, str]:
    """Return `DIT_NAMES` with the numbers of the blocks in place of *."""
    return {
        ours.replace("*", str(block)): theirs.replace("*", str(block))
        for ours, theirs in DIT_NAMES.items()
        for block in range(num_layers if "*" in ours else 1)
    }


def _class_vector(state: Mapping[str, Tensor], num_classes: int, choice: ClassEmbedding) -> Tensor:
    """Return the `(d,)` embedding that stands for every class."""
    table = state[CLASS_TABLE].double()
    has_null = len(table) == num_classes + 1
    if num_classes < 1 or not (has_null or len(table) == num_classes):
        raise ConfigError(
            f"num_classes={num_classes} does not fit DiT tensor {CLASS_TABLE!r} of {len(table)} "
            f"rows, allowed: {len(table) - 1} and a null class, or {len(table)} without one"
        )
    if choice == "mean":
        return table[:num_classes].mean(dim=0)
    if not has_null:
        raise ConfigError(
            f"class_embedding='null', but DiT tensor {CLASS_TABLE!r} has a row for each of "
            f"num_classes={num_classes} and none for the null class; allowed: 'mean'"
        )
    return table[-1]


def _time_condition(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return `(d,)`: SiLU of the expert's time embedding at the reference, in float64."""
    hidden = sinusoid(torch.tensor(REFERENCE_TIMESTEP), FREQUENCY_DIM).double()
    for i in (0, 2):
        weight, bias = (tensors[f"time_embed.mlp.{i}.{part}"] for part in ("weight", "bias"))
        hidden = silu(linear(hidden, weight.double(), bias.double()))
    return hidden


def _single_modulation(
    state: Mapping[str, Tensor], condition: Tensor, num_layers: int
) -> dict[str, Tensor]:
    """Return the shared Linear, and the tables that make it DiT's at the reference timestep."""

    def adaln(block: int, part: str) -> Tensor:
        return state[f"{ADALN}.{part}".replace("*", str(block))].double()

    blocks = range(num_layers)
    weight, bias = (
        sum((adaln(block, part) for block in blocks), torch.tensor(0.0)) / num_layers
        for part in ("weight", "bias")
    )
    tensors = {"t_block.1.weight": weight, "t_block.1.bias": bias}
    for block in blocks:
        missing = linear(condition, adaln(block, "weight") - weight, adaln(block, "bias") - bias)
        tensors[f"layers.{block}.scale_shift_table"] = missing.view(6, -1)
    return tensors


def _groups(expert: Expert, mapped: Mapping[str, str], *, new: str) -> tuple[TensorGroup, ...]:
    """Return what became of the expert's tensors, the kept ones first."""
    counts: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, value in expert.state_dict().items():
        pattern = re.sub(r"^layers\.\d+", "layers.*", name)
        counts[pattern] += 1
        shapes[pattern] = tuple(value.shape)
    sources: dict[Treatment, Mapping[str, str]] = {
        "kept": {name: source for name, source in DIT_NAMES.items() if name not in mapped},
        "mapped": mapped,
        "re-initialised": dict.fromkeys(shapes.keys() - DIT_NAMES.keys() - mapped.keys(), new),
    }
    return tuple(
        TensorGroup(
            treatment=treatment, name=name, shape=shapes[name], count=counts[name], source=source
        )
        for treatment, part in sources.items()
        for name, source in sorted(part.items())
    )
