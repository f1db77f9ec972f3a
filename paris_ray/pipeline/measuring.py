"""The one task that compares drawn pictures with the corpus and writes what it finds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from paris_ray.artifacts import REPORT, read_manifest
from paris_ray.clustering import FEATURE_COLUMNS
from paris_ray.config import Config
from paris_ray.corpora import compositions
from paris_ray.corpora.labels import label_names
from paris_ray.embeddings import ATTRIBUTE, read_rows, tensor_column, write_part
from paris_ray.evaluation.attributes import Attributes, attribute_accuracy
from paris_ray.evaluation.memorisation import QUANTILES, memorisation
from paris_ray.evaluation.page import evaluation_page
from paris_ray.evaluation.recall import caption_recall
from paris_ray.evaluation.summary import (
    attribute_summary,
    by_cluster,
    distribution_summary,
    mean_with_interval,
    retrieval_summary,
)
from paris_ray.folders import Folder
from paris_ray.pipeline.cluster import clusters_of
from paris_ray.pipeline.drawing import Drawn, Split, chosen_rows, split_folder
from paris_ray.reports import decode_thumbnails, png_bytes
from paris_ray.run import EMBEDDINGS, ROUTER, Run
from paris_ray.seeding import derive_seed


@dataclass(frozen=True, slots=True)
class Corpus:
    """Rows of a split: the pictures that there are.

    Attributes:
        rows: `(M,)` their numbers, ascending.
        table: Their keys, captions and labels.
        pictures: `(M, 32, 32, 3)` thumbnails.
        features: `(M, D)` of the run's image model.
        clusters: `(M,)`.
    """

    rows: NDArray[np.int64]
    table: pa.Table
    pictures: NDArray[np.uint8]
    features: NDArray[np.float32]
    clusters: NDArray[np.int64]

    @property
    def captions(self) -> list[str]:
        """The M captions."""
        captions: list[str] = self.table["caption"].to_pylist()
        return captions

    def attributes(self) -> dict[str, list[str]]:
        """Return the labels of `corpus.attributes`, M of each; empty where a row has none."""
        names = [name for name in self.table.column_names if name.startswith(ATTRIBUTE)]
        return {name.removeprefix(ATTRIBUTE): self.table[name].to_pylist() for name in names}


@ray.remote
def measure(
    config: Config,
    drawn: "Mapping[Split, Sequence[ray.ObjectRef[Drawn]]]",
    losses: Sequence[Sequence[float | None]] | None,
    student: str | None,
) -> dict[str, Any]:
    """Write rows, pictures and the page of an evaluation; return its measures.

    Args:
        config: The run.
        drawn: What was drawn of every split.
        losses: Held-out velocity errors, experts by clusters, or None.
        student: The distilled model that drew; None: the ensemble.
    """
    run = Run(config)
    output = run.evaluation_of(student)
    pictures = {split: Drawn.join(ray.get(list(parts))) for split, parts in drawn.items()}
    corpora = {split: _read(run, split, part.rows) for split, part in pictures.items()}
    facts: dict[str, Any] = {
        split: _measure_split(run, split, part, corpora, output) for split, part in pictures.items()
    }
    if "held_out" in pictures:
        facts["memorisation"] = _memorisation(pictures["held_out"], corpora)
        facts["held_out_losses"] = losses
    usage = np.concatenate([part.usage for part in pictures.values()])
    facts["expert_usage"] = usage.mean(axis=0).tolist()
    asked = np.concatenate([part.experts_asked for part in pictures.values()])
    facts["experts_asked"] = float(asked.mean())
    attribution = read_manifest(run.embeddings, EMBEDDINGS).facts["attribution"]
    pairs: dict[str, NDArray[np.uint8]] = {
        split: _pairs(corpora[split], part) for split, part in pictures.items()
    }
    router = None
    if student is None:
        router = read_manifest(run.router, ROUTER).facts.get("held_out")
    report, grid = evaluation_page(facts, pairs, attribution, router)
    output.write(REPORT, report)
    output.write("samples.png", png_bytes(grid))
    return facts


def _read(run: Run, split: Split, drawn_rows: NDArray[np.int64]) -> Corpus:
    """Return the drawn captions' own rows and others to compare with."""
    others = chosen_rows(run, split, run.config.evaluation.max_gallery, "gallery")
    rows = np.union1d(drawn_rows, others)
    labels = [f"{ATTRIBUTE}{name}" for name in label_names(run.config.corpus.attributes)]
    clustered = FEATURE_COLUMNS[run.config.cluster.features]
    columns = dict.fromkeys(["key", "caption", "thumbnail", "features", *labels, *clustered])
    table = read_rows(split_folder(run, split), rows, list(columns))
    return Corpus(
        rows,
        table.select(["key", "caption", *labels]),
        decode_thumbnails(table["thumbnail"].to_pylist()),
        tensor_column(table, "features").astype(np.float32),
        clusters_of(run, table),
    )


