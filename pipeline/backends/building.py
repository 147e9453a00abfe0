"""While TensorRT builds: its progress on the terminal, and Ctrl-C.

TensorRT's bindings catch what a callback raises, KeyboardInterrupt too, and build on; so an interrupt that arrives
while TensorRT works would be lost. It is kept here instead, and raised when TensorRT returns. A build is cancelled
through its progress monitor (TensorRT 10 and newer); an older one runs to its end first.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.progress import Phases

if TYPE_CHECKING:
    import tensorrt

    from pipeline.backends.api_types import Api

log = logging.getLogger(__name__)


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Keep Ctrl-C until the block ends, then raise KeyboardInterrupt; the event says that it was pressed.

    A second Ctrl-C ends the process at once. Does nothing on other threads than the main one, or where the program has
    a handler of its own.
    """
    pressed = threading.Event()
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield pressed
        return

    def keep(*_: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with contextlib.suppress(Exception):
            log.warning("interrupted; TensorRT stops as soon as it can (Ctrl-C again: at once)")

    signal.signal(signal.SIGINT, keep)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if pressed.is_set():
            raise KeyboardInterrupt


@contextlib.contextmanager
def watched(trt: Api, config: tensorrt.IBuilderConfig, description: str, stop: threading.Event) -> Iterator[None]:
    """Within the block a build with this config shows its progress, and is cancelled when ``stop`` is set.

    Does nothing where the library has no progress monitor.
    """
    if not hasattr(trt, "IProgressMonitor") or not hasattr(config, "progress_monitor"):
        yield
        return
    with Phases(description) as phases:
        config.progress_monitor = _monitor(trt, phases, stop)
        yield


def _monitor(trt: Api, phases: Phases, stop: threading.Event) -> Any:
    base: Any = trt.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with contextlib.suppress(Exception):
                phases.start(phase_name, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            with contextlib.suppress(Exception):
                phases.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with contextlib.suppress(Exception):
                phases.step(phase_name, step + 1)
            return not stop.is_set()

    return Monitor()
