"""Prepare, part one: have a codec, an image encoder and a text encoder for this corpus."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import ray

from paris_ray.artifacts import Folder, Manifest
from paris_ray.config import Config
from paris_ray.corpora import DecodedRow, decode_row, open_corpus
from paris_ray.embeddings import write_null_text
from paris_ray.encoders.codec import PatchPCA
from paris_ray.encoders.text import MiniLM, copy_text_encoder, text_encoder_folder
from paris_ray.errors import ConfigError, CorpusError
from paris_ray.pipeline.progress import ProgressFile, follow
from paris_ray.pipeline.stage import Stage
from paris_ray.run import ENCODERS, Run
from paris_ray.seeding import derive_seed

SECTIONS = ("seed", "corpus", "text", "features", "codec")


def prepare_encoders(config: Config) -> Manifest:
    """Publish `encoders/`: the codec fitted, the image model trained if none was given."""
    run = Run(config)
    stage = Stage(ENCODERS, run.encoders, config, sections=SECTIONS, parents={})
    manifest = stage.finished()
    if manifest is not None:
        return manifest
    stage.begin()
    task = fit_encoders.options(
        num_cpus=config.features.num_cpus, num_gpus=config.features.num_gpus
    ).remote(config, run.encoders.uri)
    return stage.publish(follow("image encoder", task, run.encoders))


@ray.remote
def fit_encoders(config: Config, output_uri: str) -> dict[str, Any]:
    """Fit the codec and, if there is no checkpoint, train the image encoder."""
    from paris_ray.training.contrastive import train_open_clip

    output = Folder(output_uri)
    rows = list(islice(_valid_rows(config), config.features.max_images))
    if not rows:
        raise CorpusError(f"corpus.path={config.corpus.path!r} has no usable row")
    images = np.stack([row.image for row in rows])
    PatchPCA.fit(images, config.codec).save(output / "codec")
    text_encoder = text_encoder_folder(config.text)
    copy_text_encoder(text_encoder, output / "text_encoder")
    encoder = MiniLM(text_encoder)
    for name, model in (("expert", config.expert), ("router", config.router)):
        if model.text_embed_dim not in (0, encoder.embed_dim):
            raise ConfigError(
                f"{name}.text_embed_dim={model.text_embed_dim} is not allowed: "
                f"the text encoder has {encoder.embed_dim}"
            )
    write_null_text(output, encoder.encode([""]).pooled_text[0].numpy())
    facts: dict[str, Any] = {"rows_fitted_to": len(rows)}
    if config.features.checkpoint is None:
        facts["contrastive_loss"] = train_open_clip(
            config.features,
            images,
            [row.caption for row in rows],
            seed=derive_seed(config.seed, "features"),
            output=output / "features",
            on_progress=ProgressFile(output),
        )
    return facts


def _valid_rows(config: Config) -> Iterator[DecodedRow]:
    """Yield usable rows in corpus order; the embedding pass counts and keeps the bad ones."""
    corpus = open_corpus(config.corpus)
    for shard in corpus.shards():
        for raw in corpus.read(shard):
            row = decode_row(raw, config.corpus)
            if isinstance(row, DecodedRow):
                yield row
