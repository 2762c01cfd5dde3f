"""``python -m tersor``."""

import sys

from tersor.command_line import main

if __name__ == "__main__":
    sys.exit(main())
