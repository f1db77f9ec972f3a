"""What training an expert and training the router share: where to start, and what is written."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from paris_ray.config import Precision, TrainingConfig, identity, unlike_fields
from paris_ray.config.release import read_document, write_document
from paris_ray.devices import resolve_device, resolve_precision
from paris_ray.encoders.pretrained import read_weights
from paris_ray.errors import BundleError, ConfigError
from paris_ray.folders import Folder
from paris_ray.models import Expert, Router
from paris_ray.models.flops import training_flops_per_image
from paris_ray.models.stored import check_dtype
from paris_ray.run import EXPERT_WEIGHTS, MODEL_CONFIG, ROUTER_WEIGHTS
from paris_ray.training.checkpoint import identity_digest
from paris_ray.training.loop import Draw, Loss, OnProgress, TrainingLoop

Model = TypeVar("Model", Expert, Router)
DrawSamples = Callable[[Model, int], None]

WEIGHTS: Mapping[type, str] = {Expert: EXPERT_WEIGHTS, Router: ROUTER_WEIGHTS}


def train_model(
    model: Model,
    draw: Draw,
    loss: Loss,
    config: TrainingConfig,
    *,
    inputs: Mapping[str, Any],
    text_length: int,
    output: Folder,
    on_progress: OnProgress,
    draw_samples: DrawSamples[Model] | None = None,
    validate: Callable[[Model], Mapping[str, float]] | None = None,
    heads: nn.Module | None = None,
) -> Model:
    """Train a model, write its averaged weights in the released layout, and return that average.

    Args:
        model: The model with its first weights; it is trained in place.
        draw: Returns the batch of a step.
        loss: Returns the loss of a batch, by way of the model.
        config: Hyper-parameters, `epochs` resolved.
        inputs: What else decides the result: digests of the data, the seed.
        text_length: Text tokens a caption, which the MFU depends on.
        output: The model's own folder; training continues from a checkpoint in it.
        on_progress: Called with the progress from time to time.
        draw_samples: Called every `config.sample_every` steps but the last, with the average so far
            in evaluation mode, which is good only during the call, and the number of steps done.
        validate: Returns measures of such an average for the metrics, every
            `config.validate_every` steps and at the end.
        heads: What the loss trains beside the model: no part of it, nor of what is written but the
            checkpoint.

    Raises:
        TrainingError: if the loss or the state stops being finite.
        ConfigError: if `config.init_from` holds a model of another architecture.
        BundleError: if its weights are damaged or do not fit.
        ArtifactError: if it has none.
    """
    torch.set_num_threads(config.threads)
    started_from = None if config.init_from is None else _start_from(config.init_from, model)
    device = resolve_device(config.device)
    set_block_options(model.to(device), config)
    averaged = partial(_with_weights, model, device)
    loop = TrainingLoop(
        model,
        draw,
        loss,
        config,
        output,
        identity=_identity(model, config, inputs, started_from),
        on_progress=on_progress,
        flops_per_image=training_flops_per_image(model.config, text_length),
        on_average=draw_samples and (lambda state, done: draw_samples(averaged(state), done)),
        measure=validate and (lambda state: validate(averaged(state))),
        heads=None if heads is None else heads.to(device),
    )
    average = loop.run()
    _write(model, average, output)
    return averaged(average)


def _identity(
    model: Expert | Router, config: TrainingConfig, inputs: Mapping[str, Any], init: str | None
) -> str:
    """Return the digest of all that decides the result."""
    training = training_identity(config)
    return identity_digest(model=identity(model.config), training=training, init=init, **inputs)


def _write(model: Expert | Router, state: Mapping[str, Tensor], output: Folder) -> None:
    """Write a model like this one with other weights."""
    weights = {name: value.cpu().contiguous() for name, value in state.items()}
    output.write_json(MODEL_CONFIG, write_document(model.config))
    with output.writing(WEIGHTS[type(model)]) as path:
        safetensors.torch.save_file(weights, path)


def training_identity(config: TrainingConfig) -> dict[str, Any]:
    """Return what of a training decides its result; of `precision: auto`, what it means here.

    Else a retry on another kind of GPU would go on in another precision.
    """
    dtype = resolve_precision(config.precision, resolve_device(config.device))
    precision: Precision = "bfloat16" if dtype == torch.bfloat16 else "float32"
    return identity(replace(config, precision=precision))


def set_block_options(model: Expert | Router, config: TrainingConfig) -> None:
    """Set how the blocks are run: a second time in the backward pass, each compiled by itself."""
    model.gradient_checkpointing = config.gradient_checkpointing
    if config.compile:
        for block in model.layers:
            block.compile()


def _with_weights(model: Model, device: torch.device, state: Mapping[str, Tensor]) -> Model:
    """Return a model like this one around other weights, which it shares if they are there."""
    with torch.device("meta"):
        other = type(model)(model.config)
    other.load_state_dict({name: v.to(device) for name, v in state.items()}, assign=True)
    return other.eval().requires_grad_(False)


def _start_from(location: str, model: Model) -> str:
    """Give a model the weights in a folder of the released layout; return their digest."""
    folder, name = Folder(location), WEIGHTS[type(model)]
    theirs = read_document(
        type(model.config),
        folder.read_json(MODEL_CONFIG),
        f"{folder.uri}/{MODEL_CONFIG}",
        defaults={"input_size": model.config.input_size},
    )
    for field, (wanted, found) in unlike_fields(model.config, theirs).items():
        raise ConfigError(
            f"init_from={location!r} is not allowed: its {field} is {found!r}, "
            f"of the model to train {wanted!r}"
        )
    with folder.reading(name) as path:
        state = read_weights(path)
        _check_fits(state, model, f"{folder.uri}/{name}")
        model.load_state_dict(state)  # copied into float32, one tensor after the other
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _check_fits(state: Mapping[str, Tensor], model: Expert | Router, where: str) -> None:
    """Compare names, shapes and types; `load_state_dict` alone takes some names in two spellings.

    Raises:
        BundleError: naming the tensor that does not fit.
    """
    found = {name: tuple(value.shape) for name, value in state.items()}
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise BundleError(
                f"{where} does not fit: tensor {name!r} has shape {found.get(name, 'none')}, "
                f"of the model to train {wanted.get(name, 'none')}"
            )
    for name, value in state.items():
        check_dtype(f"{where}: tensor {name!r}", value)
