"""`python -m serve`: the commands of `serve/cli.py`."""

import sys

from serve.cli import main

if __name__ == "__main__":
    sys.exit(main())
