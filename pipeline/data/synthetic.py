"""The built-in "cells": procedural, seeded, microscopy-like images with label maps.

A field of touching cells: every pixel belongs to the nearest of jittered, unequally weighted cell centres (a
multiplicatively weighted Voronoi diagram over coordinates bent by smooth noise), cells lie where smooth noise is high,
their outlines are membranes, and most hold an elliptic nucleus. Brightness varies from cell to cell, light falls off
unevenly over the image, and blur, shot noise and debris make the borders uncertain.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.preprocessing import Pixels

CELLS_SIZE, SHAPES_SIZE = 512, 192
BACKGROUND, CYTOPLASM, MEMBRANE, NUCLEUS = range(4)

DISC, SQUARE, TRIANGLE = range(3)
# Sides of shapes, in pixels, and how many there are at most; two may share this much of the smaller one's box.
SMALLEST, LARGEST, MOST_SHAPES, MOST_SHARED = 12, 110, 7, 0.15

Field = NDArray[np.float32]


def draw_cells(seed: int, size: int = CELLS_SIZE) -> tuple[Pixels, Pixels]:
    """Image and label map of one seed, both uint8 (size, size); the same seed gives the same picture.

    Labels: 0 background, 1 cytoplasm, 2 membrane, 3 nucleus.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    bend = rng.uniform(4, 9)
    y_bent = y + bend * _smooth(rng, size, 12) + 0.4 * bend * _smooth(rng, size, 32)
    x_bent = x + bend * _smooth(rng, size, 12) + 0.4 * bend * _smooth(rng, size, 32)

    spacing = rng.uniform(38, 64)
    centres = _centres(rng, size, spacing)
    weights = rng.uniform(0.85, 1.2, len(centres)).astype(np.float32)
    cell, gap = _nearest(y_bent, x_bent, centres, weights, spacing)
    alive = (_smooth(rng, size, 4) > rng.uniform(-0.9, -0.2))[
        centres[:, 0].clip(0, size - 1).astype(int), centres[:, 1].clip(0, size - 1).astype(int)
    ]
    inside = alive[cell]

    thickness = rng.uniform(2.2, 3.6)
    rim = _edge_of(inside, thickness)
    label = np.where(inside, CYTOPLASM, BACKGROUND).astype(np.uint8)
    label[inside & ((gap < thickness * 2) | rim)] = MEMBRANE

    nuclei, nucleus_tone = _nuclei(rng, y_bent, x_bent, centres, cell, spacing)
    label[nuclei & (label == CYTOPLASM)] = NUCLEUS

    image = _paint(rng, size, label, cell, nucleus_tone, len(centres))
    return image, label


def draw_shapes(seed: int, size: int = SHAPES_SIZE) -> tuple[Pixels, NDArray[np.float32]]:
    """Image, uint8 (size, size, 3), and boxes, float32 (n, 5), of one seed; the same seed gives the same picture.

    One to seven discs, squares and triangles of any colour and of 12 to 110 pixels, small ones as often as large ones,
    over a smooth background with noise. Boxes: left, top, right, bottom in pixels, class: 0 disc, 1 square, 2 triangle.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    tone = np.stack([_smooth(rng, size, 4) for _ in range(3)], -1) * 0.08 + rng.uniform(0.3, 0.7, 3).astype(np.float32)
    y, x = (grid + np.float32(0.5) for grid in np.mgrid[0:size, 0:size].astype(np.float32))
    boxes: list[tuple[float, ...]] = []
    for _ in range(rng.integers(1, MOST_SHAPES + 1)):
        side = float(np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST))))
        left, top = rng.uniform(0, size - side, 2)
        box = (left, top, left + side, top + side)
        if any(_shared(box, other) > MOST_SHARED for other in boxes):
            continue
        kind = int(rng.integers(3))
        across, down = (x - left) / side, (y - top) / side
        inside = (across >= 0) & (across < 1) & (down >= 0) & (down < 1)
        if kind == DISC:
            inside &= (across - 0.5) ** 2 + (down - 0.5) ** 2 < 0.25
        if kind == TRIANGLE:
            inside &= np.abs(across - 0.5) < down / 2
        # Away from the background's tones, lighter or darker.
        colour = tone[inside].mean(0) + rng.choice([-1, 1], 3) * rng.uniform(0.15, 0.3, 3)
        tone[inside] = colour + 0.3 * (tone[inside] - tone[inside].mean(0))
        boxes.append((*box, kind))
    noisy = tone + rng.normal(0, 0.03, tone.shape)
    return (noisy.clip(0, 1) * 255).round().astype(np.uint8), np.array(boxes, np.float32).reshape(-1, 5)


def _shared(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Common area of two boxes over the smaller one's."""
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return width * height / min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))


def _smooth(rng: np.random.Generator, size: int, waves: int) -> Field:
    """Noise without detail finer than size / waves; mean near 0, standard deviation near 1."""
    coarse = rng.standard_normal((waves + 3, waves + 3)).astype(np.float32)
    noise: Field = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
    return noise / np.float32(max(float(noise.std()), 1e-6))


def _centres(rng: np.random.Generator, size: int, spacing: float) -> Field:
    """Jittered grid of (y, x) that reaches one cell beyond each side."""
    ticks = np.arange(-spacing, size + spacing, spacing)
    grid = np.stack(np.meshgrid(ticks, ticks, indexing="ij"), -1).reshape(-1, 2)
    return (grid + rng.uniform(-0.38, 0.38, grid.shape) * spacing).astype(np.float32)


