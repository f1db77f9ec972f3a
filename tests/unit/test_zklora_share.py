"""The share of an adapter's worth that a thief has: between nothing seen and all."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paris_ray.bundle import Bundle
from paris_ray.config import LoRAConfig
from paris_ray.errors import ConfigError
from paris_ray.evaluation.denoising import denoising_losses
from paris_ray.folders import Folder
from paris_ray.models import Expert, TextConditioning
from paris_ray.models.lora import Adapter, attach
from paris_ray.models.peft_layout import save_adapter
from paris_ray.zklora.adapter import quantise_adapter, read_peft
from paris_ray.zklora.fixed_point import QuantisedModule
from paris_ray.zklora.share import Worth
from paris_ray.zklora.subjects import PictureSubject

LEVELS = (0.3, 0.7)
TOKENS = 16  # rows of each module that one picture takes at one level
CAPTIONS = ("a red cat", "a blue dog", "a red circle", "a green square")


class Sold(NamedTuple):
    """An adapter that lowers the loss of the last pictures, as floats and as integers."""

    subject: PictureSubject
    expert: Expert
    adapter: Adapter
    modules: Mapping[str, QuantisedModule]
    latents: Tensor
    text: TextConditioning

    def worth(self, count: int = len(CAPTIONS)) -> Worth:
        pictures = self.subject.pictures
        assert pictures is not None
        some = replace(self.subject, pictures=pictures[:count], captions=CAPTIONS[:count])
        return Worth(some, self.modules, self.adapter.config.scale)


@pytest.fixture(scope="module")
def sold(
    tiny_bundle: Bundle,
    tiny_bundle_path: Path,
    randomised: Callable[[nn.Module, int], nn.Module],
    tmp_path_factory: pytest.TempPathFactory,
) -> Sold:
    expert, folder = tiny_bundle.expert(1), tmp_path_factory.mktemp("sold")
    # Of this seed it happens to lower the loss.
    adapter = randomised(Adapter.create(expert, LoRAConfig(r=2, lora_alpha=2), 0), 2)
    assert isinstance(adapter, Adapter)
    save_adapter(adapter, Folder(folder))
    pictures = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 32, 32, 3), np.uint8)
    latents, text = tiny_bundle.codec.encode(pictures), tiny_bundle.encode_text(CAPTIONS)
    subject = PictureSubject(
        bundle=str(tiny_bundle_path), expert=1, pictures=pictures, captions=CAPTIONS, noise=LEVELS
    )
    return Sold(subject, expert, adapter, quantise_adapter(read_peft(folder)), latents, text)


@pytest.fixture(scope="module")
def worth(sold: Sold) -> Worth:
    worth = sold.worth()
    assert worth.gain > 0
    return worth


def test_the_gain_is_that_of_the_float_adapter_on_the_other_half(sold: Sold, worth: Worth) -> None:
    def loss(model: Expert) -> float:
        pictures = [(sold.latents[i : i + 1], sold.text.rows(slice(i, i + 1)), i) for i in (2, 3)]
        losses = [denoising_losses(model, x, text, LEVELS, seed=i) for x, text, i in pictures]
        return torch.cat(losses).double().mean().item()

    without, with_adapter = loss(sold.expert), loss(attach(sold.expert, sold.adapter))
    assert worth.gain == pytest.approx(without - with_adapter, rel=1e-2)


def test_inputs_are_those_of_the_known_half(sold: Sold, worth: Worth) -> None:
    rows = 2 * len(LEVELS) * TOKENS
    assert {name: x.shape for name, x in worth.inputs.items()} == {
        name: (rows, module.d_in) for name, module in sold.modules.items()
    }


@pytest.mark.parametrize("chooses", [False, True])
def test_a_thief_has_nothing_of_no_rows_and_all_of_enough(worth: Worth, chooses: bool) -> None:
    nothing, everything = (worth.thief(rows, chooses=chooses) for rows in (0, 10**6))
    assert nothing == (0, 1)
    assert everything.share == pytest.approx(1, abs=1e-3)
    assert everything.error < 1e-9


def test_more_rows_teach_more_and_chosen_ones_most(worth: Worth) -> None:
    errors = {
        chooses: [worth.thief(rows, chooses=chooses).error for rows in (2, 4, 8, 16)]
        for chooses in (False, True)
    }
    for found in errors.values():
        assert found == sorted(found, reverse=True)
    assert errors[True][-1] < errors[False][-1]


def test_a_worth_needs_pictures_that_thieves_do_not_know(sold: Sold) -> None:
    with pytest.raises(ConfigError, match="examples: 1 are not allowed: at least 2"):
        sold.worth(1)
