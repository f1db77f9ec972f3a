"""Parity: the package against `reference.py`, a plain and separately written Paris."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from paris_ray.artifacts import VerifiedFolder
from paris_ray.bundle import Bundle, BundleFacts
from paris_ray.config import ExpertConfig, RouterConfig, SamplingConfig
from paris_ray.config.release import write_document
from paris_ray.errors import SamplingError
from paris_ray.folders import Folder
from paris_ray.models import Expert, Router, TextConditioning
from paris_ray.run import EXPERT_WEIGHTS, MODEL_CONFIG, ROUTER_WEIGHTS
from paris_ray.sampling.generation import sample
from paris_ray.sampling.sampler import Samples, initial_noise
from paris_ray.sampling_options import sampling_options
from tests.reference import PlainExpert, PlainRouter, plain_sample

TOLERANCE = 1e-4
NUM_EXPERTS, NUM_TOKENS, TEXT_WIDTH = 3, 77, 32
SMALL = {"input_size": 8, "hidden_size": 64, "num_layers": 2, "num_heads": 4}
EXPERT = ExpertConfig(text_embed_dim=TEXT_WIDTH, **SMALL)
ROUTER = RouterConfig(num_experts=NUM_EXPERTS, **SMALL)
PROMPTS, SEEDS = ["a red cat", "dog", "a long caption about nothing at all"], [3, 14, 15]
STRATEGIES = ["top-1", "top-2", "full"]
STEPS = 10


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def plain_model(config: ExpertConfig | RouterConfig, seed: int = 0) -> nn.Module:
    """Return a plain model, every parameter random, none zero, activations of about 1."""
    model = (PlainExpert if isinstance(config, ExpertConfig) else PlainRouter)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        spread = parameter[0].numel() ** -0.5 if parameter.dim() in (2, 4) else 0.5
        parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return model


def our_model(config: ExpertConfig | RouterConfig) -> nn.Module:
    return (Expert if isinstance(config, ExpertConfig) else Router)(config).eval()


def twins(config: ExpertConfig | RouterConfig) -> tuple[nn.Module, nn.Module]:
    """Return the package's model and a random plain one, with the same parameters."""
    ours, plain = our_model(config), plain_model(config)
    ours.load_state_dict(plain.state_dict(), strict=True)
    return ours, plain


def noisy_latents() -> tuple[Tensor, Tensor]:
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return latents, torch.tensor([0.0, 0.7, 430.5, 1000.0])


