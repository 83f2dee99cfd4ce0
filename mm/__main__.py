"""`python -m mm`."""

import os
import sys

from mm.cli import main
from mm.ranks.launch import launched

if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code and launched():
        # A rank that failed may have messages under way. A thread of theirs that lets go of a tensor while
        # the interpreter ends is stopped there, which ends the process with SIGABRT and loses the reason.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
