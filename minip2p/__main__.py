"""python -m minip2p is python -m minip2p.sample."""

import sys

from .sample import main

sys.exit(main())
