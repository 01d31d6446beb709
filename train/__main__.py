"""`python -m train`: the commands of `train/cli.py`."""

import gc

if __name__ == "__main__":
    gc.disable()  # imports make no garbage, and looking for it takes a quarter of their time
    from train.cli import main

    gc.freeze()
    gc.enable()
    main()
