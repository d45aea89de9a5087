"""``python -m scmulan``, which is what ``torchrun -m`` needs."""

import sys

from scmulan.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
