"""The calibration table: one amax per tensor, written and read as TensorRT's cache text."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from pipeline.calibration.report import CalibrationReport, report_beside
from pipeline.errors import CalibrationError
from pipeline.slips import did_you_mean

# Header names by algorithm: IInt8EntropyCalibrator2 and IInt8MinMaxCalibrator write and read these. TensorRT has no
# calibrator for the others, and takes the scales alone: their caches go under the name that most programs ask for.
HEADERS = {"entropy": "EntropyCalibration2", "minmax": "MinMaxCalibration"}
OTHERS = ("percentile", "mse")
LINE = re.compile(r"(?P<tensor>.+): (?P<scale>[0-9a-fA-F]{8})")
HEADER = re.compile(r"TRT-(?P<version>\d+)-(?P<algorithm>\w+)")
SHOWN = 5


@dataclass(frozen=True)
class CalibrationTable:
    """Activation ranges of one graph: ``amax[tensor]`` > 0 means that [-amax, amax] maps to [-127, 127].

    Attributes:
        algorithm: entropy, minmax, percentile, mse, or the header's own name where the project knows no other.
        amax: by tensor name, in the graph's order.
        version: number of the TensorRT that the cache's header names; None for a table that comes from no cache.
        report: where the ranges come from; None for a cache without its report, such as TensorRT's own.
        biases: of convolutions, by the tensor that they give, which belong to these ranges: ``pipeline.refinement``.

    Raises:
        CalibrationError: an amax whose float32 scale is not finite and above 0, or a tensor name of more than one line.
    """

    algorithm: str
    amax: Mapping[str, float]
    version: int | None = field(default=None, compare=False)
    report: CalibrationReport | None = field(default=None, compare=False)
    biases: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

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
        written = HEADERS["entropy"] if self.algorithm in OTHERS else HEADERS.get(self.algorithm, self.algorithm)
        lines = [f"TRT-{version}-{written}"]
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
        return cls(names.get(header["algorithm"], header["algorithm"]), amax, int(header["version"]))


def read_cache(path: Path) -> CalibrationTable:
    """The table of a cache file, with its report where that lies beside it (see ``report_beside``).

    Raises:
        CalibrationError: the file is missing, unreadable, no text, damaged, or not what its report says.
        BuildFolderError: the report cannot be read.
    """
    try:
        data = path.read_bytes()
        text = data.decode()
    except OSError as error:
        raise CalibrationError(
            f"cannot read the calibration cache {path}: {error.strerror}{did_you_mean(path)}",
            fix="check the path, or calibrate first",
        ) from error
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is no text, so no calibration cache", expected="TensorRT's text format", fix="calibrate again"
        ) from error
    table = CalibrationTable.from_cache(text, str(path))
    report = report_beside(path, data)
    if report is None:
        return table
    biases = report.refinement.biases if report.refinement else {}
    return replace(table, algorithm=report.algorithm, report=report, biases=biases)


def check_table(
    table: CalibrationTable, wanted: Iterable[str], known: Iterable[str], source: str = "the calibration table"
) -> list[str]:
    """Refuse a table that was not made for a graph.

    Args:
        wanted: tensors that need a range.
        known: all of the graph's activation tensors.
        source: where the table comes from, for the message.

    Returns:
        Tensors that the table names and the graph does not have.

    Raises:
        CalibrationError: a wanted tensor has no range.
    """
    needed, own = list(wanted), set(known)
    missing = [tensor for tensor in needed if tensor not in table.amax]
    unknown = [tensor for tensor in table.amax if tensor not in own]
    if missing:
        foreign = 2 * len(unknown) >= len(table.amax)
        differences = [("missing", missing), ("unknown", unknown)]
        raise CalibrationError(
            f"{source} belongs to another graph" if foreign else f"{source} lacks {len(missing)} of the ranges needed",
            expected=f"a range for each of {len(needed)} tensors of this graph",
            got="; ".join(f"{len(names)} {what}: {some(names)}" for what, names in differences if names),
            fix="calibrate this graph, give the cache that belongs to it, or (explicit route) name the readers of "
            "missing tensors in engine.exclude",
        )
    return unknown


def renamed(table: CalibrationTable, earlier: Mapping[str, str]) -> CalibrationTable:
    """The table in a clean graph's names, where it speaks in those of the raw export: where it lacks a clean name.

    Args:
        earlier: the raw export's name of a tensor, by its name now.
    """
    if all(name in table.amax for name in earlier):
        return table
    now = {raw: name for name, raw in earlier.items()}
    return replace(table, amax={now.get(tensor, tensor): amax for tensor, amax in table.amax.items()})


def some(names: Sequence[str], shown: int = SHOWN) -> str:
    """The first names of a list, and how many more there are."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _is_scale(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _float32(value: float) -> float:
    """The nearest float32 value; infinite beyond its range."""
    try:
        (rounded,) = struct.unpack(">f", struct.pack(">f", value))
    except OverflowError:
        return math.copysign(math.inf, value)
    return float(rounded)
