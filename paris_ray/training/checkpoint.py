"""Training checkpoints: one safetensors file whose header says how far training is.

A single file is complete or absent, so a killed run never resumes from half a checkpoint. Nothing
is pickled, and no generator state is needed: generators derive from the step (`paris_ray.seeding`).
"""

import logging
import zlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from paris_ray.artifacts import CHECKPOINT, canonical_json, sha256_hex
from paris_ray.errors import ArtifactError
from paris_ray.folders import Folder, fault_of
from paris_ray.training.ema import ExponentialMovingAverage

logger = logging.getLogger("paris_ray")

HEADS = "heads/"  # before names of what is trained beside the model
_CHECKSUM = "crc32"  # in the header
_UNCHECKED = {"identity", "samples_seen"}  # the header of checkpoints that have none


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Everything that changes while training.

    Attributes:
        model: What is trained, which may be a part of what is run: of an expert with an adapter,
            the adapter.
        ema: Its average.
        optimizers: Of all parameters, each in one of them.
        heads: What is trained beside the model, without an average.
    """

    model: nn.Module
    ema: ExponentialMovingAverage
    optimizers: Sequence[Optimizer]
    heads: nn.Module = field(default_factory=nn.Module)

    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters, the model's first."""
        return [*self.model.parameters(), *self.heads.parameters()]

    def named_moments(self) -> Iterator[tuple[str, Tensor, MutableMapping[Tensor, Any]]]:
        """Yield every optimised parameter with its name and where its optimizer keeps moments."""
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        names |= {p: f"{HEADS}{name}" for name, p in self.heads.named_parameters()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield names[parameter], parameter, optimizer.state


def _optimizer_tensors(state: TrainingState) -> dict[str, Tensor]:
    """Name the optimizers' moments after the parameters they belong to."""
    return {
        f"optimizer/{name}/{moment}": value
        for name, parameter, moments in state.named_moments()
        for moment, value in moments[parameter].items()
    }


def save(folder: Folder, state: TrainingState, *, identity: str, samples_seen: int) -> None:
    """Write the checkpoint, replacing the one before.

    Args:
        folder: The artefact's folder.
        state: What to save.
        identity: Digest of everything that decides the result; checked on resume.
        samples_seen: How far training is.
    """
    tensors = {f"model/{name}": value for name, value in state.model.state_dict().items()}
    tensors |= {f"ema/{name}": value for name, value in state.ema.state.items()}
    tensors |= {f"{HEADS}{name}": value for name, value in state.heads.state_dict().items()}
    tensors |= _optimizer_tensors(state)
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # Nothing that grows: a header of more than 100 MB is refused.
    header = {"identity": identity, "samples_seen": str(samples_seen)}
    header[_CHECKSUM] = _checksum(header, contiguous)
    with folder.writing(CHECKPOINT) as path:
        safetensors.torch.save_file(contiguous, path, metadata=header)


def restore(folder: Folder, state: TrainingState, *, identity: str) -> int | None:
    """Load the newest checkpoint into `state`; return its samples seen, or None if there is none.

    Raises:
        ArtifactError: if the checkpoint is damaged or belongs to another configuration.
    """
    if not folder.exists(CHECKPOINT):
        return None
    header, tensors = _read(folder)
    _verify(header, tensors, f"{folder.uri}/{CHECKPOINT}")
    if header.get("identity") != identity:
        raise ArtifactError(
            f"{folder.uri}/{CHECKPOINT} belongs to another configuration, shard or precision "
            "(of precision=auto the device decides: set the one that it was begun with, float32 "
            "or bfloat16); else choose another folder or delete that one"
        )
    state.model.load_state_dict(_under("model/", tensors))
    state.ema.load(_under("ema/", tensors))
    state.heads.load_state_dict(_under(HEADS, tensors))
    for name, parameter, moments in state.named_moments():
        saved = _under(f"optimizer/{name}/", tensors)
        if saved:
            # A copy, since these are mapped; "step" too: a fused optimizer reads it there.
            moments[parameter] = {
                moment: value.to(parameter.device, copy=True) for moment, value in saved.items()
            }
    return int(header["samples_seen"])


def _read(folder: Folder) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the header and the tensors, mapped, of a checkpoint."""
    try:
        with folder.reading(CHECKPOINT) as path, safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except ArtifactError:  # it could not be had, which is no damage
        raise
    except (SafetensorError, ValueError, OSError, KeyError) as error:
        raise ArtifactError(f"{folder.uri}/{CHECKPOINT} {fault_of(error)}: {error}") from None


def _verify(header: Mapping[str, str], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise ArtifactError unless a checkpoint has its checksum; earlier code wrote none."""
    if header.keys() == _UNCHECKED:  # and not a name that is damaged
        logger.warning("%s has no checksum: damage of it cannot be seen", where)
        return
    described = {name: value for name, value in header.items() if name != _CHECKSUM}
    if header.get(_CHECKSUM) != _checksum(described, tensors):
        raise ArtifactError(
            f"{where} is damaged: it does not have its checksum; delete it to begin anew"
        )


def _checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 of a header, and of the names, types, shapes and bytes of all tensors."""
    described = {name: (str(value.dtype), *value.shape) for name, value in tensors.items()}
    checksum = zlib.crc32(canonical_json([dict(header), described]))
    for name in sorted(tensors):
        content = tensors[name].reshape(-1).view(torch.uint8).numpy()
        checksum = zlib.crc32(content.data, checksum)
    return str(checksum)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def identity_digest(**parts: Any) -> str:
    """Return the digest that ties a checkpoint to configuration, shard and seed."""
    return sha256_hex(canonical_json(parts))
