"""Progress: bars on a terminal, plain lines elsewhere, one display whatever nests."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Callable

import pytest

from pipeline import progress
from pipeline.cli.logs import set_up_logging
from pipeline.progress import Phases, duration, pace, paused, track, working


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


Terminals = Callable[[], Terminal]


@pytest.fixture
def terminals(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Terminals:
    """Puts a terminal in the place of stderr; to be called by the test, since pytest captures anew before each."""
    caplog.set_level(logging.INFO, "pipeline")
    monkeypatch.setenv("TERM", "xterm")

    def put() -> Terminal:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        return terminal

    return put


@pytest.mark.parametrize(
    ("done", "total", "elapsed", "speed", "text"),
    [
        (0, None, 7.4, None, "0:07"),
        (0, 9, 2.0, None, "0 of 9, 0:02"),
        (3, 9, 6.0, 2.0, "3 of 9, 2.0/s, 0:03 left"),
        (1, 3, 90.0, 1 / 90, "1 of 3, 90.0 s each, 3:00 left"),
    ],
)
def test_what_stands_beside_a_bar(
    done: float, total: float | None, elapsed: float, speed: float | None, text: str
) -> None:
    assert pace(done, total, elapsed, speed) == text


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]


def test_a_bar_shows_rate_and_remaining_time_and_goes_away(terminals: Terminals) -> None:
    terminal = terminals()
    with working("validate/int8"):
        for _ in track(range(20), "validating int8", 20):
            time.sleep(0.02)
    shown = terminal.getvalue()
    assert "validate/int8" in shown
    assert "validating int8" in shown
    assert "/s, 0:00 left" in shown
    assert progress._display._bars is None
    assert "\x1b[2K" in shown.rpartition("left")[2]  # the last lines are cleared


def test_log_lines_come_above_the_bars_and_results_stay_out_of_them(
    terminals: Terminals, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = terminals()
    set_up_logging(debug=False, quiet=False)
    with working("export"):
        logging.getLogger("pipeline.record").info("a line of the log")
        print("a result")
    assert "a line of the log\n" in terminal.getvalue()
    assert "a result" not in terminal.getvalue()
    assert capsys.readouterr().out == "a result\n"


def test_nothing_is_drawn_while_something_is_timed(terminals: Terminals) -> None:
    terminal = terminals()
    with working("benchmark"):
        with paused():
            before = terminal.getvalue()
            with Phases("building") as phases:
                phases.start("whole", 2)
                phases.step("whole", 1)
            time.sleep(0.25)  # longer than between two frames
            assert terminal.getvalue() == before
        time.sleep(0.25)
        assert len(terminal.getvalue()) > len(before)


def test_an_abandoned_loop_takes_its_bar_along(terminals: Terminals) -> None:
    terminals()
    for _ in track(range(5), "looking", 5):
        break
    assert progress._display._bars is None
    with pytest.raises(ZeroDivisionError), working("dividing"):
        _ = 1 / 0
    assert progress._display._bars is None


def test_lines_instead_of_bars_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "pipeline")
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.01)
    monkeypatch.setattr(progress, "SURE_SECONDS", 0)
    with working("train"):
        for _ in track(range(3), "training", 3):
            time.sleep(0.02)
    assert [record.message.split(",")[0] for record in caplog.records] == ["training: 1 of 3", "training: 2 of 3"]
    assert all(" left" in record.message for record in caplog.records)
    assert capsys.readouterr().err == ""


def test_quiet_means_quiet_on_a_terminal(terminals: Terminals, caplog: pytest.LogCaptureFixture) -> None:
    terminal = terminals()
    caplog.set_level(logging.WARNING, "pipeline")
    with working("train"):
        assert list(track(range(3), "training", 3)) == [0, 1, 2]
    assert terminal.getvalue() == ""
