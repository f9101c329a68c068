"""What every test shares: the built package under test, and one Hypothesis profile."""

import os
import sys
from pathlib import Path

from hypothesis import settings

# Started from the checkout's root, the folder `pagealloc/` there, which holds no compiled module,
# would shadow the installed package: here (`python -m pytest`) and in the tests' subprocesses.
ROOT = Path(__file__).resolve().parent.parent
if sys.path and Path(sys.path[0]).resolve() == ROOT:
    del sys.path[0]
os.environ["PYTHONSAFEPATH"] = "1"

# No deadline: a kernel call now and then takes long on a shared machine, and that is no failure.
settings.register_profile("pagealloc", deadline=None, print_blob=True)
settings.load_profile("pagealloc")
