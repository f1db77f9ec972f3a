"""CLIP's text tower in the layout of the public Paris release.

    text_encoder/  config.json  model.safetensors
    tokenizer/     tokenizer.json, or vocab.json and merges.txt; tokenizer_config.json ...

A hub folder (openai/clip-vit-large-patch14) and an open_clip model are rewritten to it, so that a
run folder and a bundle hold one layout whatever they were made from.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from paris_ray.encoders.folders import (
    CLIP_TYPES,
    CONFIG,
    TEXT_ENCODER,
    TEXT_ENCODER_FILES,
    TEXT_ENCODER_WEIGHTS,
    TOKENIZER,
    require_package,
    tokenizer_files,
)
from paris_ray.encoders.pretrained import load_transformer, read_weights
from paris_ray.encoders.tokenizers import ClipTokenizer
from paris_ray.errors import BundleError
from paris_ray.folders import Folder, parse_json
from paris_ray.models import TextConditioning

MAX_VOCAB_SIZE = 2**16  # token ids are kept in 16 bits
PREFIX = "text_model."
WORD_END = "</w>"  # ends a token that ends a word


class ClipText:
    """CLIP's text tower: a state a token, for cross-attention (Paris: 77 x 768).

    Every caption is padded to the same length, so a batch has one shape whatever is in it.

    Args:
        text_encoder: Folder with `config.json` and `model.safetensors` of a CLIPTextModel, or of
            a whole CLIPModel.
        tokenizer: Folder with the tokenizer's files.
        dtype: Data type of the weights and of what is returned; None keeps the stored one.

    Raises:
        BundleError: if a file is missing, is not CLIP's, or does not fit the others.
    """

    def __init__(
        self, text_encoder: Path, tokenizer: Path, dtype: torch.dtype | None = torch.float32
    ) -> None:
        architecture, state = read_text_tower(text_encoder)
        require_package("transformers", text_encoder)
        # Imported here: the core never needs transformers, and its import is slow.
        from transformers import CLIPTextModel

        stored = next(iter(state.values())).dtype
        self.model = load_transformer(
            CLIPTextModel, architecture, state, where=text_encoder, dtype=dtype or stored
        )
        self.tokenizer = ClipTokenizer(tokenizer, int(self.model.config.max_position_embeddings))
        vocab_size = self.model.config.vocab_size
        if self.tokenizer.num_ids > min(vocab_size, MAX_VOCAB_SIZE):
            raise BundleError(
                f"the tokenizer in {tokenizer} has ids up to {self.tokenizer.num_ids - 1}, "
                f"{text_encoder}/{CONFIG} has vocab_size={vocab_size}, at most {MAX_VOCAB_SIZE}"
            )

    @property
    def embed_dim(self) -> int:
        """Width D of the token states (768 in Paris)."""
        return int(self.model.config.hidden_size)

    @property
    def max_length(self) -> int:
        """Number of tokens L that every caption is cut or padded to (77)."""
        return self.tokenizer.max_length

    @property
    def lengths(self) -> tuple[int, ...]:
        """The same, as `TextEncoder` has it."""
        return (self.max_length,)

    def tokenize(self, captions: Sequence[str]) -> NDArray[np.uint16]:
        """Return token ids `(B, L)`; see `ClipTokenizer`."""
        return self.tokenizer(captions)

    @property
    def words(self) -> dict[str, int]:
        """The ids of the tokens that are whole words."""
        vocabulary: dict[str, int] = self.tokenizer.tokenizer.get_vocab()
        whole = {t.removesuffix(WORD_END): i for t, i in vocabulary.items() if WORD_END in t}
        return {word: number for word, number in whole.items() if word.isalnum()}

    @torch.no_grad()  # not inference_mode: experts are trained on what this returns
    def encode_tokens(self, token_ids: NDArray[np.uint16] | Tensor) -> TextConditioning:
        """Return the conditioning of token ids `(B, L)`.

        `text_embeddings` is the last hidden state after the final LayerNorm, padding included;
        `pooled_text` its row at the end of the text, without CLIP's projection; `text_mask` is
        True up to and including that row.
        """
        return self.conditioning(token_ids)

    def conditioning(self, token_ids: NDArray[np.uint16] | Tensor) -> TextConditioning:
        """Return the same, through which gradients flow."""
        ids = torch.as_tensor(token_ids).long().to(self.model.device)
        states = self.model(input_ids=ids).last_hidden_state
        is_end = ids == self.tokenizer.end_of_text
        text_mask = is_end.cumsum(dim=1) - is_end.long() == 0
        last = text_mask.sum(dim=1) - 1
        rows = torch.arange(len(ids), device=ids.device)
        return TextConditioning(states, states[rows, last], text_mask)

    def encode(self, captions: Sequence[str]) -> TextConditioning:
        """Return the conditioning of some captions; see `encode_tokens`."""
        return self.encode_tokens(self.tokenize(captions))

    def to(self, device: torch.device) -> "ClipText":
        """Move the model to a device."""
        self.model.to(device)
        return self


def read_text_tower(folder: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """Return architecture and weights of a CLIPTextModel, or those of a CLIPModel's text tower.

    Weights have the released names, `text_model.*`; transformers 5 writes them without the prefix.

    Raises:
        BundleError: if the folder holds something else.
    """
    where = f"{folder}/{CONFIG}"
    for name in TEXT_ENCODER_FILES:
        if not (folder / name).is_file():
            raise BundleError(f"text encoder folder {folder} lacks {name}")
    document = parse_json((folder / CONFIG).read_bytes(), where)
    model_type = document.get("model_type") if isinstance(document, dict) else None
    if model_type not in CLIP_TYPES:
        raise BundleError(f"{where}: model_type={model_type!r}, expected {' or '.join(CLIP_TYPES)}")
    architecture = document if model_type == "clip_text_model" else document.get("text_config")
    if not isinstance(architecture, dict):
        raise BundleError(f"{where}: text_config={architecture!r} is no mapping")
    state = read_weights(folder / TEXT_ENCODER_WEIGHTS)
    if not any(name.startswith(PREFIX) for name in state):
        state = {f"{PREFIX}{name}": value for name, value in state.items()}
    tower = {name: value for name, value in state.items() if _is_text_weight(name)}
    if not tower:
        raise BundleError(f"{folder}/{TEXT_ENCODER_WEIGHTS} holds no text tower")
    return architecture, tower


def _is_text_weight(name: str) -> bool:
    # Old releases of transformers stored the positions 0..76 beside the weights.
    return name.startswith(PREFIX) and not name.endswith(".position_ids")


def copy_clip(source: Path, target: Folder) -> None:
    """Write `text_encoder/` and `tokenizer/` of a CLIP text tower.

    Args:
        source: A folder that holds these two, or a flat one as on the hub: a CLIPModel, of which
            the text tower is taken, beside its tokenizer.
        target: Where the two folders are written.

    Raises:
        BundleError: if a file is missing or is not CLIP's.
    """
    nested = (source / TEXT_ENCODER).is_dir()
    tokenizer = Folder(source / TOKENIZER if nested else source)
    names = tokenizer_files(tokenizer)
    write_text_tower(target, *read_text_tower(source / TEXT_ENCODER if nested else source))
    for name in names:
        (target / TOKENIZER).write(name, tokenizer.read(name))


def write_text_tower(
    target: Folder, architecture: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    """Write `text_encoder/`: the configuration of a CLIPTextModel, and its released weights."""
    config = {**architecture, "architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    (target / TEXT_ENCODER).write_json(CONFIG, config)
    payload = safetensors.torch.save(dict(state), metadata={"format": "pt"})
    (target / TEXT_ENCODER).write(TEXT_ENCODER_WEIGHTS, payload)
