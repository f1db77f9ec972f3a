"""Adapters (LoRA) that single experts of a bundle can be asked to draw with."""

import copy
from dataclasses import dataclass

import torch

from paris_ray.artifacts import MANIFEST, Folder, VerifiedFolder, read_manifest
from paris_ray.bundle.links import check_links
from paris_ray.config import ExpertConfig
from paris_ray.errors import BundleError
from paris_ray.models import Expert
from paris_ray.models.lora import Adapter, attach, merge
from paris_ray.models.peft_layout import LORA, load_adapter


@dataclass(frozen=True, slots=True)
class LoRA:
    """An adapter in memory, and what it is for.

    Attributes:
        expert: Number of its expert.
        adapter: The low-rank updates, frozen.
        merged: Whether weights are computed once, which takes a copy of those that it targets and
            makes each step as fast as without.
    """

    expert: int
    adapter: Adapter
    merged: bool

    @torch.inference_mode(False)  # see `Bundle`: a view may be trained on later
    def adapt(self, expert: Expert) -> Expert:
        """Return the expert with the adapter; what is not adapted is shared with it.

        The adapter on the expert's device is a copy, which goes when the view goes.
        """
        adapter = copy.deepcopy(self.adapter).to(expert.pos_embed.device)
        return merge(expert, adapter) if self.merged else attach(expert, adapter)


def read_lora(
    path: str, experts: tuple[ExpertConfig, ...], *, expert: int | None, merged: bool
) -> LoRA:
    """Return the adapter in a folder, checked against the architecture of its expert.

    Args:
        path: Path or URI of what `jobs.train_lora` made, or of any folder in PEFT's layout.
        experts: The architectures of the bundle's experts.
        expert: Which of them it is for; None: the one that its manifest names.
        merged: See `LoRA`.

    Raises:
        BundleError: if no expert is given or known, the adapter does not fit that expert, or a
            link leaves the folder.
        ArtifactError: if a file is missing, damaged, or not the published one.
    """
    folder, digests = Folder(path), None
    if folder.is_local:
        check_links(folder)
    if folder.exists(MANIFEST):
        manifest = read_manifest(folder, LORA)
        digests = manifest.files
        expert = manifest.facts.get("expert") if expert is None else expert
    if type(expert) is not int or not 0 <= expert < len(experts):
        raise BundleError(
            f"{folder.uri}: expert={expert!r} is not allowed: the number of the expert that it was "
            f"trained for, 0 to {len(experts) - 1}"
        )
    with torch.device("meta"):
        model = Expert(experts[expert])
    adapter = load_adapter(VerifiedFolder(folder, digests), model)
    return LoRA(expert, adapter.requires_grad_(False), merged)
