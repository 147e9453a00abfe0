"""A real Triton Inference Server on free ports of this machine: of ``make triton``, or in TRITON_HOME."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
ENVIRONMENT = REPOSITORY / ".venv" / "triton"
PACKAGED = ENVIRONMENT / "lib" / f"python{PYTHON}" / "site-packages" / "pytriton" / "tritonserver"
START_SECONDS = 60


@dataclass(frozen=True)
class Triton:
    """Where a running server listens, and its log."""

    http: str
    grpc: str
    log: Path

    def server(self, scheme: str) -> str:
        return f"{scheme}://{self.http if scheme == 'http' else self.grpc}"


def triton_home() -> Path:
    """The folder with ``bin/tritonserver`` and ``backends``; skips where there is none."""
    home = Path(os.environ.get("TRITON_HOME", PACKAGED))
    stub = home / "backends" / "python" / "triton_python_backend_stub"
    if not ((home / "bin" / "tritonserver").is_file() and stub.is_file()):
        pytest.skip(f"no Triton in {home}: run `make triton`, or set TRITON_HOME to an installed one")
    alone = subprocess.run([stub], env=environment(), capture_output=True, text=True, timeout=10, check=False)
    if "error while loading shared libraries" in alone.stderr:
        pytest.skip(f"Triton's Python backend does not run here: {alone.stderr.strip()}")
    return home


def environment() -> dict[str, str]:
    """Of the server's process: its own interpreter, whose libpython the Python backend loads."""
    path = f"{ENVIRONMENT / 'bin'}{os.pathsep}{os.environ['PATH']}"
    libraries = f"{sysconfig.get_config_var('LIBDIR')}{os.pathsep}{os.environ.get('LD_LIBRARY_PATH', '')}"
    return {**os.environ, "PATH": path, "LD_LIBRARY_PATH": libraries}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def running_triton(repository: Path, working: Path) -> Iterator[Triton]:
    """Serve a model repository until the block ends."""
    home = triton_home()
    http, grpc = free_port(), free_port()
    arguments = {
        "model-repository": repository,
        "backend-directory": home / "backends",
        "http-address": "127.0.0.1",
        "http-port": http,
        "grpc-address": "127.0.0.1",
        "grpc-port": grpc,
        "allow-metrics": "false",
        "exit-on-error": "false",
    }
    log = working / "triton.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [home / "bin" / "tritonserver", *(f"--{key}={value}" for key, value in arguments.items())],
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        triton = Triton(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", log)
        wait_for(triton, process)
        yield triton
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(triton: Triton, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{triton.http}/v2/health/live", timeout=1):
            return
        time.sleep(0.05)
    pytest.fail(f"Triton did not start:\n{triton.log.read_text(errors='replace')[-3000:]}")
