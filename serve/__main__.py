"""`python -m serve`: the commands of `serve/cli.py`."""

from serve.cli import main

if __name__ == "__main__":
    main()
