"""From where a bundle is to a bundle that computes."""

from paris_ray.bundle import Bundle, load_bundle
from serve.source import BundleSource


def open_bundle(source: BundleSource) -> Bundle:
    """Return the bundle with its adapters.

    Raises:
        BundleError: if there is none, or another one, or an adapter does not fit it or is
            another one.
        ReceiptError: if an adapter was bought, and its receipt does not allow it.
    """
    bundle = load_bundle(
        source.uri, source.digest, dtype=source.dtype, device=source.device, offload=source.offload
    )
    for lora in source.loras:
        lora.check()
        bundle.add_lora(
            lora.name,
            lora.uri,
            expert=lora.expert,
            merge=lora.merge,
            receipt_key=lora.receipt_key,
        )
    return bundle
