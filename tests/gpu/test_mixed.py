"""On a GPU: engines of mixed precision on either route, and the search by measured layers and latencies.

Runs on CPython 3.10 with TensorRT 8.6 and without torch, as well as on newer ones.
"""

import numpy as np
import pytest
from PIL import Image

from pipeline.artifacts import EngineManifest, from_json
from pipeline.backends.layers import parse_layers
from pipeline.backends.tensorrt import TensorrtBuilder
from pipeline.config import Config, EngineConfig
from pipeline.engines import load_engine
from pipeline.graph.cost import operators
from pipeline.graph.placement import quantizable
from pipeline.run import Run
from pipeline.stages.engine import build_engine
from tests.planted_unet import CARD, PREPROCESSING, SENSITIVE, feeds, planted_unet, samples
from tests.tiny_unet import images, observed_table, reference, save, tiny_unet

KNOWN = TensorrtBuilder().capabilities()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not KNOWN.builds, reason=KNOWN.why_not_build or "builds")]

CONVOLUTIONS = {node.name for node in quantizable(tiny_unet(), ())}


# TensorRT 8.6.0 fails on small INT8 networks at level 1 ("Assertion engine failed", refitUtils.cpp); 0 and 3 build.
def settings(route="auto", exclude=()):
    return EngineConfig(
        backend="tensorrt", route=route, workspace_mib=1024, optimization_level=0, exclude=tuple(sorted(exclude))
    )


def needs(route):
    if route not in KNOWN.routes:
        pytest.skip(f"TensorRT {KNOWN.version} has no {route} route")


def built(folder, model, table, precision, route, exclude=()):
    """The plan of one engine."""
    needs(route)
    clean, target = save(model, folder / "clean.onnx"), folder / precision
    build_engine(clean, precision, settings(route, exclude), table, "c" * 64, None, target, None)
    return target / "model.engine"


def in_int8(plan):
    """Convolutions that the engine computes in INT8, as its inspector says."""
    with load_engine(plan) as runner:
        layers = parse_layers(runner.layers(), operators(tiny_unet()))
    found = {node: layer.precision for layer in layers if layer.group == "conv" for node in layer.nodes}
    assert found.keys() >= CONVOLUTIONS
    return {node for node in CONVOLUTIONS if found[node] == "int8"}


def error(plan, model, given):
    """Largest error of the logits, relative to the largest logit."""
    want = reference(model, given)
    with load_engine(plan) as runner:
        return float(np.abs(runner(given)["logits"] - want).max() / np.abs(want).max())


def test_explicit(tmp_path):
    """``SENSITIVE`` has no Q/DQ pair: it leaves INT8, alone, and what INT8 ruins is right again."""
    model = planted_unet()
    table = observed_table(model, feeds(model, samples(6, seed=1)))
    whole = built(tmp_path, model, table, "int8", "explicit")
    mixed = built(tmp_path, model, table, "mixed", "explicit", {SENSITIVE})
    assert SENSITIVE in in_int8(whole)
    assert in_int8(mixed) == in_int8(whole) - {SENSITIVE}
    (given,) = feeds(model, samples(1, seed=7))
    assert error(mixed, model, given) < 0.2
    assert error(mixed, model, given) < error(whole, model, given) / 2


def test_implicit(tmp_path):
    """What precision constraints hold to FP16 leaves INT8. The rest is TensorRT's choice, which may be FP16 too."""
    table = observed_table(tiny_unet(), images(8))
    quantized = sorted(in_int8(built(tmp_path, tiny_unet(), table, "int8", "implicit")))
    assert len(quantized) > 1, quantized
    held = set(quantized[:1])
    mixed = built(tmp_path, tiny_unet(), table, "mixed", "implicit", held)
    assert in_int8(mixed).isdisjoint(held)
    (given,) = images(1, seed=7)
    assert error(mixed, tiny_unet(), given) < 0.2


@pytest.mark.parametrize("route", ["implicit", "explicit"])
def test_nothing_in_int8(tmp_path, route):
    plan = built(tmp_path, tiny_unet(), observed_table(tiny_unet(), images(8)), "mixed", route, {"*"})
    assert in_int8(plan) == set()
    (given,) = images(1, seed=7)
    assert error(plan, tiny_unet(), given) < 0.02


def write_images(folder, count, seed):
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for sample in samples(count, seed, planted_unet()):
        Image.fromarray(sample.image).save(folder / "images" / f"{sample.name}.png")
        Image.fromarray(sample.label).save(folder / "labels" / f"{sample.name}.png")


def test_the_search_times_engines(tmp_path):
    save(planted_unet(), tmp_path / "model.onnx")
    write_images(tmp_path / "train", 12, seed=1)
    write_images(tmp_path / "val", 2, seed=7)
    config = Config.model_validate(
        {
            "name": "planted",
            "network": {"onnx": tmp_path / "model.onnx"},
            "data": {
                "kind": "folder",
                "root": tmp_path,
                "train": {"images": "train/images", "labels": "train/labels"},
                "validation": {"images": "val/images", "labels": "val/labels"},
                "classes": [each.model_dump() for each in CARD.classes],
            },
            "preprocessing": PREPROCESSING.model_dump(),
            "calibrate": {"images": 6, "algorithm": "minmax"},
            "engine": settings().model_dump(),
            "mixed": {"max_miou_drop": 0.03, "judge_by": "figure", "finalists": 2},
            "benchmark": {"seconds": 0.3, "warmup_seconds": 0.1, "rounds": 6},
        }
    )
    with Run(config, tmp_path / "build") as run:
        report, folder = run.mix(), run.engine("mixed")
    assert report.latency == "measured"
    half, int8 = report.candidates[:2]
    assert not int8.kept
    assert SENSITIVE in report.choice.half
    timed = [one for one in report.candidates if one.measured_ms is not None]
    assert {half.half, int8.half} <= {one.half for one in timed}
    assert len(timed) <= 2 + 2 * 2  # all FP16 and all INT8; finalists, and once more where borders were misjudged
    assert report.estimates == "layers"
    for one in (half, int8):  # the same engines, in another session
        assert one.estimated_ms == pytest.approx(one.ms, rel=0.2)
    assert report.choice.ms == min(one.ms for one in timed if one.kept)
    assert report.speedup_kept == pytest.approx(int8.ms / report.choice.ms)
    assert 0 < report.choice.measured_ms.low <= report.choice.measured_ms.high < 50
    manifest = from_json(EngineManifest, folder / "manifest.json")
    assert manifest.precision == "mixed"
    assert SENSITIVE not in in_int8(folder / "model.engine")
