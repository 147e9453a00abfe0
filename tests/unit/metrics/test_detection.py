"""Boxes: decoding, suppression, average precision, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.metrics.detection import average_precision, decode, iou, suppress


def boxes(*rows: tuple[float, ...]) -> np.ndarray:
    width = len(rows[0]) if rows else 6
    return np.array(rows, np.float32).reshape(-1, width)


def test_decode_puts_boxes_where_the_head_says() -> None:
    head = np.full((7, 2, 3), -20, np.float32)
    head[:4] = 0
    head[:, 1, 2] = (0.25, -0.5, np.log(2), np.log(4), 20, -20, 20)
    (box,) = decode([head], [8])
    # The cell's middle is (20, 12); the centre lies 2 to the right and 4 above; 16 wide, 32 high.
    assert box[:4] == pytest.approx([14, -8, 30, 24], abs=1e-4)
    assert box[4] == pytest.approx(1, abs=1e-6)
    assert box[5] == 1


def test_decode_sorts_all_heads_and_leaves_out_weak_boxes() -> None:
    heads = []
    for logit in (0.0, 3.0, -6.0):
        head = np.zeros((6, 1, 1), np.float32)
        head[4], head[5] = logit, 20
        heads.append(head)
    found = decode(heads, [8, 16, 32], threshold=0.05)
    assert found[:, 4] == pytest.approx([1 / (1 + np.exp(-3)), 0.5], abs=1e-6)
    assert found[:, 2] - found[:, 0] == pytest.approx([16, 8])
    assert decode(heads, [8, 16, 32], threshold=0.99).shape == (0, 6)


def test_iou() -> None:
    a = boxes((0, 0, 4, 4), (0, 0, 0, 0))
    b = boxes((0, 0, 4, 4), (2, 0, 6, 4), (4, 4, 8, 8), (0, 0, 0, 0))
    assert iou(a, b)[0] == pytest.approx([1, 1 / 3, 0, 0])
    assert iou(a, b)[1] == pytest.approx([0, 0, 0, 0])


def test_suppress_keeps_the_best_of_a_class() -> None:
    given = boxes((0, 0, 10, 10, 0.9, 0), (1, 0, 11, 10, 0.8, 0), (1, 0, 11, 10, 0.7, 1), (20, 0, 30, 10, 0.6, 0))
    assert suppress(given)[:, 4] == pytest.approx([0.9, 0.7, 0.6])
    assert len(suppress(given, overlap=0.9)) == 4
    assert suppress(given[:0]).shape == (0, 6)


class TestAveragePrecision:
    TRUTH = (boxes((0, 0, 10, 10, 0), (20, 20, 30, 30, 0)), boxes((0, 0, 10, 10, 0)))

    def test_all_found(self) -> None:
        found = [np.hstack([t[:, :4], np.full((len(t), 1), 0.9), t[:, 4:]]) for t in self.TRUTH]
        assert average_precision(found, self.TRUTH, 2)[0] == 1
        assert np.isnan(average_precision(found, self.TRUTH, 2)[1])

    def test_none_found(self) -> None:
        assert average_precision([boxes(), boxes()], self.TRUTH, 1)[0] == 0

    def test_a_second_box_of_an_object_and_a_wrong_one_cost_precision(self) -> None:
        found = [
            boxes((0, 0, 10, 10, 0.9, 0), (0, 0, 10, 9, 0.8, 0)),
            boxes((50, 50, 60, 60, 0.7, 0), (0, 0, 10, 10, 0.6, 0)),
        ]
        # Right, wrong, wrong, right of three objects: precision 1 up to recall 1/3, 2/4 up to 2/3, then nothing.
        assert average_precision(found, self.TRUTH, 1)[0] == pytest.approx((1 + 0.5) / 3)

    def test_overlap_decides(self) -> None:
        found = [boxes((0, 0, 10, 6, 0.9, 0)), boxes()]
        assert average_precision(found, self.TRUTH, 1)[0] == pytest.approx(1 / 3)
        assert average_precision(found, self.TRUTH, 1, overlap=0.7)[0] == 0

    def test_a_box_of_another_class_is_no_hit(self) -> None:
        found = [boxes((0, 0, 10, 10, 0.9, 1)), boxes()]
        assert average_precision(found, self.TRUTH, 2)[0] == 0
