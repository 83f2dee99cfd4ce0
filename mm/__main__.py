"""`python -m mm`."""

import os
import sys

from mm.cli import main
from mm.ranks.launch import launched
from mm.ranks.output import lasting

if __name__ == "__main__":
    # A run outlives the terminal that it was started from: what it has to say is in its folder too.
    sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)
    code = main(sys.argv[1:])
    if code and launched():
        # A rank that failed may have messages under way. Where one of their threads frees a tensor while the
        # interpreter shuts down, the process ends with SIGABRT and the reason is lost.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
