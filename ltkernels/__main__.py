"""`python -m ltkernels` is the same as the command `ltkernels`."""

import sys

from ltkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
