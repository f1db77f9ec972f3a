"""The layout of a run folder: where each stage writes and the next one reads."""

from collections.abc import Sequence

from paris_ray.artifacts import VerifiedFolder, open_finished, read_manifest
from paris_ray.config import Config, run_folder
from paris_ray.errors import ArtifactError
from paris_ray.folders import Folder

EMBEDDINGS, ENCODERS, CLUSTERS, SHARD = "embeddings", "encoders", "clusters", "shard"
SEED, EXPERT, ROUTER, EVALUATION, BUNDLE = "seed", "expert", "router", "evaluation", "bundle"
# Kind of a distilled model, and the names of the two that there may be.
DISTILLED, STUDENT, FEW_STEP = "distilled", "student", "few_step"
FEDERATION = "federation"  # what a site was given: encoders/, centroids, router/, seed/

# Where a bundle, and the encoders of a run, keep each kind of codec.
CODEC_FOLDERS = {"patch_pca": "codec", "autoencoder_kl": "vae"}

# Files of a trained model, named as in the public Paris release.
MODEL_CONFIG = "config.json"
EXPERT_WEIGHTS = "diffusion_pytorch_model.safetensors"
ROUTER_WEIGHTS = "pytorch_model.safetensors"


class Run:
    """The folders of one run.

    Args:
        config: Its configuration; `run_dir` says where, and `prepared_from` where encoders and
            embeddings of another run are.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = Folder(run_folder(config))
        source = config.prepared_from
        prepared = self.folder if source is None else Folder(source)
        self.encoders = prepared / "encoders"
        self.embeddings = prepared / "embeddings"
        self.held_out = self.embeddings / "held_out"
        self.quarantine = prepared / "quarantine"
        self.clusters = self.folder / "clusters"
        self.shared = self.clusters / "shared"
        self.seed = self.folder / "seed"
        self.router = self.folder / "router"
        name = config.evaluation.name
        self.main_evaluation = self.folder / "evaluation"  # what a bundle tells of
        self.evaluation = self.folder / f"evaluations/{name}" if name else self.main_evaluation
        self.bundle = self.folder / "bundle"
        self.distilled = self.folder / "distilled"
        self.distilled_bundle = self.distilled / "bundle"

    @property
    def codec(self) -> Folder:
        """The codec of the run, under the name that it has in a bundle."""
        return self.encoders / CODEC_FOLDERS[self.config.codec.kind]

    @property
    def num_experts(self) -> int:
        """Number of clusters, and so of experts."""
        return self.config.cluster.num_clusters

    @property
    def trained_experts(self) -> Sequence[int]:
        """Numbers of the experts that are trained in this run: all, but at a federation's site."""
        return self.config.federation.experts or range(self.num_experts)

    def shard(self, cluster: int) -> Folder:
        """The training data of one cluster."""
        return self.clusters / "shards" / f"cluster={cluster}"

    def held_out_shard(self, cluster: int) -> Folder:
        """The held-out rows of one cluster, which nothing is trained on."""
        return self.clusters / "held_out" / f"cluster={cluster}"

    def held_out_shards(self) -> dict[int, Folder]:
        """The held-out rows of every cluster that has some."""
        shards = {k: self.held_out_shard(k) for k in range(self.num_experts)}
        return {k: shard for k, shard in shards.items() if shard.exists()}

    def expert(self, index: int) -> Folder:
        """The own folder of one expert."""
        return self.folder / "experts" / f"expert_{index}"

    def student(self, name: str) -> Folder:
        """The folder of one distilled model, with the parts `expert_0` and `router`."""
        return self.distilled / name

    def evaluation_of(self, student: str | None) -> Folder:
        """The evaluation of one distilled model, or of the ensemble for None."""
        if student is None:
            return self.evaluation
        name = self.config.evaluation.name
        return self.distilled / "evaluation" / (student if name is None else f"{student}_{name}")

    @property
    def federation(self) -> VerifiedFolder | None:
        """What the federation of this site gave it; None: this run is of no federation.

        Raises:
            ArtifactError: if it is not finished.
        """
        folder = self.config.federation.folder
        return None if folder is None else open_finished(Folder(folder), FEDERATION)

    def parents(self) -> dict[str, str]:
        """Return the digests of all parts of the model.

        Raises:
            ArtifactError: naming the part that is not finished, or was made of other data.
        """
        for k in range(self.num_experts):
            shard = read_manifest(self.shard(k), SHARD).digest
            if read_manifest(self.expert(k), EXPERT).parents.get("shard") != shard:
                raise ArtifactError(f"{self.expert(k).uri} was trained on another shard")
        clusters = read_manifest(self.clusters, CLUSTERS).digest
        if read_manifest(self.router, ROUTER).parents.get("clusters") != clusters:
            raise ArtifactError(f"{self.router.uri} was trained on other clusters")
        parts = {f"expert_{k}": (self.expert(k), EXPERT) for k in range(self.num_experts)}
        parts |= {"router": (self.router, ROUTER), "encoders": (self.encoders, ENCODERS)}
        return {name: read_manifest(*where).digest for name, where in parts.items()}
