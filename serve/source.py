"""Where the bundle of an application is, and which one it must be."""

from typing import NamedTuple

from paris_ray.bundle import Bundle, load_bundle


class BundleSource(NamedTuple):
    """A constructor argument of every deployment.

    Attributes:
        uri: Where the bundle is.
        digest: Digest of its manifest; None takes whatever is there. Since Serve restarts a
            replica when its arguments change, a new digest makes it load the new bundle.
    """

    uri: str
    digest: str | None = None

    def open(self) -> Bundle:
        """Return the bundle; raises BundleError if there is none, or another one."""
        return load_bundle(self.uri, self.digest)
