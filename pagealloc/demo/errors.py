"""What can go wrong in the demo, and how its optional packages are asked for."""

import importlib
from typing import Any

from pagealloc.errors import PageallocError

__all__ = ["DemoError", "ModelNotFoundError", "UnsupportedModelError", "require_extra"]


class DemoError(PageallocError, RuntimeError):
    """The demo cannot go on; the message says what would help."""


class ModelNotFoundError(DemoError):
    """No model file: neither the model package nor a file of the caller's."""


class UnsupportedModelError(DemoError):
    """The GGUF holds something the small NumPy engine does not compute."""


def require_extra(module_name: str) -> Any:
    """Import an optional package of the ``demo`` extra.

    Raises
    ------
    DemoError
        If it is not installed; the message names the command that installs it.
    """
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != module_name.partition(".")[0]:
            raise
        raise DemoError(
            f"this needs the package {module_name.partition('.')[0]!r}, which is not installed. "
            "Install it with: pip install 'pagealloc[demo]'"
        ) from missing
