"""`python -m loramix` is `loramix`."""

import sys

from loramix.cli import main

sys.exit(main())
