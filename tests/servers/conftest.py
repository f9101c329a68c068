"""The quick suite leaves these out, whatever is installed: ``tox -e servers`` runs them."""

import os

if "PAGEALLOC_TEST_SERVERS" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
