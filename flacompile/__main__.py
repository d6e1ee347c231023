"""``python -m flacompile``, also for ``torchrun -m flacompile``."""

import sys

from flacompile.cli import main

sys.exit(main())
