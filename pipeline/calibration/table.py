"""The calibration table: one amax per tensor, written and read as TensorRT's cache text."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pipeline.errors import CalibrationError

# Header names by algorithm; TensorRT's IInt8EntropyCalibrator2 and IInt8MinMaxCalibrator write these.
HEADERS = {"entropy": "EntropyCalibration2", "minmax": "MinMaxCalibration"}
LINE = re.compile(r"(?P<tensor>.+): (?P<scale>[0-9a-fA-F]{8})")
HEADER = re.compile(r"TRT-(?P<version>\d+)-(?P<algorithm>\w+)")
SHOWN = 5


@dataclass(frozen=True)
class CalibrationTable:
    """Activation ranges of one graph: ``amax[tensor]`` > 0 means that [-amax, amax] maps to [-127, 127].

    Attributes:
        algorithm: entropy, minmax, or the header's own name where the project knows no other.
        amax: by tensor name, in the graph's order.

    Raises:
        CalibrationError: an amax whose float32 scale is not finite and above 0, or a tensor name of more than one line.
    """

    algorithm: str
    amax: Mapping[str, float]

    def __post_init__(self) -> None:
        for tensor, value in self.amax.items():
            if not _is_scale(_float32(value / 127)):
                raise CalibrationError(
                    f"the calibration range of tensor {tensor} is {value}",
                    expected="an amax whose scale, amax / 127, is a finite float32 above 0",
                    fix="calibrate again on images that reach this tensor",
                )
            if "\n" in tensor or "\r" in tensor:
                raise CalibrationError(
                    f"the tensor name {tensor!r} does not fit a line of a calibration cache", fix="rename the tensor"
                )
        object.__setattr__(self, "amax", MappingProxyType(dict(self.amax)))

    def scale(self, tensor: str) -> float:
        """amax / 127, as a float32 value."""
        return _float32(self.amax[tensor] / 127)

    def to_cache(self, version: int) -> str:
        """TensorRT's cache text for a TensorRT whose version number is ``version`` (8.6.0: 8600; 10.3.0: 100300).

        Format (seen in caches that TensorRT 8.6.0 wrote): a header, then ``<tensor>: <8 hex digits>``, the big-endian
        IEEE-754 bits of the float32 scale.
        """
        lines = [f"TRT-{version}-{HEADERS.get(self.algorithm, self.algorithm)}"]
        lines += [f"{tensor}: {struct.pack('>f', self.scale(tensor)).hex()}" for tensor in self.amax]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_cache(cls, text: str, source: str = "the calibration cache") -> CalibrationTable:
        """Read a cache of any TensorRT version.

        Raises:
            CalibrationError: no header, a malformed or duplicated line, a scale that is not finite and above 0.
        """
        lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
        header = HEADER.fullmatch(lines[0])
        if header is None:
            raise CalibrationError(
                f"{source} has no header",
                expected="TRT-<version>-<algorithm> in its first line",
                got=repr(lines[0][:60]) if text else "an empty file",
                fix="calibrate again; the file is damaged or no TensorRT cache",
            )
        names = {written: name for name, written in HEADERS.items()}
        amax: dict[str, float] = {}
        for number, line in enumerate(lines[1:], 2):
            match = LINE.fullmatch(line)
            if match is None or match["tensor"] in amax:
                raise CalibrationError(
                    f"{source} is damaged in line {number}",
                    expected="<tensor>: <8 hex digits>, each tensor once",
                    got=repr(line[:80]),
                    fix="calibrate again, or restore the file",
                )
            (scale,) = struct.unpack(">f", bytes.fromhex(match["scale"]))
            if not _is_scale(scale):
                raise CalibrationError(
                    f"{source} holds the scale {scale} in line {number}",
                    expected="a finite scale above 0",
                    got=line[:80],
                    fix="calibrate again, or restore the file",
                )
            amax[match["tensor"]] = scale * 127
        return cls(names.get(header["algorithm"], header["algorithm"]), amax)


def read_cache(path: Path) -> CalibrationTable:
    """The table of a cache file.

    Raises:
        CalibrationError: the file is missing, unreadable, no text, or damaged.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise CalibrationError(
            f"cannot read the calibration cache {path}: {error.strerror}", fix="check the path, or calibrate first"
        ) from error
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is no text, so no calibration cache", expected="TensorRT's text format", fix="calibrate again"
        ) from error
    return CalibrationTable.from_cache(text, str(path))


def check_table(table: CalibrationTable, tensors: Iterable[str], source: str) -> None:
    """Refuse a table that was not made for the graph whose activation tensors are given.

    Args:
        source: the table's file, for the message.

    Raises:
        CalibrationError: a tensor of the graph has no range, or the table names a tensor that the graph does not hold.
    """
    wanted = list(tensors)
    missing = [tensor for tensor in wanted if tensor not in table.amax]
    unknown = sorted(set(table.amax) - set(wanted))
    if missing or unknown:
        differences = [("missing", missing), ("unknown", unknown)]
        raise CalibrationError(
            f"{source} is the calibration cache of another model",
            expected=f"one range for each of the graph's {len(wanted)} tensors",
            got="; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in differences if names),
            fix="calibrate this model, or give the cache that belongs to it",
        )


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _is_scale(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _float32(value: float) -> float:
    """The nearest float32 value; infinite beyond its range."""
    try:
        (rounded,) = struct.unpack(">f", struct.pack(">f", value))
    except OverflowError:
        return math.copysign(math.inf, value)
    return float(rounded)
