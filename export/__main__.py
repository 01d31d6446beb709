"""Export a checkpoint to a bundle that has passed the gate, build its engine, publish it.

python -m export CHECKPOINT --out BUNDLE   ONNX in several precisions, gated, with its reports
python -m export engine BUNDLE             a TensorRT plan, on the GPU that will serve it
python -m export publish BUNDLE --model-repository DIR   a version in Triton's model repository
"""

import signal
import sys
from collections.abc import Sequence

from serve.contract.interrupts import ending_signals
from serve.contract.quick_imports import quick_imports


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. An error that the user can fix ends with one line and its exit status."""
    with quick_imports():
        from export.cli import run
    for number in ending_signals():  # so it cleans up, as an interrupted one does
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    run(sys.argv[1:] if arguments is None else list(arguments))


if __name__ == "__main__":
    main()
