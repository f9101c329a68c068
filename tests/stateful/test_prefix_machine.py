"""Prompts that are published, found, cut, forked and evicted: rows are always the prompt's."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from prefixes import BLOCK, assert_rows, compute, layout_of

from pagealloc.errors import OutOfMemoryError
from pagealloc.kv import KVCache

MAX_TOKENS = 32
BUDGET_PAGES = 40

# Few tokens, and whole blocks of one: prompts that share much.
tokens = st.lists(st.integers(0, 1), max_size=6).flatmap(
    lambda blocks: st.lists(st.integers(0, 2), max_size=3).map(
        lambda tail: [token for token in blocks for _ in range(BLOCK)] + tail
    )
)


class Open:
    def __init__(self, seq, prompt):
        self.seq = seq
        self.prompt = list(prompt)  # what it was told its rows are of, or will be
        self.tokens = self.prompt[: len(seq)]  # of its rows


class PrefixMachine(RuleBasedStateMachine):
    order: str

    opened = Bundle("opened")

    def __init__(self):
        super().__init__()
        self.has_evicted = False
        self.told = []
        layout = layout_of(self.order, MAX_TOKENS)
        self.cache = KVCache(
            layout,
            purge_after_s=float("inf"),
            budget_bytes=BUDGET_PAGES * layout.page_bytes,
            on_prefix_event=self.told.append,
        )
        self.published = {()}
        self.open = []

    def note_evictions(self):
        self.has_evicted |= any(event.kind == "evicted" for event in self.told)
        self.told.clear()

    @rule(target=opened, prompt=tokens)
    def sequence(self, prompt):
        if len(self.open) >= 5:
            return multiple()
        seq = self.cache.sequence(prompt)
        ends = range(0, len(prompt) + 1, BLOCK)
        longest = max(end for end in ends if tuple(prompt[:end]) in self.published)
        self.note_evictions()
        assert seq.n_cached == len(seq) <= longest
        assert seq.n_cached == longest or self.has_evicted
        self.open.append(Open(seq, prompt))
        return self.open[-1]

    @rule(entry=opened, more=tokens)
    def append(self, entry, more):
        if entry not in self.open:
            return
        wanted = entry.prompt + more if len(entry.prompt) == len(entry.tokens) else entry.prompt
        wanted = wanted[:MAX_TOKENS]
        try:
            compute(entry.seq, wanted)
        except OutOfMemoryError:
            wanted = wanted[: len(entry.seq)]
        entry.tokens = wanted
        entry.prompt += wanted[len(entry.prompt) :]

    @rule(entry=opened, pin=st.booleans())
    def publish(self, entry, pin):
        if entry not in self.open:
            return
        n_tokens = entry.seq.publish(entry.tokens, pin=pin)
        assert n_tokens == len(entry.tokens) // BLOCK * BLOCK
        for end in range(0, n_tokens + 1, BLOCK):
            self.published.add(tuple(entry.tokens[:end]))

    @rule(target=opened, entry=opened, data=st.data())
    def fork(self, entry, data):
        if entry not in self.open or len(self.open) >= 5:
            return multiple()
        n_tokens = data.draw(st.integers(0, len(entry.tokens)))
        self.open.append(Open(entry.seq.fork(n_tokens), entry.tokens[:n_tokens]))
        return self.open[-1]

    @rule(entry=opened, data=st.data())
    def truncate(self, entry, data):
        if entry not in self.open:
            return
        n_tokens = data.draw(st.integers(0, len(entry.tokens)))
        entry.seq.truncate(n_tokens)
        entry.tokens = entry.tokens[:n_tokens]
        entry.prompt = entry.prompt[:n_tokens]

    @rule(entry=consumes(opened))
    def close(self, entry):
        if entry in self.open:
            self.open.remove(entry)
            entry.seq.close()

    @rule(prompt=tokens)
    def pin(self, prompt):
        assert self.cache.prefixes.pin(prompt) % BLOCK == 0

    @rule(prompt=tokens)
    def unpin(self, prompt):
        self.cache.prefixes.unpin(prompt)

    @rule(clears=st.booleans())
    def evict(self, clears):
        before = self.cache.prefixes.stats().n_blocks
        done = self.cache.prefixes.clear() if clears else self.cache.prefixes.evict()
        assert (self.cache.prefixes.stats().n_blocks < before) == bool(done)

    @invariant()
    def rows_are_the_prompts(self):
        self.note_evictions()
        for entry in self.open:
            assert_rows(entry.seq, entry.tokens)
        self.cache.check()
        stats = self.cache.stats()
        assert stats.committed_bytes <= stats.budget_bytes
        assert np.all([entry.seq.positions.tolist() == list(range(len(entry.seq)))
                       for entry in self.open])  # fmt: skip

    def teardown(self):
        for entry in self.open:
            entry.seq.close()
        self.cache.check()
        self.cache.close()


@pytest.mark.parametrize("order", ["interleaved", "split", "block"])
def test_prefixes(order, long_suite):
    machine = type("Machine", (PrefixMachine,), {"order": order})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=1000 if long_suite else 60, stateful_step_count=30, deadline=None
        ),
    )
