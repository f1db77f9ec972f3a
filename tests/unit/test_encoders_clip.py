"""CLIP's text tower, from the public layout, a hub folder and open_clip; small and real."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, CLIPTextModel

from paris_ray.artifacts import VerifiedFolder, publish, read_manifest
from paris_ray.config import TextConfig
from paris_ray.encoders.clip import ClipText, copy_clip
from paris_ray.encoders.folders import TEXT_ENCODER_FILES, TOKENIZER_FILES, tokenizer_files
from paris_ray.encoders.images import register_packaged_models, save_open_clip
from paris_ray.encoders.open_clip_text import write_clip_from_open_clip
from paris_ray.encoders.text import MiniLM, load_text_encoder, write_text_encoder
from paris_ray.errors import ArtifactError, BundleError, ConfigError
from paris_ray.folders import Folder

REPOSITORY = Path(__file__).resolve().parents[2]
START, END = 49406, 49407
CAPTIONS = [
    "a red cat",
    "",
    "Hello, World! 50% off... it's #1 (yes) [no] {x} @home $5.00",
    "naïve café über straße; ΑΒΓ İstanbul",
    "日本語のテキスト मराठी مرحبا ไทย",
    "emoji 🐱🚀 e\u0301 ½ Ⅷ — …",
    "a  b\t\nc  ",
    "DON'T we're I'LL you've he'd I'm",
    "supercalifragilistic " * 40,
]


def make_open_clip(quick_gelu: bool = False, **text_options: Any) -> open_clip.CLIP:
    """A small open_clip model of CLIP's own vocabulary and text length, with random weights."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
    return open_clip.CLIP(16, vision, text | text_options, quick_gelu=quick_gelu).eval()


def save_model(model: open_clip.CLIP, folder: Path, *, quick_gelu: bool = False) -> Path:
    """Write it as an open_clip folder."""
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick_gelu}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return folder


