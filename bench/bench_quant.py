"""Quantised KV: ggml's bytes, memory, page faults, perplexity and speed.

Needs ggml's shared library (llama-cpp-python), and the demo's model and extra: `tox -e bench-quant`
installs them.  What is timed runs in turn with ggml's functions, every round, and a ratio is the
median of the ratios of the same round.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.bench_kv import PREALLOCATED, append_ns, in_process, share_row
from bench.compiled import compiled
from bench.ggml import BLOCK_BYTES, Ggml
from bench.report import machine
from bench.rows import Row, RowsReport, compare, guarded, limit_row
from pagealloc.kv import KVCache, KVLayout, quant

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from pagealloc.demo.perplexity import Quality

__all__ = ["run"]

TITLE = "Quantised KV, measured"
GGML = "ggml"
MIB = 1 << 20
BLOCK_VALUES = 32
N_BLOCKS = 31_250  # a million values
ROW_HEADS, ROW_HEAD_DIM, N_ROWS, N_LOOPS = 8, 128, 32, 100  # of a round: rows of 1,024 values
N_TOKENS = 2048  # of a round

# --- bytes ----------------------------------------------------------------------------------------


def random_blocks() -> Iterator[npt.NDArray[np.float32]]:
    """Yield blocks of random values, a million each time."""
    rng = np.random.default_rng(0)
    yield rng.normal(size=(N_BLOCKS, BLOCK_VALUES)).astype(np.float32)
    yield rng.normal(size=(N_BLOCKS, BLOCK_VALUES)).astype(np.float16).astype(np.float32)
    bits = rng.integers(0, 2**32, (N_BLOCKS, BLOCK_VALUES), np.uint32)
    patterns = bits.view(np.float32)
    yield np.where(np.isfinite(patterns), patterns, np.float32(0))


def edge_blocks() -> Iterator[npt.NDArray[np.float32]]:
    """Yield blocks of zeros, denormals, ties, huge and tiny scales."""
    rng = np.random.default_rng(1)
    shape = (1000, BLOCK_VALUES)
    zeros = np.zeros((4, BLOCK_VALUES), np.float32)
    zeros[1], zeros[2, 3], zeros[3, 1] = -0.0, -0.0, 1e-45
    yield zeros
    denormals = rng.integers(0, 2**23, shape, np.uint32) >> rng.integers(0, 23, (1000, 1))
    yield (denormals.astype(np.uint32) | rng.integers(0, 2, shape, np.uint32) << 31).view(
        np.float32
    )
    ties = rng.integers(-254, 255, shape) / 2 * rng.choice([1, 0.25, 3, 127 / 128], (1000, 1))
    yield ties.astype(np.float32)
    yield rng.integers(-8, 9, shape).astype(np.float32)
    yield (rng.normal(size=shape) * np.exp(rng.uniform(-90, 85, (1000, 1)))).astype(np.float32)


def bytes_rows() -> list[Row]:
    """Return the lines of bytes and values that differ from ggml's."""
    ggml, rows = Ggml(), []
    for kind, block_bytes in BLOCK_BYTES.items():
        for work, make in (("random values", random_blocks), ("edge cases", edge_blocks)):
            n_blocks = n_bytes_differ = n_values_differ = 0
            for blocks in make():
                theirs = ggml.quantize(blocks, kind)
                ours = quant.quantize(blocks[:, None], kind).reshape(-1, block_bytes)
                values = quant.dequantize(theirs, kind, (1, BLOCK_VALUES))
                expected = ggml.dequantize(theirs, kind)
                n_blocks += len(blocks)
                n_bytes_differ += int((ours != theirs).any(axis=1).sum())
                bits = values.reshape(-1, BLOCK_VALUES).view(np.uint32)
                n_values_differ += int((bits != expected.view(np.uint32)).any(axis=1).sum())
            text = f"{kind}, {work}: blocks of {n_blocks:,}"
            rows.append(
                limit_row("bytes", f"{text} packed otherwise than by ggml", 0, n_bytes_differ, "")
            )
            rows.append(
                limit_row(
                    "bytes", f"{text} unpacked otherwise than by ggml", 0, n_values_differ, ""
                )
            )
        rows.append(not_finite_row(kind))
    return rows


