"""The same captioned pictures in every layout, some of them bad."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Rows = Sequence[tuple[bytes, str]]


def jpeg(size: tuple[int, int], orientation: int = 1) -> bytes:
    """A red picture whose EXIF says how it lies."""
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.new("RGB", size, "red").save(stream, "JPEG", exif=exif)
    return stream.getvalue()


def rows_of(count: int) -> list[tuple[bytes, str]]:
    """Good rows."""
    return [(jpeg((40, 20 + i)), f"picture {i} of a red wall") for i in range(count)]


def write_image_folder(folder: Path, rows: Rows) -> Path:
    folder.mkdir()
    lines = []
    for i, (picture, caption) in enumerate(rows):
        (folder / f"{i:03d}.jpg").write_bytes(picture)
        lines.append(json.dumps({"file_name": f"{i:03d}.jpg", "text": caption, "source": "web"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_parquet(folder: Path, rows: Rows) -> Path:
    folder.mkdir()
    pictures = [{"bytes": picture, "path": None} for picture, _ in rows]
    columns = {"url": ["u"] * len(rows), "image": pictures, "caption": [text for _, text in rows]}
    pq.write_table(pa.table(columns), folder / "part.parquet", row_group_size=16)
    return folder


def write_tars(folder: Path, rows: Rows) -> Path:
    """Two tars, with captions in JSON."""
    folder.mkdir()
    half = len(rows) // 2
    for k, part in enumerate((rows[:half], rows[half:])):
        with tarfile.open(folder / f"{k}.tar", "w") as tar:
            for i, (picture, caption) in enumerate(part):
                document = json.dumps({"caption": caption, "url": "u"}).encode()
                for extension, content in (("jpg", picture), ("json", document)):
                    member = tarfile.TarInfo(f"{k}-{i:03d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def write_sidecars(folder: Path, rows: Rows) -> Path:
    """Pictures in a folder below, each with a text file beside it."""
    (folder / "below").mkdir(parents=True)
    for i, (picture, caption) in enumerate(rows):
        (folder / "below" / f"{i:03d}.jpg").write_bytes(picture)
        (folder / "below" / f"{i:03d}.txt").write_text(caption)
    return folder


LAYOUTS: dict[str, Callable[[Path, Rows], Path]] = {
    "image_folder": write_image_folder,
    "parquet": write_parquet,
    "sidecars": write_sidecars,
    "webdataset": write_tars,
}
