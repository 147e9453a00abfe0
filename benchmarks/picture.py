"""README's picture from a run: image, label map, what each precision sees, and the pixels that INT8 flips.

.venv/bin/python benchmarks/picture.py build/cells NAME -o docs/images/masks.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE, GAP, TITLE = 320, 8, 26


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="build/<config>")
    parser.add_argument("name", help="of the image, such as cells_0001")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    folders = {precision: options.run / "validate" / precision for precision in ("fp32", "fp16", "int8")}
    file = f"{options.name}.png"
    some = folders["fp32"]
    tiles: list[tuple[str, Image.Image]] = [
        ("image", Image.open(some / "images" / file)),
        ("labels", Image.open(some / "labels" / file)),
    ]
    tiles += [(precision.upper(), Image.open(folder / "masks" / file)) for precision, folder in folders.items()]
    masks = {precision: np.asarray(Image.open(folder / "masks" / file)) for precision, folder in folders.items()}
    flipped = masks["int8"] != masks["fp32"]
    share = 100 * flipped.mean()
    tiles.append((f"INT8 against FP32: {share:.2f} % of pixels", Image.fromarray((flipped * 255).astype(np.uint8))))
    canvas = Image.new("RGB", (3 * TILE + 4 * GAP, 2 * (TILE + TITLE) + 3 * GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    for index, (title, tile) in enumerate(tiles):
        left, top = GAP + index % 3 * (TILE + GAP), GAP + index // 3 * (TILE + TITLE + GAP)
        draw.text((left, top), title, "black", font)
        canvas.paste(tile.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS), (left, top + TITLE))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    canvas.quantize(256, kmeans=1, dither=Image.Dither.NONE).save(options.output, optimize=True)
    print(f"{options.output}: {options.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
