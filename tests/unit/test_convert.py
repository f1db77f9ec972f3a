"""A DiT becomes an expert: equal activations, honest report, and no trust in the file."""

import argparse
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from paris_ray.artifacts import VerifiedFolder
from paris_ray.bundle import load_expert
from paris_ray.errors import BundleError, ConfigError
from paris_ray.folders import Folder
from paris_ray.models import Expert, ExpertConfig
from paris_ray.models.convert import Conversion, convert_dit, read_dit
from paris_ray.seeding import build_seeded

REPOSITORY = Path(__file__).resolve().parents[2]
WIDTH, DEPTH, HEADS, GRID, CHANNELS, CLASSES = 32, 3, 4, 3, 4, 5
OPTIONS: dict[str, Any] = {"num_heads": HEADS, "num_classes": CLASSES, "text_embed_dim": 8}
State = dict[str, Tensor]


def dit_shapes(
    width: int = WIDTH, depth: int = DEPTH, grid: int = GRID, num_embeddings: int = CLASSES + 1
) -> dict[str, tuple[int, ...]]:
    """Every tensor of a DiT with learned variance, as the trainer stores it."""
    linears = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    for i in range(depth):
        linears[f"blocks.{i}.attn.qkv"] = (3 * width, width)
        linears[f"blocks.{i}.attn.proj"] = (width, width)
        linears[f"blocks.{i}.mlp.fc1"] = (4 * width, width)
        linears[f"blocks.{i}.mlp.fc2"] = (width, 4 * width)
        linears[f"blocks.{i}.adaLN_modulation.1"] = (6 * width, width)
    linears["final_layer.adaLN_modulation.1"] = (2 * width, width)
    linears["final_layer.linear"] = (2 * 2 * 2 * CHANNELS, width)
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, grid**2, width),
        "x_embedder.proj.weight": (width, CHANNELS, 2, 2),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (num_embeddings, width),
    }
    for name, (rows, columns) in linears.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes


