"""The picture of the page in docs/report.md: its answers, the images wiped between, and the network.

.venv/bin/python -m benchmarks.page_picture build/cells/report/index.html -o docs/images/report.png
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from tests.browser import Browser, find_chromium

WIDTH, SHOWN, ABOVE, BELOW = 1180, 0.75, 56, 12
CHOICES = {"left": "Image", "marks": "INT8"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    program = find_chromium()
    if program is None:
        parser.error("no Chromium is installed (or named by CHROMIUM)")
    with tempfile.TemporaryDirectory() as scratch, Browser(program, Path(scratch, "profile")) as browser:
        browser.open(options.page, WIDTH)
        for name, value in CHOICES.items():
            browser.run(f"document.getElementById('{name}').value = '{value}'")
            browser.run(f"document.getElementById('{name}').dispatchEvent(new Event('change'))")
        browser.screenshot(Path(scratch, "page.png"))
        whole = Image.open(Path(scratch, "page.png")).convert("RGB")
        rows = [(0, ends(browser, "main .cards")[1] + BELOW)]
        rows += [(top - ABOVE, bottom + BELOW) for top, bottom in (ends(browser, "#viewer"), ends(browser, ".network"))]
    canvas = Image.new("RGB", (WIDTH, sum(bottom - top for top, bottom in rows)))
    place = 0
    for top, bottom in rows:
        canvas.paste(whole.crop((0, top, WIDTH, bottom)), (0, place))
        place += bottom - top
    small = canvas.resize((round(SHOWN * canvas.width), round(SHOWN * canvas.height)), Image.Resampling.LANCZOS)
    small.quantize(128, kmeans=1, dither=Image.Dither.NONE).save(options.output, optimize=True)
    print(f"{options.output}: {options.output.stat().st_size / 1e3:.0f} kB")


def ends(browser: Browser, selector: str) -> tuple[int, int]:
    """Top and bottom of an element on the page, in pixels."""
    box = browser.box(selector)
    top = box["y"] + browser.run("scrollY")
    return round(top), round(top + box["height"])


if __name__ == "__main__":
    main()
