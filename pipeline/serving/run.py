"""Masks of images, with the model beside this file: python run.py IMAGE... -o FOLDER

Needs numpy, pillow, and onnxruntime; or tensorrt where there is an engine.py.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent


def open_model() -> tuple[Any, list[Any], bool]:
    """A function from the network's input to its output, the input's shape, and whether it takes uint8 images."""
    if (HERE / "engine.py").is_file():
        import engine

        opened: tuple[Any, list[Any], bool] = engine.open_engine(HERE / "model.engine")
        return opened
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # the arithmetic that was validated
    graph = next(HERE / name for name in ("emulation.onnx", "model.onnx") if (HERE / name).is_file())
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    return lambda batch: session.run(None, {source.name: batch})[0], source.shape, source.type == "tensor(uint8)"


def read(path: Path, spec: dict[str, Any]) -> Image.Image:
    """The image upright, with 8 bits a channel, grey or RGB."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("L" if spec["channels"] == "grey" else "RGB")


def fit(image: Image.Image, spec: dict[str, Any], sizes: list[int]) -> tuple[Any, tuple[slice, slice]]:
    """The pixels that the network is fed, uint8 (H, W, C), and where in them the image is."""
    width, height, top, left = *image.size, 0, 0
    if spec["resize"] != "none":
        width, height = spec["width"], spec["height"]
        if spec["resize"] == "letterbox":
            ratio = min(height / image.height, width / image.width)
            width, height = max(1, round(image.width * ratio)), max(1, round(image.height * ratio))
            top, left = (spec["height"] - height) // 2, (spec["width"] - width) // 2
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling[spec["interpolation"].upper()])
    pixels = np.atleast_3d(np.asarray(image))[..., :: -1 if spec["channels"] == "bgr" else 1]
    around = [(top, sizes[0] - height - top), (left, sizes[1] - width - left), (0, 0)]
    if min(map(min, around)) < 0:
        raise SystemExit(f"an image of {width}x{height} is larger than the network's input; unet-trt predict cuts it")
    how = {"constant_values": spec["pad_value"]} if spec["resize"] == "letterbox" else {"mode": "reflect"}
    return np.pad(pixels, around, **how), (slice(top, top + height), slice(left, left + width))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    facts = json.loads((HERE / "model.json").read_text())
    spec, palette = (
        facts["card"]["preprocessing"],
        [part for one in facts["card"]["classes"] for part in one["colour"]],
    )
    mean, std = np.array(spec["mean"]), np.array(spec["std"])
    factor, offset = (spec["scale"] / std).astype(np.float32), (0 - mean / std).astype(np.float32)
    infer, shape, takes_images = open_model()
    given.output.mkdir(parents=True, exist_ok=True)
    for path in given.images:
        image, sizes = read(path, spec), []
        for axis, role in enumerate(("height", "width")):
            size, multiple = shape[axis + (1 if takes_images else 2)], facts["multiples"].get(role, 1)
            is_free = not isinstance(size, int) or size < 0
            sizes.append(-(-image.size[1 - axis] // multiple) * multiple if is_free else size)
        pixels, place = fit(image, spec, sizes)
        planes = pixels if takes_images else (pixels * factor + offset).transpose(2, 0, 1)
        count = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else 1
        scores = infer(np.ascontiguousarray(np.repeat(planes[np.newaxis], count, axis=0)))[0]
        labels = scores if scores.ndim == 2 else scores.argmax(0)
        mask = Image.fromarray(labels[place].astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
        mask.putpalette(palette)
        mask.save(given.output / f"{path.stem}.png")


if __name__ == "__main__":
    main()