def random_dit(seed: int = 0, **sizes: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in dit_shapes(**sizes).items():
        fan_in = math.prod(shape[1:]) if len(shape) in (2, 4) else 4
        state[name] = torch.randn(shape, generator=generator) * fan_in**-0.5
    state["y_embedder.embedding_table.weight"] *= 4
    return state


def dit_activations(state: State, latents: Tensor, t: float, label: Tensor) -> dict[str, Tensor]:
    """DiT as its paper describes it, for one class embedding `label (d,)`; every result by name."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * (1 + scale) + shift

    def attention(name: str, x: Tensor) -> Tensor:
        parts = []
        for query, key, value in zip(
            *(part.split(WIDTH // HEADS, dim=-1) for part in linear(f"{name}.qkv", x).chunk(3, -1)),
            strict=True,
        ):
            scores = query @ key.transpose(1, 2) / (WIDTH // HEADS) ** 0.5
            parts.append(scores.softmax(-1) @ value)
        return linear(f"{name}.proj", torch.cat(parts, -1))

    frequencies = torch.tensor([10_000 ** (-i / 128) for i in range(128)])
    features = torch.cat([torch.cos(t * frequencies), torch.sin(t * frequencies)])
    time_embedding = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", features)))
    condition = F.silu(time_embedding + label)
    patches = F.conv2d(latents, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], 2)
    x = patches.flatten(2).transpose(1, 2) + state["pos_embed"]
    results = {"embedded": x}
    for i in range(sum(name.endswith("attn.qkv.weight") for name in state)):
        parts = linear(f"blocks.{i}.adaLN_modulation.1", condition).split(WIDTH)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        results[f"{i}.attn"] = attention(f"blocks.{i}.attn", modulated(x, shift_msa, scale_msa))
        x = x + gate_msa * results[f"{i}.attn"]
        inner = linear(f"blocks.{i}.mlp.fc1", modulated(x, shift_mlp, scale_mlp))
        results[f"{i}.mlp"] = linear(f"blocks.{i}.mlp.fc2", F.gelu(inner, approximate="tanh"))
        x = x + gate_mlp * results[f"{i}.mlp"]
        results[f"{i}"] = x
    return results


def expert_activations(expert: Expert, latents: Tensor, t: float) -> dict[str, Tensor]:
    """The same results of an expert, read from inside one forward pass with loud text."""
    results: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: results.update({name: output})

    handles = [expert.patch_embed.register_forward_hook(keep("embedded"))]
    for i, block in enumerate(expert.layers):
        for name, module in ((f"{i}.attn", block.attn), (f"{i}.mlp", block.mlp), (f"{i}", block)):
            handles.append(module.register_forward_hook(keep(name)))
    generator = torch.Generator().manual_seed(7)
    text = 10 * torch.randn(len(latents), 6, 8, generator=generator)
    with torch.no_grad():
        expert(latents, torch.full((len(latents),), t), text)
    for handle in handles:
        handle.remove()
    results["embedded"] = results["embedded"] + expert.pos_embed.detach()
    return results


def random_latents() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, CHANNELS, 2 * GRID, 2 * GRID, generator=generator)


def label_of(state: State, class_embedding: str) -> Tensor:
    table = state["y_embedder.embedding_table.weight"]
    return table[CLASSES] if class_embedding == "null" else table[:CLASSES].mean(0)


@pytest.mark.parametrize("class_embedding", ["null", "mean"])
def test_every_block_gives_dits_own_activations_at_the_reference_time(class_embedding: str) -> None:
    state, latents = random_dit(), random_latents()
    expert = convert_dit(state, class_embedding=class_embedding, **OPTIONS).expert
    expected = dit_activations(state, latents, 500.0, label_of(state, class_embedding))
    found = expert_activations(expert, latents, 500.0)
    assert found.keys() == expected.keys()
    assert len(found) == 1 + 3 * DEPTH
    for name, value in expected.items():
        assert value.std() > 0.1, name
        assert (found[name] - value).abs().max() < 1e-5 * value.abs().max(), name


def test_the_choice_of_the_class_embedding_is_honoured() -> None:
    state, latents = random_dit(), random_latents()
    expert = convert_dit(state, class_embedding="mean", **OPTIONS).expert
    other = dit_activations(state, latents, 500.0, label_of(state, "null"))
    difference = (expert_activations(expert, latents, 500.0)["0"] - other["0"]).abs().max()
    assert difference > 0.1


@pytest.mark.parametrize("t", [0.0, 37.5, 999.0])
def test_a_single_block_equals_dit_at_every_time(t: float) -> None:
    """The mean of one Linear is itself, so what is left is the time embedding with the class."""
    state, latents = random_dit(depth=1), random_latents()
    expert = convert_dit(state, **OPTIONS).expert
    expected = dit_activations(state, latents, t, label_of(state, "null"))
    found = expert_activations(expert, latents, t)
    assert (found["0"] - expected["0"]).abs().max() < 1e-5 * expected["0"].abs().max()


def test_the_shared_modulation_is_the_mean_of_the_blocks_at_every_time() -> None:
    """Tables differ from block to block, but their mean is nothing."""
    state = random_dit()
    weights = convert_dit(state, **OPTIONS).expert.state_dict()
    linears = [state[f"blocks.{i}.adaLN_modulation.1.weight"] for i in range(DEPTH)]
    torch.testing.assert_close(weights["t_block.1.weight"], torch.stack(linears).mean(0))
    tables = torch.stack([weights[f"layers.{i}.scale_shift_table"] for i in range(DEPTH)])
    assert tables.std() > 0.1
    torch.testing.assert_close(tables.mean(0), torch.zeros(6, WIDTH), rtol=0, atol=1e-6)


def test_what_is_new_is_that_of_a_new_expert_and_silent() -> None:
    conversion = convert_dit(random_dit(), seed=5, **OPTIONS)
    expert = conversion.expert
    fresh = build_seeded(lambda: Expert(expert.config), 5).state_dict()
    weights = expert.state_dict()
    new = {group.name for group in conversion.groups if group.treatment == "re-initialised"}
    equal = {name for name, value in fresh.items() if torch.equal(value, weights[name])}
    assert new == {re.sub(r"^layers\.\d+", "layers.*", name) for name in equal}
    assert {"text_proj.weight", "layers.*.cross_attn.in_proj_weight"} <= new
    latents = random_latents()
    assert not expert(latents, torch.tensor([10.0, 700.0]), torch.ones(2, 1, 8)).any()
    other = convert_dit(random_dit(), seed=6, **OPTIONS).expert.state_dict()
    assert not torch.equal(other["text_proj.weight"], weights["text_proj.weight"])
    assert torch.equal(other["t_block.1.weight"], weights["t_block.1.weight"])


def test_the_architecture_of_a_published_size_is_inferred() -> None:
    conversion = convert_dit(random_dit(width=384, depth=12, grid=16, num_embeddings=1001))
    assert conversion.expert.config == ExpertConfig(hidden_size=384, num_layers=12, num_heads=6)
    assert sum(group.num_parameters for group in conversion.groups) == 29_939_728


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16), (1152, 16)])
def test_heads_of_the_published_widths(width: int, heads: int) -> None:
    state = random_dit(width=width, depth=1, num_embeddings=1)
    config = convert_dit(state, num_classes=1, class_embedding="mean").expert.config
    assert (config.hidden_size, config.num_heads) == (width, heads)


def test_half_precision_becomes_float32() -> None:
    state = {name: value.half() for name, value in random_dit().items()}
    weights = convert_dit(state, **OPTIONS).expert.state_dict()
    assert {value.dtype for value in weights.values()} == {torch.float32}
    qkv = state["blocks.1.attn.qkv.weight"].float()
    assert torch.equal(weights["layers.1.attn.in_proj_weight"], qkv)


def without(name: str) -> State:
    return {key: value for key, value in random_dit().items() if key != name}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        pytest.param(
            without("blocks.1.attn.qkv.bias"),
            r"'blocks\.1\.attn\.qkv\.bias' has shape missing, the other tensors mean \(96,\)",
            id="missing",
        ),
        pytest.param(without("x_embedder.proj.weight"), "not the state dict of a DiT", id="no DiT"),
        pytest.param({}, "'x_embedder.proj.weight' is missing", id="empty"),
        pytest.param(
            random_dit() | {"blocks.0.attn.q_norm.weight": torch.ones(8)},
            r"'blocks\.0\.attn\.q_norm\.weight' has shape \(8,\), the other tensors mean none",
            id="unknown",
        ),
        pytest.param(
            random_dit() | {"blocks.2.mlp.fc2.weight": torch.zeros(WIDTH, 9)},
            r"'blocks\.2\.mlp\.fc2\.weight' has shape \(32, 9\), .* mean \(32, 128\)",
            id="shape",
        ),
        pytest.param(
            random_dit() | {"pos_embed": torch.zeros(1, 7, WIDTH)}, "7 rows.*square", id="grid"
        ),
        pytest.param(
            random_dit() | {"pos_embed": torch.zeros(9, WIDTH)}, "allowed: 3 axes", id="axes"
        ),
        pytest.param(
            random_dit() | {"blocks.0.mlp.fc1.bias": torch.full((4 * WIDTH,), torch.nan)},
            r"'blocks\.0\.mlp\.fc1\.bias' has values that are not finite",
            id="nan",
        ),
        pytest.param(
            random_dit() | {"blocks.0.mlp.fc1.bias": torch.ones(4 * WIDTH).to(torch.float8_e5m2)},
            r"'blocks\.0\.mlp\.fc1\.bias' has dtype torch\.float8_e5m2, allowed: torch\.float32",
            id="eight bits",
        ),
    ],
)
def test_what_is_no_dit_is_refused(state: State, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        convert_dit(state, **OPTIONS)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({}, {"num_heads": None}, "num_heads must be given: hidden_size=32"),
        ({}, {"num_heads": 5}, "multiple of num_heads=5"),
        ({}, {"num_heads": 0}, "num_heads=0"),
        ({}, {"num_classes": 1000}, "num_classes=1000 does not fit .* 6 rows, allowed: 5 and"),
        ({"num_embeddings": CLASSES}, {}, "class_embedding='null'.* allowed: 'mean'"),
        ({"num_embeddings": 1}, {"num_classes": 0}, "num_classes=0 does not fit"),
        ({}, {"text_embed_dim": 10**9}, "text_embed_dim=1000000000"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    sizes: dict[str, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        convert_dit(random_dit(**sizes), **(OPTIONS | options))


def test_an_absurd_size_is_refused_before_anything_is_allocated() -> None:
    """On the meta device the sizes are real and the memory is not."""
    state = {
        name: torch.empty(shape, device="meta")
        for name, shape in dit_shapes(width=10**6, depth=1).items()
    }
    with pytest.raises(ConfigError, match=r"DiT\.hidden_size=1000000"):
        convert_dit(state, **(OPTIONS | {"num_heads": 16}))


# Files.


def trainer_checkpoint(ema: State) -> dict[str, Any]:
    """What DiT's train.py saves."""
    args = argparse.Namespace(model="DiT-XL/2", num_classes=CLASSES, image_size=256)
    return {"model": random_dit(seed=1), "ema": ema, "opt": {"state": {}}, "args": args}


@pytest.mark.parametrize("form", ["plain", "trainer", "legacy", "safetensors"])
def test_every_form_of_a_checkpoint_is_read(form: str, tmp_path: Path) -> None:
    state = random_dit()
    path = tmp_path / ("dit.safetensors" if form == "safetensors" else "dit.pt")
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        document = trainer_checkpoint(state) if form == "trainer" else state
        torch.save(document, path, _use_new_zipfile_serialization=form != "legacy")
    found = read_dit(path).state
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("keys", "source"),
    [
        (["ema"], "the averaged ones (ema)"),
        (["model", "ema"], "the averaged ones (ema)"),
        (["model"], "the plain ones (model)"),
        ([], "the whole file"),
    ],
)
def test_which_weights_are_taken_is_said(keys: list[str], source: str, tmp_path: Path) -> None:
    states = {key: random_dit(seed) for seed, key in enumerate(keys)}
    torch.save(states or random_dit(), tmp_path / "dit.pt")
    found = read_dit(tmp_path / "dit.pt")
    assert found.source == source
    expected = states[keys[-1]] if keys else random_dit()
    assert all(torch.equal(found.state[name], expected[name]) for name in expected)


