"""python -m minip2p.sample: the program, from options to files."""

import sys

from .tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
