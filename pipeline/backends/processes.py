"""Processes of this machine that share its work on images with the one that has the model.

Python lets one thread of a process run at a time, and threads that each do a little between calls of C code spend more
time on handing the lock on than on their work. Here each process takes items as it wants more, does with them all that
is done to images, and asks the process that started it for nothing but the model's answers.

They are programs of their own (``python -c``), so that a script that starts them needs no ``__main__`` guard, and in
sessions of their own, so that Ctrl-C reaches the first process alone. They end when their connections close, whatever
has become of that.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from pipeline.artifacts import process_name
from pipeline.backends.distant import DistantModel, DistantRunner, Model, SharedMemory, answer
from pipeline.closing import Closing
from pipeline.errors import PipelineError, UnsupportedError

log = logging.getLogger(__name__)
# With the modules of the process that starts it.
PROGRAM = f"import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from {__name__} import main; main()"
# Items that a process is given, and results that it sends, at a time.
PORTION = 8
# How long a process may take to end once it is no longer wanted.
END_SECONDS = 10.0


class Desk:
    """Where a job in one of the processes gets its items, leaves its results, and finds the model."""

    def __init__(self, work: Connection, network: Connection, given: SharedMemory, taken: SharedMemory) -> None:
        self._work, self._network, self._given, self._taken = work, network, given, taken
        self._lock = threading.Lock()
        self._results: list[Any] = []

    def items(self) -> Iterator[Any]:
        """Until there are no more; to be read by one thread."""
        while True:
            self.tell("more")
            portion = self._work.recv()
            if not portion:
                return
            yield from portion

    def put(self, result: Any) -> None:
        """Keep a result, which is sent together with others."""
        self._results.append(result)
        if len(self._results) >= PORTION:
            self.flush()

    def flush(self) -> None:
        """Send the results that are kept."""
        results, self._results = self._results, []
        self.tell("results", results)

    def tell(self, kind: str, value: Any = None) -> None:
        with self._lock:
            self._work.send((kind, value))

    def runner(self, model: DistantModel) -> DistantRunner:
        return DistantRunner(model, self._network, self._given, self._taken)


class _Process:
    """One of them, as the first process sees it."""

    def __init__(self, module: str) -> None:
        with contextlib.ExitStack() as stack:
            self.work, works = (stack.enter_context(end) for end in Pipe())
            self.network, networks = (stack.enter_context(end) for end in Pipe())
            self.given, self.taken = (stack.enter_context(SharedMemory()) for _ in range(2))
            numbers = [works.fileno(), networks.fileno(), self.given.descriptor, self.taken.descriptor]
            self.program = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, json.dumps(sys.path), module, *map(str, numbers)],
                stdin=subprocess.DEVNULL,
                pass_fds=numbers,
                start_new_session=True,
            )
            self._held = stack.pop_all()
        works.close()
        networks.close()

    @property
    def name(self) -> str:
        """Its ``process_name``."""
        return process_name(self.program.pid)

    def end(self, seconds: float) -> None:
        """Wait until it has ended, and end it where it has not by then."""
        try:
            self.program.wait(seconds)
        except subprocess.TimeoutExpired:
            self.program.kill()
            self.program.wait()

    def release(self) -> None:
        self._held.close()


class Processes(Closing):
    """Some of them, which start while this process goes on; a context manager.

    Args:
        module: of the jobs to be, which they import at once.

    Attributes:
        names: their ``process_name``.

    Raises:
        UnsupportedError: the system starts no more.
    """

    def __init__(self, count: int, module: str) -> None:
        self._all: list[_Process] = []
        self._threads: list[threading.Thread] = []
        self._at_work = False
        try:
            for _ in range(count):
                self._all.append(_Process(module))
        except OSError as error:
            self.close()
            raise UnsupportedError(
                f"only {len(self._all)} of {count} processes could be started: {error.strerror}",
                fix="allow more processes or memory, or give --processes 0",
            ) from error
        self.names = [one.name for one in self._all]

    def run(self, job: Callable[[Desk], None], model: Model, items: Iterable[Any]) -> Iterator[Any]:
        """Do a job in all of them: the results, as they come.

        Args:
            job: pickled. What it raises is raised here, and what it logs is logged here, once.
            model: answers the job's batches.
            items: given out as they are asked for.

        Raises:
            UnsupportedError: a process has died.
        """
        given, said = iter(items), set[str]()
        self._at_work = True
        pickled = pickle.dumps(job)
        self._threads = [
            threading.Thread(target=answer, args=(one.network, one.given, one.taken, model), daemon=True)
            for one in self._all
        ]
        for thread in self._threads:
            thread.start()
        working: dict[Any, _Process] = {one.work: one for one in self._all}
        for work in working:
            with contextlib.suppress(OSError):  # it has died, which shows below
                work.send_bytes(pickled)
        while working:
            for work in wait(list(working)):
                process = working[work]
                try:
                    kind, value = process.work.recv()
                    if kind == "more":
                        process.work.send(tuple(islice(given, PORTION)))
                except (EOFError, OSError) as error:
                    raise _died(process) from error
                if kind == "results":
                    yield from value
                elif kind == "said" and value[1] not in said:
                    said.add(value[1])
                    log.log(*value)
                elif kind == "raised":
                    raise value
                elif kind == "done":
                    del working[work]
        for thread in self._threads:
            thread.join()
        self._at_work = False

    def close(self) -> None:
        """End them: what they are at is given up, and nothing of them is left afterwards."""
        for one in self._all:
            one.work.close()
        for one in self._all:
            one.end(END_SECONDS if self._at_work else 0)
        for thread in self._threads:
            thread.join()
        for one in self._all:
            one.release()
        self._all = []


def _died(process: _Process) -> PipelineError:
    process.end(END_SECONDS)
    return UnsupportedError(
        f"a process that decodes and encodes images has ended by itself (exit status {process.program.returncode})",
        expected="memory enough for all of them",
        fix="go on with --resume, with fewer of them (--processes)",
    )


class _Telling(logging.Handler):
    """Sends what is logged to the first process."""

    def __init__(self, desk: Desk) -> None:
        super().__init__(logging.WARNING)
        self._desk = desk

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self._desk.tell("said", (record.levelno, record.getMessage()))


def main(arguments: Sequence[str] | None = None) -> None:
    """The program of such a process: does jobs until its connection is closed."""
    module, *descriptors = arguments or sys.argv[1:]
    works, networks, given, taken = map(int, descriptors)
    work, network = Connection(works), Connection(networks)
    desk = Desk(work, network, SharedMemory(given), SharedMemory(taken))
    logging.getLogger().addHandler(_Telling(desk))
    importlib.import_module(module)
    with contextlib.suppress(EOFError, OSError):  # the first process has closed the connection, or is gone
        while True:
            job = work.recv()
            try:
                job(desk)
                desk.flush()
                network.send(None)
                desk.tell("done")
            except (EOFError, ConnectionError):
                raise
            except Exception as error:
                desk.flush()
                desk.tell("raised", error)
