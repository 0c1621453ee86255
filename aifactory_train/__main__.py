"""`python -m aifactory_train` is the same as `aifactory-train`."""

import sys

from aifactory_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
