"""``python -m consilience`` is the command line."""

import sys

from consilience.cli import main_alone

sys.exit(main_alone())
