"""From a PEFT folder to integers, and from integers that were bought to a PEFT folder.

No base model is needed: the names of modules are those of the tensors. Linear layers and the
transposed ones of GPT-2 (`Conv1D`) look alike here, since PEFT stores the factors of both as
`lora_A (r, in)` and `lora_B (out, r)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from paris_ray.artifacts import VerifiedFolder, find_finished, publish
from paris_ray.config import LoRAConfig
from paris_ray.config.lora import ADAPTER_WEIGHTS, require
from paris_ray.errors import ArtifactError, BundleError, VerificationError, naming
from paris_ray.folders import Folder
from paris_ray.model_folder.links import check_links
from paris_ray.models.peft_layout import (
    LORA,
    PEFT_PREFIX,
    naming_document,
    read_factors,
    read_options,
    save_factors,
    stored_names,
    stored_shapes,
    to_config,
)
from paris_ray.receipts import ADAPTER_ID
from paris_ray.zklora.fixed_point import QuantisedModule, quantise
from paris_ray.zklora.manifest import MAX_EXPONENT, MIN_EXPONENT, AdapterManifest

CONV1D = "fan_in_fan_out"  # PEFT's option for GPT-2's layers; it does not change the factors
FIRST_FACTOR = stored_names("")[0].removeprefix(PEFT_PREFIX)

Float32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False, slots=True)
class PeftAdapter:
    """The LoRA in a PEFT folder.

    Attributes:
        config: Rank, scale and the modules by their full names.
        factors: A `(d_in, r)` and B `(r, d_out)` of each module, so that its update is
            `config.scale * x A B`.
    """

    config: LoRAConfig
    factors: Mapping[str, tuple[Float32, Float32]]


def read_peft(folder: Path) -> PeftAdapter:
    """Return the adapter in a PEFT folder, whoever made it.

    Its targets are Linear or GPT-2's Conv1D layers. `target_modules`, which may be a pattern, are
    not read: what has tensors is adapted.

    Raises:
        BundleError: if it holds no LoRA, one with options that change what the factors mean, or
            tensors that are missing, unknown, of another shape or dtype, or not finite. Pickled
            weights are never opened.
        ArtifactError: if a file is missing.
    """
    source = VerifiedFolder(Folder(folder), None)
    if folder.is_dir():
        check_links(source.folder)
    document = read_options(source, understood={CONV1D})
    widths = _widths(stored_shapes(source))
    if not widths:
        raise BundleError(f"{source.folder.uri}/{ADAPTER_WEIGHTS} has no tensor *{FIRST_FACTOR}")
    with naming_document(source):
        transposed = document.get(CONV1D, False)
        require(isinstance(transposed, bool), CONV1D, transposed, "true or false")
        config = to_config(document, tuple(widths))
    factors = {
        name: (a.numpy().T, b.numpy().T)
        for name, (a, b) in read_factors(source, config.r, widths).items()
    }
    return PeftAdapter(config, factors)


def _widths(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Return `d_in, d_out` of every module, as far as shapes tell: `read_factors` checks them."""
    widths = {}
    for stored, shape in shapes.items():
        name = stored.removeprefix(PEFT_PREFIX).removesuffix(FIRST_FACTOR)
        name_a, name_b = stored_names(name)
        if stored == name_a:
            # The last side of A and the first of B; 0 where there is none.
            widths[name] = sum(shape[-1:]), sum(shapes.get(name_b, ())[:1])
    return {name: widths[name] for name in sorted(widths, key=_in_numbers)}


def _in_numbers(name: str) -> list[tuple[int, str]]:
    """Sort layer 10 after layer 9."""
    return [(len(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def quantise_adapter(adapter: PeftAdapter) -> dict[str, QuantisedModule]:
    """Return the integers of every module: from here on they are the adapter.

    Raises:
        ParisError: naming a module whose dimensions or values are out of range.
    """
    modules = {}
    for name, (a, b) in adapter.factors.items():
        with naming(name):
            module = modules[name] = quantise(a, b)
            for exponent in (module.exponent_a, module.exponent_b):
                allowed = f"{MIN_EXPONENT} to {MAX_EXPONENT}, so that the factors are float32"
                require(MIN_EXPONENT <= exponent <= MAX_EXPONENT, "exponent", exponent, allowed)
    return modules


def write_peft(
    folder: Path, modules: Mapping[str, QuantisedModule], manifest: AdapterManifest
) -> None:
    """Publish integers that were bought as an artefact that PEFT and `Bundle.add_lora` read.

    Its float32 factors are the integers times powers of two, without any rounding. The folder is
    new, or what an earlier call with this manifest left.

    Raises:
        VerificationError: if the modules are not those of the manifest.
        ArtifactError: if there is something else in the folder.
    """
    _check_modules(modules, manifest)
    target, parents = Folder(folder), {"base": manifest.base.digest}
    adapter_id = manifest.adapter_id
    finished = find_finished(target, LORA, config_digest=adapter_id, parents=parents)
    if finished is None and target.exists(ADAPTER_WEIGHTS):
        raise ArtifactError(f"{target.uri} holds weights: choose another folder or delete that one")
    factors = {
        name: (_to_float32(m.a, m.exponent_a), _to_float32(m.b, m.exponent_b))
        for name, m in modules.items()
    }
    save_factors(factors, manifest.config, target, metadata={ADAPTER_ID: adapter_id})
    facts = {"expert": manifest.base.expert, "adapter": manifest.adapter, ADAPTER_ID: adapter_id}
    publish(target, LORA, config_digest=adapter_id, parents=parents, facts=facts)


def _check_modules(modules: Mapping[str, QuantisedModule], manifest: AdapterManifest) -> None:
    meant, given = (
        {name: (m.d_in, m.r, m.d_out, m.exponent_a, m.exponent_b) for name, m in side.items()}
        for side in (manifest.terms, modules)
    )
    for name in sorted(meant.keys() | given.keys()):
        if given.get(name) != meant.get(name):
            raise VerificationError(
                f"{name}: dimensions and exponents are {given.get(name, 'missing')}, "
                f"the manifest has {meant.get(name, 'no such module')}"
            )


def _to_float32(integers: NDArray[np.int16], exponent: int) -> torch.Tensor:
    """Return a factor as PEFT stores it, transposed."""
    values = np.ldexp(integers.T.astype(np.float32), -exponent)
    return torch.from_numpy(np.ascontiguousarray(values))
