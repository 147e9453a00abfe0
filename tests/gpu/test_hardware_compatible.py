"""An engine for every GPU from Ampere on against one for this GPU alone: what it computes, costs and loads on.

Runs on CPython 3.10 with TensorRT 8.6 and without torch, as well as on newer ones. Two small engines.
"""

import functools
import json

import numpy as np
import pytest

from pipeline.backends.tensorrt import TensorrtBuilder
from pipeline.config import EngineConfig
from pipeline.engines import AMPERE, load_engine
from pipeline.errors import EngineError
from pipeline.metrics.interleaving import interleave
from pipeline.stages.engine import build_engine
from tests.tiny_unet import images, reference, save, tiny_unet

KNOWN = TensorrtBuilder().capabilities()
CAPABILITY = tuple(map(int, KNOWN.device.compute_capability.split("."))) if KNOWN.device else (0, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not KNOWN.builds, reason=KNOWN.why_not_build or "builds"),
    pytest.mark.skipif(CAPABILITY < AMPERE, reason="hardware-compatible engines are built on Ampere or newer GPUs"),
]
OWN, PORTABLE = "this GPU", "Ampere and newer"
# More would be another defect than missing tactics: this network takes microseconds.
MOST_TIMES_SLOWER = 4


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """The folders of both engines, FP16."""
    root = tmp_path_factory.mktemp("engines")
    clean = save(tiny_unet(), root / "clean.onnx")
    made = {}
    for name, portable in ((OWN, False), (PORTABLE, True)):
        config = EngineConfig(
            backend="tensorrt", workspace_mib=1024, optimization_level=2, hardware_compatible=portable
        )
        made[name] = root / name.replace(" ", "-")
        build_engine(clean, "fp16", config, None, None, None, made[name], root / f"{portable}.timing")
    return made


def elsewhere(folder, target, **device):
    """A copy of an engine whose manifest says that it was built on another GPU."""
    (target / "model.engine").write_bytes((folder / "model.engine").read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    (target / "manifest.json").write_text(json.dumps({**manifest, "device": {**manifest["device"], **device}}))
    return target / "model.engine"


@pytest.mark.parametrize("name", [OWN, PORTABLE])
def test_it_computes_the_network(engines, name):
    (feeds,) = images(1, seed=7)
    want = reference(tiny_unet(), feeds)
    with load_engine(engines[name] / "model.engine") as runner:
        assert np.abs(runner(feeds)["logits"] - want).max() < 0.02 * np.abs(want).max()
    options = json.loads((engines[name] / "manifest.json").read_text())["options"]
    assert options["hardware_compatible"] is (name == PORTABLE)


def test_what_it_costs(engines):
    (feeds,) = images(1)
    with load_engine(engines[OWN] / "model.engine") as own, load_engine(engines[PORTABLE] / "model.engine") as portable:
        turns = {
            name: functools.partial(runner.device_milliseconds, feeds, 0.05, 0.01)
            for name, runner in ((OWN, own), (PORTABLE, portable))
        }
        timed = interleave(turns, 8)
    for name in turns:
        print(f"{name}: {timed.latency(name)}")
    cost = timed.ratio(PORTABLE, OWN)
    print(f"hardware-compatible / own: {cost}")
    assert 1 / MOST_TIMES_SLOWER < cost.median < MOST_TIMES_SLOWER


def test_where_it_loads(engines, tmp_path):
    other = {"name": "NVIDIA A10", "compute_capability": "8.6"}
    (feeds,) = images(1)
    with load_engine(elsewhere(engines[PORTABLE], tmp_path, **other)) as runner:
        assert np.isfinite(runner(feeds)["logits"]).all()
    with pytest.raises(EngineError, match="was built on a NVIDIA A10"):
        load_engine(elsewhere(engines[OWN], tmp_path, **other))
