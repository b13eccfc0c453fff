"""Pages in a headless chromium, as people meet them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SCREENS = {"desk": (1280, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")
EVERY = [(screen, scheme) for screen in SCREENS for scheme in SCHEMES]


@contextmanager
def opened(
    browser: Any, address: str, screen: str = "desk", scheme: str = "light"
) -> Iterator[Any]:
    """A page that notes what its console said (`heard`) and what it requested (`asked`)."""
    width, height = SCREENS[screen]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.heard, page.asked = [], []
    page.on("console", lambda message: page.heard.append(message.text))
    page.on("pageerror", lambda error: page.heard.append(str(error)))
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.goto(address)
    yield page
    page.close()