def _nearest(y: Field, x: Field, centres: Field, weights: Field, spacing: float) -> tuple[NDArray[np.intp], Field]:
    """Index of the nearest centre by weighted distance, and by how much the second nearest is farther (pixels)."""
    best = np.full(y.shape, np.inf, np.float32)
    second = np.full(y.shape, np.inf, np.float32)
    cell = np.zeros(y.shape, np.intp)
    reach = int(spacing * 2.2) + 24
    for index, (cy, cx) in enumerate(centres):
        rows = slice(max(0, int(cy) - reach), max(0, int(cy) + reach))
        columns = slice(max(0, int(cx) - reach), max(0, int(cx) + reach))
        if y[rows, columns].size == 0:
            continue
        distance = np.hypot(y[rows, columns] - cy, x[rows, columns] - cx) * weights[index]
        nearer = distance < best[rows, columns]
        second[rows, columns] = np.where(nearer, best[rows, columns], np.minimum(second[rows, columns], distance))
        best[rows, columns] = np.where(nearer, distance, best[rows, columns])
        cell[rows, columns] = np.where(nearer, index, cell[rows, columns])
    return cell, second - best


def _edge_of(mask: NDArray[np.bool_], thickness: float) -> NDArray[np.bool_]:
    """Pixels of the mask within ``thickness`` of its outside."""
    blurred = _blur(mask.astype(np.float32), thickness)
    return mask & (blurred < 0.86)


def _blur(plane: Field, radius: float) -> Field:
    """Box blur applied three times along both axes: close to a Gaussian of standard deviation ``radius`` (pixels)."""
    width = max(1, round(float(np.sqrt(4 * radius**2 + 1)))) | 1
    for axis in (0, 1):
        for _ in range(3):
            pad = [(0, 0), (0, 0)]
            pad[axis] = (width // 2 + 1, width // 2)
            total = np.cumsum(np.pad(plane, pad, mode="edge"), axis=axis, dtype=np.float64)
            high = np.take(total, range(width, total.shape[axis]), axis=axis)
            low = np.take(total, range(0, total.shape[axis] - width), axis=axis)
            plane = ((high - low) / width).astype(np.float32)
    return plane


def _nuclei(
    rng: np.random.Generator, y: Field, x: Field, centres: Field, cell: NDArray[np.intp], spacing: float
) -> tuple[NDArray[np.bool_], Field]:
    """Where nuclei lie, and the tone of each cell's nucleus (positive: brighter than its cytoplasm)."""
    count = len(centres)
    long = spacing * rng.uniform(0.17, 0.29, count)
    short = long * rng.uniform(0.6, 1.0, count)
    long[rng.random(count) < 0.12] = 0
    angle = rng.uniform(0, np.pi, count)
    shift = rng.normal(0, 0.07 * spacing, (count, 2))
    dy = y - (centres[:, 0] + shift[:, 0]).astype(np.float32)[cell]
    dx = x - (centres[:, 1] + shift[:, 1]).astype(np.float32)[cell]
    sine, cosine = np.sin(angle).astype(np.float32)[cell], np.cos(angle).astype(np.float32)[cell]
    with np.errstate(divide="ignore", invalid="ignore"):
        reach = ((dx * cosine + dy * sine) / long.astype(np.float32)[cell]) ** 2
        reach += ((dy * cosine - dx * sine) / short.astype(np.float32)[cell]) ** 2
    tone = (rng.uniform(0.12, 0.28, count) * np.where(rng.random(count) < 0.2, -0.6, 1)).astype(np.float32)
    return np.nan_to_num(reach, nan=np.inf) < 1, tone


def _paint(
    rng: np.random.Generator, size: int, label: Pixels, cell: NDArray[np.intp], nucleus_tone: Field, count: int
) -> Pixels:
    """Brightness from the label map: tones, texture, debris, blur, uneven light, noise."""
    body = rng.uniform(0.36, 0.56, count).astype(np.float32)[cell]
    tone = np.where(label == BACKGROUND, np.float32(rng.uniform(0.16, 0.27)), body)
    tone = np.where(label == MEMBRANE, body - np.float32(rng.uniform(0.12, 0.22)), tone)
    tone = np.where(label == NUCLEUS, body + nucleus_tone[cell], tone)
    tone += 0.030 * _smooth(rng, size, 64) + 0.022 * _smooth(rng, size, 20)
    for _ in range(rng.integers(6, 18)):
        cy, cx = rng.uniform(0, size, 2)
        radius, strength = rng.uniform(2, 6), rng.uniform(-0.22, 0.22)
        rows = slice(max(0, int(cy - 16)), int(cy + 16))
        columns = slice(max(0, int(cx - 16)), int(cx + 16))
        yy, xx = np.mgrid[rows.start : min(rows.stop, size), columns.start : min(columns.stop, size)]
        spot = np.exp(-((yy - cy) ** 2 + (xx - cx) ** 2) / radius**2).astype(np.float32)
        tone[rows, columns] += np.float32(strength) * spot
    tone = _blur(tone, rng.uniform(0.8, 1.7))
    light = 1 + 0.16 * _smooth(rng, size, 2)
    signal = np.clip(tone * light.clip(0.55, 1.5), 0.01, 1)
    photons = rng.uniform(70, 180)
    noisy = rng.normal(signal, np.sqrt(signal / photons)) + rng.normal(0, 0.012, signal.shape)
    pixels: Pixels = (noisy.clip(0, 1) * 255).round().astype(np.uint8)
    return pixels