def test_without_an_average_the_plain_weights_are_taken(tmp_path: Path) -> None:
    torch.save({"ema": None, "model": random_dit()}, tmp_path / "dit.pt")
    assert read_dit(tmp_path / "dit.pt").source == "the plain ones (model)"


@pytest.mark.parametrize("wrapped", ["module.{}", "_orig_mod.{}", "_orig_mod.module.{}", "blocks"])
def test_what_wraps_a_model_is_not_part_of_names(wrapped: str, tmp_path: Path) -> None:
    state = random_dit()
    if wrapped == "blocks":  # compiled one by one
        given = {re.sub(r"(blocks\.\d+)\.", r"\1._orig_mod.", n): v for n, v in state.items()}
    else:
        given = {wrapped.format(name): value for name, value in state.items()}
    assert given.keys() != state.keys()
    torch.save({"model": given}, tmp_path / "dit.pt")
    found = read_dit(tmp_path / "dit.pt").state
    assert found.keys() == state.keys()
    assert convert_dit(found, **OPTIONS).expert.config.num_layers == DEPTH


def test_a_tensor_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    state = random_dit() | {"module.pos_embed": torch.zeros(1, GRID**2, WIDTH)}
    torch.save(state, tmp_path / "dit.pt")
    with pytest.raises(BundleError, match="twice, with and without module or _orig_mod"):
        read_dit(tmp_path / "dit.pt")


