"""Which bytes are a picture: known by how they begin, never by the name of a file."""

import io

from PIL import AvifImagePlugin, Image

from paris_ray.corpora.jpeg import MAX_SCANS, has_too_many_scans
from paris_ray.corpora.jpeg_xl import read_header
from paris_ray.corpora.png import fit_profile, fit_transparency, without_ballast
from paris_ray.corpora.quarantine import BadRow

# What Pillow decodes in this process and knows by a signature. Not EPS and WMF, which other
# programs draw, nor TGA, PCD and the like, which anything may be.
FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "JPEG2000", "PPM", "ICO", "CUR", "ICNS"),
    *("PSD", "QOI", "DDS", "SGI", "PCX", "DCX", "SUN", "XBM", "XPM", "MSP", "FLI", "FITS"),
)
# A file too short or too damaged for its header still shows what it was.
_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
}
_NUM_THREADS = 1  # rows are decoded by many tasks at once, each on its own core
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def open_picture(encoded: bytes, max_pixels: int) -> Image.Image:
    """Read the header of a picture, and nothing that would cost memory.

    Args:
        encoded: The bytes of its file.
        max_pixels: More than these are refused. Pillow refuses more than 178,956,970 by itself.

    Raises:
        BadRow: if it is no picture, or none that can be used.
    """
    kind = _kind(encoded)
    try:
        image = _open(kind, encoded, max_pixels)
    except ImportError as error:
        detail = f"{kind}: needs paris_ray[formats] ({error})"
        raise BadRow("unsupported_image", detail) from None
    except Image.DecompressionBombError as error:
        raise BadRow("too_many_pixels", str(error)) from None
    except BadRow:
        raise
    except Exception:  # decoders of arbitrary bytes raise almost anything
        raise _unreadable(kind, encoded) from None
    check_size(image.size, max_pixels)
    return image


def check_size(size: tuple[int, int], max_pixels: int) -> None:
    """Refuse a picture of more than `max_pixels`.

    Raises:
        BadRow: if width times height is more.
    """
    width, height = size
    if width * height > max_pixels:
        detail = f"{width} x {height} pixels, corpus.max_pixels={max_pixels}"
        raise BadRow("too_many_pixels", detail)


def _kind(encoded: bytes) -> str | None:
    """Return the format that the first bytes announce, None if they announce none for certain."""
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        return "WEBP"
    if encoded[4:8] == b"ftyp":
        brands = _brands(encoded)
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        return "HEIC" if brands & _HEIF_BRANDS else None
    return next((kind for begin, kind in _SIGNATURES.items() if encoded.startswith(begin)), None)


def _brands(encoded: bytes) -> set[bytes]:
    """Return what the file type box of an ISO media file says to be compatible with."""
    end = min(int.from_bytes(encoded[:4]), 256)
    return {encoded[8:12], *(encoded[start : start + 4] for start in range(16, end, 4))}


def _unreadable(kind: str | None, encoded: bytes) -> BadRow:
    size = f"{len(encoded)} bytes"
    if kind is None:
        return BadRow("not_an_image", f"{size} that begin with {encoded[:8]!r}")
    return BadRow("truncated_image", f"{kind} of {size}, whose header is damaged")


def _open(kind: str | None, encoded: bytes, max_pixels: int) -> Image.Image:
    match kind:
        case "PNG":
            image = Image.open(io.BytesIO(without_ballast(encoded)), formats=("PNG",))
            fit_transparency(image)
            fit_profile(image, encoded)
            return image
        case "JPEG" if has_too_many_scans(encoded):
            raise BadRow("unsupported_image", f"JPEG: of more than {MAX_SCANS} scans")
        case "AVIF":
            AvifImagePlugin.DEFAULT_MAX_THREADS = _NUM_THREADS
            return Image.open(io.BytesIO(encoded), formats=("AVIF",))
        case "HEIC":
            return _open_heic(encoded)
        case "JPEG XL":
            return _open_jpeg_xl(encoded, max_pixels)
        case _:
            return Image.open(io.BytesIO(encoded), formats=FORMATS)


def _open_heic(encoded: bytes) -> Image.Image:
    from pillow_heif import register_heif_opener

    register_heif_opener(
        decode_threads=_NUM_THREADS, thumbnails=False, depth_images=False, aux_images=False
    )
    return Image.open(io.BytesIO(encoded), formats=("HEIF",))


def _open_jpeg_xl(encoded: bytes, max_pixels: int) -> Image.Image:
    from pillow_jxl import JpegXLImagePlugin

    JpegXLImagePlugin.DECODE_THREADS = 0  # beside this one
    header = read_header(encoded)
    check_size(header.size, max_pixels)  # now: the plug-in decodes as it opens
    if header.animated:
        raise BadRow("unsupported_image", "JPEG XL: of an animation only the end is decoded")
    return Image.open(io.BytesIO(encoded), formats=("JXL",))
