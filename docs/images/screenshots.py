"""The README's pictures of a report: python docs/images/screenshots.py <run>/report.html.

It needs playwright, which `make test-browser` installs, and a chromium.
"""

import io
import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

SIZES = {"desktop": (1120, 3150), "phone": (390, 1640)}


def main(report: Path) -> None:
    """Write report_desktop.png and report_phone.png beside this file, in 256 colors."""
    with sync_playwright() as playwright:
        executable = os.environ.get("CHROMIUM") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for name, (width, height) in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(report.resolve().as_uri())
            screenshot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            colors = screenshot.quantize(256, dither=Image.Dither.NONE)
            colors.save(Path(__file__).with_name(f"report_{name}.png"), optimize=True)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
