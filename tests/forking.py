"""``python -m pipeline`` many times over, without importing torch many times over.

A server imports the heavy libraries once; each command then runs in a fork of it: a process of its own, with its own
working folder, environment, modules, output and exit, as after ``exec``. Of the project's own modules the server
imports none, so that every command finds its own imports.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import onnxruntime as ort

REPOSITORY = Path(__file__).parent.parent
SECONDS = 300
# Several tests run at once, and only a process of one thread can be forked safely.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
HEAVY = ("numpy", "onnx", "onnx_graphsurgeon", "PIL.Image", "pydantic.main", "rich.table", "typer", "yaml")
OPTIONAL = ("torch", "safetensors.torch")
Ended = tuple[int, str, str]


def run_afresh(arguments: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> Ended:
    """``python -m pipeline``: its exit code (negative for a signal), standard output and standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=cwd,
        env={**environment, **ONE_THREAD},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


class Server:
    """Runs commands, one at a time; a context manager, which ends the server's process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forking"],
            cwd=REPOSITORY,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> Ended:
        """As ``run_afresh``, save for variables that only a starting Python or library reads."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            request = {"arguments": arguments, "cwd": str(cwd), "out": str(out), "err": str(err)}
            print(json.dumps({**request, "environment": dict(environment)}), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
            assert answer, "the server has ended; standard error says why"
            return int(answer), out.read_text(), err.read_text()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate()


def give_sessions_one_thread() -> None:
    """ONNX Runtime, which reads no variable for it, starts a thread per core and lets them spin between operators."""

    class SessionOptions(ort.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    ort.SessionOptions = SessionOptions


def main() -> None:
    _import_all()
    give_sessions_one_thread()
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, f"{len(threads)} threads, of which a fork would keep one: run pytest with --afresh"
    gc.freeze()  # what the forks need not look through, nor copy
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(json.loads(line))
            _run()
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _import_all() -> None:
    for name in HEAVY:
        import_module(name)
    for name in OPTIONAL:
        with contextlib.suppress(ImportError):
            import_module(name)
    if "torch" in sys.modules:
        with sys.modules["torch"].random.fork_rng(devices=()):
            _export_once()


def _export_once() -> None:
    """Torch's exporter imports most of itself when it is first called."""
    import torch

    logger = logging.getLogger("torch.onnx")
    logger.setLevel(logging.ERROR)
    network, example = torch.nn.Conv2d(1, 1, 1).eval(), torch.zeros(1, 1, 4, 4)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (example,), dynamo=True, verbose=False)
    logger.setLevel(logging.NOTSET)


def _become(request: dict[str, Any]) -> None:
    signal.alarm(SECONDS)
    for stream, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, request["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, stream)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv[1:] = request["arguments"]
    sys.path[0] = request["cwd"]


def _run() -> NoReturn:
    """The command, and an exit that leaves the imported libraries as they are: taking them apart takes a second."""
    code: object = 1
    try:
        runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    main()
