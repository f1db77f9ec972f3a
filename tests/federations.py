"""A federation of two sites, small and without Ray: runs as prepare and training leave them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from zlib import crc32

import numpy as np
import safetensors.torch
import torch

from paris_ray.artifacts import publish, read_manifest
from paris_ray.clustering import fit_clustering
from paris_ray.config import CodecConfig, Config, load
from paris_ray.embeddings import to_table, write_null_text, write_part
from paris_ray.encoders.codec import PatchPCA
from paris_ray.folders import Folder
from paris_ray.identity import Identity
from paris_ray.models import Expert
from paris_ray.roster.federation import Site, found, join, submit
from paris_ray.run import (
    CLUSTERS,
    EMBEDDINGS,
    ENCODERS,
    EXPERT,
    EXPERT_WEIGHTS,
    ROUTER,
    ROUTER_WEIGHTS,
    SEED,
    SHARD,
    Run,
)
from paris_ray.training.router import train_router
from tests.conftest import randomise, write_model, write_text_encoder
from tests.training_shards import carry_on

NUM_CLUSTERS = 3
CLUSTERS_OF = {"east": [0, 1], "west": [2]}
WIDTH = 16  # of text vectors
OPTIONS = [
    "corpus.kind=image_folder",
    "corpus.image_size=32",
    "text.token_states=0",
    "codec.patch_size=8",
    "codec.num_components=8",
    f"cluster.num_clusters={NUM_CLUSTERS}",
    "cluster.num_fine=6",
    "expert.hidden_size=32",
    "expert.num_layers=1",
    f"expert.text_embed_dim={WIDTH}",
    "expert.text_injection=spatial",
    "seed_training.steps=1",
    "training.batch_size=8",
    "router.hidden_size=32",
    "router.num_layers=1",
    f"router.text_embed_dim={WIDTH}",
    "router_training.steps=60",
    "router_training.batch_size=16",
    "router_training.learning_rate=1e-2",
    "router_training.warmup_steps=5",
    "router_training.ema_decay=0.9",
    "router_training.threads=1",
]
ROWS = 40  # of a cluster


@dataclass(frozen=True)
class Federation:
    """A federation whose sites have submitted.

    Attributes:
        folder: What the coordinator gave to all.
        config: The coordinator's run.
        coordinator: The coordinator.
        sites: The sites' identities, by name.
        runs: Their configurations, by name.
        submissions: What they handed over, by name.
    """

    folder: Folder
    config: Config
    coordinator: Identity
    sites: dict[str, Identity]
    runs: dict[str, Config]
    submissions: dict[str, Folder]


def write_rows(folder: Folder, cluster: int, count: int, who: str) -> None:
    """Write a shard whose captions and thumbnails name whose they are."""
    generator = np.random.default_rng([cluster, *who.encode()])
    latents = cluster + 0.5 * generator.standard_normal((count, 8, 4, 4))
    text = np.eye(WIDTH)[cluster] + 0.1 * generator.standard_normal((count, 1, WIDTH))
    columns = {
        "key": [f"{who}-key-{cluster}-{i}" for i in range(count)],
        "caption": [f"the private caption {i} of {who}" for i in range(count)],
        "thumbnail": [f"\x89PNG thumbnail {i} of {who}".encode("latin-1") for i in range(count)],
        "latents": latents.astype(np.float16),
        "features": generator.standard_normal((count, 4)).astype(np.float32),
        "text_embedding": text.astype(np.float16),
    }
    write_part(folder, "part-000000.parquet", to_table(columns))
    write_null_text(folder, np.zeros(WIDTH, np.float32))


def write_clusters(run: Run, clusters: list[int], who: str) -> None:
    """Write shards and held-out rows of some clusters, and what prepare tells of its work."""
    sizes = [ROWS if k in clusters else 0 for k in range(NUM_CLUSTERS)]
    for k in clusters:
        write_rows(run.shard(k), k, ROWS, who)
        write_rows(run.held_out_shard(k), k, 16, f"{who} held out")
        publish(run.shard(k), SHARD, config_digest="", parents={}, facts={"rows": ROWS})
    facts = {"rows": sum(sizes), "quarantined": {}, "attribution": f"Pictures by\n{who}."}
    publish(run.embeddings, EMBEDDINGS, config_digest="", parents={}, facts=facts)
    told = [
        {"rows": size, "words": [f"{who}word"] if size else [], "pictures": ["AAAA"] * bool(size)}
        for size in sizes
    ]
    run.clusters.write_json("clusters.json", told)
    publish(run.clusters, CLUSTERS, config_digest="", parents={}, facts={"sizes": sizes})


def write_coordinator(config: Config) -> None:
    """Write what `found` needs: encoders, clusters, router and seed."""
    run = Run(config)
    write_text_encoder(run.encoders.local_path / "text_encoder")
    pictures = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    PatchPCA.fit(pictures, CodecConfig(num_components=8)).save(run.codec)
    write_null_text(run.encoders, np.zeros(WIDTH, np.float32))
    publish(run.encoders, ENCODERS, config_digest="", parents={}, facts={})
    features = np.random.default_rng(0).standard_normal((60, WIDTH)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    fit_clustering(features, config.cluster, 0).save(run.clusters)
    write_clusters(run, list(range(NUM_CLUSTERS)), "coordinator")
    write_router(run)
    parents = {"clusters": read_manifest(run.clusters, CLUSTERS).digest}
    publish(run.router, ROUTER, config_digest="", parents=parents, facts={})
    write_model(run.seed, randomise(Expert(config.expert), 7), EXPERT_WEIGHTS)
    publish(run.seed, SEED, config_digest="", parents={}, facts={})


def write_router(run: Run) -> None:
    """Write a router that learnt features of the clusters, but whose last layer tells nothing."""
    train_router(
        run.config.router,
        run.config.router_training,
        shards=[run.shard(k) for k in range(NUM_CLUSTERS)],
        shards_digest="",
        seed=0,
        output=run.router,
        on_progress=carry_on,
    )
    state = safetensors.torch.load(run.router.read(ROUTER_WEIGHTS))
    for name in ("head.4.weight", "head.4.bias"):
        state[name].zero_()
    run.router.write(ROUTER_WEIGHTS, safetensors.torch.save(state))


def write_expert(run: Run, k: int, seed: int) -> None:
    """Write an expert as its training leaves it."""
    folder = run.expert(k)
    write_model(folder, randomise(Expert(run.config.expert), seed), EXPERT_WEIGHTS)
    parents = {"shard": read_manifest(run.shard(k), SHARD).digest}
    facts = {"expert": k, "rows": ROWS, "loss": 0.5, "held_out_loss": 0.75}
    publish(folder, EXPERT, config_digest="", parents=parents, facts=facts)


def write_federation(
    root: Path,
    *,
    share_words: bool,
    share_rows: bool,
    clusters_of: Mapping[str, list[int]] = MappingProxyType(CLUSTERS_OF),
    first_site_wins: bool = False,
) -> Federation:
    """Write a federation up to the submissions of both sites."""
    torch.manual_seed(0)
    path = f"corpus.path={root}"
    config = load("quickstart", [f"run_dir={root}/coordinator", path, *OPTIONS])
    write_coordinator(config)
    coordinator = Identity.create(root / "coordinator-key")
    sites = {name: Identity.create(root / f"{name}-key") for name in clusters_of}
    expected = [
        Site(name=name, public_key=sites[name].public_key, clusters=clusters_of[name])
        for name in sites
    ]
    folder = Folder(root / "federation")
    found(config, coordinator, folder, name="ours", sites=expected, first_site_wins=first_site_wins)
    runs, submissions = {}, {}
    for name, identity in sites.items():
        runs[name] = join(
            folder,
            coordinator.public_key,
            identity.public_key,
            Folder(root / name),
            overrides=["corpus.kind=image_folder", path],
        )
        run = Run(runs[name])
        write_clusters(run, clusters_of[name], name)
        for k in clusters_of[name]:
            write_expert(run, k, crc32(f"{name} {k}".encode()))
        submissions[name] = Folder(root / f"{name}-submission")
        flags = {"share_words": share_words, "share_rows": share_rows}
        submit(runs[name], identity, submissions[name], **flags)
    return Federation(folder, config, coordinator, sites, runs, submissions)


def resign(folder: Folder, kind: str, signer: Identity, **changes: object) -> None:
    """Change a signed document and sign it again; files are listed as they are now."""
    from paris_ray.roster.federation.handover import hand_over

    document = json.loads(folder.read(f"{kind}.json"))["document"]
    document.pop("files")
    hand_over(folder, kind, document | changes, signer)
