"""Drawing captions of a run with its trained parts: one Ray task a part of them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from paris_ray.artifacts import VerifiedFolder
from paris_ray.bundle import Bundle
from paris_ray.clustering import FEATURE_COLUMNS
from paris_ray.config import Config
from paris_ray.embeddings import num_rows, part_names, read_rows
from paris_ray.encoders.images import OPEN_CLIP_FILES, JointEmbedding, load_features
from paris_ray.export import open_student, open_trained_parts
from paris_ray.folders import Folder
from paris_ray.models import TextConditioning
from paris_ray.pipeline.cluster import clusters_of
from paris_ray.reports import thumbnail
from paris_ray.run import Run
from paris_ray.sampling.generation import sample, sample_one_expert
from paris_ray.sampling.sampler import Samples
from paris_ray.sampling_options import SamplingOptions, sampling_options
from paris_ray.seeding import derive_seed, numpy_generator

Split = Literal["shown", "held_out"]


@dataclass(frozen=True, slots=True)
class Drawn:
    """Pictures drawn from captions of a run.

    Attributes:
        rows: `(N,)` which rows of the split they are of.
        pictures: `(N, 32, 32, 3)` uint8.
        features: `(N, D)` of the run's image model, unit length.
        image_embeddings: `(N, J)` in the joint space with text; `(N, 0)` if the model has none.
        text_embeddings: `(N, J)` of the captions.
        usage: `(N, K)` mean weight of each expert.
        experts_asked: `(N,)` mean number of experts that a step asked.
    """

    rows: NDArray[np.int64]
    pictures: NDArray[np.uint8]
    features: NDArray[np.float32]
    image_embeddings: NDArray[np.float32]
    text_embeddings: NDArray[np.float32]
    usage: NDArray[np.float32]
    experts_asked: NDArray[np.float32]

    @staticmethod
    def join(parts: "Sequence[Drawn]") -> "Drawn":
        """Return parts as one."""
        names = [field.name for field in fields(Drawn)]
        return Drawn(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def split_folder(run: Run, split: Split) -> Folder:
    """Return where the rows of a split are."""
    return run.embeddings if split == "shown" else run.held_out


def chosen_rows(run: Run, split: Split, limit: int | None, purpose: str) -> NDArray[np.int64]:
    """Return at most `limit` rows of a split, at random but always the same, in order."""
    folder = split_folder(run, split)
    total = sum(num_rows(folder, name) for name in part_names(folder))
    if limit is None or limit >= total:
        return np.arange(total)
    generator = numpy_generator(run.config.seed, purpose)
    return np.sort(generator.choice(total, limit, replace=False))


@ray.remote
def draw(config: Config, split: Split, part: int, num_parts: int, student: str | None) -> Drawn:
    """Draw every `num_parts`-th of the chosen captions of a split.

    Args:
        config: The run.
        split: Which captions.
        part: Which of the parts.
        num_parts: How many parts there are.
        student: The distilled model that draws; None: the ensemble.
    """
    torch.set_num_threads(config.evaluation.threads)
    run = Run(config)
    rows = chosen_rows(run, split, config.evaluation.max_captions, "evaluation")[part::num_parts]
    columns = dict.fromkeys(["key", "caption", *FEATURE_COLUMNS[config.cluster.features]])
    table = read_rows(split_folder(run, split), rows, list(columns))
    captions = table["caption"].to_pylist()
    clusters = clusters_of(run, table) if config.evaluation.oracle else None
    device = "auto" if config.evaluation.num_gpus else "cpu"
    bundle = _open(run, student, device)
    options, codec, judge = sampling_options(bundle), bundle.codec, _Judge(config)
    seed, size = derive_seed(config.seed, f"evaluation {split}"), config.evaluation.batch_size
    parts = []
    for start in range(0, len(rows), size):
        batch = slice(start, start + size)
        seeds = [derive_seed(seed, "picture", int(row)) for row in rows[batch]]
        text = bundle.text_encoder.encode(captions[batch]).to("cpu")
        if clusters is None:
            samples = sample(bundle, text, seeds, options)
        else:
            samples = sample_own_experts(bundle, text, seeds, options, clusters[batch])
        images = codec.decode(samples.latents)
        parts.append(judge.look(rows[batch], images, captions[batch], samples))
    return Drawn.join(parts)


def sample_own_experts(
    bundle: Bundle,
    text: TextConditioning,
    seeds: Sequence[int],
    options: SamplingOptions,
    clusters: NDArray[np.int64],
) -> Samples:
    """Return what `sample` would, were the router always sure that row i is of `clusters[i]`."""
    own = torch.from_numpy(clusters)
    latents = torch.empty(len(seeds), *bundle.latent_shape)
    for k in own.unique().tolist():
        rows = (own == k).nonzero()[:, 0]
        latents[rows] = sample_one_expert(
            bundle.expert(k),
            text.rows(rows),
            bundle.null_text,
            seeds=[seeds[row] for row in rows.tolist()],
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            solver=options.solver,
            time_grid=options.time_grid,
        )
    weights = torch.nn.functional.one_hot(own, bundle.num_experts).float()
    return Samples(latents, weights[:, None], torch.ones(len(own), 1))  # the same in every step


def _open(run: Run, student: str | None, device: str) -> Bundle:
    dtype = run.config.evaluation.dtype
    if student is None:
        return open_trained_parts(run, device=device, dtype=dtype)
    return open_student(run, student, device=device, dtype=dtype)


class _Judge:
    """The run's image model, which sees drawn pictures as it saw the corpus."""

    def __init__(self, config: Config) -> None:
        trained = None
        if config.features.checkpoint is None:
            folder = VerifiedFolder(Run(config).encoders / "features", None)
            trained = folder.local_path(OPEN_CLIP_FILES)
        device = torch.device("cuda" if config.evaluation.num_gpus else "cpu")
        self.features = load_features(config.features, trained).to(device)
        self.joint: JointEmbedding | None = None
        if config.features.kind == "open_clip":
            self.joint = JointEmbedding.load(config.features, trained, device)

    def look(
        self,
        rows: NDArray[np.int64],
        images: NDArray[np.uint8],
        captions: Sequence[str],
        samples: Samples,
    ) -> Drawn:
        none = np.empty((len(rows), 0), np.float32)
        return Drawn(
            rows,
            np.stack([thumbnail(image) for image in images]),
            self.features.encode(images),
            none if self.joint is None else self.joint.encode_images(images),
            none if self.joint is None else self.joint.encode_captions(captions),
            samples.expert_usage.numpy(),
            samples.experts_asked.numpy(),
        )
