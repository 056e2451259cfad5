"""`python -m stellarator VERB` is `stellarator VERB`."""

import sys

from stellarator.cli import main

if __name__ == "__main__":
    sys.exit(main())
