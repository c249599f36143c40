"""`python -m dropsurgery` is the command `dropsurgery`."""

from __future__ import annotations

import sys

from dropsurgery.cli import main

sys.exit(main())
