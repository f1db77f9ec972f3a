"""Evaluation: draw every training caption and see whether the right picture comes out."""

import logging
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray

from paris_ray.artifacts import Manifest, read_manifest
from paris_ray.config import Config
from paris_ray.embeddings import num_rows, part_names, read_rows, write_part
from paris_ray.evaluation.recall import CaptionRecall, caption_recall
from paris_ray.export import open_trained_parts
from paris_ray.pipeline.stage import Stage
from paris_ray.reports import (
    decode_thumbnails,
    inline_image,
    page,
    paragraph,
    picture_grid,
    png_bytes,
    section,
    thumbnail,
)
from paris_ray.run import EMBEDDINGS, EVALUATION, Run
from paris_ray.sampling.sampler import sample, sampling_options
from paris_ray.seeding import derive_seed, numpy_generator

logger = logging.getLogger("paris_ray")

SECTIONS = ("seed", "sampling", "evaluation")
PICTURES_IN_REPORT = 40


def evaluate(config: Config) -> Manifest:
    """Publish `evaluation/`: accuracy, a row a caption, and pictures.

    Raises:
        ArtifactError: if an expert or the router has not finished.
    """
    run = Run(config)
    parents = run.parents() | {"embeddings": read_manifest(run.embeddings, EMBEDDINGS).digest}
    stage = Stage(EVALUATION, run.evaluation, config, sections=SECTIONS, parents=parents)
    manifest = stage.finished()
    if manifest is None:
        manifest = stage.publish(_evaluate(run))
    facts = manifest.facts
    logger.info("caption accuracy: %.4f over %d captions", facts["accuracy"], facts["captions"])
    return manifest


def _evaluate(run: Run) -> dict[str, Any]:
    settings = run.config.evaluation
    total = sum(num_rows(run.embeddings, name) for name in part_names(run.embeddings))
    drawn_rows = _sample_rows(run, total, settings.max_captions, "evaluation")
    others = _sample_rows(run, total, settings.max_gallery, "gallery")
    gallery_rows = np.union1d(drawn_rows, others)
    table = read_rows(run.embeddings, gallery_rows, ["key", "caption", "thumbnail"])
    own = np.searchsorted(gallery_rows, drawn_rows)
    drawn, usage = _draw_all(run, drawn_rows, table["caption"].take(own).to_pylist())
    gallery = decode_thumbnails(table["thumbnail"].to_pylist())
    result = caption_recall(drawn, own, gallery, table["caption"].to_pylist())
    _write(run, table, own, result, drawn, gallery)
    return {
        "accuracy": float(result.hit.mean()),
        "captions": len(own),
        "gallery": len(gallery),
        "squared_error": float(result.squared_error.mean()),
        "expert_usage": usage.mean(axis=0).tolist(),
    }


def _sample_rows(run: Run, total: int, limit: int | None, purpose: str) -> NDArray[np.int64]:
    """Return at most `limit` rows of the corpus, in order."""
    if limit is None or limit >= total:
        return np.arange(total)
    generator = numpy_generator(run.config.seed, purpose)
    return np.sort(generator.choice(total, limit, replace=False))


def _draw_all(
    run: Run, rows: NDArray[np.int64], captions: list[str]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Draw captions in parallel; return thumbnails `(N, 32, 32, 3)` and expert usage `(N, K)`."""
    settings = run.config.evaluation
    task = draw.options(num_cpus=settings.num_cpus, num_gpus=settings.num_gpus)
    parts = [
        task.remote(run.config, rows[part].tolist(), [captions[i] for i in part])
        for part in np.array_split(np.arange(len(rows)), min(settings.num_tasks, len(rows)))
    ]
    drawn, usage = map(np.concatenate, zip(*ray.get(parts), strict=True))
    return drawn, usage


@ray.remote
def draw(
    config: Config, indices: list[int], captions: list[str]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Draw captions; return thumbnails `(N, 32, 32, 3)` and expert usage `(N, K)`."""
    torch.set_num_threads(config.evaluation.threads)
    device = "auto" if config.evaluation.num_gpus else "cpu"
    bundle = open_trained_parts(Run(config), device=device, dtype=config.evaluation.dtype)
    options = sampling_options(bundle)
    seed, size = derive_seed(config.seed, "evaluation"), config.evaluation.batch_size
    pictures, usages = [], []
    for start in range(0, len(captions), size):
        batch = slice(start, start + size)
        seeds = [derive_seed(seed, "picture", i) for i in indices[batch]]
        text = bundle.text_encoder.encode(captions[batch]).to("cpu")
        samples = sample(bundle, text, seeds, options)
        pictures += [thumbnail(image) for image in bundle.codec.decode(samples.latents)]
        usages.append(samples.expert_usage.numpy())
    return np.stack(pictures), np.concatenate(usages)


def _write(
    run: Run,
    table: pa.Table,
    rows: NDArray[np.int64],
    result: CaptionRecall,
    drawn: NDArray[np.uint8],
    gallery: NDArray[np.uint8],
) -> None:
    columns = {
        "key": table["key"].take(rows),
        "caption": table["caption"].take(rows),
        "nearest_key": table["key"].take(result.nearest),
        "hit": pa.array(result.hit),
        "squared_error": pa.array(result.squared_error),
    }
    write_part(run.evaluation, "results.parquet", pa.table(columns))
    order = np.argsort(result.squared_error, kind="stable")
    spread = order[np.linspace(0, len(order) - 1, min(PICTURES_IN_REPORT, len(order))).astype(int)]
    pairs = np.stack([gallery[rows[spread]], drawn[spread]], axis=1).reshape(-1, *gallery.shape[1:])
    grid = picture_grid(pairs, columns=16, scale=2)
    attribution = read_manifest(run.embeddings, EMBEDDINGS).facts["attribution"]
    text = "Pairs of corpus picture and drawn picture, from the best to the worst caption."
    sections = [section("Drawn from training captions", paragraph(text), inline_image(grid, text))]
    title = f"Caption accuracy {result.hit.mean():.4f} over {len(order)} captions"
    run.evaluation.write("samples.png", png_bytes(grid))
    run.evaluation.write("report.html", page(title, sections, attribution))
