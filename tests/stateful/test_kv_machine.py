"""Sequences against a NumPy model: no side ever sees the other's rows, and the books balance.

The model keeps, for each sequence, the rows it must hold.  After every step all rows of all
sequences are compared, `check()` runs, and the held bytes are cross-checked with the kernel's own
account: the file's pages that are mapped here, each once (``/proc/self/pagemap``).
"""

from typing import ClassVar

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
from quant_model import read_back

from pagealloc.core.os_memory import page_size_bytes
from pagealloc.kv import KVCache, KVLayout, Rope

N_LAYERS, N_HEADS, HEAD_DIM = 2, 2, 144  # rows of 576 bytes: most pages end within a row
MAX_TOKENS = 40
MAX_SEQUENCES = 6
ROPE = Rope(64, base=50.0)


class Twin:
    """A sequence, and what it must hold: rows per layer (T, 2, H, D), and by token where it lies
    and which it is: tokens that two sequences share are the same one."""

    def __init__(self, seq, rows, positions=(), names=(), cold=(0,) * N_LAYERS):
        self.seq = seq
        self.cold = list(cold)  # how many rows of each layer are quantised
        self.rows = rows
        self.positions = list(positions)
        self.names = list(names)
        self.arrays = []  # live (array, expected, reach)
        self.is_open = True

    @property
    def lengths(self):
        return [len(rows) for rows in self.rows]

    @property
    def is_even(self):
        return len(set(self.lengths)) == 1

    def keep(self, tokens):
        self.cold = [sum(token < n_cold for token in tokens) for n_cold in self.cold]
        self.rows = [rows[tokens] for rows in self.rows]
        self.positions = [self.positions[token] for token in tokens]
        self.names = [self.names[token] for token in tokens]

    def cut(self, n_tokens):
        self.keep(list(range(n_tokens)))

    def selected(self, p0, p1):
        """The tokens at positions [p0, p1), as llama.cpp means them."""
        end = 1 << 40 if p1 < 0 else p1
        return [i for i, position in enumerate(self.positions) if max(p0, 0) <= position < end]

    @property
    def reach(self):
        return max((reach for _, _, reach in self.arrays), default=0)


