"""`python -m meerkat`."""

import sys

from meerkat.cli import main

if __name__ == "__main__":
    sys.exit(main())
