"""The PyTorch loop that predict.py measures against: a DataLoader, a network in FP16 channels-last, masks as PNG files.

    python torch_loop.py PNGS OUT --arguments '{"in_channels": 1, …}' [--batch 8] [--workers 16] [--repeats 3]

Needs torch, numpy and Pillow, and the repository on PYTHONPATH for the network. Prints one line of JSON: seconds of
every pass over the folder after one that is not counted, with masks written, with overlays beside them, and with
nothing written. Files are compressed as Pillow does when nobody asks otherwise. On a CPU it runs in FP32.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from models.unet import UNet

JOBS = ("masks", "overlays", "nothing")

SIZE, MEAN, STD = 512, 0.4, 0.15
COLOURS = np.array([(0, 0, 0), (230, 60, 60), (60, 200, 90), (70, 110, 230)], np.uint8)


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """Grey PNGs, stretched to the network's size and normalised."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[index]) as image:
            pixels = np.asarray(image.convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float32)
        return torch.from_numpy((pixels / 255 - MEAN) / STD)[None], index


def run(
    module: torch.nn.Module, loader: Any, paths: list[Path], out: Path | None, overlays: bool, device: torch.device
) -> float:
    """Seconds of one pass; the first one starts the workers."""
    dtype = next(module.parameters()).dtype
    start = time.perf_counter()
    with torch.inference_mode():
        for batch, indices in loader:
            x = batch.to(device, non_blocking=True).to(dtype, memory_format=torch.channels_last)
            masks = module(x).argmax(1).to(torch.uint8).cpu().numpy()
            for mask, index in zip(masks, indices.tolist(), strict=True):
                if out is not None:
                    with Image.open(paths[index]) as image:
                        decided = Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST)
                        decided.save(out / paths[index].name)
                        if overlays:
                            coloured = Image.fromarray(COLOURS[np.asarray(decided)])
                            Image.blend(image.convert("RGB"), coloured, 0.5).save(
                                out / f"{paths[index].stem}_overlay.png"
                            )
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arguments", type=json.loads, required=True, help="of models.unet.UNet, as JSON")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS, help="what to write of each image")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    module = UNet(**options.arguments).eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device.type == "cuda":
        module = module.half()
    paths = sorted(options.folder.glob("*.png"))
    loader = DataLoader(
        Pictures(paths),
        options.batch,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        pin_memory=device.type == "cuda",
    )
    options.out.mkdir(parents=True, exist_ok=True)
    run(module, loader, paths, options.out, False, device)
    seconds = {
        job: [
            round(run(module, loader, paths, None if job == "nothing" else options.out, job == "overlays", device), 4)
            for _ in range(options.repeats)
        ]
        for job in options.jobs
    }
    facts = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(next(module.parameters()).dtype),
        "batch": options.batch,
        "workers": options.workers,
        "images": len(paths),
        "seconds": seconds,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
