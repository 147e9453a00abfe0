"""Reading what comes next while what is here is worked on."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")
DEPTH = 3


class _End:
    """What a thread puts behind its last item."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Ahead(Iterator[T]):
    """Reads an iterable on a thread, at most ``DEPTH`` items ahead; a context manager.

    What the iterable raises is raised where its item would have come. Leaving the context stops the thread after the
    item that it is reading, and closes the iterable where it is a generator.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self._items = items
        self._queue: queue.Queue[T | _End] = queue.Queue(DEPTH)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="reading ahead", daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        item = self._queue.get()
        if not isinstance(item, _End):
            return item
        if item.error is not None:
            raise item.error
        raise StopIteration

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        with contextlib.suppress(queue.Empty):
            # Afterwards there is room for the item and the end that the thread may still put.
            while True:
                self._queue.get_nowait()
        self._thread.join()

    def _read(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._items:
                if self._stop.is_set():
                    break
                self._queue.put(item)
            if hasattr(self._items, "close"):
                self._items.close()
        except BaseException as caught:
            error = caught
        self._queue.put(_End(error))
