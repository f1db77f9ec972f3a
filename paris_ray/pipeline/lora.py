"""A LoRA: one Ray task that encodes its own pictures and trains an adapter of one expert.

The output is a folder that the `peft` library loads, and beside that a run folder in the small:
`embeddings/` and `quarantine/` hold what became of the pictures. The bundle is only read.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

from paris_ray.artifacts import (
    METRICS,
    SAMPLES,
    Manifest,
    VerifiedFolder,
    canonical_json,
    sha256_hex,
)
from paris_ray.bundle import Bundle, load_bundle
from paris_ray.config import CodecConfig, Config, CorpusConfig, LoRARun
from paris_ray.corpora import corpus_version, open_corpus
from paris_ray.corpora.paths import corpus_path
from paris_ray.encoders.folders import TEXT_ENCODER, TOKENIZER
from paris_ray.errors import ArtifactError, ConfigError, CorpusError
from paris_ray.folders import LOCKS, Folder, absolute_uri
from paris_ray.models import Expert
from paris_ray.models.lora import find_targets
from paris_ray.models.peft_layout import EXPERT_DIGEST, LORA
from paris_ray.pipeline.lora_data import embed_pictures
from paris_ray.pipeline.placement import on_reserved_device, placed
from paris_ray.pipeline.progress import ProgressFile, Task, follow
from paris_ray.pipeline.samples import SampleGrid
from paris_ray.pipeline.stage import Stage, watch_hint
from paris_ray.run import CODEC_FOLDERS, EMBEDDINGS, Run
from paris_ray.storage import is_uri
from paris_ray.survey.listing import by_kind
from paris_ray.training.lora import train_lora as train

logger = logging.getLogger("paris_ray")

SECTIONS = ("seed", "corpus", "lora", "training")


def train_lora(run: LoRARun, *, bundle: str, expert: int, data: str, output: str) -> Manifest:
    """Train an adapter of one expert of a bundle, and publish it.

    Args:
        run: The adapter and its training.
        bundle: Path or URI of a model folder.
        expert: Number of the expert.
        data: Path or URI of captioned pictures in any layout of docs/training.md.
        output: The adapter's own folder, new or left by an interruption of this very training.

    Raises:
        ConfigError: if there is no such expert, the adapter does not fit it, or there is no data.
        BundleError: if the bundle is not one.
        CorpusError: if no layout explains the data, or too large a share of the pictures is bad.
        ArtifactError: if there is something else in the output folder.
        LockError: if another job writes to it.
        TrainingError: if the loss stops being finite.
    """
    opened = load_bundle(bundle)
    _check_fit(run, opened, expert)
    # All pictures are trained on: there are few, and the adapter is judged by what it adds.
    size = opened.facts.picture_size
    corpus = replace(_corpus(run.corpus, data), image_size=size, held_out_share=0.0)
    run = replace(run, corpus=corpus, training=on_reserved_device(run.training))
    parents = _parents(opened, expert) | {"pictures": corpus_version(open_corpus(run.corpus))}
    stage = Stage(LORA, Folder(output), run, sections=SECTIONS, parents=parents)
    if stage.folder.is_local and stage.folder.local_path.is_file():
        raise ArtifactError(f"{stage.folder.uri} is a file: choose a folder for a LoRA")
    with stage.locked():
        return stage.finished() or _train(run, stage, absolute_uri(bundle), expert)


def _train(run: LoRARun, stage: Stage, bundle: str, expert: int) -> Manifest:
    others = [name for name in stage.folder.files() if not name.startswith(f"{LOCKS}/")]
    if others and not stage.begun():
        raise ArtifactError(f"{stage.folder.uri} is not empty: choose another folder for a LoRA")
    stage.begin()
    logger.info("%s", watch_hint(stage.folder.uri))
    task = placed(train_one_lora, "lora", run.training)
    result = task.remote(run, bundle, expert, stage.folder.uri, stage.parents)
    facts = follow("lora", Task(result, stage.folder, run.training), stage.check)
    bad, filtered = (sum(facts[name].values()) for name in ("quarantined", "filtered"))
    text = "lora: trained on %d pictures, %d quarantined, %d filtered"
    logger.info(text, facts["rows"], bad, filtered)
    return stage.publish(facts)


def _check_fit(run: LoRARun, bundle: Bundle, expert: int) -> None:
    """Refuse here what would fail in the task, after it has waited for a GPU."""
    last = bundle.num_experts - 1
    if not 0 <= expert <= last:
        raise ConfigError(f"expert={expert} is not allowed: the bundle has 0 to {last}")
    if TOKENIZER in bundle.parts and run.training.text_noise:
        noise = run.training.text_noise
        raise ConfigError(f"training.text_noise={noise} is not allowed: 0 for token ids")
    with torch.device("meta"):
        find_targets(Expert(bundle.expert_configs[expert]), run.lora)


def _corpus(config: CorpusConfig, location: str) -> CorpusConfig:
    """Return the corpus at a path; its kind is the configured one, or the one that can read it."""
    path = location if is_uri(location) else str(Path(location).expanduser().resolve())
    try:
        corpus_path(replace(config, path=path))
    except CorpusError as error:
        raise ConfigError(f"data={location!r} is not allowed: {error}") from None
    if config.kind != CorpusConfig().kind:
        return replace(config, path=path)
    readable = by_kind(lambda kind: _listed(replace(config, path=path, kind=kind)))
    if len(readable) > 1:  # pictures without a table, a tar or the like are what sidecars belong to
        readable.pop("sidecars", None)
    if len(readable) > 1:
        raise ConfigError(
            f"data={location!r} can be read as {' and '.join(readable)}: "
            f"say corpus.kind={'|'.join(readable)}"
        )
    (corpus,) = readable.values()
    return corpus


def _listed(config: CorpusConfig) -> CorpusConfig:
    """Return the corpus; raise CorpusError if there is nothing in it."""
    try:
        open_corpus(config).shards()
    except OSError as error:
        raise CorpusError(f"it cannot be read: {error}") from None
    return config


def _parents(bundle: Bundle, expert: int) -> dict[str, str]:
    """Return the digests of all parts that the adapter depends on."""
    encoders = bundle.parts.keys() & {*CODEC_FOLDERS.values(), TEXT_ENCODER, TOKENIZER}
    names = [f"expert_{expert}", *sorted(encoders)]
    return {name: _digest(bundle.parts[name]) for name in names}


def _digest(part: VerifiedFolder) -> str:
    """Return the digest of a part's files, taken now where nobody published any."""
    digests = part.digests
    if digests is None:
        digests = {name: part.folder.sha256(name) for name in part.folder.files()}
    return sha256_hex(canonical_json(dict(digests)))


