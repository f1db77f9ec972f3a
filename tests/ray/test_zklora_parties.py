"""Contributor, user and escrow against each other: real parties, one Ray, one process."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import peft
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from paris_ray.artifacts import Folder
from paris_ray.bundle import Bundle, load_bundle
from paris_ray.config import LoRAConfig
from paris_ray.errors import (
    BudgetError,
    ConfigError,
    ParisError,
    ProtocolError,
    ReceiptError,
    TradeError,
    VerificationError,
)
from paris_ray.evaluation.denoising import denoising_losses
from paris_ray.models.lora import Adapter
from paris_ray.models.peft_layout import save_adapter
from paris_ray.receipts import Receipt
from paris_ray.sampling import generate
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.adapter import PeftAdapter, quantise_adapter, read_peft
from paris_ray.zklora.commitment import ModuleOpening, commit, open_commitments
from paris_ray.zklora.escrow import Escrow, State, check_opening
from paris_ray.zklora.fixed_point import Int16, Int64, QuantisedModule, evaluate
from paris_ray.zklora.identity import Identity
from paris_ray.zklora.inference import adapt
from paris_ray.zklora.ledger import OPENING_BALANCE, Journal, SQLiteLedger
from paris_ray.zklora.manifest import MANIFEST, AdapterManifest, Base, build_manifest
from paris_ray.zklora.offer import Offer, Terms, base_of_expert, base_of_file, load_offer, open_offer
from paris_ray.zklora.parties.buyer import Buyer, Outcome, Trial
from paris_ray.zklora.parties.channel import Channel, Peer, serve
from paris_ray.zklora.parties.contributor import Contribution, Service
from paris_ray.zklora.parties.escrow import EscrowClient, EscrowService
from paris_ray.zklora.parties.frames import Message
from paris_ray.zklora.parties.purchase import buy, integers_digest
from paris_ray.zklora.parties.session import (
    ClosedSession,
    Evidence,
    Session,
    fetch_evidence,
    load_evidence,
    save_evidence,
)
from paris_ray.zklora.parties.user import verify_evidence
from paris_ray.zklora.proof import prove, verify_named
from paris_ray.zklora.sealing import seal
from paris_ray.zklora.transcript import (
    Transcript,
    closing_statement,
    new_nonce,
    proof_context,
    session_id,
)
from serve.app import AppArgs, LoRAOptions, build

# peft says when it corrects the option for one layer; transformers renames something.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is", "ignore:.*is_gradient_check"),
]

EXPERT = 1
BUDGET = 100_000
PRICE = 100
TARGETS = ("in_proj", "out_proj", "mlp.0", "mlp.2")
LEVELS = (0.3, 0.7)
PROMPTS = ("a red cat", "a blue dog")
CAPTIONS = ("a red circle", "a green square")
TOKENS = 16  # rows of each module that one picture takes at one level
AUDIT_ROWS = 20
HERE = "127.0.0.1"

Randomise = Callable[[nn.Module, int], nn.Module]
Change = Callable[[Message], Message]


class Crowd:
    """Identities by name; the contributor knows those that a test will ask for."""

    def __init__(self, folder: Path, number: int) -> None:
        self.all = [Identity.create(folder / f"user_{i}") for i in range(number)]
        self._next = count()

    def one(self) -> Identity:
        """Return a user who has done nothing yet."""
        return self.all[next(self._next)]


@dataclass(frozen=True)
class Market:
    """A contributor whose adapter of an expert is for sale, through an escrow.

    Attributes:
        bundle: The base.
        service: How the contributor serves.
        offer: What it sells.
        contribution: The service.
        crowd: Its users.
        journal: The escrow's.
        escrow: The escrow's service.
    """

    bundle: str
    service: Service
    offer: Offer
    contribution: Contribution
    crowd: Crowd
    journal: Journal
    escrow: EscrowService

    @property
    def manifest(self) -> AdapterManifest:
        return self.offer.manifest

    def rows_left(self) -> dict[str, int]:
        with Channel(*self.towards(self.crowd.one())) as channel:
            return Session(channel, channel_user(channel), self.manifest, "exact", new_nonce()).rows_left

    def towards(self, user: Identity) -> tuple[Identity, tuple[str, int], str]:
        return user, self.contribution.address, self.manifest.contributor_certificate
