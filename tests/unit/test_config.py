from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.config import load_config
from pipeline.errors import ConfigError

REPOSITORY = Path(__file__).parent.parent.parent


def write(folder: Path, **changes: object) -> Path:
    settings = yaml.safe_load((REPOSITORY / "configs" / "cells.yaml").read_text())
    for key, value in changes.items():
        settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_shipped_configs_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISBI_ROOT", "/data/isbi")
    monkeypatch.setenv("CAMVID_ROOT", "/data/camvid")
    monkeypatch.setenv("KERAS_ONNX", "/data/unet.onnx")
    monkeypatch.setenv("CITYSCAPES_ROOT", "/data/cityscapes")
    names = {load_config(path).name for path in (REPOSITORY / "configs").glob("*.yaml")}
    assert {"cells", "isbi", "camvid", "camvid-fcn8s", "cityscapes", "wts", "keras"} <= names


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"calibrate\.image: unknown key; did you mean 'images'"):
        load_config(write(tmp_path, calibrate={"image": 3}))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "validate.tolerances.int8={atol: 1, rtol: 1, max_miou_drop: 0.1, max_miou_dropp: 0.1}",
            r"int8\.max_miou_dropp: unknown key; did you mean 'max_miou_drop'",
        ),
        ("engine.profile.batch={mn: 1, opt: 1, max: 1}", r"batch\.mn: unknown key; did you mean 'min'"),
        ("data.classes=[{name: a, colr: [0, 0, 0]}]", r"classes\.0\.colr: unknown key; did you mean 'colour'"),
    ],
)
def test_unknown_keys_within_mappings_and_lists(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(REPOSITORY / "configs" / "cells.yaml", [setting])


def test_unknown_key_without_a_neighbour_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"clean\.zzz: unknown key; known keys: tolerance"):
        load_config(write(tmp_path, clean={"zzz": 3}))


def test_wrong_type_is_named_with_its_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"export\.opset.*'many'"):
        load_config(write(tmp_path, export={"opset": "many"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": {"onnx": "a.onnx"}}, "either factory"),
        ({"network": {"factory": None}}, "either factory"),
        ({"data": {"void": 2}}, "void is 2, which is the id of class 'membrane'"),
        ({"data": {"kind": "folder"}}, "needs root and train"),
        ({"preprocessing": {"mean": [0.1, 0.2, 0.3]}}, "mean needs 1 or 1 values"),
        ({"export": {"dynamic": ["batch"]}}, r"engine\.profile\.batch needs min"),
        ({"engine": {"profile": {"batch": {"min": 1, "opt": 1, "max": 2}}}}, "export.dynamic does not name batch"),
        ({"engine": {"route": "implicit", "backend": "tensorrt-rtx"}}, "implicit needs a TensorRT with calibrators"),
        (
            {"export": {"dynamic": ["batch"]}, "engine": {"profile": {"batch": {"min": 4, "opt": 1, "max": 2}}}},
            "min <= opt <= max",
        ),
    ],
)
def test_impossible_combinations(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, **changes))


def test_set_overrides_and_paths_are_relative_to_where_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    plain = load_config(path)
    assert plain.network.weights == (tmp_path / "../models/weights/cells.safetensors").resolve()
    changed = load_config(path, ["network.weights=mine.pth", "calibrate.algorithm=minmax", "validate.images=3"])
    assert changed.network.weights == tmp_path / "elsewhere" / "mine.pth"
    assert changed.calibrate.algorithm == "minmax"
    assert changed.validate_.images == 3
    whole = load_config(path, ["network={onnx: pruned.onnx}"])
    assert (whole.network.onnx, whole.network.factory) == (tmp_path / "elsewhere" / "pruned.onnx", None)


@pytest.mark.parametrize("override", ["novalue", "=3", "export=3x: [", "name.part=3"])
def test_bad_overrides(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_config(write(tmp_path), [override])


def test_unset_variable_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAMVID_ROOT", raising=False)
    with pytest.raises(ConfigError, match=r"(?s)CAMVID_ROOT is not set.*--set data\.root=FOLDER"):
        load_config(REPOSITORY / "configs" / "camvid.yaml")


@pytest.mark.parametrize("text", ["a: [", "- 1", "\x00"])
def test_files_that_hold_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path)
