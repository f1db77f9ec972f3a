"""What the processes of one machine find out about it, found out once.

The trials of `exactness` take a replica longer than all else that it loads, and a replacement of
one that died would make them all again. Outcomes are files in the temporary folder, so that they
end with the machine; they are of this user's alone, since whoever can write there decides.
"""

import hashlib
import logging
import os
import platform
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger("paris_ray")

SHARED = "PARIS_RAY_SHARE_TRIALS"
# What decides how a product is computed, beside the machine and the libraries.
VARIABLES = ("ATEN_", "CUBLAS_", "CUDA_", "DNNL_", "KMP_", "MKL_", "NVIDIA_", "OMP_", "ONEDNN_")
PROCESSOR = ("model", "flags", "CPU", "Features")  # lines of Linux, the same of all cores
CODE = ("exactness.py", "models/*.py", "encoders/*.py")
OUTCOMES = {b"yes": True, b"no": False}


def outcome(kind: str, trial: Callable[[], bool]) -> bool:
    """Return the outcome of a trial.

    With `SHARED` in the environment, it is made only if no other such process left it here.

    Args:
        kind: Of what: another one has another text.
        trial: Makes it.
    """
    folder = _folder() if SHARED in os.environ else None
    if folder is None:
        return trial()
    file = folder / hashlib.sha256(f"{kind}\n{_machine()}".encode()).hexdigest()
    known = _known(file)
    if known is not None:
        return known
    found = trial()
    _leave(file, found)
    return found


def _known(file: Path) -> bool | None:
    try:
        return OUTCOMES.get(file.read_bytes())
    except OSError:
        return None


def _leave(file: Path, found: bool) -> None:
    """Write an outcome, in one piece: others of its kind may do so at the same moment."""
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
            temporary.write(b"yes" if found else b"no")
        Path(temporary.name).replace(file)
    except OSError as error:  # nobody needs it to be there
        logger.warning("%s could not be written: %s", file, error)


@cache
def _folder() -> Path | None:
    """Return where outcomes are; None if others than this user could write there."""
    path = Path(tempfile.gettempdir(), f"paris_ray-{os.getuid()}")
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
        if (status.st_uid, status.st_mode) == (os.getuid(), 0o40700):
            folder = path / "trials"
            folder.mkdir(exist_ok=True)
            return folder
        reason = "it is not this user's alone"
    except OSError as error:
        reason = str(error)
    logger.warning("%s: %s; trials are made again", path, reason)
    return None


@cache
def _machine() -> str:
    """Return what becomes another text when trials might end otherwise."""
    root = Path(__file__).parent
    code = b"".join(file.read_bytes() for glob in CODE for file in sorted(root.glob(glob)))
    variables = {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processors = {line for line in lines if line.startswith(PROCESSOR)} | {platform.processor()}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    told = (
        hashlib.sha256(code).hexdigest(),
        torch.__version__,
        torch.__config__.show(),  # its libraries, and the instructions that it uses
        sorted(processors),
        gpus,
        sorted(variables.items()),
    )
    return repr(told)
