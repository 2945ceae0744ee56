"""python -m minip2p.studio: the browser page of tools/studio.py."""

import sys

from .tools.studio import main

if __name__ == "__main__":
    sys.exit(main())
