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

cold, recent
    Of a quantised sequence: the rows that are packed in 8 or 4 bits (`quant`), and the newest,
    which lie as they came in a ring.
position
    Where a token stands in its conversation; `Sequence.rm` and its siblings go by it.
published
    Of rows: kept for sequences whose prompts begin alike (`Sequence.publish`, the prefix index).
warm
    A window of a closed sequence, whose pages stay committed for the next one for a while.

Rooms, bottom up: rope, model_shape (shapes from files), row_formats (bytes of rows), layer_rows,
layout (where rows lie), row_table (the same in C), boundary (which pages an access touches),
row_copy (the copy loops), quant_loops and quant_plain, quant_avx2, quant_avx512 (the packing loops,
compiled for each processor), quant (rows packed), row_codecs (how each layer's are), quantisation
(what a cache's arguments mean), row_arrays (arrays over rows), conversions (as which types rows are
read), token_positions, window_rows (rows of a window), cold_rows (packed ones), sequence_arrays
(reading), sequence_rows (what every token passes), batch_rows (of many sequences), lineage (which
tokens are whose), stats, error_stats, views and sequence_views (arrays as stored), row_moves (rows
moved or mapped elsewhere), row_pages (pages kept in step with lengths), ring_pages,
quantised_pages (those of both windows), warm_windows, pressure (what is given up at the limit),
seq_ops (by position), prefix_hash (names of prefixes), prefix_stats, prefix_nodes, held_blocks
(their pages), eviction (what goes first), prefix_tree (looking up), prefix_index, block_segments (a
block as one piece), cache_file (reading a file of them), prefix_disk (published blocks in files),
cache_writer, cache_description, prefix_wire (what processes say to each other), prefix_server,
prefix_client, sequence_prefix, sequence, sequences_by_id, cache_sharing (files and other
processes), batches, open_caches (all of the process), cache.
"""

from pagealloc.kv import quant
from pagealloc.kv.cache import KVCache
from pagealloc.kv.error_stats import ErrorStats
from pagealloc.kv.layout import KVLayout
from pagealloc.kv.prefix_index import PrefixIndex
from pagealloc.kv.prefix_server import PrefixServer
from pagealloc.kv.prefix_stats import PrefixEvent, PrefixStats
from pagealloc.kv.rope import Rope
from pagealloc.kv.row_table import is_page_safe
from pagealloc.kv.sequence import Sequence
from pagealloc.kv.stats import KVStats

__all__ = [
    "ErrorStats",
    "KVCache",
    "KVLayout",
    "KVStats",
    "PrefixEvent",
    "PrefixIndex",
    "PrefixServer",
    "PrefixStats",
    "Rope",
    "Sequence",
    "is_page_safe",
    "quant",
]
