"""A headless Chromium, for pages that people look at."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from programs import program


@contextmanager
def open_browser(width: int = 1280, height: int = 900, *, dark: bool = False) -> Iterator[Any]:
    """Yield a Selenium driver of Debian's chromium; a test without one is skipped."""
    chromium, driver = program("chromium"), program("chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-gpu", f"window-size={width},{height}"):
        options.add_argument(f"--{argument}")
    if dark:
        options.add_argument("--blink-settings=preferredColorScheme=0")
    browser = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(executable_path=driver)
    )
    try:
        yield browser
    finally:
        browser.quit()
