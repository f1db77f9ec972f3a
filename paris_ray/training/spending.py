"""What a training has taken so far, over all processes that worked on it, and its caps."""

from time import monotonic, process_time

from paris_ray.artifacts import SPENT
from paris_ray.config import ExpertConfig, RouterConfig, TrainingConfig
from paris_ray.devices import device_name, resolve_device
from paris_ray.errors import ArtifactError, SpendingCapError
from paris_ray.folders import Folder
from paris_ray.ledger import SECONDS_PER_HOUR, Bytes, Taken
from paris_ray.models.flops import training_flops_per_image

NOTE_INTERVAL_S = 10.0  # so much at most is not known of a process that was killed


class Spending:
    """Counts the seconds of a training, those of earlier processes included.

    They are kept in a file of the training's own folder, which is written from time to time: what a
    killed process had trained since its last checkpoint is paid for too.

    Args:
        folder: Of the training.
        config: Has the caps and the price.

    Raises:
        ArtifactError: if the file is damaged.
    """

    def __init__(self, folder: Folder, config: TrainingConfig) -> None:
        self.folder, self.config = folder, config
        self._earlier, self._began = seconds_spent(folder), monotonic()
        self._cpu_earlier, self._cpu_began = cpu_seconds_spent(folder), process_time()
        self._noted_at = self._began

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._earlier + monotonic() - self._began

    def note(self, *, at_once: bool = False) -> None:
        """Write the seconds down, if it is time to."""
        now = monotonic()
        if at_once or now - self._noted_at >= NOTE_INTERVAL_S:
            cpu_seconds = self._cpu_earlier + process_time() - self._cpu_began
            spent = {"seconds": self.seconds, "cpu_seconds": cpu_seconds}
            self.folder.write_json(SPENT, {name: round(value, 3) for name, value in spent.items()})
            self._noted_at = now

    def cap_reached(self) -> SpendingCapError | None:
        """Return an error that tells of the cap that is reached, or None."""
        hours, price = self.seconds / SECONDS_PER_HOUR, self.config.dollars_per_hour
        spent = {"max_hours": hours, "max_dollars": None if price is None else hours * price}
        for name, amount in spent.items():
            cap = getattr(self.config, name)
            if cap is not None and amount is not None and amount >= cap:
                return SpendingCapError(
                    f"{name}={cap:g} is reached ({hours:.4g} hours{_in_dollars(hours, price)}): "
                    f"what is trained is in the checkpoint; run again with a higher {name} to go on"
                )
        return None


def seconds_spent(folder: Folder) -> float:
    """Return the seconds that the training of a folder has taken; 0 where nothing tells of any.

    Raises:
        ArtifactError: if the file that tells of them is damaged.
    """
    return _spent(folder, "seconds", None)


def cpu_seconds_spent(folder: Folder) -> float:
    """Return the seconds that all threads of its processes computed; raises as `seconds_spent`."""
    return _spent(folder, "cpu_seconds", 0.0)  # earlier code did not count them


def _spent(folder: Folder, name: str, default: float | None) -> float:
    if not folder.exists(SPENT):
        return 0.0
    told = folder.read_json(SPENT)
    seconds = told.get(name, default) if isinstance(told, dict) else None
    if not isinstance(seconds, int | float) or not seconds >= 0:
        raise ArtifactError(f"{folder.uri}/{SPENT} is damaged: delete it to count from 0")
    return float(seconds)


def taken_by_training(
    model: ExpertConfig | RouterConfig,
    training: TrainingConfig,
    *,
    text_length: int,
    samples: int,
    seconds: float,
    moved: Bytes,
) -> Taken:
    """Return what a training took, told by its own process.

    Args:
        model: What was trained.
        training: How.
        text_length: Text tokens a caption.
        samples: That it saw.
        seconds: That all of its processes took.
        moved: What was read and written.
    """
    hours, price = seconds / SECONDS_PER_HOUR, training.dollars_per_hour
    return Taken(
        hours=hours,
        device=device_name(resolve_device(training.device)),
        samples=samples,
        flops=samples * training_flops_per_image(model, text_length),
        dollars=None if price is None else hours * price,
        bytes=moved,
    )


def _in_dollars(hours: float, price: float | None) -> str:
    return "" if price is None else f", {hours * price:.4g} dollars at {price:g} an hour"
