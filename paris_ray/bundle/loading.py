"""From a folder to a bundle that computes."""

from functools import partial

from paris_ray.bundle.parts import Bundle
from paris_ray.config import Dtype
from paris_ray.model_folder.layout import read_model_folder


def load_bundle(
    path: str,
    digest: str | None = None,
    *,
    dtype: Dtype | None = None,
    device: str = "cpu",
    offload: bool = False,
) -> Bundle:
    """Open a model folder in the layout of the public Paris release; no weights are read yet.

    Args:
        path: A path or a pyarrow.fs URI. Links that leave a local folder are refused, which the
            cache of the Hugging Face hub consists of: copy it with `cp -rL`.
        digest: Digest of the manifest of the only bundle that is wanted; None takes any.
        dtype: Data type of experts and router: `float32`, `bfloat16` or `float16`; None keeps the
            stored one.
        device: Where all parts run: `cpu`, `cuda` or `auto`.
        offload: Keep at most two experts on the device, the ones used last.

    Raises:
        BundleError: if a file is missing or left over, a value is not allowed, or whoever writes
            the bundle has not finished.
        ArtifactError: if a file does not have the digest that the folder's manifest gives.
        ConfigError: if `dtype` is not allowed.
    """
    make = partial(Bundle, dtype=dtype, device=device, offload=offload)
    bundle = read_model_folder(path, digest, make)
    router = bundle.parts["router"]
    if router.folder.is_local and router.digests is None:  # else a digest tells what is damaged
        bundle.check_headers()
    return bundle
