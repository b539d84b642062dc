"""`python -m flows.cli`: the same as `tinycats`."""

import sys

from flows.cli import main

sys.exit(main())
