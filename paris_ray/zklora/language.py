"""Causal language models in folders of transformers: `config.json`, `tokenizer.json`, safetensors.

One's own copies on this machine: nothing is downloaded, no code of the folder runs, no pickle is
opened.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from paris_ray.artifacts import canonical_json, file_sha256, sha256_hex
from paris_ray.encoders.folders import require_package
from paris_ray.encoders.pretrained import read_weights
from paris_ray.encoders.tokenizers import tokenizing
from paris_ray.errors import BundleError, ConfigError, ParisError
from paris_ray.folders import Folder
from paris_ray.zklora.manifest import Base

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"\w[\w.-]*\.safetensors")


def base_of_model(folder: Path) -> Base:
    """Return what an adapter of a model is for: the SHA-256 of its weights.

    Of several shards it is the SHA-256 of their names and digests, as canonical JSON.

    Raises:
        ConfigError: as `weight_files`.
    """
    files = {
        path.name: file_sha256(Folder(str(folder)), path.name) for path in weight_files(folder)
    }
    is_one = list(files) == [WEIGHTS]
    digest = files[WEIGHTS] if is_one else sha256_hex(canonical_json(files))
    return Base(digest=digest, expert=None, router_digest=None)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors of a model: one file, or the shards that its index names, sorted.

    Raises:
        ConfigError: if the folder has no configuration, or none of them, or the index is damaged.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} is no folder of a model: {CONFIG} is missing")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ConfigError(f"{folder} has neither {WEIGHTS} nor {INDEX}: no other weights are read")
    index: Any = Folder(str(folder)).read_json(INDEX)
    named = index.get("weight_map") if isinstance(index, dict) else None
    shards: set[Any] = set(named.values()) if isinstance(named, dict) and named else {None}
    for shard in shards:
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise ConfigError(
                f"{folder / INDEX}: weight_map names {shard!r:.80}, which is no shard"
            )
        if not (folder / shard).is_file():
            raise ConfigError(f"{folder} lacks the shard {shard}")
    return [folder / shard for shard in sorted(shards)]


def skeleton(folder: Path) -> nn.Module:
    """Return a model without memory for its weights.

    Raises:
        BundleError: if its configuration is not that of a causal language model.
    """
    require_package("transformers", folder)
    from transformers import AutoConfig, AutoModelForCausalLM  # here: its import is slow

    try:
        config: Any = AutoConfig.from_pretrained(
            folder.resolve(), local_files_only=True, trust_remote_code=False
        )
        if getattr(config, "quantization_config", None) is not None:
            raise BundleError(f"{folder / CONFIG}: quantization_config is not allowed")
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, attn_implementation="eager"
            ).eval()
    except ParisError:
        raise
    except Exception as error:  # what a configuration makes transformers raise has no other class
        reason = " ".join(str(error).split())[:300]
        raise BundleError(f"{folder / CONFIG} is of no causal language model: {reason}") from None


def load_model(folder: Path, device: str) -> nn.Module:
    """Return a model with its weights, of the type that they are stored in, without gradients.

    Raises:
        BundleError: if weights are missing or misshapen, or as `skeleton`.
        ConfigError: as `weight_files`.
    """
    empty: Any = skeleton(folder)
    state = {
        key: value for path in weight_files(folder) for key, value in read_weights(path).items()
    }
    try:
        model, report = type(empty).from_pretrained(
            None,
            config=empty.config,
            state_dict=state,
            dtype="auto",
            attn_implementation="eager",
            output_loading_info=True,
        )
    except RuntimeError as error:
        raise BundleError(f"the weights in {folder} do not fit {CONFIG}: {error}") from None
    if report["missing_keys"]:  # transformers would fill them at random
        missing = ", ".join(sorted(report["missing_keys"]))
        raise BundleError(f"the weights in {folder} lack {missing:.300}")
    return model.eval().requires_grad_(False).to(device)


def tokenise(folder: Path, texts: Sequence[str]) -> list[Tensor]:
    """Return the token ids of each text, with what the tokenizer puts around it: int64 `(tokens,)`.

    Raises:
        ConfigError: if there is no tokenizer, or a text has fewer than two tokens.
        BundleError: if the tokenizer is damaged.
    """
    require_package("tokenizers", folder)
    from tokenizers import Tokenizer

    path = folder / TOKENIZER
    if not path.is_file():
        raise ConfigError(f"{path} is missing: save it with the tokenizer's save_pretrained")
    with tokenizing(folder):
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = [torch.tensor(tokenizer.encode(text).ids, dtype=torch.int64) for text in texts]
    for text, tokens in zip(texts, ids, strict=True):
        if len(tokens) < 2:
            raise ConfigError(f"texts: {text!r:.80} has {len(tokens)} tokens, allowed: at least 2")
    return ids


def check_lengths(model: nn.Module, ids: Sequence[Tensor]) -> None:
    """Raise ConfigError if a text has more tokens than the model has places, or others than its."""
    config: Any = model.config
    places = getattr(config, "max_position_embeddings", None)
    for tokens in ids:
        if isinstance(places, int) and len(tokens) > places:
            raise ConfigError(f"texts: one has {len(tokens)} tokens, the model reads {places}")
        if int(tokens.max()) >= config.get_text_config().vocab_size:
            raise ConfigError(f"texts: token {int(tokens.max())} is none of the model's vocabulary")


@torch.inference_mode()
def token_loss(model: Callable[..., Any], ids: Tensor, device: str) -> Tensor:
    """Return the mean negative log-likelihood of the tokens after the first, in nats: `(1, 1)`.

    Args:
        model: A causal language model, or a view of it.
        ids: `(tokens,)` int64, at least two.
        device: Where the model is.
    """
    tokens = ids.to(device)
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
    return cross_entropy(logits.float(), tokens[1:]).reshape(1, 1).cpu()
