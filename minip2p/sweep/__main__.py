"""python -m minip2p.sweep: every run of a study. What it does is in tools/sweep.py."""

import sys

from .program import main

if __name__ == "__main__":
    sys.exit(main())
