"""KVCache: the sequences of one layout and one owner, over one extent store.

Purpose
    Make sequences, keep the budget, and say what they hold.
Structure
    ::

        KVCache ---- ExtentStore (one memfd, the budget)
           |  weakly       |
           +-- Sequence -- Window   one each, two if quantised; forks share pages of the store
           +-- PrefixIndex          keeps pages of published rows
Invariants
    n_sequences counts open sequences; a sequence nobody refers to gives its pages back by itself.
    needed_bytes <= file_bytes, for every distinct row lies in the file at least once.
Locking
    None of its own: the store serialises, and the index.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self

from pagealloc import ExtentStore, Window
from pagealloc.errors import (
    BackingUnavailableError,
    ClosedError,
    ForkedError,
    InvariantError,
    PageallocError,
)
from pagealloc.kv.batches import append_batch, gather
from pagealloc.kv.cache_sharing import CacheSharing
from pagealloc.kv.cold_rows import ColdRows
from pagealloc.kv.layout import KVLayout
from pagealloc.kv.lineage import count_distinct_tokens
from pagealloc.kv.open_caches import note_cache
from pagealloc.kv.prefix_disk import DiskPrefixIndex
from pagealloc.kv.prefix_hash import describe_rows, hash_key, owner_key
from pagealloc.kv.pressure import Pressure
from pagealloc.kv.quantisation import quantisation_of
from pagealloc.kv.row_codecs import RowCodecs
from pagealloc.kv.row_table import RowTable
from pagealloc.kv.stats import KVStats, page_table_bytes
from pagealloc.kv.warm_windows import WarmWindows
from pagealloc.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from collections.abc import Sequence as Items

    import numpy.typing as npt

    from pagealloc.kv.eviction import Policy
    from pagealloc.kv.prefix_stats import PrefixEvent
    from pagealloc.kv.row_formats import KVType
    from pagealloc.kv.sequence import Sequence

__all__ = ["KVCache"]

Backing = Literal["auto", "base", "folios", "hugetlb"]

FOLIO_BYTES = 64 << 10

# ruff: noqa: SLF001  cache and sequences are one unit


class KVCache(CacheSharing):
    """Holds the KV rows of any number of sequences.

    Parameters
    ----------
    layout : KVLayout
        Shape, type and order of the rows; the same for all its sequences.
    quantize : {"recommended"}, optional
        ``k_type="q8_0", v_type="q4_0", rotate="v"``: 59 % fewer bytes than float16, and
        half a percent more perplexity, measured with SmolLM2 (docs/quant.md).
    k_type, v_type : {"q8_0", "q4_0", "int4"}, optional
        As what K and V rows are stored, see `pagealloc.kv.quant`; as they come by default.  4 bits
        are too few for K: "q4_0" costs 3 % of perplexity if it is rotated and 12 % if not, "int4"
        (plain symmetric) 3 and 16 % (docs/quant.md).
    rotate : {"", "k", "v", "kv"}, optional
        Which of them are multiplied by a Hadamard matrix before; by default what has 4 bits.
    residual_tokens : int, optional
        How many of a sequence's newest tokens are not quantised, 128 by default; there are up to
        ``layout.block_tokens`` more of them, for so many are quantised at a time.
    budget_bytes : int or str, optional
        Most bytes of pages it may hold, such as ``"4GiB"``; no limit but the machine's by default.
    salt : str or bytes, optional
        Names the owner.  Nothing is shared across salts, and each cache has its own memory file.
    backing : {"auto", "base", "folios", "hugetlb"}
        "auto": the machine's pages, made huge ones by the kernel wherever a whole one is committed
        (MADV_COLLAPSE, Linux 6.1), which costs no byte more; and 64 KiB folios where the kernel
        offers them and the layout's `page_bytes` is a multiple of 64 KiB.  "base": neither.
        "folios", "hugetlb": 64 KiB folios, or huge pages from the machine's pool, or an error; the
        layout's `page_bytes` must be a multiple of these.  `huge_bytes` tells what came of it.
    purge_after_s : float
        How long the window of a closed sequence stays warm, its pages committed for the next
        sequence, before they go back to the kernel by themselves; 0: they go at once.
    high_watermark : float
        Share of the budget above which `on_pressure` is called.
    model : str or bytes, optional
        Names the model, such as its file's checksum: published rows are of one model only.
    prefix_eviction : {"lru", "lfu", "bytes"}
        Which published KV blocks go first when memory is short: those used longest ago; those used
        least often; or those of the largest branch times the time since it was used.  The ends of
        prompts go before their beginnings.
    on_prefix_event : callable, optional
        Called with a `PrefixEvent` when blocks were published, found or evicted, by whoever
        did that.  What it raises comes out of that call.
    on_pressure : callable, optional
        Called with the cache by whoever made it grow past the watermark, once until it has shrunk
        again; and when a request is refused though warm windows and evictable sequences have gone.
        It may close or shorten sequences.  What it raises comes out of the call that grew.

    Notes
    -----
    The budget is hard.  At the limit a request closes warm windows, then evicts published blocks
    that no open sequence has, then evictable sequences, the longest unused first, then asks
    `on_pressure`, and then raises `OutOfMemoryError`; the sequence it is for stays whole.  Windows
    of closed sequences pass between sequences of this cache only.

    Threads may make sequences, publish and close them at the same time, each its own.

    Examples
    --------
    >>> from pagealloc.kv import KVCache, KVLayout
    >>> layout = KVLayout(n_layers=30, n_kv_heads=3, head_dim=64, max_tokens=8192, order="block")
    >>> with KVCache(layout, budget_bytes="1GiB") as cache:
    ...     prompt = cache.sequence()
    ...     conversations = [prompt.fork() for _ in range(8)]
    ...     cache.stats().n_sequences
    9
    """

    __slots__ = (
        "__weakref__",
        "_codecs",
        "_cold_table",
        "_page_table_bytes_before",
        "_pid",
        "_pressure",
        "_salt",
        "_table",
        "_warm",
    )

    def __init__(
        self,
        layout: KVLayout,
        *,
        quantize: Literal["recommended"] | None = None,
        k_type: KVType | None = None,
        v_type: KVType | None = None,
        rotate: Literal["", "k", "v", "kv"] | None = None,
        residual_tokens: int | None = None,
        budget_bytes: int | str | None = None,
        salt: str | bytes | None = None,
        backing: Backing = "auto",
        purge_after_s: float = 0.5,
        model: str | bytes | None = None,
        prefix_eviction: Policy = "lru",
        on_prefix_event: Callable[[PrefixEvent], Any] | None = None,
        high_watermark: float = 0.9,
        on_pressure: Callable[[KVCache], Any] | None = None,
    ) -> None:
        if not isinstance(layout, KVLayout):
            raise TypeError(f"layout must be a KVLayout, not {type(layout).__name__}")
        if not purge_after_s >= 0:
            raise ValueError(f"purge_after_s={purge_after_s!r}: at least 0 is possible")
        super().__init__()
        self._pressure = Pressure(high_watermark, on_pressure)
        self._warm = WarmWindows(purge_after_s)
        self._layout = layout
        self._salt = salt
        self._owner_key = owner_key(model, salt)
        self._page_table_bytes_before = page_table_bytes()
        self._quantisation = quantisation_of(
            layout, quantize, (k_type, v_type), rotate, residual_tokens
        )
        self._table = RowTable(self._recent_layout)
        self._cold_table = None if self._quantisation is None else RowTable(self.cold_layout)
        rotated = "" if self._quantisation is None else self._quantisation.rotate
        self._codecs = RowCodecs(layout, self.cold_layout, rotated)
        rows = describe_rows(layout, self.cold_layout, rotated)
        self._prefixes = DiskPrefixIndex(
            self.cold_layout,
            hash_key(rows, model, salt),
            self._new_unmapped_window,
            prefix_eviction,
            on_prefix_event,
        )
        self._pid = os.getpid()
        self._store = _new_store(layout, budget_bytes, backing)
        if layout.page_bytes % self._store.page_bytes:
            store_page_bytes = self._store.page_bytes
            self._store.close()
            whose = {"hugetlb": "the pool's", "folios": "a folio's"}.get(backing, "this machine's")
            raise ValueError(
                f"the layout's pages of {layout.page_bytes} bytes are no multiple of {whose} "
                f"{store_page_bytes}: give KVLayout(..., page_bytes={store_page_bytes})"
            )
        note_cache(self)

    @property
    def layout(self) -> KVLayout:
        """Shape, type and order of the rows, as they come."""
        return self._layout

    @property
    def cold_layout(self) -> KVLayout:
        """Where quantised rows lie, and as what; `layout` if the cache does not quantise."""
        return self._layout if self._quantisation is None else self._quantisation.cold_layout

    @property
    def _recent_layout(self) -> KVLayout:
        """Where rows lie that are stored as they come."""
        return self._layout if self._quantisation is None else self._quantisation.ring_layout

    @property
    def _ring_tokens(self) -> int:
        return 0 if self._quantisation is None else self._quantisation.ring_layout.max_tokens

    @property
    def salt(self) -> str | bytes | None:
        """Name of the owner."""
        return self._salt

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._store.closed

    @property
    def committed_bytes(self) -> int:
        """Bytes of pages it has now, which the budget limits; `stats` tells what they hold."""
        return int(self._store.committed_bytes)

    @property
    def prefixes(self) -> DiskPrefixIndex:
        """What is published, see `PrefixIndex`."""
        return self._prefixes

    # --- many sequences at once ---------------------------------------------------------------

    def append_batch(
        self,
        sequences: Iterable[Sequence],
        kv: npt.NDArray[Any],
        *,
        positions: Items[int] | None = None,
    ) -> None:
        """Add one token to each of some sequences, or to none: a decode step.

        Parameters
        ----------
        sequences : iterable of Sequence
            Different ones of this cache, S of them.
        kv : ndarray, shape (S, L, 2, H, D)
            K and V of each one's token by layer.
        positions : sequence of int, optional
            Position of each token; behind each sequence's largest by default.

        Raises
        ------
        TypeError, ValueError
            The array does not fit; a sequence is another cache's, or in it twice, or its layers
            differ in length; or the layout's rows are not all of one shape and type.
        PageBoundaryError
            A window has no room for another token.
        OutOfMemoryError
            There is no memory for all of them; no sequence has grown.
        ClosedError, ForkedError
            A sequence is closed, or inherited through ``os.fork()``.
        """
        append_batch(self, sequences, kv, positions)

    def gather(
        self,
        sequences: Iterable[Sequence],
        layer: int,
        kv: Literal["k", "v"],
        *,
        out: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]:
        """Copy the rows of a layer of some sequences into one array, one behind the other.

        Parameters
        ----------
        sequences : iterable of Sequence
            Different ones of this cache.
        layer : int
            Which layer.
        kv : {"k", "v"}
            Which rows.
        out : ndarray, optional
            Where to put them: contiguous, and exactly as large.

        Returns
        -------
        ndarray, shape (sum of T, H, D)
            Sequence i's rows end where ``np.cumsum`` of the lengths says.

        Raises
        ------
        ValueError, PageBoundaryError, ClosedError
            A sequence is another cache's, or in it twice; `out` does not fit; there is no such
            layer; or a sequence is closed.
        """
        return gather(self, sequences, layer, kv, out)

    # --- what it holds ------------------------------------------------------------------------

    def stats(self) -> KVStats:
        """Return what the cache holds, needs, shares and wastes now; see `KVStats`."""
        self._check_open()
        layout, sequences = self._layout, self.sequences
        store = self._store.stats()
        tables_bytes = max(0, page_table_bytes() - self._page_table_bytes_before)
        cold = [run for seq in sequences for run in seq._lineage.first_runs(len(seq), seq.n_cold)]
        recent = [run for seq in sequences for run in seq._lineage.last_runs(len(seq), seq.n_cold)]
        published = self._prefixes.cells()  # rows as the cache stores them
        (recent if self._quantisation is None else cold).extend(published)
        needed_bytes = count_distinct_tokens(recent) * layout.token_bytes
        needed_bytes += count_distinct_tokens(cold) * self.cold_layout.token_bytes
        for sequence in sequences:  # rows of a token that not all layers hold yet
            needed_bytes += sequence._uneven_bytes()
        return KVStats(
            file_bytes=store.held_bytes,
            page_table_bytes=tables_bytes,
            committed_bytes=store.committed_bytes,
            needed_bytes=needed_bytes,
            shared_bytes=store.shared_bytes,
            warm_bytes=self._warm.nbytes,
            n_sequences=len(sequences),
            n_tokens=sum(len(sequence) for sequence in sequences),
            n_mappings=store.n_mappings,
            budget_bytes=store.budget_bytes,
        )

    def huge_bytes(self) -> int:
        """Return how many bytes of all sequences huge pages map, as achieved; see `Window`.

        A shared page counts in each sequence that has read it.  Takes a system call a sequence.

        Raises
        ------
        ClosedError
            The cache is closed.
        OSError
            The kernel does not say (it takes Linux 6.7).
        """
        self._check_open()
        return sum(
            window.huge_bytes() for sequence in self.sequences for window in sequence._pages.windows
        )

    def check(self) -> None:
        """Raise InvariantError if what the modules say must hold does not.

        No other thread may be changing a sequence meanwhile.
        """
        if self.closed:
            return
        self._store.check()
        for sequence in self.sequences:
            sequence.check()
        self._prefixes.check()
        stats = self.stats()
        if stats.needed_bytes > stats.file_bytes:
            raise InvariantError(
                f"{stats.needed_bytes} bytes of distinct rows lie in {stats.file_bytes} bytes"
            )

    def close(self) -> None:
        """Close all sequences and give all memory back.  A second call does nothing.

        Raises
        ------
        BufferError
            An array over a sequence's rows is still alive, or other processes have prefixes, and
            nothing was closed; or another thread made a sequence meanwhile, and the others were.
        """
        if self.closed:
            return
        sequences = self.sequences
        windows = [window for sequence in sequences for window in sequence._pages.windows]
        n_views = sum(window.n_views for window in windows)
        self._warm.close_all()
        if n_views or self._store.n_windows > len(windows) + self._prefixes.n_windows:
            raise BufferError(
                "cannot close the cache: arrays that k() and v() returned are still alive"
            )
        if self._server is not None:
            self._server.close()
        self._warm.purge_after_s = 0.0  # what closes from here on goes at once
        for sequence in sequences:
            sequence.close()
        self._prefixes.close()
        self._store.close()
        if self._remote is not None:
            self._remote.close()

    def _new_cold_rows(self, *, for_fork: bool) -> ColdRows | None:
        """Return the cold rows of a new sequence; None if the cache does not quantise."""
        how = self._quantisation
        if how is None or self._cold_table is None:
            return None
        window = self._new_window(how.cold_layout, for_fork=for_fork)
        return ColdRows(
            self._cold_table, window, self._codecs, how.residual_tokens, how.step_tokens
        )

    def _new_window(self, layout: KVLayout | None = None, *, for_fork: bool = False) -> Window:
        """Return a window, by default for rows that are stored as they come."""
        self._check_process()
        use = 0 if layout is None else 1
        nbytes = (layout or self._recent_layout).window_bytes
        return self._warm.take(use, for_fork=for_fork) or Window(self._store, nbytes)

    def _check_process(self) -> None:
        self._check_open()
        if os.getpid() != self._pid:
            raise ForkedError(
                "this process inherited the cache through os.fork() and may only read it: "
                "build a new KVCache here"
            )

    def _new_unmapped_window(self) -> Window:
        """Return a window for published rows, which keeps pages and has no addresses."""
        return Window(self._store, self.cold_layout.window_bytes, is_mapped=False)

    def _retire(self, window: Window, use: int, *, is_idle: bool) -> None:
        """Keep the window of a sequence that is closed, or close it, too.

        `use`: 0 of rows as they come, 1 of others, for which a refusal comes too late to go back:
        it is closed later then.  `is_idle`: no thread is about to commit pages in it.
        """
        if is_idle and os.getpid() == self._pid and self._warm.put(window, use):
            return
        try:
            window.close()
        except (PageallocError, OSError):
            if not use:
                raise
            self._warm.put_refused(window)

    def trim(self) -> int:
        """Give back warm windows; return the bytes that went.  See also ``prefixes.clear()``.

        Raises
        ------
        ClosedError, ForkedError
            The cache is closed, or inherited through ``os.fork()``.
        """
        self._check_open()
        before_bytes = self._store.committed_bytes
        self._warm.close_all()
        self._store.trim()
        return max(0, before_bytes - self._store.committed_bytes)

    def _check_open(self) -> None:
        if self._store.closed:
            raise ClosedError("the cache is closed")

    def __repr__(self) -> str:
        if self.closed:
            return "<KVCache closed>"
        budget = self._store.budget_bytes
        of_budget = "" if budget is None else f" of {format_bytes(budget)}"
        stored, how = "", self.cold_layout
        if self._quantisation is not None:
            stored = f", stored as {how.k_dtype} and {how.v_dtype}"
        return (
            f"<KVCache of {len(self.sequences)} sequences, "
            f"{format_bytes(self._store.committed_bytes)}{of_budget} committed; {self._layout!r}"
            f"{stored}>"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: object, *exc_info: object) -> None:
        try:
            self.close()
        except BufferError:
            if exc_type is None:  # else what the block raised matters more, and holds the arrays
                raise

    def __reduce__(self) -> NoReturn:
        raise TypeError("a KVCache is memory of this process and cannot be pickled or copied")


def _new_store(layout: KVLayout, budget_bytes: int | str | None, backing: Backing) -> ExtentStore:
    """Return a store of the backing; of folios where they fit the layout and the kernel can."""
    if backing == "auto" and layout.page_bytes % FOLIO_BYTES == 0:
        with suppress(BackingUnavailableError):
            return ExtentStore(budget_bytes=budget_bytes, name="pagealloc-kv", backing="folios")
    return ExtentStore(budget_bytes=budget_bytes, name="pagealloc-kv", backing=backing)
