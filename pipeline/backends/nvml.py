"""Clocks and energy of the GPU, as its driver tells them through NVML.

Source: NVML API reference, device queries; the library comes with the driver, so no package is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.backends import cuda
from pipeline.closing import Closing
from pipeline.errors import UnsupportedError

LIBRARY = "libnvidia-ml.so.1"
CLOCK_SM = 1
# Bits of the reasons for which clocks are held down; idling and settings by the user are none.
SLOWED = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


@dataclass(frozen=True)
class Reading:
    """At one moment; None where the driver does not tell.

    Attributes:
        sm_mhz: clock of the multiprocessors.
        joules: since the driver was loaded.
        slowed: why clocks are held down, empty where they are not.
    """

    sm_mhz: int | None
    joules: float | None
    slowed: tuple[str, ...]


class Gauge(Closing):
    """Reads this process's GPU.

    Raises:
        UnsupportedError: no NVML, no GPU, or one that NVML does not show.
    """

    def __init__(self) -> None:
        try:
            self._nvml: Any = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise UnsupportedError(f"{LIBRARY} cannot be loaded: {error}") from error
        self._device = ctypes.c_void_p()
        address = ctypes.c_char_p(cuda.pci_address())
        if self._nvml.nvmlInit_v2():
            raise UnsupportedError("NVML does not start")
        if self._nvml.nvmlDeviceGetHandleByPciBusId_v2(address, ctypes.byref(self._device)):
            self.close()
            raise UnsupportedError("NVML does not show this GPU")

    def read(self) -> Reading:
        millijoules = self._get("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong)
        bits = self._get("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong) or 0
        return Reading(
            self._get("nvmlDeviceGetClockInfo", ctypes.c_uint, CLOCK_SM),
            None if millijoules is None else millijoules / 1000,
            tuple(why for bit, why in SLOWED.items() if bits & bit),
        )

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def _get(self, function: str, kind: Any, *arguments: int) -> int | None:
        value = kind()
        with contextlib.suppress(AttributeError):  # of a driver that has no such function
            if getattr(self._nvml, function)(self._device, *arguments, ctypes.byref(value)) == 0:
                return int(value.value)
        return None


@dataclass(frozen=True)
class Spell:
    """One turn of a candidate: how long it took, what it used, and clocks at its end."""

    seconds: float
    joules: float | None
    sm_mhz: int | None
    slowed: tuple[str, ...]


@dataclass(frozen=True)
class Usage:
    """What the GPU did during a candidate's turns; None where the driver does not tell.

    Attributes:
        watts: mean power.
        sm_mhz: lowest and highest clock at the end of a turn.
        slowed: why clocks were held down at the end of any.
    """

    watts: float | None
    sm_mhz: tuple[int, int] | None
    slowed: frozenset[str]


class Meter:
    """Keeps the GPU's usage by candidate; none without a gauge."""

    def __init__(self, gauge: Gauge | None) -> None:
        self._gauge = gauge
        self._spells: dict[str, list[Spell]] = defaultdict(list)

    @contextlib.contextmanager
    def over(self, name: str) -> Iterator[None]:
        """One turn of a candidate."""
        if self._gauge is None:
            yield
            return
        before, started = self._gauge.read(), time.perf_counter()
        yield
        after, seconds = self._gauge.read(), time.perf_counter() - started
        known = before.joules is not None and after.joules is not None
        joules = after.joules - before.joules if known else None  # type: ignore[operator]
        self._spells[name].append(Spell(seconds, joules, after.sm_mhz, after.slowed))

    def usage(self, name: str, turns: int) -> Usage:
        """Of the last so many turns: those before warmed up."""
        spells = self._spells[name][-turns:]
        joules = [spell.joules for spell in spells if spell.joules is not None]
        clocks = [spell.sm_mhz for spell in spells if spell.sm_mhz is not None]
        return Usage(
            sum(joules) / sum(spell.seconds for spell in spells) if joules and len(joules) == len(spells) else None,
            (min(clocks), max(clocks)) if clocks else None,
            frozenset(why for spell in spells for why in spell.slowed),
        )
