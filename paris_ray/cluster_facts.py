"""What the experts of a bundle were trained on, for people: words and pictures of each cluster.

    clusters/clusters.json

The public release has no such file, and a bundle draws without it.
"""

from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from paris_ray.artifacts import VerifiedFolder
from paris_ray.errors import BundleError
from paris_ray.folders import Folder

FILE = "clusters.json"
MAX_WORDS, MAX_WORD_LENGTH = 20, 100
MAX_PICTURES, MAX_PICTURE_LENGTH = 20, 20_000  # of 32x32 pixels: 4 kB without compression
TOLD_PICTURES, TOLD_WORDS = 6, 8  # of a cluster, in bundles of ours

Word = Annotated[str, Field(max_length=MAX_WORD_LENGTH)]
Picture = Annotated[str, Field(max_length=MAX_PICTURE_LENGTH, pattern="^[A-Za-z0-9+/]+=*$")]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterFacts:
    """One cluster.

    Attributes:
        rows: How many pictures it has.
        words: What their captions say more often than all others do, the most telling first.
        pictures: Some of them: PNG files of 32x32 pixels, in base64.
    """

    # Model folders come from strangers: no conversions, no fields that nobody knows.
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    rows: int
    words: Annotated[list[Word], Field(max_length=MAX_WORDS)]
    pictures: Annotated[list[Picture], Field(max_length=MAX_PICTURES)]


_CLUSTERS = TypeAdapter(list[ClusterFacts])


def write_clusters(folder: Folder, clusters: list[ClusterFacts]) -> None:
    """Write what is known of the clusters, in the order of their experts."""
    folder.write_json(FILE, [asdict(cluster) for cluster in clusters])


def read_clusters(part: VerifiedFolder, num_experts: int | None) -> list[ClusterFacts]:
    """Return what is known of the clusters.

    Args:
        part: The folder that the file is in.
        num_experts: How many entries it must have; None: any number.

    Raises:
        BundleError: if the file is damaged, or has not one entry an expert.
    """
    where = f"{part.folder.uri}/{FILE}"
    try:
        clusters = _CLUSTERS.validate_json(part.read(FILE))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "it"
        raise BundleError(f"{where} is damaged: {field}: {first['msg']}") from None
    if num_experts not in (None, len(clusters)):
        raise BundleError(f"{where} has {len(clusters)} clusters, expected {num_experts}")
    return clusters
