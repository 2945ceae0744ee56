"""python -m minip2p.studio: the browser page of tools/studio.py."""

import sys

from .app import main

if __name__ == "__main__":
    sys.exit(main())
