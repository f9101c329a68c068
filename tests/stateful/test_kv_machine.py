"""Sequences against a NumPy model: no side ever sees the other's rows, and the books balance.

The model keeps, for each sequence, the rows it must hold.  After every step all rows of all
sequences are compared, `check()` runs, and the held bytes are cross-checked with the kernel's own
account: the sum of Pss over our mappings in ``/proc/self/smaps``.
"""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)
from mappings import CAN_WEIGH, weigh

from pagealloc.core.os_memory import page_size_bytes
from pagealloc.kv import KVCache, KVLayout

N_LAYERS, N_HEADS, HEAD_DIM = 2, 2, 150  # rows of 600 bytes: most pages end within a row
MAX_TOKENS = 40
MAX_SEQUENCES = 6


class Twin:
    """A sequence, and the rows it must hold: per layer (T, 2, H, D)."""

    def __init__(self, seq, rows):
        self.seq = seq
        self.rows = rows
        self.arrays = []  # live (array, expected, reach)
        self.is_open = True

    @property
    def lengths(self):
        return [len(rows) for rows in self.rows]

    @property
    def is_even(self):
        return len(set(self.lengths)) == 1

    @property
    def reach(self):
        return max((reach for _, _, reach in self.arrays), default=0)


class KVMachine(RuleBasedStateMachine):
    order: str

    twins = Bundle("twins")

    def __init__(self):
        super().__init__()
        layout = KVLayout(N_LAYERS, N_HEADS, HEAD_DIM, MAX_TOKENS, order=self.order, block_tokens=4)
        self.cache = KVCache(layout)
        self.open = []
        self.next_value = 0

    def new_rows(self, *shape):
        """Rows that occur nowhere else."""
        n_values = int(np.prod(shape, dtype=int))
        values = np.arange(self.next_value, self.next_value + n_values, dtype=np.uint32)
        self.next_value += n_values
        # Bit patterns rather than numbers: all 65,536 are told apart, NaNs included.
        return (values * np.uint32(40503)).astype(np.uint16).view(np.float16).reshape(shape)

    def add(self, seq, rows):
        twin = Twin(seq, rows)
        self.open.append(twin)
        return twin

    @rule(target=twins)
    def sequence(self):
        if len(self.open) >= MAX_SEQUENCES:
            return self.open[-1]
        empty = np.empty((0, 2, N_HEADS, HEAD_DIM), np.float16)
        return self.add(self.cache.sequence(), [empty] * N_LAYERS)

    @rule(twin=twins, layer=st.integers(0, N_LAYERS - 1), n_tokens=st.integers(0, 13))
    def append_layer(self, twin, layer, n_tokens):
        self.append(twin, [layer], n_tokens)

    @rule(twin=twins, n_tokens=st.integers(0, 13))
    def append_layers(self, twin, n_tokens):
        self.append(twin, range(N_LAYERS), n_tokens)

    def append(self, twin, layers, n_tokens):
        for layer in layers:
            if not twin.is_open or twin.lengths[layer] + n_tokens > MAX_TOKENS:
                return
            rows = self.new_rows(n_tokens, 2, N_HEADS, HEAD_DIM)
            twin.seq.append(layer, rows[:, 0], rows[:, 1])
            twin.rows[layer] = np.concatenate([twin.rows[layer], rows])

    @rule(twin=twins)
    def append_token(self, twin):
        if not twin.is_open or max(twin.lengths) >= MAX_TOKENS:
            return
        token = self.new_rows(N_LAYERS, 2, N_HEADS, HEAD_DIM)
        if not twin.is_even:
            with pytest.raises(ValueError, match="cannot append a token"):
                twin.seq.append_token(token)
            return
        twin.seq.append_token(token)
        twin.rows = [
            np.concatenate([rows, token[layer][None]]) for layer, rows in enumerate(twin.rows)
        ]

    @rule(twin=twins, data=st.data())
    def truncate(self, twin, data):
        if not twin.is_open:
            return
        n_tokens = data.draw(st.integers(0, min(twin.lengths)))
        if not twin.is_even:
            with pytest.raises(ValueError, match="cannot truncate"):
                twin.seq.truncate(n_tokens)
        elif twin.reach > n_tokens:
            with pytest.raises(BufferError, match="live array"):
                twin.seq.truncate(n_tokens)
        else:
            twin.seq.truncate(n_tokens)
            twin.rows = [rows[:n_tokens] for rows in twin.rows]

    @rule(twin=twins)
    def rollback(self, twin):
        if not twin.is_open:
            return
        n_tokens = min(twin.lengths)
        if twin.reach > n_tokens:
            with pytest.raises(BufferError, match="live array"):
                twin.seq.rollback()
        else:
            twin.seq.rollback()
            twin.rows = [rows[:n_tokens] for rows in twin.rows]

    @rule(target=twins, twin=twins)
    def fork(self, twin):
        if not twin.is_open or len(self.open) >= MAX_SEQUENCES:
            return twin
        if not twin.is_even:
            with pytest.raises(ValueError, match="cannot fork"):
                twin.seq.fork()
            return twin
        return self.add(twin.seq.fork(), list(twin.rows))

    @rule(twin=twins, layer=st.integers(0, N_LAYERS - 1), kv=st.integers(0, 1))
    def hold_array(self, twin, layer, kv):
        if not twin.is_open or not twin.lengths[layer]:
            return
        array = self.read(twin.seq, layer, kv)
        twin.arrays.append((array, twin.rows[layer][:, kv].copy(), twin.lengths[layer]))

    @rule(twin=twins)
    def drop_arrays(self, twin):
        twin.arrays.clear()

    @rule(twin=consumes(twins))
    def close(self, twin):
        if not twin.is_open:
            return
        if twin.arrays:
            with pytest.raises(BufferError):
                twin.seq.close()
            twin.arrays.clear()
        twin.seq.close()
        twin.is_open = False
        self.open.remove(twin)

    def read(self, seq, layer, kv):
        if self.order == "block":
            return (seq.v_blocks if kv else seq.k_blocks)(layer)
        return (seq.v if kv else seq.k)(layer)

    def assert_rows(self, array, rows):
        flat = array.reshape(-1, N_HEADS, HEAD_DIM)
        np.testing.assert_array_equal(flat[: len(rows)].view(np.uint16), rows.view(np.uint16))

    @invariant()
    def every_side_has_its_own_rows(self):
        for twin in self.open:
            assert twin.seq.layer_lengths == tuple(twin.lengths)
            for layer in range(N_LAYERS):
                for kv in (0, 1):
                    self.assert_rows(self.read(twin.seq, layer, kv), twin.rows[layer][:, kv])
            for array, expected, _ in twin.arrays:
                self.assert_rows(array, expected)

    def touch_pages(self):
        """Read every committed page: Pss counts what was touched since it was mapped."""
        for twin in self.open:
            window = twin.seq._window
            for run in window.runs():
                np.frombuffer(window.view(run.offset, run.nbytes), np.uint8)[::512].copy()

    @invariant()
    def the_books_balance(self):
        self.cache.check()
        stats = self.cache.stats()
        assert stats.n_sequences == len(self.open)
        assert stats.n_tokens == sum(min(twin.lengths) for twin in self.open)
        assert stats.committed_bytes == stats.file_bytes
        unshared_bytes = sum(twin.seq.committed_bytes for twin in self.open)
        assert stats.shared_bytes == unshared_bytes - stats.committed_bytes
        distinct = {
            rows[token].tobytes() + bytes([layer])
            for twin in self.open
            for layer, rows in enumerate(twin.rows)
            for token in range(len(rows))
        }
        assert stats.needed_bytes == len(distinct) * self.cache.layout.layers[0].token_bytes
        if CAN_WEIGH:
            self.touch_pages()
            pss_bytes, n_mappings = weigh(self.cache._store.fd)
            assert abs(pss_bytes - stats.file_bytes) <= 1024 * n_mappings

    def teardown(self):
        for twin in self.open:
            twin.arrays.clear()
        self.cache.close()


@pytest.mark.parametrize("order", ["interleaved", "split", "block"])
def test_sequences_against_the_model(order):
    machine = type(f"{order.title()}Machine", (KVMachine,), {"order": order})
    run_state_machine_as_test(machine, settings=settings(max_examples=110, stateful_step_count=20))


def test_the_layouts_under_test_share_pages_between_rows():
    """The machine is only worth its time if pages hold rows of several tokens, and layers."""
    layout = KVLayout(N_LAYERS, N_HEADS, HEAD_DIM, MAX_TOKENS, block_tokens=4, order="block")
    assert page_size_bytes() % layout.layers[0].k_stride
    assert layout.layers[1].base % page_size_bytes()
