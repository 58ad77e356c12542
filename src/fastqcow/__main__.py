"""`python -m fastqcow` is the command `fastqcow`."""

import sys

from fastqcow.cli import main

if __name__ == "__main__":
    sys.exit(main())
