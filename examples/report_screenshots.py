"""The screenshots of a report that the documentation shows, taken by a browser.

    tokred evaluate digits_cluttered --methods tome atc dpc_knn evit slic --html report.html
    python examples/report_screenshots.py report.html --out docs

Writes `report-light.png`, as wide as a desk, and `report-dark-phone.png`. Needs playwright (`pip
install playwright`), and Chromium: one that is installed, or that `playwright install chromium`
has fetched. Says so, and takes none, where they are missing.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

SHOTS: dict[str, tuple[tuple[int, int], str]] = {
    "report-light.png": ((1200, 1250), "light"),
    "report-dark-phone.png": ((390, 1500), "dark"),
}
"""Width and height of the window, and which of the themes."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("page", type=Path, help="what --html has written")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write into")
    parser.add_argument("--browser", help="Chromium's executable, if it is not found")
    options = parser.parse_args()
    if not options.page.is_file():
        parser.error(f"there is no page {options.page}")
    try:
        playwright = importlib.import_module("playwright.sync_api")
    except ModuleNotFoundError:
        sys.exit("no screenshots: this needs playwright, run `pip install playwright`")
    browser = options.browser or next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as running:
        try:
            chromium = running.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        except playwright.Error as error:
            first = str(error).split("\n")[0]
            sys.exit(
                f"no screenshots: Chromium does not start ({first}); run `playwright install "
                "chromium`, or say where it is with --browser"
            )
        for name, (size, theme) in SHOTS.items():
            shoot(chromium, options.page, options.out / name, size, theme)
            print(options.out / name)
        chromium.close()


def shoot(chromium: Any, page: Path, file: Path, size: tuple[int, int], theme: str) -> None:
    """A picture of the upper end of a page, in a window of this size, in "light" or "dark".

    Raises:
        RuntimeError: the page asks for something from elsewhere, or is wider than the window.
    """
    wide, high = size
    shown = chromium.new_page(viewport={"width": wide, "height": high}, color_scheme=theme)
    asked: list[str] = []
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto(page.resolve().as_uri(), wait_until="networkidle")
    elsewhere = [url for url in asked[1:] if not url.startswith("data:")]
    if elsewhere:
        raise RuntimeError(f"{page} asks for {', '.join(elsewhere)}")
    needed = shown.evaluate("document.documentElement.scrollWidth")
    if needed > wide:
        raise RuntimeError(f"{page} is {needed} pixels wide in a window of {wide}")
    shown.screenshot(path=file)
    shown.close()


if __name__ == "__main__":
    main()
