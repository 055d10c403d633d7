"""`python -m d4s`: the command `d4s`."""

from d4s.cli import main
from d4s.ranks import exit_with

exit_with(main())
