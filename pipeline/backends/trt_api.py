"""Small things that every module of the TensorRT family needs: logging, data types, version numbers."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorrt

    from pipeline.backends.api_types import Api

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
# TensorRT's INFO is a running commentary (dozens of lines a build), and VERBOSE megabytes.
LEVELS = {
    "VERBOSE": logging.DEBUG - 5,
    "INFO": logging.DEBUG,
    "WARNING": logging.WARNING,
    "ERROR": logging.ERROR,
    "INTERNAL_ERROR": logging.ERROR,
}
_loggers: dict[str, tensorrt.ILogger] = {}
_collecting = threading.RLock()


def logger(trt: Api) -> Any:
    """The one logger of a TensorRT library in this process: TensorRT keeps the first it is given for good.

    Its messages go to the Python logger ``pipeline.backends.<library>``, where their severity decides the level.
    """
    if trt.__name__ not in _loggers:
        _loggers[trt.__name__] = _make(trt)
    return _loggers[trt.__name__]


@contextlib.contextmanager
def collected(trt: Api) -> Iterator[list[str]]:
    """Within the block TensorRT's errors and warnings land in the list, as "E: …" or "W: …", errors nowhere else.

    Whoever collects them raises them or keeps them as notes; TensorRT also reports as errors what it recovers from.
    One thread collects at a time, and others wait: TensorRT does not say whose call a message belongs to.
    """
    with _collecting:
        bridge = logger(trt)
        outer, bridge.messages = bridge.messages, []
        try:
            yield bridge.messages
        finally:
            bridge.messages = outer


def errors_of(messages: list[str]) -> list[str]:
    """The errors among collected messages, without severity, repeats and places in TensorRT's sources."""
    texts = [re.sub(r"^\[[\w.]+::\w+::\d+\] ", "", text[3:]).strip() for text in messages if text.startswith("E: ")]
    return list(dict.fromkeys(texts))


def version_number(version: str) -> int:
    """The number that TensorRT writes into calibration caches: 8.6.0 is 8600, 10.3.0 is 100300."""
    parts = [int(part) for part in re.findall(r"\d+", version)[:3]]
    major, minor, patch = [*parts, 0, 0, 0][:3]
    return major * (10000 if major >= 10 else 1000) + minor * 100 + patch


def named_shape(tensor: str, shape: tuple[int, ...], names: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The shape with names for its free (-1) axes: those given for them, or ``<tensor>_<axis>``."""
    given = dict(enumerate(names))
    return tuple(
        size if size >= 0 else name if isinstance(name := given.get(axis), str) else f"{tensor}_{axis}"
        for axis, size in enumerate(shape)
    )


def _make(trt: Api) -> Any:
    target = logging.getLogger(f"pipeline.backends.{trt.__name__}")
    levels = {getattr(trt.ILogger, name): level for name, level in LEVELS.items()}

    base: Any = trt.ILogger

    class Bridge(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.messages: list[str] | None = None

        def log(self, severity: Any, message: str) -> None:
            # An exception here would end the process: TensorRT calls this from functions that may not throw.
            with contextlib.suppress(Exception):
                level = levels[severity]
                if self.messages is not None and level >= logging.WARNING:
                    self.messages.append(f"{'E' if level == logging.ERROR else 'W'}: {message}")
                    level = logging.DEBUG if level == logging.ERROR else level
                if target.isEnabledFor(level):
                    target.log(level, "%s", message)

    return Bridge()
