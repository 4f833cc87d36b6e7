"""``python -m sage_diffusion``."""

import sys

from sage_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main())