@ray.remote
def train_one_lora(
    run: LoRARun, bundle_uri: str, expert: int, output_uri: str, parents: Mapping[str, str]
) -> dict[str, Any]:
    """Encode the pictures, train the adapter, draw with it and without; return a small report."""
    torch.set_num_threads(run.training.threads)
    bundle, output = load_bundle(bundle_uri, device=run.training.device), Folder(output_uri)
    setup = _setup(run, bundle, output)
    # Opened for this call alone, so that codec and text encoder leave the device before training.
    embeddings = embed_pictures(setup, load_bundle(bundle_uri, device=run.training.device), parents)
    frozen, shard = bundle.expert(expert), Run(setup).embeddings
    if frozen.pos_embed.dtype == torch.float16:
        frozen.float()  # whose range is too small for gradients
    grid = SampleGrid(setup, shard, Folder(bundle_uri), run.seed)

    def draw_samples(average: Expert, step: int) -> None:
        output.write(f"{SAMPLES}/step-{step:06d}.png", grid.draw(average))

    adapted = train(
        frozen,
        run.lora,
        run.training,
        shard=shard,
        inputs={**parents, EMBEDDINGS: embeddings.digest},
        seed=run.seed,
        output=output,
        on_progress=ProgressFile(output, f"lora-{expert}"),
        text_encoder=Folder(bundle_uri),
        base_model=f"{bundle.facts.model_name}/expert_{expert}",
        draw_samples=draw_samples,
    )
    output.write("samples.png", grid.draw(adapted))
    output.write("samples_without_lora.png", grid.draw(frozen))
    last_metrics = json.loads(output.read(METRICS).splitlines()[-1])
    trained_on = {"expert": expert, EXPERT_DIGEST: bundle.weights_digest(f"expert_{expert}")}
    return {**trained_on, **embeddings.facts, **last_metrics}


def _setup(run: LoRARun, bundle: Bundle, output: Folder) -> Config:
    """Return what the pipeline's readers, writers and sample grids want to know."""
    kind = next(kind for kind, name in CODEC_FOLDERS.items() if name in bundle.parts)
    return Config(
        run_dir=output.uri,
        seed=run.seed,
        corpus=run.corpus,
        codec=CodecConfig(kind=kind),  # type: ignore[arg-type]
        sampling=bundle.facts.sampling,
        training=run.training,
    )
