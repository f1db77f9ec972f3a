"""Adapters (LoRA) that single experts of a bundle can be asked to draw with."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from paris_ray.artifacts import MANIFEST, VerifiedFolder, file_sha256, read_manifest
from paris_ray.config import ExpertConfig
from paris_ray.config.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from paris_ray.errors import BundleError, ReceiptError, naming
from paris_ray.folders import Folder
from paris_ray.model_folder.links import check_links
from paris_ray.models import Expert
from paris_ray.models.lora import Adapter, attach, merge
from paris_ray.models.peft_layout import EXPERT_DIGEST, LORA, load_adapter
from paris_ray.receipts import ADAPTER_ID, RECEIPT, Receipt


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
        """Return the expert with the adapter; what is not adapted is shared with it."""
        adapter = self.beside(expert)
        return merge(expert, adapter) if self.merged else attach(expert, adapter)

    def beside(self, expert: Expert) -> Adapter:
        """Return the adapter on the expert's device: a copy, which goes when its view goes."""
        return copy.deepcopy(self.adapter).to(expert.pos_embed.device)


def read_lora(
    path: str,
    experts: tuple[ExpertConfig, ...],
    expert_digest: Callable[[int], str],
    *,
    expert: int | None,
    merged: bool,
    receipt_key: str | None,
) -> LoRA:
    """Return the adapter in a folder, checked against the architecture of its expert.

    Args:
        path: Path or URI of what `jobs.train_lora` made, or of any folder in PEFT's layout.
        experts: The architectures of the bundle's experts.
        expert_digest: The SHA-256 of an expert's weights, by its number.
        expert: Which of them it is for; None: the one whose weights its receipt or manifest names.
        merged: See `LoRA`.
        receipt_key: Whose receipts are believed, for an adapter that was bought; else None.

    Raises:
        BundleError: if no expert is given or known, the adapter does not fit that expert, or a
            link leaves the folder.
        ArtifactError: if a file is missing, damaged, or not the published one.
        ReceiptError: if the adapter was bought, and its receipt does not allow these weights with
            this expert; or if a key is given, and there is no receipt.
    """
    folder, digests = Folder(path), None
    if folder.is_local:
        check_links(folder)
    receipt = _read_receipt(folder, receipt_key)
    facts: Mapping[str, Any] = {}
    if folder.exists(MANIFEST):
        manifest = read_manifest(folder, LORA)
        digests, facts = manifest.files, manifest.facts
    if expert is None:
        expert = _trained_on(folder, receipt, facts, len(experts), expert_digest)
    if type(expert) is not int or not 0 <= expert < len(experts):
        raise BundleError(
            f"{folder.uri}: expert={expert!r} is not allowed: the number of the expert that it was "
            f"trained for, 0 to {len(experts) - 1}"
        )
    if receipt is not None:
        with naming(f"{folder.uri}/{RECEIPT}", ReceiptError):
            receipt.require_base(expert_digest(expert), f"expert {expert} here")
    with torch.device("meta"):
        model = Expert(experts[expert])
    adapter = load_adapter(VerifiedFolder(folder, digests), model)
    return LoRA(expert, adapter.requires_grad_(False), merged)


def _trained_on(
    folder: Folder,
    receipt: Receipt | None,
    facts: Mapping[str, Any],
    count: int,
    expert_digest: Callable[[int], str],
) -> Any:
    """Return the number of the expert that an adapter was trained on.

    Numbers change when another expert leaves a bundle, the digest of its weights does not. It is
    looked for where it was at first: digests that nobody published take reading the file.

    Args:
        folder: The adapter's.
        receipt: Of an adapter that was bought; else None.
        facts: Of its manifest: before digests were noted, the number alone.
        count: Number of experts of the bundle.
        expert_digest: The SHA-256 of an expert's weights, by its number.

    Raises:
        BundleError: if the bundle does not have the expert that the manifest names.
    """
    told, weights = facts.get("expert"), facts.get(EXPERT_DIGEST)
    if receipt is not None:
        told, weights = receipt.base.expert, receipt.base.digest
    if weights is None:
        return told
    for number in sorted(range(count), key=lambda number: number != told):
        if expert_digest(number) == weights:
            return number
    if receipt is not None:
        return told  # whose weights the receipt does not allow
    raise BundleError(
        f"{folder.uri}: expert {told}, with the weights {weights!r:.80}, which it was trained on, "
        "is not in this bundle: name as `expert` the one that is to draw with it all the same"
    )


def _read_receipt(folder: Folder, receipt_key: str | None) -> Receipt | None:
    """Return the receipt of an adapter that was bought, for these very weights; else None."""
    adapter_id = _read_adapter_id(folder)
    if not folder.exists(RECEIPT):
        if adapter_id is None and receipt_key is None:
            return None
        given = (
            f"receipt_key={receipt_key}" if adapter_id is None else f"{ADAPTER_ID}={adapter_id:.80}"
        )
        raise ReceiptError(
            f"{folder.uri}/{RECEIPT} does not exist, but {given} means an adapter that was bought "
            "through ZKLoRA, which is used with its receipt alone: fetch it with jobs.verify_lora"
        )
    receipt = Receipt.read(folder, receipt_key)
    digests = [file_sha256(folder, name) for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)]
    with naming(f"{folder.uri}/{RECEIPT}", ReceiptError):
        receipt.require_opened()
        receipt.require_files(adapter_id, *digests)
    return receipt


def _read_adapter_id(folder: Folder) -> str | None:
    """Return the mark on the weights of an adapter that was bought; None on all others."""
    if not folder.exists(ADAPTER_WEIGHTS):
        return None  # `load_adapter` says what is there instead
    try:
        with folder.reading(ADAPTER_WEIGHTS) as path, safe_open(path, framework="pt") as weights:
            return (weights.metadata() or {}).get(ADAPTER_ID)
    except SafetensorError as error:
        raise BundleError(f"{folder.uri}/{ADAPTER_WEIGHTS} is damaged: {error}") from None
