"""`python -m d4s`: the command `d4s`."""

import sys

from d4s.cli import main

sys.exit(main())
