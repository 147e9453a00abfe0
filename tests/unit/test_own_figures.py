"""Other programs' figures: a trtexec that writes what the real one writes, and what its failures become."""

import json

import numpy as np
import pytest

from pipeline import own_figures
from pipeline.artifacts import TensorSpec
from pipeline.errors import EngineError, PipelineError, UnsupportedError
from pipeline.own_figures import polygraphy_figure, trtexec_figure

FEEDS = {"image": np.zeros((2, 3, 32, 32), np.float32)}
STATIC, DYNAMIC = (TensorSpec("image", (2, 3, 32, 32), "float32"),), (TensorSpec("image", ("n", 3, 32, 32), "float32"),)
# Its trace, as samples/trtexec/tracer.py reads it.
TRACE = [{"startComputeMs": 5.0, "computeMs": ms, "latencyMs": ms} for ms in (0.5, 0.7, 0.6)]


@pytest.fixture
def trtexec(tmp_path, monkeypatch):
    """A program of this name; the arguments it was called with are in the list."""
    arguments = tmp_path / "arguments"

    def make(script):
        program = tmp_path / "trtexec"
        lines = (
            f'for a in "$@"; do echo "$a" >> {arguments}; case "$a" in --exportTimes=*) out="${{a#*=}}";; esac; done'
        )
        program.write_text(f"#!/bin/sh\n{lines}\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(own_figures, "TRTEXEC", (str(program),))
        return arguments

    return make


def figure(tmp_path, inputs=STATIC):
    return trtexec_figure(tmp_path / "model.engine", inputs, "int8", FEEDS, 3.0, 0.5)


def test_trtexec(trtexec, tmp_path):
    arguments = trtexec(f"echo '{json.dumps(TRACE)}' > \"$out\"")
    found = figure(tmp_path)
    assert (found.tool, found.name, found.median_ms, found.count) == ("trtexec", "int8", 0.6, 3)
    given = arguments.read_text().split()
    assert {f"--loadEngine={tmp_path / 'model.engine'}", "--warmUp=500", "--duration=3", "--useCudaGraph"} <= set(given)
    assert not any(argument.startswith("--shapes") for argument in given)
    figure(tmp_path, DYNAMIC)
    assert "--shapes=image:2x3x32x32" in arguments.read_text().split()


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo '[11/21/2026] [E] Error[1]: no kernel' >&2; exit 1", "trtexec failed: .*no kernel"),
        ("exit 3", "trtexec failed: exit code 3"),
        ("true", "no times that can be read"),
        ('echo "[]" > "$out"', "timed no inference"),
        ('echo "[{}]" > "$out"', "no times that can be read"),
    ],
)
def test_trtexec_that_fails(trtexec, tmp_path, script, says):
    trtexec(script)
    with pytest.raises(EngineError, match=says):
        figure(tmp_path)


def test_trtexec_that_hangs(trtexec, tmp_path, monkeypatch):
    trtexec("exec sleep 60")
    monkeypatch.setattr(own_figures, "START_SECONDS", -3.0)
    with pytest.raises(EngineError, match=r"had not finished after 0\.5 s"):
        figure(tmp_path)


def test_no_trtexec(monkeypatch, tmp_path):
    monkeypatch.setattr(own_figures, "TRTEXEC", ("no-such-trtexec",))
    with pytest.raises(UnsupportedError, match="there is no trtexec"):
        figure(tmp_path)


def test_polygraphy_on_what_is_no_engine(tmp_path):
    (tmp_path / "model.engine").write_bytes(b"no plan")
    with pytest.raises(PipelineError, match="Polygraphy"):
        polygraphy_figure(tmp_path / "model.engine", "int8", FEEDS, 0.1, 0)
