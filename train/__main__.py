"""`python -m train`: the commands of `train/cli.py`."""

from serve.contract.quick_imports import quick_imports

if __name__ == "__main__":
    with quick_imports():
        from train.cli import main
    main()
