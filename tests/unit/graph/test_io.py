"""Reading and writing ONNX files: what is refused and how, external data both ways, nothing half-written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from pipeline.artifacts import sha256_file
from pipeline.errors import BuildFolderError, ModelError
from pipeline.graph import io
from pipeline.graph.io import load_model, model_files, save_model, sha256_model, staged, tensors, with_initializers
from pipeline.graph.shapes import problem
from tests.unit.graph.builders import conv_net, model, weights


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is too large for one file; tensors from 100 bytes on go to the data file."""
    monkeypatch.setattr(io, "ONE_FILE_BYTES", 0)
    monkeypatch.setattr(io, "EXTERNAL_BYTES", 100)


def write(proto: ModelProto, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def same(a: ModelProto, b: ModelProto) -> bool:
    return a.SerializeToString(deterministic=True) == b.SerializeToString(deterministic=True)


def with_data(folder: Path, **changes: str) -> Path:
    """A valid file whose ``b.weight`` lies in w.bin; ``changes`` replace what the file says of its place."""
    proto = conv_net()
    (tensor,) = (t for t in proto.graph.initializer if t.name == "b.weight")
    data = tensor.raw_data
    (folder / "w.bin").write_bytes(data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    place = {"location": "w.bin", "offset": "0", "length": str(len(data)), **changes}
    tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in place.items())
    return write(proto, folder / "model.onnx")


def chain(*edges: tuple[str, str]) -> ModelProto:
    """Relu nodes named after their results."""
    nodes = [helper.make_node("Relu", [source], [result], name=f"to_{result}") for source, result in edges]
    return model(nodes, {"x": (1, 3, 8, 8)}, {edges[-1][1]: (1, 3, 8, 8)})


def test_large_tensors_go_to_a_data_file_and_come_back(small_limit: None, tmp_path: Path) -> None:
    proto = conv_net()
    save_model(proto, tmp_path / "m.onnx")
    data = tmp_path / "m.onnx.data"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert same(load_model(tmp_path / "m.onnx"), proto)
    bare = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    outside = {t.name: t for t in bare.graph.initializer if t.data_location == TensorProto.EXTERNAL}
    assert sorted(outside) == ["a.weight", "b.weight"]
    place = {entry.key: entry.value for entry in outside["b.weight"].external_data}
    assert place == {"location": "m.onnx.data", "offset": "4096", "length": "576"}
    assert model_files(tmp_path / "m.onnx") == (tmp_path / "m.onnx", data)
    first = sha256_model(tmp_path / "m.onnx")
    save_model(proto, tmp_path / "m.onnx")
    assert sha256_model(tmp_path / "m.onnx") == first
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    assert sha256_model(tmp_path / "m.onnx") != first


def test_values_that_are_not_raw_and_packed_ones(small_limit: None, tmp_path: Path) -> None:
    proto = conv_net()
    values = [float(i) for i in range(300)]
    proto.graph.initializer.append(helper.make_tensor("typed", TensorProto.FLOAT, [300], values))
    proto.graph.initializer.append(helper.make_tensor("packed", TensorProto.INT4, [301], [i % 7 for i in range(301)]))
    proto.graph.initializer.append(helper.make_tensor("text", TensorProto.STRING, [1], [b"x" * 500]))
    save_model(proto, tmp_path / "m.onnx")
    assert len(model_files(tmp_path / "m.onnx")) == 2
    loaded = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    found = {t.name: t for t in loaded.graph.initializer}
    assert numpy_helper.to_array(found["typed"]).tolist() == values
    assert [int(v) for v in numpy_helper.to_array(found["packed"])] == [i % 7 for i in range(301)]
    assert len(found["packed"].raw_data) == 151
    assert found["text"].string_data[0] == b"x" * 500


def test_a_small_model_is_one_file_and_hashed_as_one(tmp_path: Path) -> None:
    path = with_data(tmp_path)
    proto = load_model(path)
    save_model(proto, tmp_path / "one.onnx")
    assert not (tmp_path / "one.onnx.data").exists()
    assert model_files(tmp_path / "one.onnx") == (tmp_path / "one.onnx",)
    assert sha256_model(tmp_path / "one.onnx") == sha256_file(tmp_path / "one.onnx")
    assert sha256_model(path) != sha256_file(path)
    assert same(load_model(tmp_path / "one.onnx"), proto)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_older_pair_survives_a_failure(
    small_limit: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    path = tmp_path / "m.onnx"
    save_model(conv_net(), path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    count, replace = 0, os.replace

    def break_once(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count == failing:
            raise OSError(errno.EIO, "broken")
        replace(source, target)

    monkeypatch.setattr(os, "replace", break_once)
    with pytest.raises(BuildFolderError, match=r"cannot write .*m\.onnx: broken"):
        save_model(conv_net(**{"b.weight": weights(4, 4, 3, 3)}), path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("failing", [1, 2])
def test_a_full_disk_leaves_nothing(
    small_limit: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BuildFolderError, match="No space left"):
        save_model(conv_net(), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_data_file_that_cannot_be_followed_by_its_model_goes(
    small_limit: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def model_fails(source: Path, target: Path) -> None:
        if target.suffix == ".onnx":
            raise OSError(errno.EIO, "broken")
        replace(source, target)

    monkeypatch.setattr(os, "replace", model_fails)
    with pytest.raises(BuildFolderError):
        save_model(conv_net(), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_staged_says_at_once_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for target in (tmp_path / "none" / "m.onnx", tmp_path / "folder", tmp_path / "file" / "m.onnx"):
        with pytest.raises(BuildFolderError, match="cannot write"), staged(target):
            pytest.fail("the block ran")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_failed_block_leaves_the_target(tmp_path: Path) -> None:
    save_model(conv_net(), tmp_path / "m.onnx")
    before = (tmp_path / "m.onnx").read_bytes()

    def fail(file: Path) -> None:
        file.write_bytes(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError), staged(tmp_path / "m.onnx") as file:
        fail(file)
    assert (tmp_path / "m.onnx").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder, "not a readable ONNX file"),
        (lambda folder: folder / "none.onnx", "none.onnx does not exist"),
        (lambda folder: write(ModelProto(), folder / "m.onnx"), "is empty"),
        (lambda folder: write(ModelProto(ir_version=8), folder / "m.onnx"), "holds no graph"),
    ],
)
def test_what_is_no_model(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(make(tmp_path))


def test_a_truncated_file(tmp_path: Path) -> None:
    path = write(conv_net(), tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="not a readable ONNX file"):
        load_model(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"location": "none.bin"}, r"none\.bin does not exist"),
        ({"location": "../w.bin"}, "outside its folder"),
        ({"location": "/etc/hostname"}, "outside its folder"),
        ({"location": ""}, "outside its folder"),
        ({"offset": "1"}, "truncated or belong to another model"),
        ({"offset": "-4"}, "truncated or belong to another model"),
        ({"length": "4"}, "truncated or belong to another model"),
        ({"length": "many"}, "truncated or belong to another model"),
    ],
)
def test_external_data_that_are_not_there(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(9999))
    with pytest.raises(ModelError, match=message) as caught:
        load_model(with_data(tmp_path / "inner", **changes))
    assert "b.weight" in caught.value.problem


def test_a_link_out_of_the_folder_is_no_way_out(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    path = with_data(tmp_path / "inner")
    (tmp_path / "inner" / "w.bin").rename(tmp_path / "w.bin")
    (tmp_path / "inner" / "w.bin").symlink_to(tmp_path / "w.bin")
    with pytest.raises(ModelError, match="outside its folder"):
        load_model(path)


def test_files_of_a_newer_standard(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has opset 999, which onnx"):
        load_model(write(conv_net(opset=999), tmp_path / "m.onnx"))
    proto = conv_net()
    proto.ir_version = 99
    with pytest.raises(ModelError, match="has IR version 99, which onnx"):
        load_model(write(proto, tmp_path / "m.onnx"))


@pytest.mark.parametrize(
    ("edges", "cycle"),
    [
        ([("x", "a"), ("c", "b"), ("b", "c"), ("c", "d"), ("d", "y")], "to_c -> to_b|to_b -> to_c"),
        ([("a", "a"), ("a", "y")], "has a cycle: to_a\n"),
    ],
)
def test_a_cycle_is_named(tmp_path: Path, edges: list[tuple[str, str]], cycle: str) -> None:
    with pytest.raises(ModelError, match=cycle) as caught:
        load_model(write(chain(*edges), tmp_path / "m.onnx"))
    assert "to_d" not in str(caught.value)


def test_the_checkers_word_is_passed_on_whole(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"topologically sorted.*input 'b' of node.*to_y") as caught:
        load_model(write(chain(("b", "y"), ("x", "b")), tmp_path / "m.onnx"))
    assert "cycle" not in str(caught.value)


def test_tensors_are_found_wherever_they_are() -> None:
    inner = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(2, np.float32), "in_branch"))
    branch = helper.make_graph([inner], "b", [], [helper.make_tensor_value_info("c", 1, (2,))])
    branch.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "of_branch"))
    node = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    proto = model([node], {}, {"y": (2,)}, {"yes": np.array(True)})
    body = [helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.ones(1), "in_function"))]
    proto.functions.append(helper.make_function("f", "F", [], ["k"], body, [helper.make_opsetid("", 17)]))
    names = sorted(tensor.name for tensor in tensors(proto))
    assert names == ["in_branch", "in_branch", "in_function", "of_branch", "of_branch", "yes"]


def test_other_initializers_and_all_the_rest() -> None:
    proto = conv_net()
    proto.metadata_props.add(key="k", value="v")
    proto.graph.metadata_props.add(key="g", value="v")
    proto.doc_string = proto.graph.doc_string = "words"
    proto.functions.append(helper.make_function("f", "F", ["a"], ["b"], [], [helper.make_opsetid("", 17)]))
    assert same(with_initializers(proto, proto.graph.initializer), proto)
    assert not with_initializers(proto, []).graph.initializer


def test_the_check_sees_the_shapes_of_large_weights_without_their_values() -> None:
    net = conv_net(**{"b.weight": weights(16, 4, 7, 7), "b.bias": weights(16), "c.weight": weights(2, 16, 1, 1)})
    for tensor in net.graph.initializer:
        if tensor.name == "b.weight":
            tensor.ClearField("raw_data")
    assert problem(net).startswith("[ShapeInferenceError]")  # 7×7 kernels shrink the image
    net.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 4
    net.graph.output[0].type.tensor_type.shape.dim[3].dim_value = 4
    assert problem(net) == ""
    net.graph.node[0].op_type = "Convolve"
    assert "Convolve" in problem(net)
