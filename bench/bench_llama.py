"""llama.cpp embedded: its prompt cache and its KV buffer, stock and in pagealloc's memory.

Memory that lay idle for a second costs many times as much on a machine that others share as memory
that is in use, whoever touches it: what is timed was touched just before, on all sides alike, and
the times without that are told below the table.

SmolLM2, and eight conversations of about 1,217 tokens that share 1,000.  Each side has a `Llama` of
its own, and all take their turns in one process; a round is a conversation.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.report import machine
from bench.rows import Row, RowsReport, compare, guarded, limit_row
from pagealloc.demo.english_texts import TEXTS
from pagealloc.demo.errors import DemoError
from pagealloc.demo.llama_quality import restored_quality
from pagealloc.demo.llama_side import context_costs
from pagealloc.demo.measure import pss_bytes
from pagealloc.demo.model_file import find_model_file

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    from llama_cpp import Llama

__all__ = ["run"]

TITLE = "llama.cpp's prompt cache and KV buffer, measured"
RAM, STOCK, PRIVATE = "LlamaRAMCache", "llama.cpp", "not shared"
RECOMPUTED, AT_ONCE = "no cache", "no cache, at one go"
N_CONVERSATIONS, SHARED_TOKENS, OWN_TOKENS, ANSWER_TOKENS = 8, 1000, 201, 16
N_PROMPTS, PROMPT_TOKENS = 1000, 1000
PREFIX_TOKENS = 992
MIB = 1 << 20


def make(**options: Any) -> Llama:
    """Return a `Llama` of SmolLM2."""
    from llama_cpp import Llama

    options = {"n_ctx": 2048, "n_threads": 2, "verbose": False} | options
    return Llama(str(find_model_file()), **options)


def english(llm: Llama) -> list[int]:
    """Return tokens of the texts, one behind the other, as often as it takes."""
    tokens: list[int] = llm.tokenize("\n\n".join(TEXTS.values()).encode())
    return tokens * 4


def milliseconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start_ns = time.perf_counter_ns()
    result = work()
    return (time.perf_counter_ns() - start_ns) / 1e6, result


# --- conversations --------------------------------------------------------------------------------


class Side:
    """A `Llama` with a cache, whose saving and loading are timed, untouched memory or warm."""

    def __init__(self, cache: Any, *, flash_attn: bool) -> None:
        from pagealloc.llama import PageCache, attach
        from pagealloc.llama.contexts import Context

        self.llm, self.cache = make(flash_attn=flash_attn), cache
        self.context = Context(self.llm)
        self.saves_ms: list[float] = []
        self.loads_ms: list[float] = []
        self.cold_loads_ms: list[float] = []
        self.n_computed = 0
        if isinstance(cache, PageCache):
            attach(self.llm, cache)
        elif cache is not None:
            self.llm.set_cache(cache)
        save_state, load_state = self.llm.save_state, self.llm.load_state

        def timed_save() -> Any:
            self.warm()
            took_ms, state = milliseconds(save_state)
            self.saves_ms.append(took_ms)
            return state

        def timed_load(state: Any) -> None:
            put_back = self.present()
            self.cold_loads_ms.append(milliseconds(lambda: load_state(state))[0])
            put_back()
            self.warm()
            self.loads_ms.append(milliseconds(lambda: load_state(state))[0])

        def counted_eval(tokens: Any) -> None:
            self.n_computed += len(tokens)
            evaluate(tokens)

        evaluate = self.llm.eval
        self.llm.save_state, self.llm.load_state = timed_save, timed_load
        self.llm.eval = counted_eval

    def present(self) -> Callable[[], None]:
        """Return what puts the `Llama` where it is now."""
        llm, n_tokens, input_ids = self.llm, self.llm.n_tokens, self.llm.input_ids.copy()
        blob = self.context.take() if n_tokens else None

        def put_back() -> None:
            self.context.clear()
            if blob is not None:
                self.context.give(blob)
            llm.n_tokens, llm.input_ids[:] = n_tokens, input_ids

        return put_back

    def clear_times(self) -> dict[str, float]:
        """Return the medians of what was timed, and forget it."""
        times = {"save": self.saves_ms, "load": self.loads_ms, "cold load": self.cold_loads_ms}
        medians = {name: statistics.median(each or [0.0]) for name, each in times.items()}
        for each in times.values():
            each.clear()
        return medians

    def warm(self) -> None:
        """Touch the KV rows, and memory that will be free then."""
        from llama_cpp import llama_cpp as bindings

        context = self.llm._ctx.ctx  # noqa: SLF001  # no other way to it
        room = np.ones(256 * MIB, np.uint8)
        n_bytes = bindings.llama_state_seq_get_size_ext(context, 0, 0)
        target = (ctypes.c_uint8 * n_bytes).from_buffer(room)
        bindings.llama_state_seq_get_data_ext(context, target, n_bytes, 0, 0)

    def forget(self) -> None:
        """Let the context hold nothing."""
        self.context.clear()
        self.llm.reset()

    def answer(self, prompt: list[int]) -> str:
        """Return the answer to a prompt, of which nothing is computed that is there."""
        self.n_computed = 0
        answer = self.llm.create_completion(
            prompt, max_tokens=ANSWER_TOKENS, temperature=0.0, seed=1
        )
        return str(answer["choices"][0]["text"])

    @property
    def n_restored(self) -> int:
        """How many tokens of the prompt asked last were there; without any, none of the answer."""
        return self.llm.n_tokens - self.n_computed

    def held_bytes(self) -> int:
        """Return what the cache holds, arrays beside the state included."""
        states = getattr(self.cache, "cache_state", None)
        if states is None:
            self.cache.trim()
            return int(self.cache.cache_size)
        return sum(
            len(state.llama_state) + state.scores.nbytes + state.input_ids.nbytes
            for state in states.values()
        )


def conversation_rows(notes: list[str], *, quick: bool, flash_attn: bool) -> list[Row]:
    """Return the lines of eight conversations, each held twice."""
    from llama_cpp import LlamaRAMCache

    from pagealloc.llama import PageCache

    n = 3 if quick else N_CONVERSATIONS
    sides = {
        RAM: Side(LlamaRAMCache(8 << 30), flash_attn=flash_attn),
        "f16": Side(PageCache("4GiB"), flash_attn=flash_attn),
        "K8/V4": Side(PageCache("4GiB", quantize=True), flash_attn=flash_attn),
        RECOMPUTED: Side(None, flash_attn=flash_attn),
    }
    tokens = english(sides[RAM].llm)
    prompts = [
        tokens[:SHARED_TOKENS] + tokens[1100 + OWN_TOKENS * i : 1100 + OWN_TOKENS * (i + 1)]
        for i in range(n)
    ]
    bare = sides.pop(RECOMPUTED)
    texts = converse(sides, bare, prompts)
    held = {name: side.held_bytes() / MIB for name, side in sides.items()}
    n_differ = {
        name: {
            other: sum(a != b for a, b in zip(texts[name], texts[other], strict=True))
            for other in (RECOMPUTED, AT_ONCE)
        }
        for name in (RAM, "f16")
    }
    medians = {name: side.clear_times() for name, side in sides.items()}
    how = "flash_attn" if flash_attn else "default"
    work = f"{how}, {n} conversations of {SHARED_TOKENS + OWN_TOKENS + ANSWER_TOKENS - 1:,} tokens"
    own_tokens = OWN_TOKENS + ANSWER_TOKENS - 1
    scale = (SHARED_TOKENS + n * own_tokens) / (SHARED_TOKENS + N_CONVERSATIONS * own_tokens)
    rows = [
        limit_row(
            "held", f"{work}: {name}", most * scale, held[name], "MiB", peers={RAM: held[RAM]}
        )
        for name, most in (("f16", 65), ("K8/V4", 28))
    ]
    for bar, name, most in (
        ("save", "f16", 15),
        ("save", "K8/V4", 15),
        ("load", "f16", 10),
        ("load", "K8/V4", 20),
    ):
        peers = {RAM: medians[RAM][bar]}
        rows.append(limit_row(bar, f"{how}, {name}", most, medians[name][bar], "ms", peers=peers))
    rows.append(
        limit_row(
            "text",
            f"{how}, f16: answers of {2 * n} that differ from those of a run without a cache",
            0,
            n_differ["f16"][RECOMPUTED],
            "answers",
            peers={RAM: n_differ[RAM][RECOMPUTED]},
        )
    )
    notes.append(f"{how}: loads with memory that lay idle: {listed(medians, 'cold load')}")
    notes += [f"{how}: {each}" for each in beside_the_table(sides, prompts)]
    notes.append(
        f"{how}: answers of {2 * n} that differ from those computed at one go: "
        + ", ".join(f"{name} {each[AT_ONCE]}" for name, each in n_differ.items())
    )
    for side in (*sides.values(), bare):
        side.llm.close()
    return [*rows, logits_row(prompts, flash_attn=flash_attn)]


def converse(sides: dict[str, Side], bare: Side, prompts: list[list[int]]) -> dict[str, list[str]]:
    """Return the answers of all sides to all prompts, asked twice.

    Without a cache the beginning that the others have is computed before the rest: together with
    it some are other numbers, of other kernels.  These answers are returned as well.
    """
    texts: dict[str, list[str]] = {name: [] for name in (*sides, RECOMPUTED, AT_ONCE)}
    for visit in range(2):
        for i, prompt in enumerate(prompts):
            print(f"  visit {visit + 1}, conversation {i + 1} of {len(prompts)}", file=sys.stderr)
            for name, side in sides.items():
                texts[name].append(side.answer(prompt))
            bare.forget()
            bare.llm.eval(prompt[: sides["f16"].n_restored])
            texts[RECOMPUTED].append(bare.answer(prompt))
        if visit == 0:
            for side in sides.values():  # loads of the shared beginning; the bar is about a revisit
                side.loads_ms.clear()
                side.cold_loads_ms.clear()
    for prompt in prompts:
        bare.forget()
        texts[AT_ONCE].append(bare.answer(prompt))
    texts[AT_ONCE] *= 2
    return texts


def beside_the_table(sides: dict[str, Side], prompts: list[list[int]]) -> list[str]:
    """Return what loading and saving takes where nothing is there and nothing is known."""
    for prompt in prompts:
        for side in sides.values():
            side.forget()
            side.answer(prompt)
    for name, side in sides.items():
        side.saves_ms.clear()
        for _ in range(5):
            if name != RAM:
                side.cache.clear()
            side.llm.save_state()
    medians = {name: side.clear_times() for name, side in sides.items()}
    return [
        f"loads into a context that holds nothing: {listed(medians, 'load')}",
        f"saves of a prompt of which nothing is known: {listed(medians, 'save')}",
    ]


def listed(medians: dict[str, dict[str, float]], what: str) -> str:
    """Return a time of each side in words."""
    return ", ".join(f"{name} {times[what]:.1f} ms" for name, times in medians.items())


def logits_row(prompts: list[list[int]], *, flash_attn: bool) -> Row:
    """Return the line of logits after a restore, against those had without it."""
    from pagealloc.llama import PageCache, attach

    n_differ = 0
    with PageCache("1GiB") as cache:
        llm = make(flash_attn=flash_attn)
        attach(llm, cache)
        for prompt in prompts[:2]:
            llm.reset()
            llm.eval(prompt[:-4])
            state = llm.save_state()
            llm.eval(prompt[-4:])
            expected = logits(llm)
            llm.load_state(state)
            llm.eval(prompt[-4:])
            n_differ += int((logits(llm) != expected).sum())
        llm.close()
    work = f"{'flash_attn' if flash_attn else 'default'}, f16: logits that differ after a restore"
    return limit_row("text", work, 0, n_differ, "logits")


def logits(llm: Llama) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = np.ctypeslib.as_array(
        llm._ctx.get_logits(),  # noqa: SLF001  # no other way to them
        shape=(llm.n_vocab(),),
    ).copy()
    return found


# --- looking up -----------------------------------------------------------------------------------


def lookup_rows(rounds: int) -> list[Row]:
    """Return the line of looking a prompt up among many; rows are small, tokens are not."""
    from llama_cpp import LlamaRAMCache
    from llama_cpp.llama import LlamaState

    from pagealloc.llama import PageCache
    from pagealloc.llama.state_blob import LayerType, RecordFormat, StateFormat, write_state

    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 49152, (N_PROMPTS, PROMPT_TOKENS), np.int32)
    rows = (LayerType(1, 64),)
    state_format = StateFormat(
        b"\5\0\0\0llama", (RecordFormat(1, 0, is_transposed=False, k=rows, v=rows),)
    )
    blob = np.zeros(state_format.nbytes([PROMPT_TOKENS]), np.uint8)
    write_state(state_format, blob, [np.arange(PROMPT_TOKENS, dtype=np.int32)])
    ram, ours, theirs = LlamaRAMCache(8 << 30), [], []
    with PageCache("2GiB") as cache:
        for prompt in prompts:
            state = LlamaState(
                prompt, np.zeros((1, 1)), PROMPT_TOKENS, blob.tobytes(), len(blob), 0
            )
            cache[prompt] = state
            ram[tuple(prompt.tolist())] = state
        for prompt in rng.choice(prompts, max(5, rounds)):
            key = (*prompt.tolist(), 7)
            took_ms, found = milliseconds(lambda key=key: cache[key])
            assert found.n_tokens == PROMPT_TOKENS
            ours.append(took_ms)
            theirs.append(milliseconds(lambda key=key: ram[key])[0])
            del found
    return [
        limit_row(
            "lookup",
            f"one of {N_PROMPTS:,} prompts of {PROMPT_TOKENS:,} tokens",
            1,
            statistics.median(ours),
            "ms",
            peers={RAM: statistics.median(theirs)},
        )
    ]


# --- quality --------------------------------------------------------------------------------------


def quality_rows() -> list[Row]:
    """Return the lines of texts that go on behind a prefix that was stored in 8 and 4 bits."""
    from pagealloc.llama import PageCache, attach

    with PageCache("1GiB", quantize=True) as cache:
        llm = make(n_ctx=1024, logits_all=True)
        attach(llm, cache)
        texts = [llm.tokenize(text.encode())[:512] for text in TEXTS.values()]
        quality = restored_quality(llm, texts, 256)
        llm.close()
    work = f"{len(texts)} texts behind prefixes of 256 tokens, K8/V4"
    change = f"{quality.perplexity:.2f} for {quality.float16_perplexity:.2f}"
    return [
        limit_row("quality", f"{work}: mean KL to f16", 0.006, quality.mean_kl, "nats"),
        limit_row(
            "quality",
            f"{work}: change of perplexity ({change})",
            0.5,
            abs(quality.change_percent),
            "%",
        ),
    ]


# --- the KV buffer --------------------------------------------------------------------------------


def resident_rows(rounds: int) -> list[Row]:
    """Return the lines of a context for 8,192 tokens: when it is made, and with 1,500 of them."""
    from pagealloc.llama import kv_memory

    faults: dict[str, list[int]] = {STOCK: [], "ours": []}
    resident: dict[str, list[float]] = {STOCK: [], "made": [], "filled": []}
    with context_costs() as costs:
        for _ in range(rounds):
            llm = make(n_ctx=8192, flash_attn=True)
            n_faults, grown_bytes = costs.pop()
            faults[STOCK].append(n_faults)
            resident[STOCK].append(grown_bytes / MIB)
            llm.close()
            with kv_memory() as kv:
                llm = make(n_ctx=8192, flash_attn=True)
            faults["ours"].append(costs.pop()[0])
            resident["made"].append(kv.stats().resident_bytes / MIB)
            llm.eval(english(llm)[:1500])
            resident["filled"].append(kv.stats().resident_bytes / MIB)
            llm.close()
    peers = {STOCK: statistics.median(resident[STOCK])}
    return [
        limit_row(
            "resident", "KV, n_ctx 8,192, made", 2, max(resident["made"]), "MiB", peers=peers
        ),
        limit_row(
            "resident", "KV after 1,500 tokens", 36, max(resident["filled"]), "MiB", peers=peers
        ),
        compare(
            "resident",
            "page faults while the context is made",
            0.01,
            faults["ours"],
            {STOCK: faults[STOCK]},
            unit="faults",
        ),
    ]


def sharing_rows() -> list[Row]:
    """Return the lines of eight contexts that begin with the same tokens."""
    from pagealloc.llama import PageCache, attach, kv_memory

    grown, n_differ = {}, 0
    with ExitStack() as stack:
        cache = stack.enter_context(PageCache("1GiB"))
        for way in (PRIVATE, "shared"):
            made = []
            for _ in range(N_CONVERSATIONS + 1):
                with kv_memory() as kv:
                    llm = make(n_ctx=8192, flash_attn=True, n_batch=64, n_ubatch=64)
                llm.eval([1])  # scratch memory comes with the first token
                made.append((llm, kv))
            first, source = made[0]
            tokens = english(first)
            first.reset()
            first.eval(tokens[:PREFIX_TOKENS])
            time.sleep(1)  # what is idle goes back
            before_bytes = pss_bytes()
            for llm, kv in made[1:]:
                if way == "shared":
                    source.share_prefix(kv, PREFIX_TOKENS)
                else:
                    attach(first, cache)
                    attach(llm, cache)
                    llm.load_state(first.save_state())
            for llm, _ in made:
                llm.eval(tokens[PREFIX_TOKENS : PREFIX_TOKENS + 8])
                n_differ += int((logits(llm) != logits(first)).sum())
            cache.clear()
            time.sleep(1)
            grown[way] = (pss_bytes() - before_bytes) / MIB
            for llm, _ in made:
                llm.close()
    work = f"{N_CONVERSATIONS} contexts with a common prefix of {PREFIX_TOKENS} tokens"
    return [
        limit_row(
            "cow", f"{work}: growth", 10, grown["shared"], "MiB", peers={PRIVATE: grown[PRIVATE]}
        ),
        limit_row("cow", f"{work}: logits that differ", 0, n_differ, "logits"),
    ]


def run(rounds: int, *, quick: bool = False) -> RowsReport:
    """Measure all bars."""
    try:
        import llama_cpp

        find_model_file()
    except (ImportError, DemoError) as error:
        raise SystemExit(
            f"needs llama-cpp-python and SmolLM2 (tox -e bench -- llama): {error}"
        ) from error
    notes: list[str] = []
    rows = [
        *(
            row
            for flash_attn in ((True,) if quick else (True, False))
            for row in guarded(
                "held",
                f"conversations, {'flash_attn' if flash_attn else 'default'}",
                65,
                partial(conversation_rows, notes, quick=quick, flash_attn=flash_attn),
            )
        ),
        *guarded("lookup", "many prompts", 1, lambda: lookup_rows(rounds)),
        *guarded("quality", "texts", 0.006, quality_rows),
        *guarded("resident", "the KV buffer", 2, lambda: resident_rows(1 if quick else 3)),
        *guarded("cow", "contexts", 10, sharing_rows),
    ]
    facts = machine()
    facts["versions"] += f", llama-cpp-python {llama_cpp.__version__}"
    return RowsReport("llama", TITLE, rows, facts, [RAM, STOCK, PRIVATE], notes)
