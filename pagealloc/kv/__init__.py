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

position
    Where a token stands in its conversation; `Sequence.rm` and its siblings go by it.
warm
    A window of a closed sequence, whose pages stay committed for the next one for a while.

Rooms, bottom up: rope, model_shape (shapes from files), layer_rows, layout (where rows lie),
row_table (the same in C), boundary (which pages an access touches), row_copy (the copy loops),
row_arrays (arrays over rows), token_positions, sequence_rows (what every token passes), batch_rows
(of many sequences), lineage (which tokens are whose), stats, views (arrays over KV blocks),
row_pages (pages kept in step with lengths), warm_windows, pressure (what is given up at the
limit), seq_ops (by position), sequence, sequences_by_id, batches, cache.
"""

from pagealloc.kv.cache import KVCache
from pagealloc.kv.layout import KVLayout
from pagealloc.kv.rope import Rope
from pagealloc.kv.row_table import is_page_safe
from pagealloc.kv.sequence import Sequence
from pagealloc.kv.stats import KVStats

__all__ = ["KVCache", "KVLayout", "KVStats", "Rope", "Sequence", "is_page_safe"]
