"""Tails of prompts, and whole states: what is found, what goes first."""

import numpy as np
import pytest

from pagealloc.llama.tails import Tails
from pagealloc.llama.whole_states import WholeStates


def prompt(*token_ids):
    return np.array(token_ids, np.int32)


def test_a_tail_is_found_up_to_any_of_its_tokens():
    tails = Tails(4)
    tails.new(prompt(1, 2, 3, 4, 5, 6, 7), 30)[:] = bytes(range(30))
    assert tails.find(prompt(1, 2, 3, 4, 5, 6, 7, 8, 9), 4)[0] == 3
    assert tails.find(prompt(1, 2, 3, 4, 5, 6, 8), 4)[0] == 2
    assert bytes(tails.find(prompt(1, 2, 3, 4, 5), 4)[1]) == bytes(range(30))
    assert tails.find(prompt(1, 2, 3, 4, 6), 4) is None
    assert tails.find(prompt(1, 2, 3, 4), 4) is None
    assert tails.find(prompt(9, 2, 3, 4, 5), 4) is None
    assert tails.find(prompt(1, 2, 3, 4, 5), 0) is None  # its blocks are gone
    assert tails.new(prompt(1, 2, 3, 4, 5, 6), 20) is None  # its rows are there
    assert (len(tails), tails.nbytes) == (1, 30)


def test_tails_go_in_the_order_of_use():
    tails = Tails(4)
    for first in (1, 2, 3):
        tails.new(prompt(first, 7), 10)
    assert tails.find(prompt(1, 7), 0)[0] == 2
    assert tails.evict()
    assert [tails.find(prompt(first, 7), 0) is None for first in (1, 2, 3)] == [False, True, False]
    assert tails.evict()
    assert tails.evict()
    assert not tails.evict()
    assert tails.nbytes == 0


def test_a_key_that_two_tails_had_goes_with_the_later():
    tails = Tails(4)
    tails.new(prompt(1, 2), 10)
    tails.new(prompt(1, 3), 10)
    assert tails.evict()
    assert tails.find(prompt(1, 9), 0)[0] == 1
    assert tails.find(prompt(1, 2), 0)[0] == 1
    assert tails.evict()
    assert tails.find(prompt(1, 3), 0) is None


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
