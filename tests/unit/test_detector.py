"""The detector network and its loss; the images that it is trained on."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.synthetic import DISC, SQUARE, TRIANGLE, draw_shapes

torch = pytest.importorskip("torch", reason="torch is not installed: no network to build")
from models.detector import STRIDES, Detector, detection_loss  # noqa: E402 - needs torch


def test_heads_by_stride() -> None:
    network = Detector(1, 2, 4).eval()
    with torch.inference_mode():
        heads = network(torch.rand(2, 1, 64, 96))
    assert [tuple(head.shape) for head in heads] == [(2, 7, 64 // s, 96 // s) for s in STRIDES]
    assert Detector.infer_arguments(network.state_dict()) == {"in_channels": 1, "classes": 2, "base_channels": 4}
    assert Detector.infer_arguments({"x": torch.zeros(1)}) == {}


@pytest.mark.parametrize(("side", "index"), [(30.0, 0), (60.0, 1), (100.0, 2)])
def test_loss_vanishes_where_boxes_are_right(side: float, index: int) -> None:
    """An object belongs to one head, in the units that ``decode`` reads."""
    from pipeline.metrics.detection import decode

    heads = [torch.full((1, 7, 192 // s, 192 // s), -20.0) for s in STRIDES]
    for head in heads:
        head[:, :4] = 0
    stride = STRIDES[index]
    column, row = 100 // stride, 76 // stride
    cell = (100 / stride - column - 0.5, 76 / stride - row - 0.5, *[float(np.log(side / stride))] * 2, 20, -20, 20)
    heads[index][0, :, row, column] = torch.tensor(cell)
    box = [100 - side / 2, 76 - side / 2, 100 + side / 2, 76 + side / 2]
    (found,) = decode([head[0].numpy() for head in heads], STRIDES)
    assert found[:4] == pytest.approx(box, abs=1e-3)
    assert float(detection_loss(tuple(heads), [torch.tensor([[*box, 1]])])) == pytest.approx(0, abs=1e-4)
    assert float(detection_loss(tuple(heads), [torch.tensor([[*box, 0]])])) > 10
    assert float(detection_loss(tuple(heads), [torch.zeros(0, 5)])) > 10


def test_shapes_fill_their_boxes() -> None:
    kinds = set()
    for seed in range(20):
        image, boxes = draw_shapes(seed)
        assert (image.shape, image.dtype, boxes.dtype) == ((192, 192, 3), np.uint8, np.float32)
        assert 1 <= len(boxes) <= 7
        assert (boxes[:, :4] >= 0).all()
        assert (boxes[:, :4] <= 192).all()
        kinds |= set(boxes[:, 4])
        again = draw_shapes(seed)
        assert np.array_equal(again[0], image)
        assert np.array_equal(again[1], boxes)
    assert kinds == {DISC, SQUARE, TRIANGLE}
