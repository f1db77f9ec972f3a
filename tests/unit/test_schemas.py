"""The application without HTTP: request rules, error shapes, builder arguments, calls."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from paris_ray.artifacts import publish
from paris_ray.bundle import Bundle
from paris_ray.errors import BundleError, ConfigError, RoutingError
from paris_ray.export import write_bundle
from paris_ray.folders import Folder
from paris_ray.models import TextConditioning
from paris_ray.run import BUNDLE
from paris_ray.sampling.generation import MAX_BATCH
from paris_ray.sampling.guidance import KeyedText
from serve.app import AppArgs, ScaledOptions, build
from serve.errors import describe_violation
from serve.expert import TextArrays
from serve.gate import BODY_TIMEOUT_S
from serve.ingress import Ingress
from serve.schemas import MAX_BATCH_PICTURES, MAX_PICTURES, MAX_SEED, ImagesRequest
from serve.source import BundleSource

CONFIG = Path(__file__).parents[2] / "serve" / "config.yaml"


def violation(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first violation as FastAPI reports it, with `body` before the field."""
    with pytest.raises(ValidationError) as caught:
        ImagesRequest.model_validate(body)
    first = dict(caught.value.errors()[0])
    return first | {"loc": ("body", *first["loc"])}


def test_request_defaults() -> None:
    body = ImagesRequest(prompt="a cat")
    assert body.model_dump(exclude_none=True) == {"prompt": "a cat"}
    nulls = ImagesRequest.model_validate(
        dict.fromkeys(ImagesRequest.model_fields) | {"prompt": "a"}
    )
    assert nulls.model_dump(exclude_none=True) == {"prompt": "a"}


def test_seeds_of_all_pictures_are_63_bit_numbers() -> None:
    assert MAX_SEED + max(MAX_PICTURES, MAX_BATCH_PICTURES) - 1 < 2**63
    assert ImagesRequest(prompt="a", seed=MAX_SEED, guidance_scale=20).guidance_scale == 20.0
    assert violation({"prompt": "a", "seed": MAX_SEED + 1})["loc"] == ("body", "seed")


def test_violations_name_field_value_and_allowed() -> None:
    detail = describe_violation(violation({"prompt": "a", "n": 11}))
    assert detail.message == "n=11 is not allowed: Input should be less than or equal to 10"
    detail = describe_violation(violation({"prompt": "a", "svg": {}}))
    assert detail.message.startswith("Unknown parameter 'svg'; allowed: model, n, size, quality")
    detail = describe_violation(violation({}))
    assert (detail.param, detail.code) == ("prompt", "missing_required_parameter")


@pytest.mark.parametrize("field", ["prompt", "model", "size", "routing", "lora", "a" * 10_000])
def test_violations_repeat_only_the_start_of_a_long_value_or_field(field: str) -> None:
    detail = describe_violation(violation({"prompt": "a", field: "a" * 10_000}))
    assert detail.param == field[:80]
    assert len(detail.message) < 500


def test_config_file_holds_the_defaults_and_stays_on_loopback() -> None:
    document = yaml.safe_load(CONFIG.read_text())
    schema = ServeDeploySchema.model_validate(document)
    assert schema.http_options.host == "127.0.0.1"
    (application,) = schema.applications
    assert application.import_path == "serve.app:build"
    assert AppArgs.model_validate(application.args) == AppArgs()


@pytest.mark.parametrize(
    "args",
    [
        {"bundel": "x"},
        {"threads": 0},
        {"expert": {"replicas": 2}},
        {"expert": {"num_replicas": 0}},
        {"experts": {"first": {}}},
        {"dtype": "int8"},
        {"offload": True},
        {"ingress": {"max_replicas": 3}},
        {"sampler": {"num_replicas": 2, "max_replicas": 1}},
        {"expert": {"max_replicas": 3}, "experts": {"1": {"num_replicas": 4}}},
        {"scaling": {"period_s": 0}},
        {"public_url": "https://pictures.example"},  # a proxy of this machine: needs keys
    ],
)
def test_builder_refuses_unknown_arguments(args: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AppArgs.model_validate(args)


def test_a_public_url_needs_keys_or_is_this_machine() -> None:
    AppArgs(public_url="https://pictures.example", api_key_file="keys.yaml")
    assert AppArgs(public_url="http://localhost:9000").public_url == "http://localhost:9000"


def test_builder_refuses_what_the_bundle_does_not_have(tiny_bundle_path: Path) -> None:
    with pytest.raises(BundleError, match="no model folder"):
        build(AppArgs(bundle="no/such/bundle"))
    with pytest.raises(ConfigError, match="experts: 3 is not allowed: the bundle has 3"):
        build(AppArgs(bundle=str(tiny_bundle_path), experts={3: ScaledOptions()}))


def test_replicas_that_are_replaced_may_finish_what_they_have(tiny_bundle_path: Path) -> None:
    """Serve kills them afterwards: whoever came last may have taken all of his time."""
    args = AppArgs(bundle=str(tiny_bundle_path), timeout_s=60)
    app = build_app(build(args), name="a", default_runtime_env={})
    configs = {d.name: d._deployment_config for d in app.deployments}
    for name in ("Ingress", "Sampler"):
        looks_s = 2 * configs[name].graceful_shutdown_wait_loop_s
        grace_s = configs[name].graceful_shutdown_timeout_s
        assert grace_s > BODY_TIMEOUT_S + args.timeout_s + looks_s
    # Serve learns of a death when it asks next: by itself, every ten seconds.
    assert {config.health_check_period_s for config in configs.values()} == {1.0}


def test_a_bundle_whose_own_defaults_are_not_allowed_is_not_deployed(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    facts = tiny_bundle.facts
    facts = replace(facts, sampling=replace(facts.sampling, routing="nonsense"))
    write_bundle(Bundle(tiny_bundle.parts, facts), Folder(tmp_path), model_card="")
    publish(Folder(tmp_path), BUNDLE, config_digest="", parents={}, facts={})
    with pytest.raises(RoutingError, match="routing='nonsense' is not allowed"):
        Ingress(BundleSource(str(tmp_path)), None, None)


def test_single_experts_override_only_what_they_name() -> None:
    args = AppArgs.model_validate(
        {"expert": {"num_cpus": 2, "num_gpus": 1}, "experts": {"1": {"num_replicas": 3}}}
    )
    assert args.expert_options(0) == ScaledOptions(num_cpus=2, num_gpus=1)
    assert args.expert_options(1) == ScaledOptions(num_replicas=3, num_cpus=2, num_gpus=1)


@pytest.mark.parametrize("masked", [False, True])
def test_a_text_comes_out_of_its_arrays_as_it_went_in(masked: bool) -> None:
    mask = torch.rand(1, 5) < 0.5 if masked else None
    text = TextConditioning(torch.randn(1, 5, 4), torch.randn(1, 4), mask)
    back = TextArrays.pack(text).unpack()
    assert KeyedText.of(back).keys == KeyedText.of(text).keys
    assert (back.text_mask is None) == (not masked)


def test_expert_replicas_do_not_import_the_text_encoder() -> None:
    code = "import sys, serve.expert; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_request_is_one_batch_as_in_generate() -> None:
    assert MAX_PICTURES <= MAX_BATCH