class Payload:
    """A pickle of this runs a command when it is read without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("place", ["ema", "beside", "inside args", "plain pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(place: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "dit.pt"
    document = trainer_checkpoint(random_dit())
    if place == "ema":
        document["ema"] = Payload(mark)
    elif place == "inside args":
        document["args"].payload = Payload(mark)
    else:
        document["payload"] = Payload(mark)
    if place == "plain pickle":
        path.write_bytes(pickle.dumps(document, protocol=2))
    else:
        torch.save(document, path)
    with pytest.raises(BundleError) as caught:
        read_dit(path)
    assert not mark.exists()
    assert "only tensors, plain containers and argparse.Namespace" in str(caught.value)
    assert "weights_only" not in str(caught.value)
    if place == "plain pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert mark.exists(), "the payload of this test does nothing"


def test_no_other_class_becomes_loadable(tmp_path: Path) -> None:
    torch.save(trainer_checkpoint(random_dit()), tmp_path / "dit.pt")
    read_dit(tmp_path / "dit.pt")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    torch.save({"ema": random_dit(), "path": Path("x")}, tmp_path / "path.pt")
    with pytest.raises(BundleError, match=r"calls for pathlib"):
        read_dit(tmp_path / "path.pt")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([1, 2], "no state dict"),
        ({"ema": "averaged"}, "no state dict"),
        ({}, "no state dict"),
        ({"ema": {"decay": 0.9999}}, "entry 'decay' is not a dense floating-point"),
        (
            {"state_dict": {"weight": torch.ones(2)}},
            "'state_dict' is not a .*: read are a state dict, or one under the key ema or model",
        ),
        ({"x": torch.arange(3)}, "entry 'x' is not a dense floating-point tensor"),
        ({"x": torch.eye(3).to_sparse()}, "entry 'x' is not a dense floating-point tensor"),
        ({"x": torch.empty(2, device="meta")}, "entry 'x' is not a dense floating-point tensor"),
        ({3: torch.ones(2)}, "entry 3 is not"),
        ({"x": torch.zeros(1).expand(10**12)}, "claim 4000000000000 bytes"),
    ],
)
def test_documents_that_are_no_state_dict_are_refused(
    document: Any, message: str, tmp_path: Path
) -> None:
    torch.save(document, tmp_path / "dit.pt")
    with pytest.raises(BundleError, match=message):
        read_dit(tmp_path / "dit.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.7])
def test_a_truncated_file_is_refused(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"dit{suffix}"
    if suffix == ".pt":
        torch.save(random_dit(), path)
    else:
        safetensors.torch.save_file(random_dit(), path)
    payload = path.read_bytes()
    path.write_bytes(payload[: int(share * len(payload))])
    with pytest.raises(BundleError, match="damaged"):
        read_dit(path)


def test_a_file_of_another_kind_or_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dit.ckpt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"dit\.ckpt.*a \.safetensors or \.pt file"):
        read_dit(tmp_path / "dit.ckpt")
    with pytest.raises(ConfigError, match=r"none\.pt' is not a file"):
        read_dit(tmp_path / "none.pt")


# The job.


def run_job(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.convert_dit", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One run of the job, and the folder that it wrote."""
    root = tmp_path_factory.mktemp("job")
    torch.save(trainer_checkpoint(random_dit()), root / "dit.pt")
    output = root / "expert"
    options = ["--num-heads", "4", "--num-classes", "5", "--text-embed-dim", "8", "--seed", "2"]
    return run_job(str(root / "dit.pt"), "--output", str(output), *options), output


