"""Notices of preemption: SIGTERM, by which a machine or a scheduler asks a process to end soon."""

import signal
import threading
from types import FrameType, TracebackType


class PreemptionNotice:
    """Holds SIGTERM back as long as it is entered, so that a loop can finish its step and save.

    When it is left, a signal that came is delivered after all, and the process ends as whoever
    started it has arranged: a Ray worker by SystemExit, any other at once.

    Python hands signals to the main thread alone, where Ray's tasks run. In another thread nothing
    is held back, nor where SIGTERM is ignored or handled by other means than Python's.
    """

    def __init__(self) -> None:
        self._came = False
        self._held = False

    @property
    def given(self) -> bool:
        """Whether the signal came."""
        return self._came

    def __enter__(self) -> "PreemptionNotice":
        self._before = signal.getsignal(signal.SIGTERM)
        main = threading.current_thread() is threading.main_thread()
        self._held = main and self._before not in (None, signal.SIG_IGN)
        if self._held:
            signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._held:
            signal.signal(signal.SIGTERM, self._before)
        if self._came:
            signal.raise_signal(signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True
