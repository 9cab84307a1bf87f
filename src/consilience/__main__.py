"""``python -m consilience`` is the command line."""

import sys

from consilience.cli import main

sys.exit(main())
