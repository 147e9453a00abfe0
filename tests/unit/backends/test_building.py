"""Progress of a build, and Ctrl-C while TensorRT works, over a fake library."""

import io
import logging
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from pipeline import progress
from pipeline.backends.building import interruptible, watched
from pipeline.progress import Phases


def test_an_interrupt_is_raised_when_the_block_ends():
    seen = []

    def work():
        with interruptible() as pressed:
            seen.append(pressed.is_set())
            signal.raise_signal(signal.SIGINT)
            seen.append(pressed.is_set())

    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == [False, True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_comes_before_the_error_of_the_cancelled_build():
    def work():
        with interruptible():
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError("build cancelled")

    with pytest.raises(KeyboardInterrupt):
        work()


def test_a_second_interrupt_ends_the_process_at_once():
    code = (
        "import signal\nfrom pipeline.backends.building import interruptible\n"
        "with interruptible():\n    signal.raise_signal(signal.SIGINT)\n    signal.raise_signal(signal.SIGINT)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT
    assert "Ctrl-C again" in done.stderr


def test_without_an_interrupt_nothing_changes():
    with interruptible() as pressed:
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert not pressed.is_set()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_programs_own_stays():
    def own(*_):
        """Not ours."""

    before = signal.signal(signal.SIGINT, own)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


def test_on_another_thread_nothing_happens():
    seen = []

    def work():
        with interruptible() as pressed:
            seen.append(pressed.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


class IProgressMonitor:
    """The base class of a library that has one."""


def library():
    return SimpleNamespace(IProgressMonitor=IProgressMonitor), SimpleNamespace(progress_monitor=None)


def test_a_step_after_the_interrupt_cancels_the_build():
    (trt, config), stop = library(), threading.Event()
    with watched(trt, config, "building", stop):
        monitor = config.progress_monitor
        monitor.phase_start("outer", None, 2)
        monitor.phase_start("inner", "outer", 1)
        assert monitor.step_complete("inner", 0) is True
        stop.set()
        assert monitor.step_complete("outer", 0) is False
        monitor.phase_finish("inner")
        monitor.phase_finish("outer")
        monitor.phase_finish("never started")


def test_a_library_without_monitors():
    config = SimpleNamespace()
    with watched(SimpleNamespace(), config, "building", threading.Event()):
        assert not hasattr(config, "progress_monitor")


def test_a_failing_display_does_not_reach_tensorrt(monkeypatch):
    (trt, config), stop = library(), threading.Event()
    monkeypatch.setattr(Phases, "step", lambda *_: 1 / 0)
    with watched(trt, config, "building", stop):
        assert config.progress_monitor.step_complete("outer", 0) is True


def run_phases():
    with Phases("building") as phases:
        phases.start("whole", 3)
        phases.start("part", 2)
        phases.step("part", 1)
        phases.finish("part")
        phases.step("whole", 1)
        phases.finish("whole")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bars_on_a_terminal(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress.sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    run_phases()
    shown = progress.sys.stderr.getvalue()
    assert "building: whole" in shown
    assert not caplog.records


def test_lines_elsewhere(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", -1)
    run_phases()
    assert [record.message for record in caplog.records] == [
        "building: part, 1 of 2",
        "building: whole, 1 of 3",
    ]


def test_nothing_when_quiet(monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(progress.sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", -1)
    run_phases()
    assert progress.sys.stderr.getvalue() == ""
    assert not caplog.records