def _measure_split(
    run: Run, split: Split, drawn: Drawn, corpora: Mapping[Split, Corpus], output: Folder
) -> dict[str, Any]:
    corpus, seed = corpora[split], derive_seed(run.config.seed, "evaluation interval")
    own = np.searchsorted(corpus.rows, drawn.rows)
    captions = [corpus.captions[i] for i in own]
    recalled = caption_recall(drawn.pictures, own, corpus.pictures, corpus.captions)
    columns: dict[str, Any] = {
        "key": corpus.table["key"].take(own),
        "caption": captions,
        "cluster": corpus.clusters[own],
        "squared_error": recalled.squared_error,
    }
    facts: dict[str, Any] = {
        "captions": len(own),
        "squared_error": mean_with_interval(recalled.squared_error, seed),
        **distribution_summary(drawn.features, corpus.features[own], seed),
    }
    if split == "shown":  # of a held-out caption there is nothing to recall
        columns["recalled"] = recalled.hit
        facts |= {
            "caption_recall": mean_with_interval(recalled.hit, seed),
            "recall_by_chance": recalled.by_chance,
            "gallery": len(corpus.rows),
        }
    if drawn.image_embeddings.shape[1]:
        embeddings = drawn.image_embeddings, drawn.text_embeddings
        facts |= retrieval_summary(*embeddings, captions, seed)
    attributes = corpus.attributes()
    if any(map(any, attributes.values())):  # a corpus may have none of the labels that are named
        wanted = {name: [values[i] for i in own] for name, values in attributes.items()}
        accuracy = attribute_accuracy(drawn.pictures, wanted, *_gallery(run, corpora))
        facts["attributes"] = attribute_summary(accuracy, seed)
        columns["attributes_right"] = accuracy.all_right
    measured = {n: np.asarray(columns[n], float) for n in columns if n in PER_CLUSTER}
    facts["by_cluster"] = by_cluster(corpus.clusters[own], measured, run.num_experts)
    write_part(output, f"{split}.parquet", pa.table(columns))
    return facts


PER_CLUSTER = ("squared_error", "recalled", "attributes_right")


def _gallery(run: Run, corpora: Mapping[Split, Corpus]) -> tuple[NDArray[np.uint8], Attributes]:
    """Return pictures with known attributes: all that can be asked for, or those of the corpus."""
    everything = compositions(run.config.corpus)
    if everything is not None:
        return everything
    pictures = np.concatenate([corpus.pictures for corpus in corpora.values()])
    labels = [corpus.attributes() for corpus in corpora.values()]
    return pictures, {name: [*chain(*(part[name] for part in labels))] for name in labels[0]}


def _memorisation(drawn: Drawn, corpora: Mapping[Split, Corpus]) -> dict[str, Any]:
    """Return how many pictures drawn from held-out captions are copies of training pictures."""
    found = memorisation(drawn.features, corpora["held_out"].features, corpora["shown"].features)
    quantiles = [f"{quantile:g}" for quantile in QUANTILES]
    return dict(zip(quantiles, found.shares.tolist(), strict=True))


def _pairs(corpus: Corpus, drawn: Drawn) -> NDArray[np.uint8]:
    """Return pairs of corpus picture and drawn one, `(N, 2, 32, 32, 3)`, the nearest pair first."""
    own = corpus.pictures[np.searchsorted(corpus.rows, drawn.rows)]
    error = ((own.astype(np.float32) - drawn.pictures) ** 2).mean(axis=(1, 2, 3))
    order = np.argsort(error, kind="stable")
    return np.stack([own[order], drawn.pictures[order]], axis=1)
