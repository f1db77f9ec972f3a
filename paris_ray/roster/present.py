"""A bundle as it is, and where the rows of its experts are."""

from collections.abc import Sequence

from paris_ray.artifacts import open_finished
from paris_ray.bundle import bundle_digest, load_bundle
from paris_ray.config import Config
from paris_ray.errors import ArtifactError, BundleError, ConfigError
from paris_ray.export import MODEL_CARD
from paris_ray.folders import Folder
from paris_ray.model_folder.history import Rows, origins
from paris_ray.roster.newcomer import check_encoders
from paris_ray.roster.sample import Shard, find_shards
from paris_ray.run import BUNDLE, Run

MAX_CARD_BYTES = 1_000_000


class Present:
    """What a change starts from.

    Args:
        path: Path or URI of the bundle.
        config: A run that has trained some of its experts, with the same encoders.
        more: Shards of experts that came from elsewhere.

    Attributes:
        folder: The bundle's.
        digest: Of its manifest.
        bundle: The bundle, opened.
        shards: The rows of each expert; None where they are not found.

    Raises:
        BundleError: if it is no finished bundle, or the run has other encoders.
        ArtifactError: if an artefact is damaged.
    """

    def __init__(self, path: str, config: Config, more: Sequence[str] = ()) -> None:
        self.folder, self.config = Folder(path), config
        digest = bundle_digest(path)
        if digest is None:
            raise BundleError(f"{self.folder.uri} has no manifest.json: export writes one")
        self.digest: str = digest
        self.bundle = load_bundle(path, digest, device=config.router_training.device)
        run = Run(config)
        check_encoders(self.bundle, run.encoders)
        self.shards = find_shards(self.bundle, run, [Folder(each) for each in more])

    def shard(self, index: int) -> Shard:
        """Return the rows of an expert; raises ArtifactError if they were not found."""
        return self.found(index, self.shards[index])

    def found(self, index: int, shard: Shard | None) -> Shard:
        """Return a shard, which is that of an expert; raises ArtifactError if it is none."""
        if shard is None:
            raise ArtifactError(
                f"the rows of expert {index} are not found: run_dir={self.config.run_dir!r} has "
                "not trained these weights, and no shard of --more-rows is the one that "
                "history.json names"
            )
        return shard

    def known_rows(self, index: int, whose: str | None) -> Rows | None:
        """Return what is known of the rows of an expert.

        Args:
            index: Its number.
            whose: Whose data they are said to be; None: nothing is said.

        Raises:
            ConfigError: if it is said whose they are, but not known which, or another is named.
        """
        origin = origins(self.bundle.history, self.bundle.num_experts)[index]
        shard = self.shards[index]
        known = None if shard is None else shard.told(whose)
        if origin is not None:
            known = origin.rows_after
        if whose is not None and (known is None or known.whose != whose):
            told = "its rows are not known" if known is None else f"they are of {known.whose!r}"
            raise ConfigError(f"data_of={whose!r} is not allowed: {told}")
        return known

    def card(self) -> str:
        """Return the model card of the bundle as it is."""
        source = open_finished(self.folder, BUNDLE)
        if not self.folder.exists(MODEL_CARD):
            return f"# {self.bundle.facts.model_name}\n"
        with self.folder.open(MODEL_CARD) as file:
            if file.size() > MAX_CARD_BYTES:
                raise BundleError(
                    f"{self.folder.uri}/{MODEL_CARD} has {file.size()} bytes, allowed: "
                    f"{MAX_CARD_BYTES}"
                )
        return source.read(MODEL_CARD).decode(errors="replace")
