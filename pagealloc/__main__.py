"""``python -m pagealloc`` is the command ``pagealloc``."""

import sys

from pagealloc.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