def open_clip_text_tokens(model: open_clip.CLIP, token_ids: torch.Tensor) -> torch.Tensor:
    """open_clip's own token states `(B, L, D)`: `CLIP.encode_text` before it pools."""
    states = model.token_embedding(token_ids) + model.positional_embedding
    return model.ln_final(model.transformer(states, attn_mask=model.attn_mask))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text_encoder/` and `tokenizer/` in the layout of the public release."""
    source = save_model(make_open_clip(), tmp_path_factory.mktemp("open_clip"))
    folder = tmp_path_factory.mktemp("release")
    write_clip_from_open_clip("unused", str(source), Folder(folder))
    return folder


@pytest.fixture(scope="module")
def clip(release: Path) -> ClipText:
    return ClipText(release / "text_encoder", release / "tokenizer")


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    """A copy of the release that a test may damage."""
    copy_clip(release, Folder(tmp_path / "copy"))
    return tmp_path / "copy"


def load(folder: Path, **options: Any) -> ClipText:
    return ClipText(folder / "text_encoder", folder / "tokenizer", **options)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_converted_open_clip_weights_give_the_same_token_states(
    tmp_path: Path, quick_gelu: bool
) -> None:
    model = make_open_clip(quick_gelu)
    source = save_model(model, tmp_path / "open_clip", quick_gelu=quick_gelu)
    write_clip_from_open_clip("unused", str(source), Folder(tmp_path / "release"))
    encoder = load(tmp_path / "release")
    assert encoder.model.config.hidden_act == ("quick_gelu" if quick_gelu else "gelu")
    token_ids = encoder.tokenize(CAPTIONS)
    text = encoder.encode_tokens(token_ids)
    with torch.no_grad():
        ours = torch.from_numpy(token_ids.astype(np.int64))
        expected = open_clip_text_tokens(model, ours)
        pooled = model.encode_text(ours)
    assert text.text_embeddings.shape == (len(CAPTIONS), 77, 32)
    torch.testing.assert_close(text.text_embeddings, expected, rtol=0, atol=1e-4)
    projected = text.pooled_text @ model.text_projection
    torch.testing.assert_close(projected, pooled, rtol=0, atol=1e-4)
    other = make_open_clip(not quick_gelu)
    with torch.no_grad():
        assert (open_clip_text_tokens(other, ours) - expected).abs().max() > 1e-3


def test_padding_of_open_clip_changes_only_what_is_after_the_text(clip: ClipText) -> None:
    """open_clip pads with 0, the release with the end of the text; attention is causal."""
    model = make_open_clip()
    token_ids = open_clip.tokenizer.SimpleTokenizer()(CAPTIONS)
    with torch.no_grad():
        expected = open_clip_text_tokens(model, token_ids)
    text = clip.encode(CAPTIONS)
    mask = text.text_mask
    assert mask is not None
    torch.testing.assert_close(text.text_embeddings[mask], expected[mask], rtol=0, atol=1e-4)


def test_tokens_are_those_of_open_clip_up_to_padding(clip: ClipText) -> None:
    ours = clip.tokenize(CAPTIONS)
    theirs = open_clip.tokenizer.SimpleTokenizer()(CAPTIONS).numpy()
    assert ours.dtype == np.uint16
    assert ours.shape == theirs.shape == (len(CAPTIONS), clip.max_length) == (9, 77)
    padding = theirs == 0
    assert padding.any() and not padding.all()
    assert (ours[~padding] == theirs[~padding]).all()
    assert (ours[padding] == END).all()
    assert ours[1].tolist() == [START] + [END] * 76
    assert ours[-1, -1] == END  # cut, but it still ends


def test_the_mask_ends_with_the_text(clip: ClipText) -> None:
    text = clip.encode(["a red cat", "", CAPTIONS[-1]])
    assert text.text_mask is not None
    assert text.text_mask.dtype == torch.bool
    assert text.text_mask.sum(dim=1).tolist() == [5, 2, 77]
    assert text.text_mask[0].tolist() == [True] * 5 + [False] * 72
    assert torch.equal(text.pooled_text[0], text.text_embeddings[0, 4])
    assert torch.equal(text.pooled_text[1], text.text_embeddings[1, 1])


def test_captions_mean_the_same_in_a_batch_and_alone(clip: ClipText) -> None:
    together = clip.encode(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        alone = clip.encode([caption])
        assert alone.text_embeddings.shape == (1, 77, 32)
        torch.testing.assert_close(
            alone.text_embeddings[0], together.text_embeddings[i], rtol=0, atol=1e-5
        )


def test_experts_can_be_trained_on_encoded_tokens(clip: ClipText) -> None:
    projection = torch.nn.Linear(clip.embed_dim, 1)
    projection(clip.encode(["a cat"]).text_embeddings).sum().backward()
    assert projection.weight.grad is not None
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())


def test_text_encoders_move(release: Path, tiny_parts: Path) -> None:
    for encoder in (load(release), MiniLM(tiny_parts / "text_encoder")):
        assert encoder.to(torch.device("meta")) is encoder
        assert encoder.model.device.type == "meta"


def test_the_written_layout_is_the_public_one(release: Path) -> None:
    config = json.loads((release / "text_encoder" / "config.json").read_text())
    assert config["model_type"] == "clip_text_model"
    assert config["architectures"] == ["CLIPTextModel"]
    state = safetensors.torch.load_file(release / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in state)
    assert {path.name for path in (release / "tokenizer").iterdir()} <= set(TOKENIZER_FILES)
    model = CLIPTextModel.from_pretrained(release / "text_encoder")  # strangers can read it
    ids = torch.tensor([[START, 320, END]])
    ours = load(release).model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model(input_ids=ids).last_hidden_state, ours)


def write_hub_folder(release: Path, folder: Path, **text_options: Any) -> CLIPModel:
    """Write a whole CLIPModel beside its tokenizer, as hub repositories do."""
    torch.manual_seed(1)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = CLIPConfig(
        text_config=text | {"num_attention_heads": 4} | text_options,
        vision_config=vision | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    for path in (release / "tokenizer").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return model


@pytest.mark.parametrize("eos_token_id", [2, END])  # 2 is in OpenAI's own config.json, wrongly
def test_a_hub_folder_gives_its_text_tower(
    release: Path, tmp_path: Path, eos_token_id: int
) -> None:
    model = write_hub_folder(release, tmp_path / "hub", eos_token_id=eos_token_id)
    write_text_encoder(
        TextConfig(kind="clip", path=str(tmp_path / "hub")), Folder(tmp_path / "run")
    )
    state = safetensors.torch.load_file(tmp_path / "run/text_encoder/model.safetensors")
    assert all(name.startswith("text_model.") for name in state)
    direct = ClipText(tmp_path / "hub", tmp_path / "hub").encode(CAPTIONS)
    copied = load(tmp_path / "run").encode(CAPTIONS)
    assert torch.equal(direct.text_embeddings, copied.text_embeddings)
    with torch.no_grad():
        ids = torch.from_numpy(load(tmp_path / "run").tokenize(CAPTIONS).astype(np.int64))
        expected = model.text_model(input_ids=ids)
    torch.testing.assert_close(copied.text_embeddings, expected.last_hidden_state)
    torch.testing.assert_close(copied.pooled_text, expected.pooler_output)


def test_weights_as_transformers_5_names_them_are_read(release: Path, copy: Path) -> None:
    path = copy / "text_encoder" / "model.safetensors"
    state = safetensors.torch.load_file(path)
    renamed = {name.removeprefix("text_model."): value for name, value in state.items()}
    renamed["embeddings.position_ids"] = torch.arange(77)[None]  # as old releases did
    safetensors.torch.save_file(renamed, path)
    expected = load(release).encode(["a cat"])
    assert torch.equal(load(copy).encode(["a cat"]).text_embeddings, expected.text_embeddings)


def test_a_tokenizer_json_is_enough(release: Path, copy: Path, clip: ClipText) -> None:
    clip.tokenizer.tokenizer.backend_tokenizer.save(str(copy / "tokenizer" / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        (copy / "tokenizer" / name).unlink()
    assert np.array_equal(load(copy).tokenize(CAPTIONS), clip.tokenize(CAPTIONS))


def test_padding_is_the_tokenizers_own(copy: Path) -> None:
    """Stable Diffusion 2 pads with "!", whose id is 0."""
    path = copy / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "!"}))
    (copy / "tokenizer" / "special_tokens_map.json").unlink()
    assert load(copy).tokenize(["cat"])[0].tolist() == [START, 2368, END] + [0] * 74


def test_the_stored_dtype_can_be_kept(copy: Path) -> None:
    path = copy / "text_encoder" / "model.safetensors"
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file({n: v.half() for n, v in state.items()}, path)
    assert load(copy).encode(["cat"]).text_embeddings.dtype == torch.float32
    assert load(copy, dtype=None).model.dtype == torch.float16
    assert load(copy, dtype=torch.bfloat16).encode([""]).pooled_text.dtype == torch.bfloat16


@pytest.mark.parametrize("name", TEXT_ENCODER_FILES)
def test_a_missing_model_file_is_named(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / "text_encoder" / name).unlink()
    with pytest.raises(BundleError, match=f"lacks {name}"):
        load(copy)
    with pytest.raises(BundleError, match=f"lacks {name}"):
        copy_clip(copy, Folder(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_missing_vocabulary_is_named(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / "tokenizer" / name).unlink()
    with pytest.raises(BundleError, match=r"lacks tokenizer.json, or vocab.json and merges.txt"):
        load(copy)
    with pytest.raises(BundleError, match=r"lacks tokenizer.json"):
        copy_clip(copy, Folder(tmp_path / "other"))


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"hidden_size": 10**9}, "hidden_size=1000000000, allowed: 1 to"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"vocab_size": "many"}, "vocab_size='many'"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
        ({"num_attention_heads": 5}, "hidden_size=32, allowed: a multiple"),
        ({"hidden_act": "os.system"}, "hidden_act='os.system', allowed: gelu, quick_gelu"),
        ({"layer_norm_eps": "1"}, "layer_norm_eps='1'"),
        ({"model_type": "gpt2"}, "model_type='gpt2', expected clip_text_model or clip"),
        ({"model_type": "clip"}, "text_config=None is no mapping"),
        ({"num_hidden_layers": 3}, r"model.safetensors lacks encoder.layers.2"),
        ({"hidden_size": 64}, r"model.safetensors does not fit"),
        ({"vocab_size": 9}, r"model.safetensors does not fit"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(
    copy: Path, changes: dict[str, Any], fragment: str
) -> None:
    change_config(copy, **changes)
    with pytest.raises(BundleError, match=fragment):
        load(copy)


def test_a_configuration_cannot_name_code_or_other_files(copy: Path) -> None:
    """Neither kernels, nor remote code, nor the adapter that transformers would follow."""
    change_config(
        copy,
        auto_map={"AutoModel": "evil.Model"},
        _attn_implementation="stranger/kernel",
        quantization_config={"quant_method": "gptq", "bits": 4},
    )
    adapter = {"base_model_name_or_path": "stranger/model", "peft_type": "LORA"}
    (copy / "text_encoder" / "adapter_config.json").write_text(json.dumps(adapter))
    assert load(copy).model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("key", ["vocab", "merges", "vocab_file", "tokenizer_object"])
def test_a_tokenizer_cannot_name_other_files(copy: Path, key: str) -> None:
    """transformers would read them, wherever they are."""
    config = copy / "tokenizer" / "tokenizer_config.json"
    document = json.loads(config.read_text()) if config.exists() else {}
    config.write_text(json.dumps(document | {key: "/etc/passwd"}))
    with pytest.raises(BundleError, match=rf"tokenizer_config.json: {key} is not allowed"):
        load(copy)


@pytest.mark.parametrize("payload", [b"", b"\x80\x04K\x01.", b"\xff" * 64])
def test_weights_that_are_not_safetensors_are_refused(copy: Path, payload: bytes) -> None:
    (copy / "text_encoder" / "model.safetensors").write_bytes(payload)
    with pytest.raises(BundleError, match=r"model.safetensors is not a safetensors file"):
        load(copy)


def test_pickled_weights_do_not_count(copy: Path) -> None:
    weights = copy / "text_encoder" / "model.safetensors"
    torch.save(safetensors.torch.load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(BundleError, match=r"lacks model.safetensors"):
        load(copy)


def test_weights_without_a_text_tower_are_refused(copy: Path) -> None:
    path = copy / "text_encoder" / "model.safetensors"
    safetensors.torch.save_file({"text_model.position_ids": torch.zeros(1)}, path)
    with pytest.raises(BundleError, match="holds no text tower"):
        load(copy)


def test_damaged_tokenizers_are_refused(copy: Path) -> None:
    (copy / "tokenizer" / "merges.txt").write_text("#version: 0.2\nnot-in vocabulary\n")
    with pytest.raises(BundleError, match="is damaged"):
        load(copy)


def test_token_ids_beyond_the_model_are_refused(copy: Path) -> None:
    path = copy / "tokenizer" / "vocab.json"
    vocabulary = json.loads(path.read_text())
    path.write_text(json.dumps(vocabulary | {"cat</w>": 50_000}))
    with pytest.raises(BundleError, match=r"ids up to 50000, .* vocab_size=49408"):
        load(copy)


@pytest.mark.parametrize(
    "text_options",
    [{"no_causal_mask": True}, {"ls_init_value": 0.1}, {"qk_norm": True}, {"vocab_size": 99}],
)
def test_other_text_towers_of_open_clip_are_refused(
    tmp_path: Path, text_options: dict[str, Any]
) -> None:
    folder = save_model(make_open_clip(**text_options), tmp_path)
    path = folder / "open_clip_config.json"
    document = json.loads(path.read_text())
    document["model_cfg"]["text_cfg"] |= text_options
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="is not built like CLIP's"):
        write_clip_from_open_clip("unused", str(folder), Folder(tmp_path / "release"))


def test_a_packaged_open_clip_architecture_and_its_folder(tmp_path: Path) -> None:
    register_packaged_models()
    model = open_clip.create_model("paris-tiny", load_weights=False)
    save_open_clip(model, "paris-tiny", Folder(tmp_path / "model"))
    config = TextConfig(kind="open_clip", model="paris-tiny", path=str(tmp_path / "model"))
    write_text_encoder(config, Folder(tmp_path / "run"))
    encoder = load(tmp_path / "run")
    assert (encoder.max_length, encoder.embed_dim) == (12, 64)
    file = str(tmp_path / "model" / "open_clip_model.safetensors")
    write_clip_from_open_clip("paris-tiny", file, Folder(tmp_path / "again"))
    weights = "text_encoder/model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "run" / weights).read_bytes()


def part(folder: Path, name: str) -> VerifiedFolder:
    return VerifiedFolder(Folder(folder / name), None)


def test_the_stored_configuration_says_which_encoder_it_is(
    release: Path, tiny_parts: Path, tmp_path: Path
) -> None:
    tokenizer = part(release, "tokenizer")
    assert isinstance(load_text_encoder(part(release, "text_encoder"), tokenizer), ClipText)
    absent = part(tiny_parts, "tokenizer")
    assert isinstance(load_text_encoder(part(tiny_parts, "text_encoder"), absent), MiniLM)
    Folder(tmp_path / "text_encoder").write_json("config.json", {"model_type": "t5"})
    with pytest.raises(BundleError, match="model_type='t5', allowed: bert, clip_text_model, clip"):
        load_text_encoder(part(tmp_path, "text_encoder"), tokenizer)


def test_published_files_are_verified(copy: Path) -> None:
    publish(Folder(copy), "encoders", config_digest="", parents={}, facts={})
    source = VerifiedFolder(Folder(copy), read_manifest(Folder(copy), "encoders").files)
    parts = source.part("text_encoder"), source.part("tokenizer")
    assert load_text_encoder(*parts).embed_dim == 32
    with (copy / "tokenizer" / "merges.txt").open("a") as file:
        file.write("\n")
    with pytest.raises(ArtifactError, match=r"merges.txt does not have the digest"):
        load_text_encoder(*parts)


def test_which_files_a_tokenizer_has(release: Path) -> None:
    expected = ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
    assert tokenizer_files(Folder(release / "tokenizer")) == expected


@pytest.mark.parametrize(
    ("kind", "example"), [("clip", "openai/clip-vit-large-patch14"), ("open_clip", "openai")]
)
def test_clip_needs_a_path(tmp_path: Path, kind: Any, example: str) -> None:
    with pytest.raises(ConfigError, match=f"text.path is null, text.kind={kind} .* {example}"):
        write_text_encoder(TextConfig(kind=kind), Folder(tmp_path))


def test_an_incomplete_release_folder_is_refused(release: Path, tmp_path: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    config = TextConfig(kind="clip", path=str(tmp_path))
    with pytest.raises(BundleError, match="lacks"):
        write_text_encoder(config, Folder(tmp_path / "run"))


def test_another_text_model_in_place_of_clip_is_refused(copy: Path) -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config).save_pretrained(copy / "text_encoder")
    with pytest.raises(BundleError, match="model_type='bert'"):
        load(copy)


def test_importing_encoders_imports_no_model_library() -> None:
    modules = ("transformers", "diffusers", "open_clip", "timm", "huggingface_hub")
    check = f"import sys; assert not sys.modules.keys() & set({modules}), sys.modules.keys()"
    command = f"import paris_ray.encoders.text, paris_ray.encoders.codec; {check}"
    subprocess.run([sys.executable, "-c", command], check=True, cwd=REPOSITORY, env=os.environ)


def test_a_folder_in_the_place_of_the_tokenizers_configuration_is_refused(copy: Path) -> None:
    config = copy / "tokenizer" / "tokenizer_config.json"
    config.unlink(missing_ok=True)
    config.mkdir()
    with pytest.raises(ArtifactError, match=r"tokenizer_config.json cannot be read"):
        load(copy)
