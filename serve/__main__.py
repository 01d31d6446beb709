"""`python -m serve`: the commands of `serve/cli.py`."""

import sys

from serve.contract.quick_imports import no_garbage_collection

if __name__ == "__main__":
    with no_garbage_collection():
        from serve.cli import main
    sys.exit(main())
