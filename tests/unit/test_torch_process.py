"""Torch in a process of its own: it computes what the network does, and takes nothing with it when it goes wrong."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline import torch_process
from pipeline.artifacts import TensorSpec
from pipeline.config import CleanConfig, NetworkConfig, PreprocessingConfig
from pipeline.data.preprocessing import normalise
from pipeline.errors import UnsupportedError
from pipeline.torch_process import TorchProcess, Variant, torch_python

torch = pytest.importorskip("torch", reason="torch is not installed: there is nothing to start")

SIZE = 16
SPEC = PreprocessingConfig(height=SIZE, width=SIZE, channels="bgr", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
EAGER, PLAIN = Variant("fp32"), CleanConfig()
FLOATS = TensorSpec("image", (1, 3, SIZE, SIZE), "float32")
IMAGES = TensorSpec("image", (1, SIZE, SIZE, 3), "uint8")
# What networks can do to the process that runs them; the first forward is what torch.compile would work in.
MISCHIEF = """
import os, subprocess, time
import torch

class Net(torch.nn.Module):
    def __init__(self, does=""):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.does, self.calls = does, 0

    def forward(self, x):
        self.calls += 1
        if self.does == "talks":
            print("on standard output", flush=True)
            os.write(1, b'{"milliseconds": [0]}\\n')
        if self.does == "dies":
            os.abort()
        if self.does == "dies later" and self.calls > 1:
            os._exit(7)
        if self.does == "raises":
            raise RuntimeError("CUDA out of memory")
        if self.does == "hangs":
            child = subprocess.Popen(["sleep", "1000"])
            with open("child", "w") as file:
                file.write(str(child.pid))
            time.sleep(1000)
        return self.conv(x)
"""


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A factory in the current folder, as a user's own may be."""
    (tmp_path / "mischief.py").write_text(MISCHIEF)
    monkeypatch.chdir(tmp_path)
    return lambda does="": NetworkConfig(factory="mischief:Net", arguments={"does": does})


def start(config, variant=EAGER, source=FLOATS, baked=PLAIN, python=sys.executable, **keys):
    return TorchProcess(python, config, variant, source, SPEC, baked, wants_gpu=False, **keys)


def drawn(count=1):
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def expected(images):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 4, 3, padding=1)
    floats = np.stack([normalise(image, SPEC) for image in images])
    return floats, conv(torch.from_numpy(floats)).detach().numpy()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_computes_what_the_network_does(network):
    floats, want = expected(drawn(2))
    with start(network("talks")) as contender:
        assert contender.ran == f"torch {torch.__version__}, CPU"
        assert not contender.on_gpu
        np.testing.assert_allclose(contender.feed(floats[:1]), want[:1], rtol=1e-4, atol=1e-5)
        assert contender.takes(2)  # eager takes any batch, whatever the graph has
        np.testing.assert_allclose(contender.feed(floats), want, rtol=1e-4, atol=1e-5)
        times = contender.host_milliseconds(0.05, 0.01)
        assert times.size
        assert (times > 0).all()
        process = contender._process
    assert process.returncode is not None


@pytest.mark.parametrize("output", ["labels", "probabilities"])
def test_does_the_same_job_as_a_graph_with_baked_ends(network, output):
    images = drawn()
    _, logits = expected(images)
    with start(network(), Variant("fp16"), IMAGES, CleanConfig(input="image", output=output)) as contender:
        have = contender.feed(images)
    if output == "labels":
        assert have.dtype == np.uint8
        assert (have == logits.argmax(1)).mean() > 0.98
    else:
        want = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        np.testing.assert_allclose(have, want, atol=5e-3)


@pytest.mark.parametrize(
    ("does", "says"),
    [("dies", "SIGABRT"), ("raises", "RuntimeError: CUDA out of memory")],
)
def test_a_network_that_does_not_run(network, does, says):
    with start(network(does)) as contender, pytest.raises(UnsupportedError, match=says):
        contender.feed(expected(drawn())[0])


def test_a_crash_later_is_told_by_every_call_from_then_on(network):
    with start(network("dies later")) as contender:
        contender.feed(expected(drawn())[0])
        for _ in range(2):
            with pytest.raises(UnsupportedError, match="exit code 7"):
                contender.host_milliseconds(0.01, 0)


@pytest.mark.parametrize(
    ("mode", "says"), [(None, r"no answer \(feed\) after 1 s"), ("default", "torch.compile had not finished after 1 s")]
)
def test_what_takes_too_long_is_stopped_with_all_that_it_started(network, tmp_path, mode, says):
    with start(network("hangs"), Variant("fp32", mode), first_seconds=1) as contender:
        began = time.monotonic()
        with pytest.raises(UnsupportedError, match=says):
            contender.feed(expected(drawn())[0])
        assert time.monotonic() - began < 10
        assert contender._process.returncode is not None
    child = tmp_path / "child"
    assert mode is not None or child.exists()  # a compiler may not have come so far
    assert not child.exists() or not alive(int(child.read_text()))


def test_a_process_that_is_killed_from_outside(network):
    with start(network()) as contender:
        os.kill(contender._process.pid, 9)
        with pytest.raises(UnsupportedError, match="SIGKILL"):
            contender.feed(expected(drawn())[0])


def test_a_network_that_cannot_be_made(network):
    with pytest.raises(UnsupportedError, match="mischief:Other cannot be imported"):
        start(NetworkConfig(factory="mischief:Other"))


def test_tf32_needs_a_gpu(network):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UnsupportedError, match="TF32 is an arithmetic of GPUs"):
        start(network(), Variant("tf32"))


def test_an_interpreter_without_packages(network, tmp_path):
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(UnsupportedError, match=r"exit code 1.*No module named"):
        start(network(), python=str(bare))


def test_another_interpreter_does_not_get_what_belongs_to_this_one(network, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.write_text(f'#!/bin/sh\n[ -z "$LD_LIBRARY_PATH" ] || exit 9\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    monkeypatch.setenv("PYTHONHOME", "/of/another/version")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/of/tensorrt")
    with start(network(), python=str(other)) as contender:
        assert contender.feed(expected(drawn())[0]).shape == (1, 4, SIZE, SIZE)


def test_which_interpreter(monkeypatch, tmp_path):
    assert torch_python(None) == sys.executable
    with pytest.raises(UnsupportedError, match="there is no interpreter nowhere/python"):
        torch_python("nowhere/python")
    no_program = tmp_path / "python"
    no_program.write_text("")
    no_program.chmod(0o755)
    with pytest.raises(UnsupportedError, match="cannot be started"):
        start(NetworkConfig(factory="mischief:Net"), python=torch_python(str(no_program)))
    monkeypatch.setattr(torch_process.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="--torch-python"):
        torch_python(None)
