"""The steps from a preallocated float16 cache to pagealloc's, each one change further.

The order matters: a step is judged on top of those before it.  Sharing a prompt of 4-bit rows saves
fewer bytes than sharing one of float16 rows would; another order gives the same total and other
shares of it.
"""

from dataclasses import dataclass, replace
from typing import Literal

from pagealloc import ExtentStore, Window, huge_page_size_bytes, page_size_bytes
from pagealloc.demo.attribution_allocations import AllocationJob
from pagealloc.demo.job import Backing, SideJob
from pagealloc.demo.kv_stores import paged_layout
from pagealloc.demo.weights import LlamaShape
from pagealloc.kv.quantisation import KV_KINDS
from pagealloc.observe.system_report import read_system_report

__all__ = ["HUGE_PAGES", "STEPS", "Step", "Unavailable", "why_no_huge_pages"]


@dataclass(frozen=True)
class Step:
    """One way to keep the KV caches.

    Parameters
    ----------
    key : str
        Its name in report.json.
    title : str
        Its name for people.
    what : str
        What it changes, in a sentence.
    side : str
        A key of `sides.SIDES`.
    kv : str
        A key of `kv.quantisation.KV_KINDS`.
    backing : {"base", "auto"}
        Of the KV cache and of the allocator; the first side has neither.
    shares_prompt : bool
        Whether the prompt that all conversations begin with is computed and held once.
    """

    key: str
    title: str
    what: str
    side: Literal["baseline", "pagealloc"] = "pagealloc"
    kv: str = "f16"
    backing: Backing = "base"
    shares_prompt: bool = False

    def without_huge_pages(self) -> "Step":
        """Return the step for a machine that has none."""
        return replace(self, backing="base")

    def side_job(self, work: SideJob) -> SideJob:
        """Return the work, to be done as this step does it."""
        return replace(
            work,
            side=self.side,
            kv=self.kv,
            backing=self.backing,
            shares_prompt=self.shares_prompt,
        )

    def allocation_job(self, shape: LlamaShape, n_batches: int, seed: int) -> AllocationJob:
        """Return the allocations of this step: KV blocks of its rows, from its allocator."""
        dtype = KV_KINDS[self.kv].get("k_type", "float16")
        layout = paged_layout(shape, shape.max_tokens, dtype)
        return AllocationJob(
            backing=None if self.side == "baseline" else self.backing,
            block_bytes=layout.block_bytes,
            block_tokens=layout.block_tokens,
            shares_prompt=self.shares_prompt,
            n_batches=n_batches,
            seed=seed,
        )


HUGE_PAGES = "huge_pages"
"""Key of the step that not every machine can take."""

STEPS = (
    Step(
        "preallocated",
        "float16, preallocated",
        "A NumPy array for the whole context of each conversation, cleared when it is made; "
        "blocks from NumPy's malloc.",
        side="baseline",
    ),
    Step(
        "paged",
        "+ paged",
        "`KVCache` in float16 on the machine's pages, taken as tokens come; blocks from "
        '`PageAllocator(backing="base")`.',
    ),
    Step(
        "q8_0",
        "+ q8_0",
        "K and V as ggml's q8_0, 34 bytes for 32 values; a conversation's newest 128 tokens or a "
        "few more stay float16.",
        kv="q8_0",
    ),
    Step(
        "q4_0",
        "+ q4_0",
        "K and V both as q4_0, 18 bytes for 32 values, rotated before; the newest tokens as "
        'before. (pagealloc\'s `quantize="recommended"` has 8 bits for K and 4 for V.)',
        kv="q4_0",
    ),
    Step(
        HUGE_PAGES,
        "+ huge pages",
        "Huge pages in the KV cache's windows wherever a whole one is committed (MADV_COLLAPSE, "
        '`KVCache(backing="auto")`), and `PageAllocator(backing="auto")` for the blocks.',
        kv="q4_0",
        backing="auto",
    ),
    Step(
        "prefix_sharing",
        "+ prefix sharing",
        "The prompt that all conversations begin with is computed once, and its pages are mapped "
        "by each.",
        kv="q4_0",
        backing="auto",
        shares_prompt=True,
    ),
)


@dataclass(frozen=True)
class Unavailable:
    """Why a step cannot be taken on this machine, and the command that would change it."""

    reason: str
    command: str


def why_no_huge_pages() -> Unavailable | None:
    """Try it: return why the kernel backs no window with a huge page; None if it does."""
    huge_bytes = huge_page_size_bytes()
    switch = read_system_report(page_bytes=page_size_bytes()).shmem_enabled
    state = "has no shmem_enabled" if switch is None else f"says {switch.value!r} in {switch.path}"
    with ExtentStore(name="pagealloc-report") as store, Window(store, huge_bytes) as window:
        window.commit(0, huge_bytes)
        try:
            if window.huge_bytes() > 0:
                return None
        except OSError as unknown:
            return Unavailable(str(unknown), "uname -r")
    return Unavailable(
        f"the kernel made no huge page of {huge_bytes:,} whole committed bytes of a memfd (it "
        f"takes MADV_COLLAPSE, Linux 6.1, and a free huge page; this machine {state})",
        "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
    )
