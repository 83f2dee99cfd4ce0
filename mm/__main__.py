"""`python -m mm`."""

import sys

from mm.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
