"""What every test shares: the built package under test, and one Hypothesis profile."""

import gc
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Started from the checkout's root, the folder `pagealloc/` there, which holds no compiled module,
# would shadow the installed package: here (`python -m pytest`) and in the tests' subprocesses.
ROOT = Path(__file__).resolve().parent.parent
if sys.path and Path(sys.path[0]).resolve() == ROOT:
    del sys.path[0]
sys.path.insert(0, str(ROOT / "tests/support"))  # modules that tests share
os.environ["PYTHONSAFEPATH"] = "1"
# NumPy's BLAS spins in as many threads as there are CPUs, here and in every subprocess, where one
# does these small products in a quarter of the time; before the first test imports NumPy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# No deadline: a kernel call now and then takes long on a shared machine, and that is no failure.
settings.register_profile("pagealloc", deadline=None, print_blob=True)
settings.load_profile("pagealloc")

QUICK_S = 0.5  # of each test that takes duration_s, in the quick suite


def pytest_addoption(parser):
    parser.addoption(
        "--long",
        action="store_true",
        help="the long suite: 1,000 examples of a KV machine",
    )
    parser.addoption(
        "--minutes",
        type=float,
        metavar="N",
        help="how long the selected tests that loop for a time (tests/stress) take together; "
        f"unset: {QUICK_S} s each",
    )


def pytest_collection_finish(session):
    """Keep the thousands of collected tests out of every garbage collection in them.

    With them in sight each `gc.collect()` takes 0.1 s, and there are hundreds.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def long_suite(request) -> bool:
    """Whether state machines run their 1,000 examples."""
    return request.config.getoption("long")


@pytest.fixture(scope="session")
def duration_s(request) -> float:
    """How long a test that loops for a time does so: its share of --minutes."""
    minutes = request.config.getoption("minutes")
    if minutes is None:
        return QUICK_S
    return minutes * 60 / sum("duration_s" in item.fixturenames for item in request.session.items)
