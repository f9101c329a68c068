"""ggml's own row functions, out of llama-cpp-python's shared libraries through ctypes."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["BLOCK_BYTES", "Ggml"]

TYPES = {"q4_0": 2, "q8_0": 8}  # enum ggml_type
BLOCK_VALUES = 32
BLOCK_BYTES = {"q4_0": 18, "q8_0": 34}


class Ggml:
    """ggml's quantisation.

    Raises
    ------
    RuntimeError
        llama-cpp-python is not installed.
    """

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise RuntimeError(
                "needs ggml's shared library: pip install --no-deps llama-cpp-python"
            )
        folder = Path(spec.origin).parent / "lib"
        self._base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self._cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        self._cpu.ggml_cpu_init()
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._base.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._base.ggml_quantize_chunk.argtypes = [
            *(ctypes.c_int, pointer, pointer, number, number, number, pointer)
        ]

    def quantize(self, blocks: npt.NDArray[np.float32], kind: str) -> npt.NDArray[np.uint8]:
        """Return blocks (N, 32) as ``ggml_quantize_chunk`` packs them: (N, bytes)."""
        blocks = np.ascontiguousarray(blocks, np.float32)
        packed = np.zeros((len(blocks), BLOCK_BYTES[kind]), np.uint8)
        n_bytes = self._base.ggml_quantize_chunk(
            *(TYPES[kind], blocks.ctypes.data, packed.ctypes.data),
            *(0, len(blocks), BLOCK_VALUES, None),
        )
        assert n_bytes == packed.nbytes
        return packed

    def dequantize(self, packed: npt.NDArray[np.uint8], kind: str) -> npt.NDArray[np.float32]:
        """Return the values (N, 32) of packed blocks (N, bytes)."""
        values = np.empty((len(packed), BLOCK_VALUES), np.float32)
        function = getattr(self._base, f"dequantize_row_{kind}")
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function.restype = None
        function(packed.ctypes.data, values.ctypes.data, values.size)
        return values

    def address(self, kind: str, *, packs: bool) -> int:
        """Return where its fastest function for rows lies, as the CPU backend uses it."""
        library = self._cpu if packs else self._base
        name = f"quantize_row_{kind}" if packs else f"dequantize_row_{kind}"
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
