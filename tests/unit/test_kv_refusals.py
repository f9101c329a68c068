"""Every kernel call of every operation is refused once, and then for good: nothing may break."""

import errno

import numpy as np
import pytest
from quant_model import assert_recommended

from pagealloc.core.os_memory import CALL_NAMES, call_counts, page_size_bytes, refusing
from pagealloc.errors import OutOfMemoryError
from pagealloc.kv import KVCache, KVLayout

ORDERS = ("interleaved", "split", "block", "quantised interleaved", "quantised block")
N_LAYERS, N_HEADS, HEAD_DIM = 3, 3, 64
ERRORS = (errno.ENOMEM, errno.ENOSPC, errno.EINVAL)
SCALE = page_size_bytes() // 4096  # as many pages on every machine
MAX_TOKENS = 100 * SCALE


def make_rows(n_tokens, seed):
    """Random rows (T, L, 2, H, D)."""
    shape = (n_tokens, N_LAYERS, 2, N_HEADS, HEAD_DIM)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float16)


PROMPT, MORE = make_rows(37 * SCALE, 0), make_rows(30 * SCALE, 1)


def append_rows(seq, rows):
    for layer in range(N_LAYERS):
        seq.append(layer, rows[:, layer, 0], rows[:, layer, 1])


def assert_rows(seq, rows):
    for layer, length in enumerate(seq.layer_lengths):
        for kv in (0, 1):
            if seq.cache.cold_layout is not seq.cache.layout:
                assert_recommended(seq, layer, kv, rows[:length, layer, kv])
                continue
            if seq.cache.layout.order == "block":
                blocks = (seq.v_blocks if kv else seq.k_blocks)(layer)
                array = blocks.reshape(-1, N_HEADS, HEAD_DIM)[:length]
            else:
                array = (seq.v if kv else seq.k)(layer)
            np.testing.assert_array_equal(array, rows[:length, layer, kv])


class Scene:
    """A parent and a child that share a prompt; the child wrote more and has a twin."""

    def __init__(self, order):
        *quantised, order = order.split()
        layout = KVLayout(N_LAYERS, N_HEADS, HEAD_DIM, MAX_TOKENS, order=order)
        options = {"quantize": "recommended", "residual_tokens": 20 * SCALE} if quantised else {}
        self.cache = KVCache(layout, purge_after_s=0, **options)
        self.parent = self.cache.sequence()
        append_rows(self.parent, PROMPT)
        self.child = self.parent.fork()
        append_rows(self.child, MORE[: 20 * SCALE])
        self.twin = self.child.fork()
        self.child_rows = np.concatenate([PROMPT, MORE])

    def end(self):
        """Everything can be given back, whatever was refused before."""
        self.cache.check()
        for seq in self.cache.sequences:
            seq.close()
        self.cache.trim()
        assert self.cache.stats().file_bytes == 0
        self.cache.check()
        self.cache.close()


def do_append(scene):
    append_rows(scene.parent, MORE)


def do_append_shared(scene):
    append_rows(scene.child, MORE[20 * SCALE :])


def do_append_token_shared(scene):
    scene.child.append_token(MORE[20 * SCALE])


def do_append_token(scene):
    scene.parent.append_token(MORE[0])


def do_fork(scene):
    scene.child.fork()


def do_truncate(scene):
    scene.child.truncate(3)


def do_close(scene):
    scene.child.close()


def do_sequence(scene):
    scene.cache.sequence()


OPERATIONS = {
    "append": do_append,
    "append_shared": do_append_shared,
    "append_token": do_append_token,
    "append_token_shared": do_append_token_shared,
    "fork": do_fork,
    "truncate": do_truncate,
    "close": do_close,
    "sequence": do_sequence,
}


def count_calls(order, operation, call):
    scene = Scene(order)
    before = call_counts()[call]
    operation(scene)
    n_calls = call_counts()[call] - before
    scene.end()
    return n_calls


def is_refused(operate, scene):
    try:
        operate(scene)
    except (OutOfMemoryError, OSError) as refusal:
        return "refused" in str(refusal)
    return False


@pytest.mark.parametrize("call", CALL_NAMES)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("order", ORDERS)
def test_a_refused_call(order, operation, call):
    operate = OPERATIONS[operation]
    for n_refusals in (1, -1):
        for n_succeed in range(count_calls(order, operate, call)):
            for error in ERRORS if " " not in order else ERRORS[:1]:
                scene = Scene(order)
                before = [seq.layer_lengths for seq in scene.cache.sequences]
                with refusing(call, error, skip=n_succeed, times=n_refusals):
                    refused = is_refused(operate, scene)
                scene.cache.check()
                if refused and operation not in ("append", "append_shared"):  # they go by layer
                    assert [seq.layer_lengths for seq in scene.cache.sequences] == before
                if not scene.child.closed:
                    assert_rows(scene.child, scene.child_rows)
                    scene.child.rollback()
                    scene.child.truncate(0)  # tries again what was refused before
                assert_rows(scene.twin, scene.child_rows)
                scene.cache.trim()
                scene.cache.check()
                scene.parent.rollback()
                append_rows(scene.parent, MORE[len(scene.parent) - len(PROMPT) :])
                assert_rows(scene.parent, np.concatenate([PROMPT, MORE]))
                scene.end()


@pytest.mark.parametrize("order", ORDERS)
def test_a_truncation_the_kernel_refuses_is_made_up_for(order):
    """Shared pages are let go by mapping others in their place, which the kernel may refuse."""
    scene = Scene(order)
    child = scene.parent.fork()
    with refusing("mmap"):
        child.truncate(3)
        assert len(child) == 3
        assert child.committed_bytes > 0
        surplus_bytes = child.committed_bytes
        scene.cache.check()
    append_rows(child, MORE[:1])
    assert child.committed_bytes < surplus_bytes
    scene.cache.check()
    assert_rows(child, np.concatenate([PROMPT[:3], MORE[:1]]))
    assert_rows(scene.parent, PROMPT)
    scene.end()


@pytest.mark.parametrize("order", ORDERS)
def test_surplus_pages_may_be_written_again(order):
    """If the kernel goes on refusing, rows go to the shared pages once these are private."""
    scene = Scene(order)
    child = scene.parent.fork()
    with refusing("mmap"):
        child.truncate(3)
    with refusing("mmap"), pytest.raises(OutOfMemoryError):
        append_rows(child, MORE)
    child.rollback()
    append_rows(child, MORE)
    assert_rows(child, np.concatenate([PROMPT[:3], MORE]))
    assert_rows(scene.parent, PROMPT)
    assert_rows(scene.child, scene.child_rows)
    scene.cache.check()
    scene.end()


@pytest.mark.parametrize("call", CALL_NAMES)
def test_making_a_cache_is_refused(call):
    layout = KVLayout(N_LAYERS, N_HEADS, HEAD_DIM, MAX_TOKENS)
    with refusing(call):
        try:
            cache = KVCache(layout)
        except OutOfMemoryError:
            return
    with cache:
        cache.check()


def test_stats_need_fstat():
    with KVCache(KVLayout(N_LAYERS, N_HEADS, HEAD_DIM, MAX_TOKENS)) as cache:
        with refusing("fstat"), pytest.raises(OSError, match="refused"):
            cache.stats()
        assert cache.stats().file_bytes == 0
