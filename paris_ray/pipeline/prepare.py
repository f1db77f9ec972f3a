"""The verb `prepare`: encode the corpus, cut it into clusters, and tell what became of it."""

from collections.abc import Sequence

from paris_ray.artifacts import RESOLVED_CONFIG, Manifest, read_manifest
from paris_ray.config import Config, digest, load
from paris_ray.corpora import Shard, list_shards
from paris_ray.errors import ArtifactError
from paris_ray.pipeline.cluster import prepare_clusters
from paris_ray.pipeline.embed import prepare_embeddings
from paris_ray.pipeline.encoders import PREPARED, encoders_stage, prepare_encoders
from paris_ray.pipeline.report import report_preparation
from paris_ray.pipeline.stage import PART, StageTimer
from paris_ray.run import EMBEDDINGS, Run


def prepare(config: Config) -> None:
    """Encode and cluster the corpus; only cluster it if another run has encoded it."""
    if config.prepared_from is None:
        shards, embeddings = encode(config)
    else:
        shards, embeddings = (), _prepared_elsewhere(config)
    with StageTimer(config, f"{PART}clusters"):
        prepare_clusters(config, embeddings)
    report_preparation(config, shards)


def encode(config: Config) -> tuple[Sequence[Shard], Manifest]:
    """Publish `encoders/` and `embeddings/`; return the corpus's shards and the manifest of these.

    Raises:
        ArtifactError: if there are finished encoders of another configuration. That is told before
            the corpus is listed, which may take long.
    """
    encoders = encoders_stage(config).finished()
    shards = list_shards(config.corpus)
    with StageTimer(config, f"{PART}encoders"):
        encoders = encoders or prepare_encoders(config, shards)
    with StageTimer(config, f"{PART}embeddings"):
        return shards, prepare_embeddings(config, encoders, shards)


def _prepared_elsewhere(config: Config) -> Manifest:
    """Return the manifest of another run's embeddings; that run may have another seed.

    Raises:
        ArtifactError: if they are not finished, or of another corpus or other encoders.
    """
    source = Run(config).embeddings
    manifest = read_manifest(source, EMBEDDINGS)
    with source.reading(RESOLVED_CONFIG) as path:
        made = load(str(path))
    if digest(made, *PREPARED) != digest(config, *PREPARED):
        raise ArtifactError(
            f"prepared_from={config.prepared_from!r}: its {', '.join(PREPARED)} are not those of "
            f"this run (compare {source.uri}/{RESOLVED_CONFIG})"
        )
    return manifest
