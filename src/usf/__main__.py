"""``python -m usf``: the command line, see :mod:`usf.cli`."""

import sys

from usf.cli import main

if __name__ == "__main__":
    sys.exit(main())
