"""What a training task tells people while it runs."""

from pathlib import Path

import pytest

from paris_ray.artifacts import PROGRESS, Folder
from paris_ray.pipeline.progress import ProgressFile
from paris_ray.training.loop import Progress

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(("mfu", "shown"), [(0.41, "MFU 0.41"), (None, "samples/s ETA")])
def test_the_mfu_is_told_where_it_is_known(
    ray_session: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mfu: float | None,
    shown: str,
) -> None:
    progress = Progress(
        step=5, num_steps=10, samples_seen=320, loss=0.5, samples_per_second=80, eta_s=4, mfu=mfu
    )
    ProgressFile(Folder(tmp_path), "expert-0")(progress)  # Ray refuses a gauge of None
    assert shown in capsys.readouterr().out
    assert Progress(**Folder(tmp_path).read_json(PROGRESS)) == progress
