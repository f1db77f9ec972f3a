"""The pictures of a LoRA, encoded by the codec and the text encoder of the bundle it is for."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray

from paris_ray.artifacts import Manifest
from paris_ray.bundle import Bundle
from paris_ray.config import Config
from paris_ray.corpora import captions_per_row, held_out_rule, open_corpus
from paris_ray.embeddings import (
    LATENTS,
    LATENTS_FLIPPED,
    TEXT_EMBEDDING,
    TOKEN_IDS,
    write_null_text,
)
from paris_ray.encoders.clip import ClipText
from paris_ray.pipeline.accounts import account_of, files_by_shard
from paris_ray.pipeline.duplicates import drop_few_duplicates
from paris_ray.pipeline.embed import count_rows, refuse_bad_corpus
from paris_ray.pipeline.shards import Batch, ShardReader, ShardWriter, caption_variants
from paris_ray.pipeline.stage import Stage
from paris_ray.run import EMBEDDINGS, Run

PICTURES_AT_ONCE = 8  # through the codec: an autoencoder takes much memory


def embed_pictures(setup: Config, bundle: Bundle, parents: Mapping[str, str]) -> Manifest:
    """Publish `embeddings/` and `quarantine/` in the folder of a LoRA.

    Args:
        setup: The folder, as `run_dir`, and the corpus.
        bundle: Its codec and text encoder are used.
        parents: Digests of its parts.

    Raises:
        CorpusError: if more than `corpus.max_bad_share` of the rows are bad.
    """
    run = Run(setup)
    stage = Stage(EMBEDDINGS, run.embeddings, setup, sections=("corpus",), parents=parents)
    manifest = stage.finished()
    if manifest is not None:
        return manifest
    for folder in (run.embeddings, run.quarantine):  # of an attempt that was cut off
        folder.clear()
    stage.begin()
    corpus = open_corpus(setup.corpus)
    shards = corpus.shards()
    held_out = held_out_rule(setup.corpus, corpus, shards, setup.seed)
    num_captions = captions_per_row(setup.corpus, corpus, shards)
    read, write = ShardReader(setup, held_out, num_captions), ShardWriter(setup)
    for shard in shards:
        # Where pictures changed, the adapter's folder is refused: there is nothing to tell apart.
        item = asdict(shard) | {"version": ""}
        for batch in read({name: np.array([value]) for name, value in item.items()}):
            text, latents = _text(batch, setup, bundle), _latents(batch, setup, bundle)
            write(batch | text | latents)
    write_null_text(run.embeddings, _encode_captions(bundle, [""])[0])
    drop_few_duplicates(setup, [shard.name for shard in shards])
    files = files_by_shard(run)
    counts = count_rows({name: account_of(run, files[name]) for name in files})
    refuse_bad_corpus(setup, counts)
    return stage.publish(counts | {"attribution": corpus.attribution})


def _text(batch: Batch, setup: Config, bundle: Bundle) -> Batch:
    encoded = _encode_captions(bundle, caption_variants(batch, setup.corpus.caption_templates))
    shape = (len(batch["caption"]), -1, *encoded.shape[1:])
    if isinstance(bundle.text_encoder, ClipText):
        return {TOKEN_IDS: encoded.reshape(shape)}
    return {TEXT_EMBEDDING: encoded.reshape(shape).astype(np.float16)}


def _encode_captions(bundle: Bundle, captions: Sequence[str]) -> NDArray[np.generic]:
    """Return `(N, L)` token ids or, of an encoder of sentences, its vectors."""
    encoder = bundle.text_encoder
    if isinstance(encoder, ClipText):
        return encoder.tokenize(captions)
    vectors: NDArray[np.float32] = encoder.encode(captions).vectors().cpu().numpy()
    return vectors


def _latents(batch: Batch, setup: Config, bundle: Bundle) -> Batch:
    pictures = {LATENTS: batch["image"]}
    if setup.corpus.horizontal_flip:
        pictures[LATENTS_FLIPPED] = batch["image"][:, :, ::-1]
    return {name: _encode_pictures(bundle, images) for name, images in pictures.items()}


def _encode_pictures(bundle: Bundle, images: NDArray[np.uint8]) -> NDArray[np.float16]:
    parts = torch.from_numpy(images.copy()).split(PICTURES_AT_ONCE)
    latents = torch.cat([bundle.codec.encode(part.numpy()) for part in parts])
    return latents.numpy().astype(np.float16)
