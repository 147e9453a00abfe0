"""Tiles cover an image, and their weights give every pixel away once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.tiles import padded, spans


@given(size=st.integers(1, 3000), tile=st.integers(1, 700), share=st.floats(0, 0.99))
def test_every_pixel_is_given_away_once(size: int, tile: int, share: float) -> None:
    tiles = spans(size, tile, int(share * tile))
    total, owners = np.zeros(size), np.zeros(size, int)
    for span in tiles:
        assert 0 < span.stop - span.start <= tile
        assert span.start <= span.first <= span.last <= span.stop
        total[span.start : span.stop] += span.weights
        owners[span.first : span.last] += 1
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert (owners == 1).all()


def test_tiles_meet_the_same_pooling_cells_and_share_what_was_asked_for() -> None:
    tiles = spans(20_000, 512, 128)
    assert all(span.start % 32 == 0 for span in tiles)
    assert all(one.stop - other.start >= 128 for one, other in itertools.pairwise(tiles))
    assert len(tiles) == 52
    assert tiles[-1].stop == 20_000
    assert (tiles[0].weights[:350] == 1).all()  # an image's own border counts
    assert tiles[1].weights[0] < 1e-5


def test_an_image_that_fits_is_one_tile() -> None:
    (span,) = spans(512, 512)
    assert (span.start, span.stop, span.first, span.last) == (0, 512, 0, 512)
    assert (span.weights == 1).all()


@pytest.mark.parametrize("overlap", [-1, 64])
def test_impossible_overlaps(overlap: int) -> None:
    with pytest.raises(ValueError, match="does not fit tiles of 64"):
        spans(100, 64, overlap)


def test_padding_reflects_and_takes_single_pixels() -> None:
    patch = np.arange(3, dtype=np.uint8).reshape(1, 3, 1)
    assert padded(patch, 2, 7)[..., 0].tolist() == [[0, 1, 2, 1, 0, 1, 2]] * 2
    assert padded(patch, 1, 3) is patch
