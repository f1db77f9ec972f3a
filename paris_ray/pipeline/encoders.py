"""Prepare, part one: have a codec, an image encoder and a text encoder for this corpus."""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from paris_ray.artifacts import Manifest, VerifiedFolder
from paris_ray.config import Config
from paris_ray.corpora import (
    Corpus,
    DecodedRow,
    HeldOut,
    QuarantinedRow,
    RawRow,
    Shard,
    decode_row,
    held_out_rule,
    open_corpus,
)
from paris_ray.embeddings import write_null_text
from paris_ray.encoders.autoencoder import copy_autoencoder_kl
from paris_ray.encoders.clip import ClipText
from paris_ray.encoders.codec import PatchPCA, load_codec
from paris_ray.encoders.folders import TEXT_ENCODER, TOKENIZER
from paris_ray.encoders.text import TextEncoder, load_text_encoder, write_text_encoder
from paris_ray.errors import ConfigError, CorpusError
from paris_ray.folders import Folder
from paris_ray.pipeline.progress import ProgressFile, Task, follow
from paris_ray.pipeline.quarantine import BadRows
from paris_ray.pipeline.stage import Stage, federation_parent
from paris_ray.run import ENCODERS, Run
from paris_ray.seeding import derive_seed, numpy_generator

PREPARED = ("corpus", "text", "features", "codec")  # what decides encoders and embeddings
SECTIONS = ("seed", *PREPARED)
MAX_SHARDS_SAMPLED = 32  # to fit codec and encoder to, unless they have too few rows
MAX_GAP = 4  # between rows of a shard: the pictures between them are read, too


def prepare_encoders(config: Config, shards: Sequence[Shard]) -> Manifest:
    """Publish `encoders/`: given ones copied and checked, the others fitted; none, if they are.

    A federation gives all of them.

    Args:
        config: The run.
        shards: All shards of the corpus.
    """
    stage = encoders_stage(config)
    with stage.locked():
        manifest = stage.finished()
        if manifest is not None:
            return manifest
        stage.begin()
        task = make_encoders.options(
            num_cpus=config.features.num_cpus, num_gpus=config.features.num_gpus
        ).remote(config, shards)
        return stage.publish(follow("encoders", Task(task, stage.folder), stage.check))


def encoders_stage(config: Config) -> Stage:
    """Return the stage: what finished encoders are compared with."""
    parents = federation_parent(config)
    return Stage(ENCODERS, Run(config).encoders, config, sections=SECTIONS, parents=parents)


@ray.remote
def make_encoders(config: Config, shards: Sequence[Shard]) -> dict[str, Any]:
    """Write text encoder, null text, codec and, if there is no checkpoint, the image encoder."""
    run = Run(config)
    if run.federation is not None:
        copy_part(run.federation, ENCODERS, run.encoders)
        return {"rows_fitted_to": 0}
    _write_text(config)
    needs_fitting = config.codec.kind == "patch_pca" or config.features.checkpoint is None
    rows = sample_rows(config, shards) if needs_fitting else []
    _write_codec(config, rows)
    facts: dict[str, Any] = {"rows_fitted_to": len(rows)}
    if config.features.checkpoint is None:
        facts["contrastive_loss"] = _train_features(config, rows)
    return facts


def copy_part(source: VerifiedFolder, name: str, target: Folder) -> None:
    """Copy the files of a part of an artefact; each is verified on the way."""
    part = source.part(name)
    for file_name in part.digests or ():
        target.write(file_name, part.read(file_name))


def _write_text(config: Config) -> None:
    """Write the text encoder and the empty string as it reads it."""
    output = Run(config).encoders
    write_text_encoder(config.text, output)
    encoder = load_text_encoder(
        VerifiedFolder(output / TEXT_ENCODER, None), VerifiedFolder(output / TOKENIZER, None)
    )
    _check_width(config, encoder)
    if isinstance(encoder, ClipText):
        write_null_text(output, encoder.tokenize([""])[0])
    else:
        write_null_text(output, encoder.encode([""]).vectors()[0].numpy())


