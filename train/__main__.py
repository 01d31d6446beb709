"""`python -m train`: the commands of `train/cli.py`."""

from serve.contract.quick_imports import no_garbage_collection

if __name__ == "__main__":
    with no_garbage_collection():
        from train.cli import main
    main()
