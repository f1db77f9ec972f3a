"""Which bundle, data type and adapter drew a picture: nothing else may say that it did."""

import base64
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from paris_ray.bundle import Bundle
from paris_ray.config.lora import ADAPTER_WEIGHTS
from paris_ray.errors import BundleError
from paris_ray.pictures import LoRARecord, read_picture
from serve.checking import Served, check
from serve.drawing import Drawing, Partial
from serve.opening import open_bundle
from serve.pictures import encode_all, encode_partial, headers, response
from serve.schemas import ImageData, ImagesRequest
from serve.source import BundleSource, LoRASource, Origin

EXPERT = 1  # of `lora_path`
THEIRS = Origin(
    bundle="f" * 64, dtype="float16", lora=LoRARecord(expert=2, sha256="e" * 64, merge=True)
)


def double(folder: Path) -> None:
    """Change the weights of an adapter."""
    weights = safetensors.torch.load_file(folder / ADAPTER_WEIGHTS)
    doubled = {name: 2 * tensor for name, tensor in weights.items()}
    safetensors.torch.save_file(doubled, folder / ADAPTER_WEIGHTS)


@pytest.fixture
def own_lora(lora_path: Path, tmp_path: Path) -> LoRASource:
    """An adapter whose files may be changed; nothing vouches for them."""
    shutil.copytree(lora_path, tmp_path / "mine")
    (tmp_path / "mine" / "manifest.json").unlink()
    return LoRASource("mine", str(tmp_path / "mine"), None, False, None).pinned(EXPERT)


@pytest.mark.parametrize("origin", [THEIRS, Origin()])
def test_a_file_tells_what_the_sampler_says_of_itself(served: Served, origin: Origin) -> None:
    """While Serve replaces replicas, the Ingress is perhaps of another version."""
    order = check(ImagesRequest(prompt="a cat", n=2), served, random_seed=9)
    pixels = np.zeros((32, 32, 3), np.uint8)
    drawing = Drawing(
        pictures=np.stack([pixels] * 2),
        expert_usage=[[1.0, 0.0, 0.0]] * 2,
        expert_weights=[[[1.0, 0.0, 0.0]]] * 2,
        missing_experts=[],
        last_resort=False,
        seconds=0.0,
        origin=origin,
    )
    partial = Partial(picture=0, index=0, step=1, pixels=pixels, origin=origin)
    files = [
        *encode_all(order, drawing, served),
        base64.b64decode(encode_partial(order, partial, served).b64_json),
    ]
    for file in files:
        record, _ = read_picture(file)
        assert Origin(bundle=record.bundle, dtype=record.dtype, lora=record.lora) == origin
    answer = response(order, drawing, served, [ImageData()] * 2, id="a")
    assert answer.paris.bundle == origin.bundle
    assert headers(order, served, drawing).get("X-Paris-Bundle") == origin.bundle


def test_an_origin_names_the_adapter_of_the_request_alone(own_lora: LoRASource) -> None:
    source = BundleSource("/bundle", "d", "bfloat16", loras=(own_lora,))
    assert source.origin(None) == Origin(bundle="d", dtype="bfloat16")
    assert source.origin("theirs") == source.origin(None)
    record = LoRARecord(expert=EXPERT, sha256=own_lora.sha256, merge=False)
    assert source.origin("mine") == Origin(bundle="d", dtype="bfloat16", lora=record)
    merged = source._replace(loras=(own_lora._replace(merge=True),))
    assert merged.origin("mine") != source.origin("mine")
    assert merged.origin(None) == source.origin(None)


def test_other_weights_at_the_place_of_an_adapter_are_another_version(
    own_lora: LoRASource, tiny_bundle_path: Path, tiny_bundle: Bundle
) -> None:
    source = BundleSource(str(tiny_bundle_path), loras=(own_lora,))
    assert open_bundle(source).loras == {"mine": EXPERT}
    double(Path(own_lora.uri))
    with pytest.raises(BundleError, match=rf"sha256=\w+ of .* is not allowed: {own_lora.sha256}"):
        open_bundle(source)  # a replica that is restarted, or added
    again = source._replace(loras=(own_lora.pinned(EXPERT),))
    assert open_bundle(again).loras == {"mine": EXPERT}
    assert again.origin("mine") != source.origin("mine")
    assert again.of_expert(EXPERT).version != source.of_expert(EXPERT).version