def not_finite_row(kind: str) -> Row:
    """Return the line of blocks with an infinity or NaN, which ggml leaves undefined."""
    blocks = np.random.default_rng(2).normal(size=(3000, BLOCK_VALUES)).astype(np.float32)
    blocks[np.arange(3000), np.arange(3000) % BLOCK_VALUES] = np.tile(
        [np.inf, -np.inf, np.nan], 1000
    )
    packed = quant.quantize(blocks[:, None], kind)
    n_numbers = int((~np.isnan(quant.dequantize(packed, kind, (1, BLOCK_VALUES)))).sum())
    work = f"{kind}: values of 3,000 blocks with an infinity or NaN that read back as numbers"
    return limit_row("bytes", work, 0, n_numbers, "")


# --- memory and page faults -----------------------------------------------------------------------


def trace_rows() -> list[Row]:
    """Return the lines of the trace of 32 conversations, see ``bench kv``."""
    rows = []
    kinds: dict[str, tuple[float, dict[str, Any]]] = {
        "q8_0": (0.09, {"k_type": "q8_0", "v_type": "q8_0"}),
        "recommended": (0.08, {"quantize": "recommended"}),
    }
    for shape in ("smollm2", "llama"):
        base = in_process(PREALLOCATED, shape)
        base_mib = base["held_bytes"] / MIB
        for order in ("block", "interleaved", "split"):
            for kind, (to_reach, options) in kinds.items():
                found = in_process("ours", shape, order, {"cache": {"backing": "base", **options}})
                held_mib, work = found["held_bytes"] / MIB, f"{shape}, {order}, {kind}"
                rows.append(
                    share_row("memory", f"{work}: held", to_reach, held_mib, base_mib, "MiB")
                )
                if kind == "recommended":
                    faults = found["n_faults"], base["n_faults"]
                    work = f"{work}, base pages: start-up and inference"
                    rows.append(share_row("faults", work, 0.1, *faults, "faults"))
    return rows


# --- quality --------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "K q8_0, V q8_0": {"k_type": "q8_0", "v_type": "q8_0"},
    "recommended: K q8_0, V q4_0 rotated": {"quantize": "recommended"},
    "K q8_0, V q4_0": {"k_type": "q8_0", "v_type": "q4_0", "rotate": ""},
    "K q4_0 rotated, V q4_0 rotated": {"k_type": "q4_0", "v_type": "q4_0"},
    "K q4_0, V q4_0": {"k_type": "q4_0", "v_type": "q4_0", "rotate": ""},
    "K int4 rotated, V q8_0": {"k_type": "int4", "v_type": "q8_0"},
    "K int4, V q8_0": {"k_type": "int4", "v_type": "q8_0", "rotate": ""},
}
LIMITS_PERCENT = dict(zip(KINDS, (0.3, 0.5), strict=False))


def measure_quality() -> dict[str, dict[str, Quality]]:
    """Return what each kind makes of each text, every row quantised; and of all together."""
    try:
        from pagealloc.demo.engine import Llama
        from pagealloc.demo.english_texts import TEXT_TOKENS, TEXTS
        from pagealloc.demo.errors import DemoError
        from pagealloc.demo.model_file import find_model_file
        from pagealloc.demo.perplexity import compare_with_float16, pool
        from pagealloc.demo.tokenizer import Tokenizer
        from pagealloc.demo.weights import open_gguf

        path = find_model_file()
        tokenizer, model = Tokenizer(open_gguf(path)), Llama.load(path)
    except (ModuleNotFoundError, DemoError) as missing:
        raise RuntimeError(str(missing)) from missing
    kinds = {name: arguments | {"residual_tokens": 0} for name, arguments in KINDS.items()}
    texts = {
        name: compare_with_float16(model, tokenizer.encode(text)[:TEXT_TOKENS], kinds)
        for name, text in TEXTS.items()
    }
    together = {kind: pool([found[kind] for found in texts.values()]) for kind in KINDS}
    return {**texts, "together": together}


