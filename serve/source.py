"""Where the bundle of an application is, and which one it must be."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

from paris_ray.artifacts import file_sha256
from paris_ray.config import Dtype
from paris_ray.config.lora import ADAPTER_WEIGHTS
from paris_ray.errors import BundleError
from paris_ray.folders import Folder
from paris_ray.model_folder.description import BundleDescription
from paris_ray.model_folder.layout import bundle_digest, describe_bundle
from paris_ray.pictures import LoRARecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What drew a picture: where it is the same, a request with its seed means the same picture.

    Attributes:
        bundle: Digest of the bundle's manifest, or None.
        dtype: Data type of experts and router; None: as stored.
        lora: The adapter that the request names, or None.
    """

    bundle: str | None = None
    dtype: Dtype | None = None
    lora: LoRARecord | None = None


class LoRASource(NamedTuple):
    """An adapter of one expert.

    Attributes:
        name: What requests call it.
        uri: Where it is.
        expert: Number of its expert; None: the one that its receipt or manifest names.
        merge: Whether its expert's weights are computed once.
        receipt_key: Whose receipts are believed, for one that was bought.
        sha256: Digest of its weights; None takes whatever is there. `pinned` names it.
    """

    name: str
    uri: str
    expert: int | None
    merge: bool
    receipt_key: str | None
    sha256: str | None = None

    def pinned(self, expert: int) -> "LoRASource":
        """Return the source of the weights that are there now, for an expert.

        Raises:
            ArtifactError: if there are none.
        """
        return self._replace(expert=expert, sha256=self._digest())

    def check(self) -> None:
        """Raise BundleError if other weights are there than those that were pinned."""
        if self.sha256 is None:
            return
        digest = self._digest()
        if digest != self.sha256:
            raise BundleError(
                f"{self.uri}: sha256={digest} of {ADAPTER_WEIGHTS} is not allowed: "
                f"{self.sha256}, which was deployed"
            )

    def record(self) -> LoRARecord:
        """Return what the files of pictures that are drawn with it tell; it must be pinned."""
        assert self.expert is not None
        assert self.sha256 is not None
        return LoRARecord(expert=self.expert, sha256=self.sha256, merge=self.merge)

    def _digest(self) -> str:
        return file_sha256(Folder(self.uri), ADAPTER_WEIGHTS)


class BundleSource(NamedTuple):
    """A constructor argument of every deployment.

    Attributes:
        uri: Where the bundle is.
        digest: Digest of its manifest; None takes whatever is there. `pinned` names it. Since Serve
            restarts a replica when its arguments change, a new digest makes it load the new bundle.
        dtype: Data type of experts and router; None keeps the stored one.
        device: Where each replica computes.
        offload: Keep at most two experts of a process on its device.
        loras: Adapters of its experts.
        exact: Whether a seed must mean the same bytes in any batch.
    """

    uri: str
    digest: str | None = None
    dtype: Dtype | None = None
    device: str = "auto"
    offload: bool = False
    loras: tuple[LoRASource, ...] = ()
    exact: bool = True

    @property
    def version(self) -> str:
        """What replicas must agree on to draw a picture together: all but where they compute."""
        return hashlib.sha256(repr(self._replace(device="")).encode()).hexdigest()

    def pinned(self) -> "BundleSource":
        """Return the source of the bundle that is there now, and of no other at its place.

        Raises:
            ArtifactError: if the manifest is damaged.
        """
        return self._replace(digest=self.digest or bundle_digest(self.uri))

    def origin(self, lora: str | None) -> Origin:
        """Return what draws a picture with an adapter, by its name, or without any.

        Of an adapter that is not among these nothing is known, as where there is none.
        """
        record = next((each.record() for each in self.loras if each.name == lora), None)
        return Origin(bundle=self.digest, dtype=self.dtype, lora=record)

    def of_expert(self, index: int) -> "BundleSource":
        """Return the source with the adapters of one expert alone."""
        return self._replace(loras=tuple(lora for lora in self.loras if lora.expert == index))

    def describe(self) -> BundleDescription:
        """Return what the bundle tells of itself; it must be pinned, by which it has been opened.

        Raises:
            BundleError: if there is none, or another one.
        """
        loras = {}
        for lora in self.loras:
            assert lora.expert is not None
            loras[lora.name] = lora.expert
        return describe_bundle(self.uri, self.digest, loras=loras)
