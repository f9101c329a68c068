"""Branches of prompts, and whole states: what is found, what goes first."""

import numpy as np
import pytest

from pagealloc.llama.branches import Branches
from pagealloc.llama.whole_states import WholeStates


def prompt(*token_ids):
    return np.array(token_ids, np.int32)


def shared(branches, tokens, n_known):
    found = branches.find(tokens, n_known)
    return 0 if found is None else found.n_shared


def test_a_tail_is_found_up_to_any_of_its_tokens():
    branches = Branches(4)
    branches.new_tail(prompt(1, 2, 3, 4, 5, 6, 7), 30)[:] = bytes(range(30))
    assert shared(branches, prompt(1, 2, 3, 4, 5, 6, 7, 8, 9), 4) == 3
    assert shared(branches, prompt(1, 2, 3, 4, 5, 6, 8), 4) == 2
    assert bytes(branches.find(prompt(1, 2, 3, 4, 5), 4).rows) == bytes(range(30))
    assert shared(branches, prompt(1, 2, 3, 4, 6), 4) == 0
    assert shared(branches, prompt(1, 2, 3, 4), 4) == 0
    assert shared(branches, prompt(9, 2, 3, 4, 5), 4) == 0
    assert shared(branches, prompt(1, 2, 3, 4, 5), 0) == 0  # its blocks are gone
    assert branches.new_tail(prompt(1, 2, 3, 4, 5, 6), 20) is None  # its rows are there
    assert branches.new_tail(prompt(1, 2, 3, 4), 20) is None  # it has none
    assert (branches.n_tails, branches.nbytes) == (1, 30)


def test_a_block_is_found_up_to_any_of_its_tokens():
    branches = Branches(4)
    branches.note_blocks(prompt(1, 2, 3, 4, 5, 6, 7, 8, 9), 0)
    found = branches.find(prompt(1, 2, 3, 4, 5, 6, 9), 4)
    assert (found.n_shared, found.tokens.tolist(), found.rows) == (2, [5, 6, 7, 8], None)
    assert shared(branches, prompt(1, 2), 0) == 2
    assert branches.new_tail(prompt(1, 2, 3, 4, 5, 6), 20) is None  # the block has its rows
    branches.forget_block(prompt(1, 2, 3, 4, 5), 4, found)
    assert shared(branches, prompt(1, 2, 3, 4, 5), 4) == 0
    assert branches.nbytes == 0


def test_the_branch_that_shares_most():
    branches = Branches(4)
    branches.note_blocks(prompt(1, 2, 8, 8), 0)
    branches.new_tail(prompt(1, 2, 3), 10)
    assert shared(branches, prompt(1, 2, 3, 4), 0) == 3
    assert shared(branches, prompt(1, 2, 8, 4), 0) == 3


def test_tails_go_in_the_order_of_use():
    branches = Branches(4)
    for first in (1, 2, 3):
        branches.new_tail(prompt(first, 7), 10)
    assert shared(branches, prompt(1, 7), 0) == 2
    assert branches.evict()
    assert [shared(branches, prompt(first, 7), 0) for first in (1, 2, 3)] == [2, 0, 2]
    assert branches.evict()
    assert branches.evict()
    assert not branches.evict()
    assert branches.nbytes == 0


def test_only_so_many_blocks_are_noted(monkeypatch):
    monkeypatch.setattr("pagealloc.llama.branches.MAX_BLOCKS", 3)
    branches = Branches(2)
    branches.note_blocks(prompt(*range(10)), 0)
    assert [shared(branches, prompt(*range(10)), n) for n in (0, 2, 4, 6, 8)] == [0, 0, 2, 2, 2]


@pytest.fixture
def whole():
    return WholeStates(b"salt")


def test_whole_states_want_all_of_their_tokens(whole):
    whole.keep(b"model", prompt(1, 2, 3), memoryview(b"three"))
    whole.keep(b"model", prompt(1, 2), memoryview(b"two"))
    found = whole.find(b"model", prompt(1, 2, 3, 4))
    assert (found.n_tokens, bytes(memoryview(found.blob))) == (3, b"three")
    assert whole.find(b"model", prompt(1, 2, 4)).n_tokens == 2
    assert whole.find(b"model", prompt(1)) is None
    assert whole.find(b"another", prompt(1, 2, 3)) is None
    assert WholeStates(b"pepper").find(b"model", prompt(1, 2, 3)) is None


def test_whole_states_are_replaced_and_go_in_the_order_of_use(whole):
    whole.keep(b"model", prompt(1, 2), memoryview(b"two"))
    whole.keep(b"model", prompt(1, 2), memoryview(b"again"))
    whole.keep(b"model", prompt(5), memoryview(b"five"))
    assert (len(whole), whole.nbytes) == (2, 9)
    assert bytes(memoryview(whole.find(b"model", prompt(1, 2)).blob)) == b"again"
    assert whole.evict()
    assert whole.find(b"model", prompt(5)) is None
    assert whole.evict()
    assert not whole.evict()
    assert whole.nbytes == 0
