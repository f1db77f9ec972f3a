"""Language models by folder: weights in one file or in shards, texts, and nothing else."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from jobs.parties import add_base, subject_of
from paris_ray.artifacts import file_sha256
from paris_ray.errors import BundleError, ConfigError, ProtocolError
from paris_ray.folders import Folder
from paris_ray.zklora import language
from paris_ray.zklora.adapter import quantise_adapter, read_peft
from paris_ray.zklora.fixed_point import evaluate
from paris_ray.zklora.inference import adapt, check_fits
from paris_ray.zklora.manifest import Base
from paris_ray.zklora.share import Worth
from paris_ray.zklora.subjects import TextSubject, read_texts
from tests.language_models import TEXTS, write_gpt2, write_llama, write_lora

# transformers renames something inside.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_check")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    shutil.copytree(llama, tmp_path / "copy")
    return tmp_path / "copy"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_model_in_shards_is_that_of_its_files(llama: Path, copied: Path) -> None:
    files = language.weight_files(llama)
    index = json.loads((llama / language.INDEX).read_text())
    assert {path.name for path in files} == set(index["weight_map"].values())
    base = language.base_of_model(llama)
    assert base == language.base_of_model(copied) and base.expert is None
    last = copied / files[-1].name
    content = last.read_bytes()
    last.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert language.base_of_model(copied) != base


def test_a_model_in_one_file_is_that_file(tmp_path: Path) -> None:
    write_gpt2(tmp_path)
    digest = file_sha256(Folder(tmp_path), language.WEIGHTS)
    assert language.base_of_model(tmp_path) == Base(digest=digest, expert=None, router_digest=None)


def test_a_folder_is_loaded_as_transformers_does(llama: Path) -> None:
    ours, theirs = language.load_model(llama, "cpu"), LlamaForCausalLM.from_pretrained(llama)
    state = theirs.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    (ids,) = language.tokenise(llama, TEXTS[:1])
    assert len(ids) == len(TEXTS[0])
    logits = theirs(input_ids=ids[None]).logits[0]
    loss = language.token_loss(ours, ids, "cpu")
    assert loss.shape == (1, 1) and loss.dtype == torch.float32
    torch.testing.assert_close(loss.item(), cross_entropy(logits[:-1], ids[1:]).item())


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        (None, "no shard"),
        ({}, "no shard"),
        ({"a": "../elsewhere.safetensors"}, "no shard"),
        ({"a": "weights.bin"}, "no shard"),
        ({"a": 3}, "no shard"),
        ({"a": "absent.safetensors"}, "lacks the shard absent"),
    ],
    ids=str,
)
def test_an_index_names_shards_of_its_folder(copied: Path, weight_map: Any, said: str) -> None:
    change(copied / language.INDEX, weight_map=weight_map)
    with pytest.raises(ConfigError, match=said):
        language.base_of_model(copied)


def test_only_safetensors_are_weights(copied: Path) -> None:
    (copied / language.INDEX).unlink()
    torch.save({}, copied / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no other weights are read"):
        language.weight_files(copied)
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        language.weight_files(copied.parent)


def test_no_code_of_the_folder_runs(copied: Path) -> None:
    ran = copied / "ran"
    (copied / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\n")
    maps = {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.C"}
    change(copied / language.CONFIG, auto_map=maps, model_type="theirs")
    with pytest.raises(BundleError, match="of no causal language model"):
        language.skeleton(copied)
    change(copied / language.CONFIG, model_type="llama")
    assert isinstance(language.load_model(copied, "cpu"), LlamaForCausalLM)
    assert not ran.exists()


@pytest.mark.parametrize(
    "values", [{"model_type": "t5"}, {"hidden_size": "x"}, {"quantization_config": {"bits": 4}}]
)
def test_other_configurations_are_refused(copied: Path, values: dict[str, Any]) -> None:
    change(copied / language.CONFIG, **values)
    with pytest.raises(BundleError, match=r"config\.json"):
        language.skeleton(copied)


def test_weights_that_are_missing_are_not_made_up(copied: Path) -> None:
    index = json.loads((copied / language.INDEX).read_text())["weight_map"]
    kept = sorted(set(index.values()))[:1]
    change(copied / language.INDEX, weight_map={k: v for k, v in index.items() if v in kept})
    with pytest.raises(BundleError, match="lack"):
        language.load_model(copied, "cpu")


def test_texts_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "texts"
    path.write_text("\n one text \n\nanother\n")
    assert read_texts(path) == ("one text", "another")
    path.write_text("\n \n")
    with pytest.raises(ConfigError, match="has no text"):
        read_texts(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_texts(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_texts(tmp_path / "absent")


@pytest.mark.parametrize(
    ("texts", "said"), [(("a",), "has 1 tokens"), (("a" * 65,), "the model reads 64")]
)
def test_texts_that_have_no_loss_are_refused(llama: Path, texts: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TextSubject(folder=llama, texts=texts).load("cpu")


def test_a_subject_scores_with_and_without(llama: Path, tmp_path: Path) -> None:
    adapted = write_lora(LlamaForCausalLM.from_pretrained(llama), tmp_path, "q_proj", "down_proj")
    adapter = read_peft(tmp_path)
    modules = quantise_adapter(adapter)
    subject = TextSubject(folder=llama, texts=TEXTS)
    check_fits(subject.skeleton(), modules)
    scorer = subject.load("cpu")
    assert scorer.largest == 2
    view = adapt(
        scorer.model, modules, adapter.config.scale, lambda name, x, _: evaluate(modules[name], x)
    )
    for number, ids in enumerate(language.tokenise(llama, TEXTS)):
        logits = adapted(input_ids=ids[None]).logits[0]
        expected = cross_entropy(logits[:-1], ids[1:]).item()
        assert scorer.losses(view, number).item() == pytest.approx(expected, rel=2e-5)
        assert scorer.losses(scorer.model, number).item() != pytest.approx(expected, rel=1e-4)
    worth = Worth(subject, modules, adapter.config.scale)
    assert {name: len(x) for name, x in worth.inputs.items()} == dict.fromkeys(
        modules, len(TEXTS[0])
    )
    with pytest.raises(ProtocolError, match="the adapter is for another model"):
        subject.check(Base(digest="0" * 64, expert=None, router_digest=None))
    subject.check(language.base_of_model(llama))


def test_an_adapter_of_another_architecture_does_not_fit(llama: Path, tmp_path: Path) -> None:
    write_lora(write_gpt2(tmp_path / "gpt2"), tmp_path / "lora", "c_attn", fan_in_fan_out=True)
    modules = quantise_adapter(read_peft(tmp_path / "lora"))
    with pytest.raises(BundleError, match="the model has no module of this name"):
        check_fits(language.skeleton(llama), modules)
    check_fits(language.skeleton(tmp_path / "gpt2"), modules)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--base", "/m", "--pictures", "/p"), "--pictures needs --bundle"),
        (("--bundle", "/b", "--texts", "/t"), "--texts needs --base"),
        (("--base", "/m", "--texts", "/absent"), "texts=/absent cannot be read"),
    ],
)
def test_options_that_do_not_go_together_are_named(options: tuple[str, ...], said: str) -> None:
    parser = argparse.ArgumentParser()
    add_base(parser, "losses")
    with pytest.raises(ConfigError, match=said):
        subject_of(parser.parse_args(options), None)


def test_a_tokenizer_that_is_none_is_an_error_for_people(copied: Path) -> None:
    (copied / language.TOKENIZER).write_text("{}")
    with pytest.raises(BundleError, match="the tokenizer in"):
        language.tokenise(copied, TEXTS)
    (copied / language.TOKENIZER).unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        language.tokenise(copied, TEXTS)
    assert load_file(language.weight_files(copied)[0])
