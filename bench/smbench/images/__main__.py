"""`python -m smbench.images`."""

import sys

from smbench.images.cli import main

sys.exit(main())
