"""`python -m parity` is check-parity."""

import sys

from parity.cli import main

sys.exit(main())
