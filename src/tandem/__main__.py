"""`python -m tandem` is the command `tandem`."""

from __future__ import annotations

import sys

from tandem.cli.main import main

sys.exit(main())
