"""Ray itself: imported where it is used, connected to, and what is needed of it everywhere."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Any

from pipeline.errors import ConfigError, UnsupportedError

CONNECT_SECONDS = 5.0


def import_ray() -> Any:
    """The module.

    Raises:
        UnsupportedError: it is not installed.
    """
    # Read when it is imported: that processes died is said here, in its own words, and not on standard output.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError(
            "Ray is not installed, which --distributed needs", fix="pip install 'unet-trt[ray]'"
        ) from error
    return ray


def connect(address: str | None) -> None:
    """Join a running cluster, or start one on this machine where there is no address.

    Raises:
        ConfigError: it is no address, or nothing answers there.
    """
    ray = import_ray()
    options: dict[str, Any] = {"configure_logging": False, "log_to_driver": False}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(**options, include_dashboard=False)
        return
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or "/" in host:
            raise ConfigError(f"{address!r} is no address of a cluster", expected="HOST:PORT of its head, or auto")
        try:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()  # Ray itself would try for minutes
        except OSError as error:
            raise _unreachable(address, error) from error
    # Of Ray: how often to try, which takes half a minute each time.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
    try:
        ray.init(address, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"no Ray cluster answers at {address}: {lines_of(error)[0]}",
        expected="the address that `ray start --head` printed, and the same versions of Ray and Python",
        fix="check the address, the firewall and Ray's token; leave --address out to use this machine alone",
    )


def node_here() -> str:
    """Ray's id of the machine that this process is on."""
    node: str = import_ray().get_runtime_context().get_node_id()
    return node


def resources(*, on_gpu: bool) -> dict[str, Any]:
    """What an actor takes, as options of Ray: a core, and a GPU where it wants one."""
    return {"num_cpus": 1, "num_gpus": 1} if on_gpu else {"num_cpus": 1}


def kill(actor: Any) -> None:
    """End an actor's process, if it is still there."""
    ray = import_ray()
    with suppress(ray.exceptions.RayError, ValueError):
        ray.kill(actor)


def packed(value: Any) -> bytes:
    """Pickled with what it closes over; apart from Ray's own pickling, so that errors of opening it are its own."""
    from ray import cloudpickle

    pickled: bytes = cloudpickle.dumps(value)  # type: ignore[no-untyped-call]
    return pickled


def unpacked(pickled: bytes) -> Any:
    """The value of ``packed``."""
    from ray import cloudpickle

    return cloudpickle.loads(pickled)


def lines_of(error: Exception) -> list[str]:
    """What an error says, at least its type: Ray's say what happened in the first line, and why in the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines or [type(error).__name__]
