"""A process under load, for who looks at one: an allocator with mixed sizes, a KV cache with forks.

``python tests/support/observed.py [PORT]``: with a feed, and a page if a port is given, until its
stdin ends.
"""

import random
import select
import sys
import time

import numpy as np

from pagealloc import PageAllocator, page_size_bytes
from pagealloc.kv import KVCache, KVLayout
from pagealloc.observe import serve, start_feed

SIZES_BYTES = (64, 192, 512, 1024, 4096, 4096, 16384, 65536, 262144, 1 << 20)
MOST_BLOCKS = 600
PAGE_BYTES = page_size_bytes()
PROMPT_TOKENS = 256
LAYOUT = {"n_layers": 16, "n_kv_heads": 4, "head_dim": 64, "max_tokens": 2048}


def churn(allocator, blocks, rng, n_allocs):
    """Allocate and touch blocks of many sizes; others go when there are too many."""
    for _ in range(n_allocs):
        block = allocator.alloc(rng.choice(SIZES_BYTES))
        np.frombuffer(block, np.uint8)[::PAGE_BYTES] = 1
        blocks.append(block)
        if len(blocks) > MOST_BLOCKS:
            blocks.pop(rng.randrange(len(blocks))).close()


class Conversations:
    """Sequences that begin with one published prompt, grow by tokens, and end."""

    def __init__(self, cache):
        self._cache = cache
        self._rows = np.ones(
            (LAYOUT["n_layers"], 2, LAYOUT["n_kv_heads"], LAYOUT["head_dim"]), "f2"
        )
        self._prompt = list(range(PROMPT_TOKENS))
        self._open = []

    def turn(self, rng):
        """End a conversation if there are many, or else begin one; all others go on."""
        if len(self._open) > 6:
            self._open.pop(rng.randrange(len(self._open))).close()
        else:
            seq = self._cache.sequence([*self._prompt, 1 << 16, rng.randrange(100)])
            while len(seq) < PROMPT_TOKENS + 2:
                seq.append_token(self._rows)
            seq.publish()
            self._open.append(seq)
        if len(self._open) in (2, 4):
            self._open.append(self._open[-1].fork())
        for each in self._open:
            for _ in range(rng.randrange(10, 40)):
                if len(each) < LAYOUT["max_tokens"]:
                    each.append_token(self._rows)


def main():
    rng = random.Random(7)
    layout = KVLayout(**LAYOUT, order="block")
    with (
        start_feed() as feed,
        PageAllocator(budget_bytes="256MiB", time_every=32) as allocator,
        KVCache(layout, budget_bytes="192MiB") as cache,
    ):
        url = None
        if sys.argv[1:]:
            url = serve(port=int(sys.argv[1])).url
        print(url or feed.path, flush=True)
        conversations, blocks, turn = Conversations(cache), [], 0
        while not select.select([sys.stdin], [], [], 0)[0]:
            turn += 1
            churn(allocator, blocks, rng, 400 if turn // 40 % 3 else 1500)
            if turn % 16 == 0:
                conversations.turn(rng)
            if turn % 150 == 0:
                allocator.trim()
            time.sleep(0.04)


if __name__ == "__main__":
    main()
