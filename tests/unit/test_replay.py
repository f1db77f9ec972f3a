"""`jobs.replay`: the same pixels, others, and files that it refuses."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from jobs.replay import EXIT_DIFFERENT, main
from paris_ray.bundle import Bundle, bundle_digest
from paris_ray.pictures import PictureFormat, PictureRecord, Sampling, encode_picture
from paris_ray.sampling import generate
from tests.records import RECORD

pytestmark = pytest.mark.usefixtures("replica_threads")


@pytest.fixture(scope="module")
def record(tiny_bundle_path: Path) -> PictureRecord:
    return replace(
        RECORD,
        bundle=bundle_digest(str(tiny_bundle_path)),
        dtype=None,
        prompt="a red cat",
        seed=7,
        sampling=Sampling(
            num_inference_steps=3,
            solver="ab2",
            time_grid="half-last",
            guidance_scale=2.0,
            routing="full",
        ),
        lora=None,
        expert_weights=[],
        missing_experts=[],
        attribution=None,
    )


def write(
    path: Path, record: PictureRecord, bundle: Bundle, output_format: PictureFormat = "png"
) -> str:
    (image,) = generate(bundle, [record.prompt], seed=record.seed, **asdict(record.sampling))
    path.write_bytes(encode_picture(np.asarray(image), record, output_format))
    return str(path)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("size", [32, 80])
def test_a_file_is_drawn_again_byte_for_byte(
    record: PictureRecord,
    tiny_bundle: Bundle,
    tiny_bundle_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    output_format: PictureFormat,
    size: int,
) -> None:
    path = write(tmp_path / "a", replace(record, size=size), tiny_bundle, output_format)
    again = tmp_path / "again"
    assert main([path, "--bundle", str(tiny_bundle_path), "--output", str(again)]) == 0
    assert again.read_bytes() == Path(path).read_bytes()
    assert capsys.readouterr().out == "tiny, seed 7: 'a red cat'\nidentical\n"


def test_the_experts_that_might_draw_are_replayed(
    record: PictureRecord, tiny_bundle: Bundle, tiny_bundle_path: Path, tmp_path: Path
) -> None:
    sampling = replace(record.sampling, allowed_experts=[2])
    path = write(tmp_path / "a", replace(record, sampling=sampling), tiny_bundle)
    assert main([path, "--bundle", str(tiny_bundle_path)]) == 0
    sampling = replace(sampling, allowed_experts=[1, 2])
    others = replace(record, sampling=sampling)
    (image,) = generate(tiny_bundle, [record.prompt], seed=record.seed, allowed_experts=[2])
    Path(path).write_bytes(encode_picture(np.asarray(image), others, "png"))
    assert main([path, "--bundle", str(tiny_bundle_path)]) == EXIT_DIFFERENT


def test_other_pixels_are_counted(
    record: PictureRecord,
    tiny_bundle_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode_picture(np.zeros((32, 32, 3), dtype=np.uint8), record, "png"))
    assert main([str(path), "--bundle", str(tiny_bundle_path)]) == EXIT_DIFFERENT
    assert "different in 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": "0" * 64}, "the picture was drawn by 0000"),
        ({"bundle": None}, "the picture was drawn by None"),
        ({"missing_experts": [2]}, "drawn without experts that were lost: 2"),
        ({"unfinished_at": 2}, "unfinished: it was sent at step 2"),
    ],
)
def test_what_cannot_be_drawn_again_is_refused(
    record: PictureRecord,
    tiny_bundle: Bundle,
    tiny_bundle_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object],
    message: str,
) -> None:
    path = write(tmp_path / "a.png", replace(record, **change), tiny_bundle)
    assert main([path, "--bundle", str(tiny_bundle_path)]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_picture_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_text("no picture")
    assert main([str(tmp_path / "a.png")]) == 2
    assert main([str(tmp_path / "b.png")]) == 2
    assert "not a PNG, JPEG or WebP" in (error := capsys.readouterr().err)
    assert "b.png cannot be read: No such file" in error
