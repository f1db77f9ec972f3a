"""What a text encoder will not read of a prompt, found by its tokenizer alone: no weights load."""

import unicodedata
from dataclasses import dataclass
from typing import Any

from paris_ray.artifacts import VerifiedFolder
from paris_ray.encoders.folders import CLIP_TYPES, CONFIG, TOKENIZER_FILE, tokenizer_files
from paris_ray.encoders.tokenizers import MAX_TOKENS, ClipTokenizer, read_tokenizer
from paris_ray.errors import BundleError

INVISIBLE = frozenset({"Cc", "Cf", "Mn", "Zl", "Zp", "Zs"})  # Unicode's categories
BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # letters and symbols that show nothing


@dataclass(frozen=True, slots=True)
class TextReport:
    """What an encoder makes of a text.

    Attributes:
        num_tokens: Tokens of the whole text, with the two that mark its ends.
        max_tokens: How many of them the encoder reads.
        unread: The text behind the last token that is read; empty if all is.
        unknown: Parts of the text that the encoder knows no token for, each once.
    """

    num_tokens: int
    max_tokens: int
    unread: str
    unknown: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left of the text but the marks of its ends."""
        return self.num_tokens <= 2


class TextInspector:
    """Tells what an encoder will not read.

    Args:
        tokenizer: A `tokenizers.Tokenizer` that neither cuts nor pads.
        max_tokens: How many tokens the encoder reads.
        unknown_token: What stands for parts that it does not know; None: it knows all bytes.
    """

    def __init__(self, tokenizer: Any, max_tokens: int, unknown_token: str | None) -> None:
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._unknown_token = unknown_token

    def inspect(self, text: str) -> TextReport:
        """Return what the encoder makes of a text."""
        encoding = self._tokenizer.encode(text)
        unread = ""
        if len(encoding.ids) > self._max_tokens:
            # The last place is that of the mark of the end, so one token fewer of the text is read.
            unread = text[encoding.offsets[self._max_tokens - 2][1] :]
        tokens = zip(encoding.tokens, encoding.offsets, strict=True)
        unknown = (text[a:b] for token, (a, b) in tokens if token == self._unknown_token)
        return TextReport(
            len(encoding.ids), self._max_tokens, unread, tuple(dict.fromkeys(unknown))
        )


def load_text_inspector(text_encoder: VerifiedFolder, tokenizer: VerifiedFolder) -> TextInspector:
    """Return the inspector for the text encoder of a bundle; arguments as `load_text_encoder`.

    Raises:
        BundleError: if the encoder is of an unknown kind, or its tokenizer is damaged.
        ArtifactError: if a file is missing or is not the published one.
    """
    document = text_encoder.read_json(CONFIG)
    model_type = document.get("model_type") if isinstance(document, dict) else None
    if model_type == "bert":
        fast = read_tokenizer(text_encoder.verified_file(TOKENIZER_FILE))
        return TextInspector(fast, MAX_TOKENS, fast.model.unk_token)
    if model_type in CLIP_TYPES:
        tower = document.get("text_config", document)
        max_tokens = tower.get("max_position_embeddings") if isinstance(tower, dict) else None
        if not isinstance(max_tokens, int):
            where = f"{text_encoder.folder.uri}/{CONFIG}"
            raise BundleError(f"{where}: max_position_embeddings={max_tokens!r} is no number")
        folder = tokenizer.local_path(tokenizer_files(tokenizer.folder))
        fast = ClipTokenizer(folder, max_tokens).tokenizer.backend_tokenizer
        return TextInspector(fast, max_tokens, None)
    allowed = ", ".join(("bert", *CLIP_TYPES))
    where = f"{text_encoder.folder.uri}/{CONFIG}"
    raise BundleError(f"{where}: model_type={model_type!r}, allowed: {allowed}")


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing: spaces, control and format characters, lone marks."""
    return all(unicodedata.category(c) in INVISIBLE or c in BLANKS for c in text)