def _check_width(config: Config, encoder: TextEncoder) -> None:
    for name, model in (("expert", config.expert), ("router", config.router)):
        if model.text_embed_dim not in (0, encoder.embed_dim):
            raise ConfigError(
                f"{name}.text_embed_dim={model.text_embed_dim} is not allowed: "
                f"the text encoder has {encoder.embed_dim}"
            )


def _write_codec(config: Config, rows: list[DecodedRow]) -> None:
    """Fit the codec, or copy it and check that it makes the latents that the experts read."""
    output = Run(config).codec
    if config.codec.kind == "patch_pca":
        PatchPCA.fit(_images(rows), config.codec).save(output)
        return
    assert config.codec.path is not None, "the configuration has been checked"
    copy_autoencoder_kl(config.codec.path, output)
    image_size, size = config.corpus.image_size, config.expert.input_size
    expected = (config.codec.num_components, size, size)
    found = load_codec(VerifiedFolder(output, None), image_size).latent_shape
    if found != expected:
        raise ConfigError(
            f"codec.path={config.codec.path!r} makes latents of shape {found} of pictures of "
            f"{image_size} pixels; codec.num_components and corpus.image_size / codec.patch_size "
            f"say {expected}"
        )


def _train_features(config: Config, rows: list[DecodedRow]) -> float:
    from paris_ray.training.contrastive import train_open_clip  # open_clip takes seconds

    output = Run(config).encoders
    return train_open_clip(
        config.features,
        _images(rows),
        [row.caption for row in rows],
        seed=derive_seed(config.seed, "features"),
        output=output / "features",
        on_progress=ProgressFile(output),
    )


def _images(rows: list[DecodedRow]) -> NDArray[np.uint8]:
    return np.stack([row.image for row in rows])


def sample_rows(config: Config, shards: Sequence[Shard]) -> list[DecodedRow]:
    """Return the pictures that something is fitted to, from all over the corpus: none held out.

    Shards are taken in a random order, of each a share of its rows with equal gaps of at most
    `MAX_GAP`, until there are `features.max_images`; the rows come in corpus order. The embedding
    pass counts the bad ones.

    Raises:
        CorpusError: if there is none, or `corpus.held_out_key` names no group.
    """
    corpus, wanted = open_corpus(config.corpus), config.features.max_images
    held_out = held_out_rule(config.corpus, corpus, shards, config.seed)
    most = math.ceil(wanted / min(len(shards), MAX_SHARDS_SAMPLED))
    found: dict[int, list[DecodedRow]] = {}
    bad = BadRows()
    for index in numpy_generator(config.seed, "rows to fit").permutation(len(shards)).tolist():
        left = min(most, wanted - sum(map(len, found.values())))
        raws = _spread_rows(corpus, shards[index], held_out, left)
        found[index] = list(islice(_usable_rows(config, raws, bad), left))
        if sum(map(len, found.values())) == wanted:
            break
    rows = [row for index in sorted(found) for row in found[index]]
    if not rows:
        raise CorpusError(
            f"corpus.path={config.corpus.path!r} has no usable row that is not held out{bad}"
        )
    return rows


def _spread_rows(corpus: Corpus, shard: Shard, held_out: HeldOut, most: int) -> Iterator[RawRow]:
    """Yield rows of a shard that have equal gaps; without the bad ones, `most` are wanted."""
    gap = max(1, sum(1 for _ in islice(corpus.keys(shard), MAX_GAP * most)) // most)
    return islice((row for row in corpus.read(shard) if not held_out.holds(row)), 0, None, gap)


def _usable_rows(config: Config, raws: Iterator[RawRow], bad: BadRows) -> Iterator[DecodedRow]:
    for raw in raws:
        row = decode_row(raw, config.corpus)
        if isinstance(row, QuarantinedRow):
            bad.add(row)
        else:
            yield row
