"""``python -m randlora``: the commands of :mod:`randlora.files.commands`."""

import sys

from randlora.files.commands import main

if __name__ == "__main__":
    sys.exit(main())
