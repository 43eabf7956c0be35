"""`python -m converter` is convert-oss."""

import sys

from converter.cli import main

sys.exit(main())
