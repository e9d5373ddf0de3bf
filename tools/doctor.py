"""The same as ``python -m fvops.doctor``, for those who look here."""

import sys

from fvops.doctor import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
