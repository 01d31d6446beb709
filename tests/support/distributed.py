"""A small training that several processes share: `python -m tests.support.distributed`."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from tests.support.toy_data import toy_settings
from train.fitting.run import fit
from train.settings import LossSettings, RuntimeSettings, Settings


def settings_of(*, batch_size: int, devices: int = 1, nodes: int = 1) -> Settings:
    """A loss that is a mean over images, so that batches in parts learn what whole ones do.

    Without a part for the predicted IoU, as CRAG is trained.
    """
    settings = toy_settings(
        loss=LossSettings(iou_weight=0.0), runtime=RuntimeSettings(devices=devices, nodes=nodes)
    )
    return replace(settings, optimization=replace(settings.optimization, batch_size=batch_size))


def main(data: str, run: str) -> None:
    """Train on two tiles per step, as one of two nodes."""
    torch.set_num_threads(1)
    fit(settings_of(batch_size=2, nodes=2), Path(data), Path(run))


if __name__ == "__main__":
    main(*sys.argv[1:])
