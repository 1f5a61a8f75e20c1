"""The command as a module: ``python -m ssmscan``."""

import sys

from ssmscan.cli import main

sys.exit(main())
