"""From the text of a batch to what models read."""

from collections.abc import Callable

import torch
from torch import Tensor

from paris_ray.artifacts import VerifiedFolder
from paris_ray.encoders.clip import ClipText
from paris_ray.encoders.folders import TEXT_ENCODER, TOKENIZER
from paris_ray.encoders.text import load_text_encoder
from paris_ray.errors import TrainingError
from paris_ray.folders import Folder
from paris_ray.models import TextConditioning
from paris_ray.training.data import LatentDataset


def text_reader(
    dataset: LatentDataset, encoders: Folder | None, device: torch.device
) -> Callable[[Tensor], TextConditioning]:
    """Return the function from `Batch.text` on a device to its conditioning.

    Sentence vectors are one already. Token ids are read by a frozen text encoder, on the fly: what
    it makes of a caption is 768 times as large.

    Args:
        dataset: Where batches are from.
        encoders: Folder with `text_encoder/` and `tokenizer/`, needed for token ids.
        device: Where the encoder runs.

    Raises:
        TrainingError: if there is no encoder for token ids.
        BundleError: if its files do not fit.
    """
    if not dataset.has_token_ids:
        return TextConditioning.from_vectors
    if encoders is None:
        raise TrainingError("text is token ids, but no folder with a text encoder is given")
    encoder = load_text_encoder(
        VerifiedFolder(encoders / TEXT_ENCODER, None), VerifiedFolder(encoders / TOKENIZER, None)
    )
    if not isinstance(encoder, ClipText):
        raise TrainingError(f"text is token ids, but {encoders.uri} has an encoder of sentences")
    encoder.to(device)

    def encode(token_ids: Tensor) -> TextConditioning:
        # In float32 like when images are drawn, whatever the precision of the training around it.
        with torch.autocast(device.type, enabled=False):
            return encoder.encode_tokens(token_ids)

    return encode
