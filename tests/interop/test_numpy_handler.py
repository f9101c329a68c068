"""NumPy's own tests under `pagealloc.numpy_handler()`; ``bench/numpy_tests.py`` runs more."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def numpy_tests():
    specification = importlib.util.spec_from_file_location(
        "numpy_tests", ROOT / "bench/numpy_tests.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    if reason := module.missing():
        pytest.skip(reason)
    return module


def test_numpy_s_tests_have_the_same_outcomes(numpy_tests):
    result = numpy_tests.run(["item_selection", "shape_base"])
    assert result["differing"] == []
    assert result["holds"]
    assert result["outcomes"]["passed"] > 400
    assert result["n_allocs"] > 1000


def test_another_outcome_is_found(numpy_tests, tmp_path):
    planted = tmp_path / "test_planted.py"
    planted.write_text(
        "import numpy as np\n"
        "try:\n"
        "    from numpy._core.multiarray import get_handler_name\n"
        "except ImportError:\n"
        "    from numpy.core.multiarray import get_handler_name\n"
        "def test_same():\n"
        "    np.ones(3)\n"
        "def test_other():\n"
        "    assert get_handler_name(np.ones(3)) != 'pagealloc'\n"
    )
    result = numpy_tests.run([str(planted)])
    assert not result["holds"]
    assert [
        (found["test"].rpartition(":")[2], found["without"], found["with"])
        for found in result["differing"]
    ] == [("test_other", "passed", "failed")]


def test_a_run_that_breaks_off_is_an_error(numpy_tests, tmp_path):
    planted = tmp_path / "test_planted.py"
    planted.write_text("import os\ndef test_gone():\n    os._exit(3)\n")
    with pytest.raises(RuntimeError, match="ended with status 3"):
        numpy_tests.run([str(planted)])
