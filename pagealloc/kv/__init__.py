"""The KV cache: rows of K and V in windows of page-aligned memory.

The words, used here and in every message:

row
    The bytes of K (or V) of one token in one layer.
layout
    `KVLayout`: shape, type, order and strides of the rows; all offset arithmetic.
window
    The contiguous address range a sequence's rows lie in.  Its pages are committed as rows arrive.
sequence
    `Sequence`: one conversation; each layer has its length, ``len()`` is the shortest.
fork
    A second sequence that shares all pages.  Whoever writes to a page first copies it.
KV block
    ``block_tokens`` consecutive tokens.  In block order a block holds all layers of its tokens and
    is committed, copied and released whole; in layer-major orders pages are.
cache
    `KVCache`: the sequences of one layout and one owner (salt), and their budget.
held, needed, shared, waste
    Physical bytes; bytes of the distinct rows; what sharing saves; held less needed (`KVStats`).

Rooms, bottom up: layout, boundary (which pages an access touches), rows (the copy loop), lineage
(who descends from whom), stats, views (arrays over rows), row_pages (pages kept in step with
lengths), sequence, cache.
"""

from pagealloc.kv.cache import KVCache
from pagealloc.kv.layout import KVLayout
from pagealloc.kv.rope import Rope
from pagealloc.kv.row_table import is_page_safe
from pagealloc.kv.sequence import Sequence
from pagealloc.kv.stats import KVStats

__all__ = ["KVCache", "KVLayout", "KVStats", "Rope", "Sequence", "is_page_safe"]
