"""Pictures and corpora: valid ones, and who reads them."""

import gzip
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageCms

from paris_ray.config import CorpusConfig
from paris_ray.corpora import REASONS, DecodedRow, RawRow, decode_row, open_corpus
from paris_ray.errors import CorpusError, PictureError
from tests.fuzz.kinds import Kind

MAX_PIXELS = 1_000_000
SIZE = 8
ROWS = 20
# Of a file that claims to have more rows than could be read in time, the first are read.
MAX_ROWS = 3000
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "JPEG2000", "ICO", "HEIF", "JXL")


def _picture(kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    gradient = Image.linear_gradient("L").resize((12, 16))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180)))
    image.save(stream, kind, icc_profile=profile, **options)
    return stream.getvalue()


def _write_pictures(folder: Path) -> None:
    import pillow_heif
    import pillow_jxl  # noqa: F401  registers its encoder

    pillow_heif.register_heif_opener()
    for kind in PICTURES:
        (folder / f"picture.{kind.lower()}").write_bytes(_picture(kind))
    (folder / "again.jpeg").write_bytes(_picture("JPEG", progressive=True))
    (folder / "grey.png").write_bytes(_grey())
    _write_drawn(folder)


def _grey() -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").convert("I;16").save(stream, "PNG")
    return stream.getvalue()


def _write_drawn(folder: Path) -> None:
    """A picture with the record of how it was drawn, of each kind."""
    import numpy as np

    from paris_ray.pictures import FORMATS, encode_picture
    from tests.records import RECORD

    pixels = np.zeros((RECORD.native_size,) * 2 + (3,), np.uint8)
    for kind in FORMATS:
        (folder / f"drawn.{kind}").write_bytes(encode_picture(pixels, RECORD, kind))


def _decode(folder: Path, _: Any) -> None:
    from paris_ray.pictures import read_picture

    config = CorpusConfig(image_size=SIZE, max_pixels=MAX_PIXELS)
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.is_symlink():
            _check(decode_row(RawRow(path.name, path.read_bytes(), "a caption"), config))
            try:
                read_picture(path.read_bytes())
            except PictureError:
                assert not path.name.startswith("drawn") or path.exists()


def _check(row: object) -> None:
    if isinstance(row, DecodedRow):
        assert row.image.shape == (SIZE, SIZE, 3) and row.image.dtype == "uint8"
    else:
        assert row.reason in REASONS, row  # type: ignore[attr-defined]


def _samples() -> list[tuple[str, bytes]]:
    jpeg = _picture("JPEG")
    pairs = []
    for index in range(ROWS):
        document = json.dumps({"caption": f"picture {index}", "url": "u", "label": index})
        pairs += [(f"{index:02d}.jpg", jpeg), (f"{index:02d}.json", document.encode())]
    return pairs


def _write_tars(folder: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in _samples():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (folder / "plain.tar").write_bytes(stream.getvalue())
    (folder / "packed.tar.gz").write_bytes(gzip.compress(stream.getvalue()))


def _rows() -> dict[str, list[Any]]:
    jpeg = _picture("JPEG")
    return {
        "image": [{"bytes": jpeg, "path": None}] * ROWS,
        "caption": [f"picture {index}" for index in range(ROWS)],
        "key": [f"{index}" for index in range(ROWS)],
        "label": list(range(ROWS)),
    }


def _write_parquet(folder: Path) -> None:
    table = pa.table(_rows())
    pq.write_table(table, folder / "one.parquet", row_group_size=7, compression="zstd")
    pq.write_table(table, folder / "two.parquet", compression="snappy", use_dictionary=False)


def _write_image_folder(folder: Path) -> None:
    """A table of each kind, each in a folder of its own, and pictures."""
    for kind in ("jsonl", "csv", "parquet"):
        (folder / kind / "pictures").mkdir(parents=True)
        names = [f"pictures/{index:02d}.jpg" for index in range(ROWS)]
        captions = [f"picture {index}" for index in range(ROWS)]
        rows = [
            {"file_name": n, "text": c, "label": 1} for n, c in zip(names, captions, strict=True)
        ]
        for name in names:
            (folder / kind / name).write_bytes(_picture("JPEG"))
        table = folder / kind / f"metadata.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), table)
        elif kind == "csv":
            lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
            table.write_text("\n".join(lines) + "\n")
        else:
            table.write_text("\n".join(map(json.dumps, rows)) + "\n")


def _write_sidecars(folder: Path) -> None:
    for name, content in _samples():
        (folder / name).write_bytes(content)
    (folder / "00.txt").write_text("a caption")


def _read_all(kind: str, folder: Path) -> None:
    """List and read the rows of a corpus, decode them, and compare both lists of keys."""
    config = CorpusConfig(
        kind=kind,
        path=str(folder),
        image_size=SIZE,
        max_pixels=MAX_PIXELS,
        attributes="label",
        limit=MAX_ROWS,
    )
    corpus = open_corpus(config)
    for shard in corpus.shards():
        keys = corpus.keys(shard)
        for row in corpus.read(shard):
            assert next(keys, None) == row.key
            assert isinstance(row.key, str)
            _check(decode_row(row, config))
        assert next(keys, None) is None
        assert isinstance(corpus.version(shard), str)


def _read_tars(folder: Path, _: Any) -> None:
    _read_all("webdataset", folder)


def _read_parquet(folder: Path, _: Any) -> None:
    _read_all("parquet", folder)


def _read_image_folders(folder: Path, _: Any) -> None:
    refused = None
    for inner in sorted(folder.iterdir()):
        try:
            _read_all("image_folder", inner)
        except CorpusError as error:
            refused = error
    if refused is not None:
        raise refused


def _read_sidecars(folder: Path, _: Any) -> None:
    _read_all("sidecars", folder)


CORPORA: Mapping[str, Kind] = {
    "picture": Kind(_write_pictures, _decode),
    "tar": Kind(_write_tars, _read_tars, may_lead_out=True),
    "parquet": Kind(_write_parquet, _read_parquet, may_lead_out=True),
    "image_folder": Kind(
        _write_image_folder, _read_image_folders, changed="*/metadata.*", may_lead_out=True
    ),
    "sidecars": Kind(_write_sidecars, _read_sidecars),
}
