"""Runs the command line: `python -m diffq`."""

import sys

from diffq.cli import main

sys.exit(main())
