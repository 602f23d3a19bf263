"""`python -m gradmask.cli`."""

import sys

from gradmask.cli import main

sys.exit(main())
