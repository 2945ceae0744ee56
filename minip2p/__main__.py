"""python -m minip2p is python -m minip2p.sample."""

import sys

from .tools.cli import main

sys.exit(main())
