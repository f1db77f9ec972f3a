"""What one expert, asked alone, draws for captions of its own shard."""

from itertools import chain, islice

import numpy as np
import torch

from paris_ray.artifacts import VerifiedFolder
from paris_ray.config import Config
from paris_ray.devices import resolve_device
from paris_ray.embeddings import TEXT_EMBEDDING, TOKEN_IDS, read_null_text, stream_column
from paris_ray.encoders.clip import ClipText
from paris_ray.encoders.codec import load_codec
from paris_ray.encoders.folders import TEXT_ENCODER, TOKENIZER
from paris_ray.encoders.text import load_text_encoder
from paris_ray.folders import Folder
from paris_ray.models import Expert, TextConditioning
from paris_ray.reports import picture_grid, png_bytes
from paris_ray.run import CODEC_FOLDERS
from paris_ray.sampling.generation import sample_one_expert

NUM_SAMPLES = 16
GRID_PIXELS = 128  # smaller pictures are enlarged to this height, to be seen


class SampleGrid:
    """Draws the same captions from the same noise each time, so that pictures can be compared.

    Args:
        config: The setup of the expert; its codec, sampling and device count.
        shard: Its training data: the first captions are drawn.
        encoders: Folder with the run's codec and text encoder.
        seed: Seed of the first picture.
    """

    def __init__(self, config: Config, shard: Folder, encoders: Folder, seed: int) -> None:
        self.config, self.seed = config, seed
        self.codec = VerifiedFolder(encoders / CODEC_FOLDERS[config.codec.kind], None)
        self.text, self.null_text = _read_text(
            shard, encoders, resolve_device(config.training.device)
        )

    def draw(self, expert: Expert) -> bytes:
        """Return a grid of pictures as PNG; the expert is in evaluation mode, on any device."""
        sampling, device = self.config.sampling, expert.pos_embed.device
        latents = sample_one_expert(
            expert,
            self.text,
            self.null_text,
            seeds=range(self.seed, self.seed + len(self.text)),
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            solver=sampling.solver,
            time_grid=sampling.time_grid,
        )
        # Read each time: a codec that stayed on the device would take room from training.
        codec = load_codec(self.codec, self.config.corpus.image_size).to(device)
        scale = max(1, GRID_PIXELS // self.config.corpus.image_size)
        return png_bytes(picture_grid(codec.decode(latents), columns=8, scale=scale))


def _read_text(
    shard: Folder, encoders: Folder, device: torch.device
) -> tuple[TextConditioning, TextConditioning]:
    """Return the first captions of a shard, without template, and the empty string."""
    null_text = read_null_text(shard)[None]
    has_token_ids = np.issubdtype(null_text.dtype, np.integer)
    column = stream_column(shard, TOKEN_IDS if has_token_ids else TEXT_EMBEDDING)
    rows = islice(chain.from_iterable(column), NUM_SAMPLES)
    captions = np.stack([variants[0] for variants in rows])
    dtype = np.int64 if has_token_ids else np.float32
    text, null = (torch.from_numpy(array.astype(dtype)) for array in (captions, null_text))
    if not has_token_ids:
        return TextConditioning.from_vectors(text), TextConditioning.from_vectors(null)
    encoder = load_text_encoder(
        VerifiedFolder(encoders / TEXT_ENCODER, None), VerifiedFolder(encoders / TOKENIZER, None)
    )
    assert isinstance(encoder, ClipText), "only CLIP has token ids"
    encoder.to(device)
    return encoder.encode_tokens(text), encoder.encode_tokens(null)