def captions() -> TextConditioning:
    """Return four random captions of which the first tokens, 1 to 77 of them, are no padding."""
    text = torch.randn(4, NUM_TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(NUM_TOKENS) < torch.tensor([[1], [12], [40], [NUM_TOKENS]])
    return TextConditioning(text, text[:, 0], mask)


def difference(ours: nn.Module, plain: nn.Module) -> float:
    """Return the largest difference of two experts' or two routers' outputs."""
    latents, timesteps = noisy_latents()
    if isinstance(ours, Router):
        return (ours(latents, timesteps) - plain(latents, timesteps)).abs().max().item()
    text = captions()
    mask = text.text_mask if ours.config.text_padding_mask else None
    expected = plain(latents, timesteps, text.text_embeddings, mask)
    return (ours(latents, timesteps, text) - expected).abs().max().item()


CONFIGS = [
    pytest.param(EXPERT, id="expert"),
    pytest.param(replace(EXPERT, text_padding_mask=True), id="expert-masked"),
    pytest.param(replace(EXPERT, layer_norm_eps=0.1, mlp_ratio=2.0), id="expert-options"),
    pytest.param(
        ExpertConfig.preset("B/2", input_size=8, num_layers=2, text_embed_dim=TEXT_WIDTH),
        id="expert-of-B/2-width",
    ),
    pytest.param(ROUTER, id="router"),
    pytest.param(replace(ROUTER, head_activation="gelu"), id="router-gelu"),
    pytest.param(replace(ROUTER, layer_norm_eps=0.1, mlp_ratio=2.0), id="router-options"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_outputs_agree(config: ExpertConfig | RouterConfig) -> None:
    assert difference(*twins(config)) < TOLERANCE


@pytest.mark.parametrize("config", CONFIGS)
def test_state_dicts_load_strictly_both_ways(config: ExpertConfig | RouterConfig) -> None:
    ours, _ = twins(config)
    other = plain_model(config, seed=1)
    assert difference(ours, other) > 10 * TOLERANCE
    other.load_state_dict(ours.state_dict(), strict=True)
    assert difference(ours, other) < TOLERANCE


@pytest.mark.parametrize(
    ("config", "count"),
    [
        pytest.param(ExpertConfig.preset("S/2"), 29_939_728, id="S/2"),
        pytest.param(ExpertConfig.preset("B/2"), 118_566_928, id="B/2"),
        pytest.param(ExpertConfig.preset("L/2"), 411_815_952, id="L/2"),
        pytest.param(ExpertConfig.preset("XL/2"), 605_970_448, id="XL/2"),
        pytest.param(RouterConfig(), 129_136_904, id="router"),
    ],
)
def test_published_sizes_have_the_same_tensors(
    config: ExpertConfig | RouterConfig, count: int
) -> None:
    with torch.device("meta"):
        plain = (PlainExpert if isinstance(config, ExpertConfig) else PlainRouter)(config)
        ours = our_model(config)
    expected = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in ours.parameters()) == count
    assert sum(shape.numel() for shape in expected.values()) == count


@pytest.mark.parametrize("masked", [False, True])
def test_text_encoded_once_means_the_same(masked: bool) -> None:
    ours, _ = twins(replace(EXPERT, text_padding_mask=masked))
    latents, timesteps = noisy_latents()
    encoded = ours.encode_text(captions())
    for times in (timesteps, timesteps.flip(0)):
        direct = ours(latents, times, captions())
        torch.testing.assert_close(ours(latents, times, encoded), direct, rtol=0, atol=1e-5)


def names_of(config: ExpertConfig | RouterConfig) -> list[str]:
    with torch.device("meta"):
        return list(our_model(config).state_dict())


@pytest.mark.parametrize(
    ("config", "name"),
    [
        *(pytest.param(EXPERT, name, id=f"expert-{name}") for name in names_of(EXPERT)),
        *(pytest.param(ROUTER, name, id=f"router-{name}") for name in names_of(ROUTER)),
    ],
)
def test_a_changed_tensor_is_noticed(config: ExpertConfig | RouterConfig, name: str) -> None:
    """So every tensor takes part in the comparison, which can fail."""
    ours, plain = twins(config)
    state = ours.state_dict()
    generator = torch.Generator().manual_seed(3)
    state[name] = state[name] + 0.1 * torch.randn(state[name].shape, generator=generator)
    ours.load_state_dict(state, strict=True)
    assert difference(ours, plain) > 10 * TOLERANCE


class ByteEncoder:
    """A text encoder of CLIP's length: a random vector for each byte, then padding."""

    embed_dim, lengths = TEXT_WIDTH, (NUM_TOKENS,)
    table = torch.randn(256, TEXT_WIDTH, generator=torch.Generator().manual_seed(7))

    def __init__(self) -> None:
        self.model = torch.nn.Module()

    def tokenize(self, captions: Sequence[str]) -> list[np.ndarray]:
        codes = [b"\1" + caption.encode() for caption in captions]
        return [np.frombuffer(code.ljust(NUM_TOKENS, b"\0"), np.uint8) for code in codes]

    def encode_tokens(self, token_ids: np.ndarray) -> TextConditioning:
        ids = torch.tensor(token_ids).long()
        tokens = self.table[ids]
        return TextConditioning(tokens, tokens.mean(dim=1), ids > 0)

    def encode(self, captions: Sequence[str]) -> TextConditioning:
        return self.encode_tokens(np.stack(self.tokenize(captions)))


class ByteBundle(Bundle):
    text_encoder = ByteEncoder()


class Ensemble:
    """Plain experts and router, and a bundle of the same weights, read from files."""

    def __init__(self, root: Folder, *, masked: bool) -> None:
        config = replace(EXPERT, text_padding_mask=masked)
        self.masked, self.root = masked, root
        self.experts = [plain_model(config, seed) for seed in range(NUM_EXPERTS)]
        # One that changes its mind within each sample, and whose choices are never close calls.
        self.router = plain_model(ROUTER, seed=36)

    def bundle(self) -> Bundle:
        models = {f"expert_{k}": expert for k, expert in enumerate(self.experts)}
        for name, model in (models | {"router": self.router}).items():
            weights = ROUTER_WEIGHTS if name == "router" else EXPERT_WEIGHTS
            (self.root / name).write_json(MODEL_CONFIG, write_document(model.config))
            (self.root / name).write(weights, safetensors.torch.save(model.state_dict()))
        facts = BundleFacts(
            model_name="parity",
            sampling=SamplingConfig(),
            picture_size=64,
            attribution=None,
            example_prompts=(),
        )
        parts = {name: VerifiedFolder(self.root / name, None) for name in (*models, "router")}
        return ByteBundle(parts, facts)

    def plain_latents(self, strategy: str, guidance_scale: float) -> Tensor:
        encoded = [ByteEncoder().encode([prompt]) for prompt in [*PROMPTS, ""]]
        texts = [(e.text_embeddings, e.text_mask if self.masked else None) for e in encoded]
        return plain_sample(
            self.experts,
            self.router,
            initial_noise((4, 8, 8), SEEDS),
            texts[:-1],
            texts[-1],
            num_steps=STEPS,
            strategy=strategy,
            guidance_scale=guidance_scale,
        )


def draw(bundle: Bundle, strategy: str, guidance_scale: float) -> Samples:
    options = sampling_options(
        bundle, num_inference_steps=STEPS, guidance_scale=guidance_scale, routing=strategy
    )
    return sample(bundle, bundle.encode_text(PROMPTS), SEEDS, options)


@pytest.fixture(params=[False, True], ids=["unmasked", "masked"])
def ensemble(request: pytest.FixtureRequest, tmp_path: Path) -> Ensemble:
    return Ensemble(Folder(tmp_path), masked=request.param)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whole_samples_agree(ensemble: Ensemble, strategy: str, guidance_scale: float) -> None:
    latents = draw(ensemble.bundle(), strategy, guidance_scale).latents
    expected = ensemble.plain_latents(strategy, guidance_scale)
    torch.testing.assert_close(latents, expected, rtol=0, atol=TOLERANCE)


def test_the_compared_samples_are_not_all_alike(ensemble: Ensemble) -> None:
    """Strategy and guidance matter to the ensemble, and no expert has a picture to itself."""
    drawn = [draw(ensemble.bundle(), strategy, 7.5) for strategy in STRATEGIES]
    drawn += [draw(ensemble.bundle(), strategy, 1.0) for strategy in STRATEGIES]
    for one, other in combinations(drawn, 2):
        assert (one.latents - other.latents).abs().max() > 1000 * TOLERANCE
    assert (drawn[0].expert_usage < 0.9).all()


@pytest.mark.parametrize(("weight", "asked"), [(0.9e-6, False), (1.1e-6, True)])
def test_full_asks_no_expert_of_less_than_a_millionth(
    ensemble: Ensemble, weight: float, asked: bool
) -> None:
    nn.init.zeros_(ensemble.router.head[4].weight)
    ensemble.router.head[4].bias.copy_(torch.tensor([0.6, 0.4 - weight, weight]).log())
    # The third expert spoils what it takes part in.
    nn.init.constant_(ensemble.experts[2].final_layer.linear.bias, torch.nan)
    expected = ensemble.plain_latents("full", 7.5)
    assert expected.isnan().all().item() is asked
    if asked:
        with pytest.raises(SamplingError, match="not finite"):
            draw(ensemble.bundle(), "full", 7.5)
        return
    latents = draw(ensemble.bundle(), "full", 7.5).latents
    torch.testing.assert_close(latents, expected, rtol=0, atol=TOLERANCE)
