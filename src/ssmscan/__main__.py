"""``python -m ssmscan``: the command, as torchrun starts it."""

import sys

from ssmscan import cli

sys.exit(cli.main())
