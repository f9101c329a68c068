"""sequence(llm): llama.cpp's calls with checked arguments, and against pagealloc's KV layer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models import N_SEQ, Context, logits, token_ids

from pagealloc.kv import KVCache, KVLayout, Rope

llama_cpp = pytest.importorskip("llama_cpp", reason="installed in the tox env `llama` alone")

from pagealloc.llama import sequence


@pytest.fixture(scope="module")
def context(tiny_path):
    context = Context(tiny_path)
    yield context
    context.close()


@pytest.fixture(scope="module")
def streams(tiny_path):
    context = Context(tiny_path, unified=False)
    yield context
    context.close()


class TestCalls:
    def test_a_llama_object(self, make):
        llm = make()
        seq = sequence(llm)
        assert (seq.n_seq_max, seq.pos_min(0), seq.pos_max(0)) == (1, -1, -1)
        llm.eval(token_ids(30))
        assert (seq.pos_min(0), seq.pos_max(0)) == (0, 29)
        assert seq.rm(0, 20, -1)
        assert seq.pos_max(0) == 19
        llm.n_tokens = 20
        seq.rm(0, 5, 10)
        seq.add(0, 10, -1, -5)
        assert seq.pos_max(0) == 14
        seq.div(0, 0, -1, 2)
        assert seq.pos_max(0) == 7
        assert seq.rm()
        assert seq.pos_max(0) == -1

    def test_moving_there_and_back(self, make):
        """K is rotated along, so that only rounding is left of it."""
        moved, plain, away = make(), make(), make()
        for llm in (moved, plain, away):
            llm.eval(token_ids(40))
        seq = sequence(moved)
        seq.add(0, 0, -1, 7)
        assert (seq.pos_min(0), seq.pos_max(0)) == (7, 46)
        seq.add(0, 0, -1, -7)
        sequence(away).div(0, 0, -1, 2)
        away.n_tokens = 20
        for llm in (moved, plain, away):
            llm.eval([5])
        scale = np.abs(logits(plain)).max()
        assert np.abs(logits(moved) - logits(plain)).max() < 0.02 * scale
        assert np.abs(logits(away) - logits(plain)).max() > 0.1 * scale

    def test_copies_share_cells(self, context):
        context.clear()
        context.eval(0, range(10))
        sequence(context).cp(0, 1, 2, 6)
        assert [ids for _, ids in context.cells()] == [(0,)] * 2 + [(0, 1)] * 4 + [(0,)] * 4
        sequence(context).keep(1)
        assert context.cells() == [(position, (1,)) for position in range(2, 6)]

    def test_streams_copy_whole(self, streams):
        streams.clear()
        streams.eval(0, range(10))
        seq = sequence(streams)
        for p0, p1 in ((2, -1), (-1, 5), (0, 9)):
            with pytest.raises(ValueError, match="only all tokens"):
                seq.cp(0, 1, p0, p1)
        seq.cp(0, 1, 0, 10)  # which is all
        seq.cp(0, 2)
        assert [seq.pos_max(which) for which in range(N_SEQ)] == [9, 9, 9, -1]
        seq.cp(0, 0, 2, 5)
        assert seq.pos_max(0) == 9


class TestMistakes:
    @pytest.mark.parametrize(
        "call",
        [
            lambda seq: seq.rm(N_SEQ),
            lambda seq: seq.rm(-2),
            lambda seq: seq.cp(-1, 0),
            lambda seq: seq.cp(0, N_SEQ),
            lambda seq: seq.keep(-1),
            lambda seq: seq.pos_min(256),
            lambda seq: seq.pos_max(-1),
            lambda seq: seq.add(9, 0, 1, 1),
            lambda seq: seq.div(9, 0, 1, 2),
            lambda seq: seq.rm(0, 5, 2),
            lambda seq: seq.rm(0, -2, 2),
            lambda seq: seq.rm(0, 0, 1 << 31),
            lambda seq: seq.add(0, 0, -1, (1 << 31) - 5),
            lambda seq: seq.add(0, 0, -1, -(1 << 31)),
            lambda seq: seq.div(0, 0, -1, 0),
            lambda seq: seq.div(0, 0, -1, -2),
        ],
    )
    def test_what_would_abort_raises(self, context, call):
        context.clear()
        context.eval(0, range(10))
        before = context.cells()
        with pytest.raises(ValueError, match=r"sequences|positions|delta|d="):
            call(sequence(context))
        assert context.cells() == before

    def test_no_integers(self, context):
        with pytest.raises(TypeError):
            sequence(context).rm("0")

    def test_a_recurrent_model(self, make, mamba_path):
        llm = make(mamba_path)
        llm.eval(token_ids(20))
        seq = sequence(llm)
        assert not seq.rm(0, 5, -1)
        assert seq.pos_max(0) == 19
        seq.keep(0)

    def test_a_closed_llama(self, make):
        llm = make()
        llm.close()
        with pytest.raises(ValueError, match="closed"):
            sequence(llm).rm(0)


# --- against the KV layer ---------------------------------------------------------------------

LAYOUT = {
    "n_layers": 1,
    "n_kv_heads": 1,
    "head_dim": 2,
    "max_tokens": 256,
    "rope": Rope(n_dims=2, base=1e4),
}


@st.composite
def programs(draw):
    """Steps on sequences that share no cell when one of them is moved or divided."""
    seq_ids = st.integers(0, N_SEQ - 1)
    position = st.integers(-1, 30)
    step = st.one_of(
        st.tuples(st.just("eval"), seq_ids, st.integers(1, 12)),
        st.tuples(st.just("rm"), seq_ids, position, position),
        st.tuples(st.just("cp"), seq_ids, seq_ids, position, position),
        st.tuples(st.just("keep"), seq_ids),
        st.tuples(st.just("add"), seq_ids, position, position, st.integers(-8, 8)),
        st.tuples(st.just("div"), seq_ids, position, position, st.integers(1, 3)),
    )
    return draw(st.lists(step, max_size=8))


class Ours:
    """The same calls on sequences of the KV layer."""

    def __init__(self):
        self.cache = KVCache(KVLayout(**LAYOUT))
        self.sequences = [self.cache.sequence() for _ in range(N_SEQ)]

    def eval(self, seq_id, positions):
        rows = np.zeros((1, 1, 2), np.float16)
        for position in positions:
            self.sequences[seq_id].append(0, rows, rows, position=position)

    def positions(self, seq_id):
        return sorted(self.sequences[seq_id].positions.tolist())


def run_program(context, steps):
    """Run a program on both; compare where the tokens of each sequence are."""
    context.clear()
    theirs, ours = sequence(context), Ours()
    with ours.cache:
        for name, seq_id, *arguments in steps:
            mine = ours.sequences[seq_id]
            if name == "eval":
                first = theirs.pos_max(seq_id) + 1
                positions = range(first, first + arguments[0])
                context.eval(seq_id, positions)
                ours.eval(seq_id, positions)
            elif name == "keep":
                theirs.keep(seq_id)
                for other in ours.sequences:
                    if other is not mine:
                        other.rm()
            elif name == "cp":
                target, p0, p1 = arguments
                if (p1 >= 0 and p1 < p0) or target == seq_id or len(ours.sequences[target]):
                    continue
                theirs.cp(seq_id, target, p0, p1)
                mine.cp(ours.sequences[target], p0, p1)
            else:
                p0, p1 = arguments[:2]
                is_shared = any(len(ids) > 1 and seq_id in ids for _, ids in context.cells())
                if (p1 >= 0 and p1 < p0) or (name != "rm" and is_shared):
                    continue
                if name == "rm":
                    theirs.rm(seq_id, p0, p1)
                    mine.rm(p0, p1)
                elif name == "add":
                    theirs.add(seq_id, p0, p1, arguments[2])
                    mine.add(p0, p1, arguments[2])
                else:
                    theirs.div(seq_id, p0, p1, arguments[2])
                    mine.div(p0, p1, arguments[2])
            cells = context.cells()
            for which in range(N_SEQ):
                found = sorted(position for position, ids in cells if which in ids)
                assert found == ours.positions(which), (name, seq_id, arguments)
        ours.cache.check()


@settings(max_examples=1000)
@given(programs())
def test_programs_agree_with_the_kv_layer(context, steps):
    run_program(context, steps)
