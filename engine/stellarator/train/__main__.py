"""`torchrun -m stellarator.train OPTIONS` is `stellarator train OPTIONS` on every process."""

import sys

from stellarator.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