def quality_rows(notes: list[str]) -> list[Row]:
    """Return the lines of perplexity; and in `notes`, what each kind makes of each text."""
    texts = measure_quality()
    *names, _ = texts
    heading = ["K and V", *names, "all", "mean KL, nats", "same likeliest token"]
    lines = [heading, ["---", *("---:" for _ in heading[1:])]]
    for kind, pooled in texts["together"].items():
        changes = [f"{found[kind].change_percent:+.2f} %" for found in texts.values()]
        lines.append([kind, *changes, f"{pooled.mean_kl:.4f}", f"{pooled.same_top_percent:.1f} %"])
    notes += [
        "SmolLM2-135M, every row quantised: perplexity against float16, by text of 512 tokens:",
        "",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]
    return [
        limit_row(
            "quality",
            f"{kind}, every row: perplexity of the texts against float16's, up or down",
            limit,
            abs(texts["together"][kind].change_percent),
            "%",
        )
        for kind, limit in LIMITS_PERCENT.items()
    ]


# --- speed ----------------------------------------------------------------------------------------


def row_function_rows(rounds: int) -> list[Row]:
    """Return the lines of our row functions against ggml's own, one thread, float32."""
    ggml, loops, rows = Ggml(), compiled("kv_loops"), []
    n_values = ROW_HEADS * ROW_HEAD_DIM
    values = np.random.default_rng(0).normal(size=(N_ROWS, n_values)).astype(np.float32)
    n_blocks = N_LOOPS * N_ROWS * n_values / BLOCK_VALUES
    for kind in BLOCK_BYTES:
        packed = quant.quantize(values.reshape(N_ROWS, ROW_HEADS, ROW_HEAD_DIM), kind)
        for packs, verb in ((True, "quantise"), (False, "dequantise")):
            source = values.view(np.uint8) if packs else packed
            target = np.zeros_like(packed if packs else values.view(np.uint8))
            address = ggml.address(kind, packs=packs)
            ours, theirs = [], []
            for _ in range(rounds):
                ns = loops.time_ours("float32", kind, packs, 1, n_values, source, target, N_LOOPS)
                ours.append(ns / n_blocks)
                ns = loops.time_theirs(address, n_values, source, target, N_LOOPS)
                theirs.append(ns / n_blocks)
            work = f"{verb} {kind}, {BLOCK_VALUES} values ({quant.SIMD_LEVEL})"
            rows.append(compare("speed", work, 1 / 0.67, ours, {GGML: theirs}))
    return rows


def append_rows(rounds: int) -> list[Row]:
    """Return the lines of append_token into committed pages, packing included."""
    tokens = list(np.random.default_rng(0).normal(size=(N_TOKENS, 30, 2, 3, 64)).astype(np.float16))
    rows = []
    for order in ("block", "interleaved", "split"):
        layout = KVLayout(30, 3, 64, 8192, order=order)  # type: ignore[arg-type]
        ours_us = []
        with KVCache(layout, quantize="recommended", purge_after_s=float("inf")) as cache:
            for _ in range(rounds + 2):  # the first rounds commit the pages
                seq = cache.sequence()
                ours_us.append(append_ns(seq, tokens) / 1000)
                seq.close()
        work = f"smollm2, {order}, recommended: append_token, 30 layers"
        rows.append(limit_row("speed", work, 30, statistics.median(ours_us[2:]), "us"))
    return rows


def run(rounds: int) -> RowsReport:
    """Measure everything: two minutes."""
    notes: list[str] = []
    lines = {
        "bytes": ("ggml's and ours", bytes_rows),
        "memory": ("the trace", trace_rows),
        "quality": ("perplexity", partial(quality_rows, notes)),
        "speed": ("row functions", partial(row_function_rows, rounds)),
        "speed of appending": ("appending", partial(append_rows, rounds)),
    }
    rows: list[Row] = []
    for bar, (text, measure) in lines.items():
        rows += guarded(bar.split()[0], text, 1, measure)
    return RowsReport("quant", TITLE, rows, machine(), [PREALLOCATED, GGML], notes)
