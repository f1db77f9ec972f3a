"""The tokenizers of text encoders, which need no torch: what a text consists of for them."""

from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray.encoders.folders import TOKENIZER_CONFIG, require_package, tokenizer_files
from paris_ray.errors import BundleError
from paris_ray.folders import Folder

_PANICS = "pyo3_runtime"  # the module of their class, which cannot be imported
FILE_KEYS = frozenset(
    {"vocab", "merges", "vocab_file", "merges_file", "tokenizer_file", "tokenizer_object"}
)
# MiniLM's: how many tokens a caption is padded to before it is encoded for a picture. Few, so that
# those that wait can be encoded together, and such that their products are of MANY_ROWS.
LENGTHS = (16, 32, 64, 128)
MAX_TOKENS = LENGTHS[-1]


@contextmanager
def tokenizing(where: object) -> Iterator[None]:
    """Raise BundleError for whatever a stranger's tokenizer makes its library raise.

    That has no narrower class than Exception, and panics of its Rust are not even such. What is
    not the tokenizer's fault passes: interrupts, cancellations, memory that is short.
    """
    try:
        yield
    except (MemoryError, CancelledError):
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or type(error).__module__ == _PANICS):
            raise
        raise BundleError(f"the tokenizer in {where} is damaged: {error}") from None


class ClipTokenizer:
    """CLIP's tokenizer: token ids, as many for every caption.

    Args:
        folder: Holds the tokenizer's files.
        max_length: Number of tokens L that every caption is cut or padded to (77).

    Raises:
        BundleError: if a file is missing or damaged.
    """

    def __init__(self, folder: Path, max_length: int) -> None:
        self.max_length, self._folder = max_length, folder
        self.tokenizer = _read_tokenizer(folder)
        self.end_of_text = int(self.tokenizer.eos_token_id)
        self.num_ids = 1 + max(self.tokenizer.get_vocab().values())

    def __call__(self, captions: Sequence[str]) -> NDArray[np.uint16]:
        """Return token ids `(B, L)`, padded with the tokenizer's own padding token.

        These are what is worth keeping of a corpus: 154 bytes a caption, its states are 118 kB.
        """
        with tokenizing(self._folder):
            encoded = self.tokenizer(
                list(captions), padding="max_length", truncation=True, max_length=self.max_length
            )
            return np.array(encoded["input_ids"], dtype=np.uint16)


def _read_tokenizer(folder: Path) -> Any:
    tokenizer_files(Folder(folder))
    _refuse_other_files(Folder(folder))
    require_package("transformers", folder)
    from transformers import CLIPTokenizer

    with tokenizing(folder):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise BundleError(f"the tokenizer in {folder} has no padding or no end-of-text token")
    return tokenizer


def _refuse_other_files(folder: Folder) -> None:
    """Refuse a configuration that names the tokenizer's files: they could be any of this machine.

    transformers hands every key of it to the tokenizer's constructor.
    """
    if not folder.exists(TOKENIZER_CONFIG):
        return
    document, config = folder.read_json(TOKENIZER_CONFIG), f"{folder.uri}/{TOKENIZER_CONFIG}"
    if not isinstance(document, dict):
        raise BundleError(f"{config} does not hold a mapping")
    for key in sorted(document.keys() & FILE_KEYS):
        raise BundleError(f"{config}: {key} is not allowed: the tokenizer's files have fixed names")


def read_tokenizer(path: Path) -> Any:
    """Return the `tokenizers.Tokenizer` in a file, which neither cuts nor pads.

    Raises:
        BundleError: if the file is damaged, or tokenizers is not installed.
    """
    require_package("tokenizers", path)
    from tokenizers import Tokenizer

    with tokenizing(path):
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
