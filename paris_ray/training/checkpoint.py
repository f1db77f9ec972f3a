"""Training checkpoints: one safetensors file whose header says how far training is.

A single file is complete or absent, so a killed run never resumes from half a checkpoint. Nothing
is pickled, and no generator state is needed: generators derive from the step (`paris_ray.seeding`).
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from paris_ray.artifacts import CHECKPOINT, Folder, canonical_json, sha256_hex
from paris_ray.errors import ArtifactError
from paris_ray.training.ema import ExponentialMovingAverage


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Everything that changes while training.

    `model` holds what is trained, which may be a part of what is run: of an expert with an adapter,
    the adapter.
    """

    model: nn.Module
    ema: ExponentialMovingAverage
    optimizer: Optimizer


def _optimizer_tensors(state: TrainingState) -> dict[str, Tensor]:
    """Name the optimizer's moments after the parameters they belong to."""
    return {
        f"optimizer/{name}/{moment}": value
        for name, parameter in state.model.named_parameters()
        for moment, value in state.optimizer.state[parameter].items()
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
    tensors |= _optimizer_tensors(state)
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # Nothing that grows: a header of more than 100 MB is refused.
    header = {
        "identity": identity,
        "samples_seen": str(samples_seen),
        "crc32": str(_checksum(contiguous)),
    }
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
    if header.get("crc32") != str(_checksum(tensors)):
        raise ArtifactError(
            f"{folder.uri}/{CHECKPOINT} is damaged: its tensors do not have their checksum; delete "
            "it to begin anew"
        )
    if header.get("identity") != identity:
        raise ArtifactError(
            f"{folder.uri}/{CHECKPOINT} belongs to another configuration, shard or precision "
            "(of precision=auto the device decides: set the one that it was begun with, float32 "
            "or bfloat16); else choose another folder or delete that one"
        )
    state.model.load_state_dict(_under("model/", tensors))
    state.ema.load(_under("ema/", tensors))
    for name, parameter in state.model.named_parameters():
        moments = _under(f"optimizer/{name}/", tensors)
        if moments:
            state.optimizer.state[parameter] = {
                # A copy, since these are mapped; "step" too: a fused optimizer reads it there.
                moment: value.to(parameter.device, copy=True)
                for moment, value in moments.items()
            }
    return int(header["samples_seen"])


def _read(folder: Folder) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the header and the tensors, mapped, of a checkpoint."""
    try:
        with folder.reading(CHECKPOINT) as path, safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError, KeyError) as error:
        raise ArtifactError(f"{folder.uri}/{CHECKPOINT} is damaged: {error}") from None


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of the bytes of all tensors, by their names."""
    checksum = 0
    for name in sorted(tensors):
        content = tensors[name].reshape(-1).view(torch.uint8).numpy()
        checksum = zlib.crc32(content.data, checksum)
    return checksum


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def identity_digest(**parts: Any) -> str:
    """Return the digest that ties a checkpoint to configuration, shard and seed."""
    return sha256_hex(canonical_json(parts))
