"""Programs of others that tests talk to: Debian's prometheus, golang, chromium."""

import os
import shutil

import pytest

IS_REQUIRED = os.environ.get("PAGEALLOC_TEST_SERVERS") == "1"


def program(name: str) -> str:
    """Return where a program lies; the test is skipped without it, or fails where all must run."""
    path = shutil.which(name)
    if path is not None:
        return path
    if IS_REQUIRED:
        pytest.fail(f"{name} is missing, and PAGEALLOC_TEST_SERVERS=1 asks for all of them")
    pytest.skip(f"{name} is not installed")
