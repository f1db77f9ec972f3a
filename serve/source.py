"""Where the bundle of an application is, and which one it must be."""

from typing import NamedTuple

from paris_ray.bundle import Bundle, Dtype, load_bundle


class BundleSource(NamedTuple):
    """A constructor argument of every deployment.

    Attributes:
        uri: Where the bundle is.
        digest: Digest of its manifest; None takes whatever is there. Since Serve restarts a
            replica when its arguments change, a new digest makes it load the new bundle.
        dtype: Data type of experts and router; None keeps the stored one.
        device: Where each replica computes.
        offload: Keep at most two experts of a process on its device.
    """

    uri: str
    digest: str | None = None
    dtype: Dtype | None = None
    device: str = "auto"
    offload: bool = False

    def open(self) -> Bundle:
        """Return the bundle; raises BundleError if there is none, or another one."""
        return load_bundle(
            self.uri, self.digest, dtype=self.dtype, device=self.device, offload=self.offload
        )
