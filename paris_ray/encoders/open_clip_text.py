"""open_clip's text tower, rewritten to the layout of the public Paris release."""

from typing import Any

from open_clip import CLIP
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from paris_ray.encoders.clip import PREFIX, write_text_tower
from paris_ray.encoders.folders import TOKENIZER
from paris_ray.encoders.images import load_open_clip
from paris_ray.errors import ConfigError
from paris_ray.folders import Folder

START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"
# Activations of open_clip, as they print, and what transformers calls them.
ACTIVATIONS = {"GELU(approximate='none')": "gelu", "QuickGELU()": "quick_gelu"}


def write_clip_from_open_clip(model_name: str, checkpoint: str, target: Folder) -> None:
    """Write `text_encoder/` and `tokenizer/` of an open_clip model's text tower.

    The tokenizer is the public release's: it pads with the end of the text where open_clip's pads
    with 0, and leaves HTML entities, ligatures and curly quotes as they are.

    Args:
        model_name: Architecture, such as `ViT-L-14`; a folder brings its own.
        checkpoint: An open_clip tag, a `.safetensors` file or an open_clip folder.
        target: Where the two folders are written.

    Raises:
        ConfigError: if the checkpoint cannot be read, or its text tower is not built like CLIP's.
    """
    model = load_open_clip(model_name, checkpoint, field="text.path")
    vocabulary = SimpleTokenizer()
    if not _has_clip_text_tower(model) or model.vocab_size != vocabulary.vocab_size:
        raise ConfigError(
            f"text.model={model_name!r}, text.path={checkpoint!r}: "
            f"the text tower of this {type(model).__name__} is not built like CLIP's"
        )
    write_text_tower(target, _architecture(model), _released_weights(model))
    _write_tokenizer(target / TOKENIZER, vocabulary, model.context_length)


def _has_clip_text_tower(model: Any) -> bool:
    """Return whether the text tower is causal and of plain blocks of a known activation."""
    if not isinstance(model, CLIP) or model.attn_mask is None:
        return False
    block = model.transformer.resblocks[0]
    plain = type(block) is ResidualAttentionBlock and isinstance(block.ls_1, nn.Identity)
    return plain and str(block.mlp.gelu) in ACTIVATIONS


def _architecture(model: Any) -> dict[str, Any]:
    """Return the configuration of an open_clip text tower as transformers has it."""
    block = model.transformer.resblocks[0]
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.transformer.width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(model.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "max_position_embeddings": model.context_length,
        "hidden_act": ACTIVATIONS[str(block.mlp.gelu)],
        "layer_norm_eps": model.ln_final.eps,
    }


def _released_weights(model: Any) -> dict[str, Tensor]:
    """Return the weights of an open_clip text tower under the released names."""
    modules = {"embeddings.token_embedding": model.token_embedding}
    weights = {"embeddings.position_embedding.weight": model.positional_embedding}
    for i, block in enumerate(model.transformer.resblocks):
        layer = f"encoder.layers.{i}"
        modules[f"{layer}.layer_norm1"] = block.ln_1
        modules[f"{layer}.self_attn.out_proj"] = block.attn.out_proj
        modules[f"{layer}.layer_norm2"] = block.ln_2
        modules[f"{layer}.mlp.fc1"] = block.mlp.c_fc
        modules[f"{layer}.mlp.fc2"] = block.mlp.c_proj
        for kind in ("weight", "bias"):  # queries, keys and values are fused
            parts = getattr(block.attn, f"in_proj_{kind}").chunk(3)
            names = (f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv")
            weights |= zip(names, parts, strict=True)
    modules["final_layer_norm"] = model.ln_final
    for name, module in modules.items():
        weights |= {f"{name}.{kind}": value for kind, value in module.named_parameters()}
    return {f"{PREFIX}{name}": value.detach().clone() for name, value in weights.items()}


def _write_tokenizer(folder: Folder, vocabulary: Any, max_length: int) -> None:
    """Write CLIP's tokenizer from open_clip's copy of its vocabulary."""
    tokens = [*list(vocabulary.encoder)[:-2], START_OF_TEXT, END_OF_TEXT]
    merges = [" ".join(pair) for pair in vocabulary.bpe_ranks]
    special = {
        "bos_token": START_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
    }
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length}
    folder.write_json("vocab.json", {token: i for i, token in enumerate(tokens)})
    folder.write("merges.txt", "\n".join(["#version: 0.2", *merges, ""]).encode())
    folder.write_json("tokenizer_config.json", config | special)
    folder.write_json("special_tokens_map.json", special)
