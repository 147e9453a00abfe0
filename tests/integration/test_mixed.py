"""``-p mixed`` as a user meets it."""

from __future__ import annotations

import json

import onnx
import yaml


def test_from_search_to_report(project, unet_trt):
    project.edit(mixed={"max_miou_drop": 1.0, "min_agreement": 0.9999})
    build = project.root / "build"
    here = ("-c", project.config, "--build-dir", build, "--backend", "onnxruntime")

    done = unet_trt("engine", *here, "-p", "mixed")
    assert done.code == 0, done.err
    assert done.out.strip() == str(build / "tiny" / "engine" / "mixed" / "model.onnx")
    assert "(chosen)" in done.err
    assert "convolutions stay FP16" in done.err
    assert "at the rates of an H200, as there is no GPU here" in done.err

    report = json.loads((build / "tiny" / "mixed" / "report.json").read_text())
    choice = report["candidates"][report["chosen"]]
    assert choice["kept"]
    assert choice["figures"]["agreement"] >= 0.9999
    assert len(report["images"]) == 4  # of six, four are for calibration, of which two choose the search's ranges
    assert report["range_images"] == 2
    typed = onnx.load(done.out.strip())
    quantized = {node.name for node in typed.graph.node if node.op_type == "Conv" and node.input[1] in made_by(typed)}
    assert quantized.isdisjoint(choice["half"])
    assert len(quantized) == len(report["convolutions"]) - len(choice["half"])

    again = unet_trt("engine", *here, "-p", "mixed")
    assert "mixed: unchanged, reused" in again.err
    assert "engine/mixed: unchanged, reused" in again.err
    changed = unet_trt("engine", *here, "-p", "mixed", "--set", "mixed.min_agreement=0.5")
    assert "calibrate: unchanged, reused" in changed.err
    assert "mixed: running" in changed.err
    assert "0 of " in changed.err

    page = unet_trt("report", *here, "-p", "int8", "-p", "mixed")
    assert page.code == 0, page.err
    text = (build / "tiny" / "report" / "index.html").read_text()
    assert "<svg" in text
    assert "Mixed precision" in text
    assert "http" not in text.partition("<svg")[2].partition("</svg>")[0]

    chosen = build / "tiny" / "mixed" / "config.yaml"
    assert list(yaml.safe_load(chosen.read_text())["engine"]["exclude"]) == report["patterns"]
    same = unet_trt(
        "engine", "-c", chosen, "--build-dir", project.root / "again", "-p", "int8", "--backend", "onnxruntime"
    )
    assert same.code == 0, same.err
    assert onnx.load(same.out.strip()).graph == typed.graph


def made_by(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in node.output}


def test_what_cannot_be(project, unet_trt, tmp_path):
    here = ("-c", project.config, "--build-dir", tmp_path / "b", "--backend", "onnxruntime", "-p", "mixed")
    project.edit(
        data={
            **yaml.safe_load(project.config.read_text())["data"],
            "calibration": {"images": "train/images"},
        }
    )
    unlabelled = unet_trt("engine", *here)
    assert unlabelled.code == 2
    assert "mixed.min_agreement" in unlabelled.err
    file = unet_trt("engine", "clean.onnx", "-p", "mixed", "-o", "m.engine")
    assert file.code == 2
    assert "-c CONFIG -p mixed" in file.err


def test_it_is_no_default(project, unet_trt, tmp_path):
    done = unet_trt("engine", "-c", project.config, "--build-dir", tmp_path / "b", "--backend", "onnxruntime")
    assert done.code == 0, done.err
    assert "mixed" not in done.out
    assert not (tmp_path / "b" / "tiny" / "mixed").exists()
