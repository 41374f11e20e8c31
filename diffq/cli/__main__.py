"""Runs the command line: `python -m diffq.cli`."""

import sys

from diffq.cli import main

sys.exit(main())