class KVMachine(RuleBasedStateMachine):
    order: str
    pad_rows = False
    row_dtype = np.float16  # of what is read
    shift_options: ClassVar[dict[str, bool]] = {}

    twins = Bundle("twins")

    def __init__(self):
        super().__init__()
        layout = KVLayout(
            N_LAYERS, N_HEADS, HEAD_DIM, MAX_TOKENS, order=self.order, block_tokens=4, rope=ROPE,
            pad_rows=self.pad_rows,
        )  # fmt: skip
        self.cache = KVCache(layout, purge_after_s=float("inf"), **self.quantisation())
        self.open = []
        self.next_value = self.next_name = 0

    def quantisation(self):
        return {}

    def age(self, twin, layers):
        """Rows that are old enough after an append change to what they read back as."""

    def settle(self, twin):
        """Before rows are moved, all layers have as many old ones."""

    def new_rows(self, *shape):
        """Rows that hardly occur elsewhere."""
        n_values = int(np.prod(shape, dtype=int))
        values = np.arange(self.next_value, self.next_value + n_values, dtype=np.uint32)
        self.next_value += n_values
        # Bit patterns rather than numbers: 32,768 are told apart, all finite, for add() computes.
        bits = (values * np.uint32(40503)).astype(np.uint16) & np.uint16(0xBFFF)
        return bits.view(np.float16).reshape(shape)

    def new_names(self, n_tokens):
        self.next_name += n_tokens
        return range(self.next_name - n_tokens, self.next_name)

    def add(self, seq, *of):
        twin = Twin(seq, *of)
        self.open.append(twin)
        return twin

    @rule(target=twins)
    def sequence(self):
        if len(self.open) >= MAX_SEQUENCES:
            return self.open[-1]
        empty = np.empty((0, 2, N_HEADS, HEAD_DIM), self.row_dtype)
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
            n_new = twin.lengths[layer] - len(twin.positions)
            first = max(twin.positions, default=-1) + 1
            twin.positions += range(first, first + n_new)
            twin.names += self.new_names(max(n_new, 0))
            if n_tokens:
                self.age(twin, [layer])

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
        twin.positions.append(max(twin.positions, default=-1) + 1)
        twin.names += self.new_names(1)
        twin.rows = [
            np.concatenate([rows, token[layer][None]]) for layer, rows in enumerate(twin.rows)
        ]
        self.age(twin, range(N_LAYERS))

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
            twin.cut(n_tokens)

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
            twin.cut(n_tokens)

    @rule(target=twins, twin=twins)
    def fork(self, twin):
        if not twin.is_open or len(self.open) >= MAX_SEQUENCES:
            return twin
        if not twin.is_even:
            with pytest.raises(ValueError, match="cannot fork"):
                twin.seq.fork()
            return twin
        return self.add(twin.seq.fork(), list(twin.rows), twin.positions, twin.names, twin.cold)

    @rule(twin=twins, p0=st.integers(-1, 50), n_positions=st.sampled_from((-60, 0, 1, 4, 8, 9, 32)))
    def rm(self, twin, p0, n_positions):
        if not twin.is_open:
            return
        p1 = p0 + n_positions
        if not twin.is_even:
            with pytest.raises(ValueError, match="cannot remove"):
                twin.seq.rm(p0, p1)
            return
        gone = set(twin.selected(p0, p1))
        if gone and twin.reach > min(gone):
            with pytest.raises(BufferError, match="live array"):
                twin.seq.rm(p0, p1)
            return
        assert twin.seq.rm(p0, p1)
        if gone:
            self.settle(twin)
        twin.keep([token for token in range(len(twin.positions)) if token not in gone])

    @rule(twin=twins, window=st.integers(0, 20), sinks=st.integers(0, 5))
    def slide(self, twin, window, sinks):
        if not twin.is_open or not twin.is_even or twin.reach > sinks:
            return
        n_dropped = twin.seq.slide(window, sinks)
        n_tokens = len(twin.positions)
        assert n_tokens - n_dropped >= min(n_tokens, window + sinks)
        assert n_tokens - n_dropped < window + sinks + twin.seq._pages.remap_tokens
        if n_dropped:
            self.settle(twin)
        twin.keep([*range(min(sinks, n_tokens)), *range(sinks + n_dropped, n_tokens)])

    @rule(twin=twins, other=twins, p0=st.integers(-1, 30), n_positions=st.integers(-40, 30))
    def cp(self, twin, other, p0, n_positions):
        if not (twin.is_open and other.is_open and twin.is_even and other.is_even):
            return
        p1 = p0 + n_positions
        chosen = twin.selected(p0, p1)
        if other is not twin:
            chosen = [token for token in chosen if twin.names[token] not in other.names]
        n_after = len(other.positions) + len(chosen)
        if other is not twin and n_after > MAX_TOKENS:
            with pytest.raises(IndexError, match="leaves room"):
                twin.seq.cp(other.seq, p0, p1)
            return
        twin.seq.cp(other.seq, p0, p1)
        if other is twin:
            return
        is_appended = bool(chosen and other.positions)
        source = self.copied(twin, other, chosen)
        other.rows = [
            np.concatenate([rows, more[chosen]])
            for rows, more in zip(other.rows, source, strict=True)
        ]
        other.positions += [twin.positions[token] for token in chosen]
        other.names += [twin.names[token] for token in chosen]
        if is_appended:
            self.age(other, range(N_LAYERS))

    def copied(self, twin, other, chosen):  # noqa: ARG002
        """Return the rows by layer of which those of some tokens come behind those of `other`."""
        return twin.rows

    @rule(
        twin=twins, p0=st.integers(-1, 50), n_positions=st.integers(-60, 30), by=st.integers(-9, 9)
    )
    def add_positions(self, twin, p0, n_positions, by):
        self.shift(twin, p0, p0 + n_positions, lambda position: position + by, "add", by)

    @rule(twin=twins, p0=st.integers(-1, 50), n_positions=st.integers(-60, 30), d=st.integers(1, 4))
    def divide_positions(self, twin, p0, n_positions, d):
        self.shift(twin, p0, p0 + n_positions, lambda position: position // d, "div", d)

    def shift(self, twin, p0, p1, change, name, by):
        if not twin.is_open or not twin.is_even:
            return
        after = {token: change(twin.positions[token]) for token in twin.selected(p0, p1)}
        after = {token: to for token, to in after.items() if to != twin.positions[token]}
        if after and twin.reach > min(after):
            with pytest.raises(BufferError, match="live array"):
                getattr(twin.seq, name)(p0, p1, by, **self.shift_options)
            return
        self.check_shift(twin, name, (p0, p1, by), after)
        getattr(twin.seq, name)(p0, p1, by, **self.shift_options)
        if after:
            self.settle(twin)
        moved = [token for token, to in after.items() if to >= 0]
        deltas = np.array([after[token] - twin.positions[token] for token in moved], np.int64)
        for layer, rows in enumerate(twin.rows):
            changed = rows.copy()
            rotated = ROPE.rotate(rows[moved, 0].astype(np.float32), deltas)
            changed[moved, 0] = self.stored_k(twin, layer, moved, rotated.astype(np.float16))
            twin.rows[layer] = changed
        for token, fresh in zip(moved, self.new_names(len(moved)), strict=True):
            twin.positions[token], twin.names[token] = after[token], fresh
        gone = {token for token, to in after.items() if to < 0}
        twin.keep([token for token in range(len(twin.positions)) if token not in gone])

    def check_shift(self, twin, name, arguments, after):
        """Whatever must be refused before."""

    def stored_k(self, twin, layer, tokens, rows):  # noqa: ARG002
        """K rows (T, H, D) of these tokens as they read back once they are written."""
        return rows

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

    @rule(data=st.data())
    def append_batch(self, data):
        ready = [twin for twin in self.open if twin.is_even and max(twin.lengths) < MAX_TOKENS]
        if not ready:
            return
        batch = data.draw(st.lists(st.sampled_from(ready), unique=True))
        tokens = self.new_rows(len(batch), N_LAYERS, 2, N_HEADS, HEAD_DIM)
        self.cache.append_batch([twin.seq for twin in batch], tokens)
        for twin, token in zip(batch, tokens, strict=True):
            twin.positions.append(max(twin.positions, default=-1) + 1)
            twin.names += self.new_names(1)
            twin.rows = [
                np.concatenate([rows, token[layer][None]]) for layer, rows in enumerate(twin.rows)
            ]
            self.age(twin, range(N_LAYERS))

    @rule(layer=st.integers(0, N_LAYERS - 1), kv=st.integers(0, 1))
    def gather(self, layer, kv):
        gathered = self.cache.gather([twin.seq for twin in self.open], layer, "kv"[kv])
        empty = np.empty((0, N_HEADS, HEAD_DIM), self.row_dtype)
        expected = np.concatenate([empty, *(twin.rows[layer][:, kv] for twin in self.open)])
        self.assert_rows(gathered, expected)

    @rule(twin=twins, data=st.data())
    def copy_rows(self, twin, data):
        """A copy is no export: nothing has to wait for it."""
        if not twin.is_open:
            return
        layer, kv = data.draw(st.integers(0, N_LAYERS - 1)), data.draw(st.integers(0, 1))
        start = data.draw(st.integers(0, twin.lengths[layer]))
        end = data.draw(st.integers(start, twin.lengths[layer]))
        read = twin.seq.v if kv else twin.seq.k
        self.assert_rows(read(layer, start, end, on_cross="copy"), twin.rows[layer][start:end, kv])

    @rule(twin=twins, data=st.data())
    def write_word(self, twin, data):
        """Eight bytes of a token that only this sequence has from then on."""
        if not twin.is_open or not min(twin.lengths):
            return
        token = data.draw(st.integers(0, min(twin.lengths) - 1))
        layer, kv = data.draw(st.integers(0, N_LAYERS - 1)), data.draw(st.integers(0, 1))
        offset = -(-self.cache.layout.offset(layer, token, kv) // 8) * 8
        if twin.reach > token:  # an array shows what is written
            return
        before = self.cache.layout.offset(layer, token, kv)
        at = (offset - before) // 2
        word = self.new_rows(4)
        row = twin.rows[layer][token, kv].reshape(-1).copy()
        assert twin.seq.read_word(offset) == int(row[at : at + 4].view(np.uint64)[0])
        twin.seq.write_word(offset, int(word.view(np.uint64)[0]))
        row[at : at + 4] = word
        changed = twin.rows[layer].copy()
        changed[token, kv] = row.reshape(N_HEADS, HEAD_DIM)
        twin.rows[layer] = changed

    @rule(twin=consumes(twins))
    def evict(self, twin):
        if not twin.is_open:
            return
        twin.seq.evictable = True
        assert self.cache._pressure._evict(self.cache, []) == (not twin.arrays)
        if twin.arrays:
            twin.arrays.clear()
            twin.seq.close()
        twin.is_open = False
        self.open.remove(twin)

    @rule()
    def trim(self):
        n_bytes = self.cache.trim()
        assert self.cache.stats().warm_bytes == 0
        assert n_bytes >= 0

    def read(self, seq, layer, kv):
        if self.order == "block":
            return (seq.v_blocks if kv else seq.k_blocks)(layer)
        return (seq.v if kv else seq.k)(layer)

    def assert_rows(self, array, rows):
        flat = array.reshape(-1, N_HEADS, HEAD_DIM)
        rows = np.ascontiguousarray(rows)
        np.testing.assert_array_equal(flat[: len(rows)].view(np.uint16), rows.view(np.uint16))

    @invariant()
    def every_side_has_its_own_rows(self):
        for twin in self.open:
            assert twin.seq.layer_lengths == tuple(twin.lengths)
            assert twin.seq.positions.tolist() == twin.positions
            assert twin.seq.pos_max() == max(twin.positions, default=-1)
            assert twin.seq.pos_min() == min(twin.positions, default=-1)
            for layer in range(N_LAYERS):
                for kv in (0, 1):
                    self.assert_rows(self.read(twin.seq, layer, kv), twin.rows[layer][:, kv])
            for array, expected, _ in twin.arrays:
                self.assert_rows(array, expected)

    def touch_pages(self):
        """Read every committed page: mapped is what was touched since its mapping was made."""
        windows = [window for twin in self.open for window in twin.seq._pages.windows]
        for window in windows + [entry[0] for entry in self.cache._warm._entries]:
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
        assert stats.shared_bytes == unshared_bytes + stats.warm_bytes - stats.committed_bytes
        assert stats.needed_bytes == self.needed_bytes()
        if CAN_WEIGH:
            self.touch_pages()
            mapped_bytes, _ = weigh(self.cache._store.fd)
            assert mapped_bytes == stats.file_bytes

    def needed_bytes(self):
        """Rows that two sequences share count once."""
        cold, recent, uneven_bytes = set(), set(), 0
        cold_bytes, recent_bytes = (
            layout.layers[0].token_bytes for layout in (self.cache.cold_layout, self.cache.layout)
        )
        for twin in self.open:
            n_tokens, n_cold = min(twin.lengths), min(twin.cold)
            cold.update(twin.names[:n_cold])
            recent.update(twin.names[n_cold:n_tokens])
            for length, more_cold in zip(twin.lengths, twin.cold, strict=True):
                uneven_bytes += (more_cold - n_cold) * cold_bytes
                uneven_bytes += (length - more_cold - n_tokens + n_cold) * recent_bytes
        return N_LAYERS * (len(cold) * cold_bytes + len(recent) * recent_bytes) + uneven_bytes

    def teardown(self):
        for twin in self.open:
            twin.arrays.clear()
        self.cache.close()


class QuantisedMachine(KVMachine):
    """The same with rows that are quantised once they are `RESIDUAL_TOKENS` tokens old."""

    residual_tokens: int
    row_dtype = np.float32
    shift_options: ClassVar[dict[str, bool]] = {"lossy": True}

    def quantisation(self):
        return {
            "k_type": "q8_0", "v_type": "q4_0", "rotate": "v",
            "residual_tokens": self.residual_tokens,
        }  # fmt: skip

    def due(self, n_tokens):
        step = 4 if self.residual_tokens else 1
        return max(0, n_tokens - self.residual_tokens) // step * step

    def pack(self, twin, layer, n_cold):
        """Have the first tokens of a layer quantised: they change to what they read back as."""
        start = twin.cold[layer]
        if n_cold > start:
            rows = twin.rows[layer].copy()
            rows[start:n_cold, 0] = read_back(rows[start:n_cold, 0], "q8_0")
            rows[start:n_cold, 1] = read_back(rows[start:n_cold, 1], "q4_0", rotate=True)
            twin.rows[layer] = rows
            twin.cold[layer] = n_cold

    def age(self, twin, layers):
        for layer in layers:
            self.pack(twin, layer, self.due(twin.lengths[layer]))

    def settle(self, twin):
        for layer in range(N_LAYERS):
            self.pack(twin, layer, max(twin.cold))

    def copied(self, twin, other, chosen):
        if not chosen:
            return twin.rows
        if not other.positions:  # shared up to the last, and the others dropped
            end = chosen[-1] + 1
            shared = Twin(None, list(twin.rows), twin.positions, twin.names, twin.cold)
            shared.cut(end)
            if chosen != list(range(end)):
                self.settle(shared)
            other.cold = [sum(token < n_cold for token in chosen) for n_cold in shared.cold]
            return shared.rows
        self.settle(twin)
        self.settle(other)
        n_packed = sum(token < twin.cold[0] for token in chosen)
        if n_packed:  # all of `other` is packed first
            n_there = len(other.positions)
            for layer in range(N_LAYERS):
                self.pack(other, layer, n_there)
            other.cold = [n_there + n_packed] * N_LAYERS
        return twin.rows

    def check_shift(self, twin, name, arguments, after):
        moved = [token for token, to in after.items() if to >= 0]
        if moved and min(moved) < max(twin.cold):
            with pytest.raises(ValueError, match="lossy=True"):
                getattr(twin.seq, name)(*arguments)

    def stored_k(self, twin, layer, tokens, rows):
        old = np.array(tokens, int) < twin.cold[layer]
        return np.where(old[:, None, None], read_back(rows, "q8_0"), rows)

    def read(self, seq, layer, kv):
        return (seq.v if kv else seq.k)(layer)

    def assert_rows(self, array, rows):
        flat = array.reshape(-1, *rows.shape[1:])
        if array.dtype == np.uint8:  # the last KV block may hold more
            flat = flat[: len(rows)]
        np.testing.assert_array_equal(flat, rows)

    @rule(twin=KVMachine.twins, layer=st.integers(0, N_LAYERS - 1), kv=st.integers(0, 1))
    def hold_array(self, twin, layer, kv):
        """Of packed rows, which are shown without a copy."""
        if twin.is_open and twin.cold[layer]:
            array = twin.seq.rows(layer)[kv]
            rows = array.reshape(-1, array.shape[-1])[: twin.cold[layer]]
            twin.arrays.append((array, rows.copy(), twin.cold[layer]))

    @rule()
    def write_word(self):
        """Words are of rows that are stored as they come."""


@pytest.mark.parametrize("residual_tokens", [0, 8])
@pytest.mark.parametrize("order", ["interleaved", "split", "block"])
def test_quantised_sequences_against_the_model(order, residual_tokens, long_suite):
    machine = type(
        f"Quantised{order.title()}Machine",
        (QuantisedMachine,),
        {"order": order, "residual_tokens": residual_tokens},
    )
    n_examples = 1000 if long_suite else 20
    run_state_machine_as_test(
        machine, settings=settings(max_examples=n_examples, stateful_step_count=20)
    )


@pytest.mark.parametrize("pad_rows", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("order", ["interleaved", "split", "block"])
def test_sequences_against_the_model(order, pad_rows, long_suite):
    machine = type(f"{order.title()}Machine", (KVMachine,), {"order": order, "pad_rows": pad_rows})
    n_examples = 1000 if long_suite else 20
    run_state_machine_as_test(
        machine, settings=settings(max_examples=n_examples, stateful_step_count=20)
    )


def test_the_layouts_under_test_share_pages_between_rows():
    """The machine is only worth its time if pages hold rows of several tokens, and layers."""
    layout = KVLayout(N_LAYERS, N_HEADS, HEAD_DIM, MAX_TOKENS, block_tokens=4, order="block")
    assert page_size_bytes() % layout.layers[0].k_stride
    assert layout.layers[1].base % page_size_bytes()
