"""`python -m serve`: the commands of `serve/cli.py`."""

import gc
import sys

if __name__ == "__main__":
    gc.disable()  # imports make no garbage, and looking for it takes an eighth of their time
    from serve.cli import main

    gc.freeze()
    gc.enable()
    sys.exit(main())
