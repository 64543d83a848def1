"""``python -m digrap_scale`` is the ``digrap-scale`` command."""

import sys

from digrap_scale.cli import main

sys.exit(main())