def converted() -> Conversion:
    return convert_dit(random_dit(), seed=2, **OPTIONS)


def test_the_job_writes_an_expert_that_loads(
    job: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    result, output = job
    assert result.returncode == 0, result.stderr
    expected, expert = converted().expert, load_expert(VerifiedFolder(Folder(output), None))
    assert expert.config == expected.config
    found = expert.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())


def test_the_job_says_what_it_did_and_what_the_licence_is(
    job: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    result, output = job
    lines = result.stdout.splitlines()
    for group in converted().groups:
        (line,) = [line for line in lines if line.split()[:1] == [group.name]]
        assert f"{group.num_parameters:,}" in line
        assert line.endswith(group.source)
    qkv = next(line for line in lines if "layers.*.attn.in_proj_weight" in line)
    assert "3 of 96 x 32" in qkv
    headings = [line.split(":")[0] for line in lines if "parameters" in line]
    assert headings == ["kept", "mapped", "re-initialised"]
    assert lines[0] == "weights of the checkpoint: the averaged ones (ema)"
    assert "CC BY-NC 4.0" in result.stdout
    assert f"training.init_from={output}" in result.stdout
    assert "CC BY-NC 4.0" in (output / "conversion.txt").read_text()


def test_the_job_overwrites_nothing(
    job: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    _, output = job
    result = run_job(str(output.parent / "dit.pt"), "--output", str(output))
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --output={output} is not empty")


def test_the_job_helps_with_what_comes_next() -> None:
    result = run_job("--help")
    assert result.returncode == 0
    assert "python -m jobs.convert_dit" in result.stdout
    assert "training.init_from=" in result.stdout
