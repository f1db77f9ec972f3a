"""The folders of codecs and text encoders: their files, and what reads them. No torch.

vae/           config.json  diffusion_pytorch_model.safetensors          AutoencoderKL
codec/         config.json  codec.safetensors                            our own
text_encoder/  config.json  model.safetensors                            CLIP
config.json  model.safetensors  tokenizer.json            MiniLM
tokenizer/     tokenizer.json, or vocab.json and merges.txt; tokenizer_config.json ...   of CLIP
"""

from collections.abc import Sequence
from importlib.util import find_spec

from paris_ray.errors import BundleError
from paris_ray.folders import Folder

CONFIG = "config.json"
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
VAE_FILES = (CONFIG, VAE_WEIGHTS)
CODEC_WEIGHTS = "codec.safetensors"
CODEC_FILES = (CONFIG, CODEC_WEIGHTS)
TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"
TEXT_ENCODER_WEIGHTS = "model.safetensors"
TEXT_ENCODER_FILES = (CONFIG, TEXT_ENCODER_WEIGHTS)
TOKENIZER_FILE = "tokenizer.json"
MINILM_FILES = (*TEXT_ENCODER_FILES, TOKENIZER_FILE)
VOCABULARY_FILES = ("vocab.json", "merges.txt")
TOKENIZER_CONFIG = "tokenizer_config.json"
# What a tokenizer may consist of; tokenizer.json or both vocabulary files must be there.
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    *VOCABULARY_FILES,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
)
CLIP_TYPES = ("clip_text_model", "clip")  # what `config.json` has as its model_type
MAX_BLOCKS = 8  # of an AutoencoderKL


def require_package(name: str, where: object) -> None:
    """Raise BundleError, saying what to install, unless the package that reads `where` is there."""
    if find_spec(name) is None:
        raise BundleError(f"{where} needs {name}: pip install 'paris_ray[paris]'")


def tokenizer_files(folder: Folder) -> list[str]:
    """Return which of TOKENIZER_FILES a folder has; raises BundleError if they do not suffice."""
    names = [name for name in TOKENIZER_FILES if folder.exists(name)]
    if TOKENIZER_FILE not in names and not set(VOCABULARY_FILES) <= set(names):
        vocabulary = " and ".join(VOCABULARY_FILES)
        raise BundleError(f"tokenizer folder {folder.uri} lacks tokenizer.json, or {vocabulary}")
    return names


def downsampling(block_out_channels: Sequence[int]) -> int:
    """Return how many pixels a latent pixel spans: every block but the last halves."""
    return int(2 ** (len(block_out_channels) - 1))
