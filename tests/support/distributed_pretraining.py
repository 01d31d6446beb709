"""A small pretraining that several processes share; see its test."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from train.pretraining.run import pretrain
from train.pretraining.settings import PretrainSettings, ViewSettings, synthetic


def settings_of(*, batch_size: int, devices: int = 1) -> PretrainSettings:
    """Without KoLeo, which is no mean over samples: parts of a batch learn what the whole does."""
    base = synthetic()
    return replace(
        base,
        views=ViewSettings(view_px=48, num_local=0, local_px=32),
        distillation=replace(
            base.distillation,
            **{"align_weight": 1.0, "spread_weight": 0.0, "prototypes": 32},
            **{"head_hidden": 32, "head_bottleneck": 16},
        ),
        encoder=replace(base.encoder, depth=1, embed_dim=32, num_heads=2),
        schedule=replace(
            base.schedule, steps=4, steps_per_epoch=2, batch_size=batch_size, devices=devices
        ),
    )


def main(data: str, run: str, devices: str) -> None:
    """Pretrain on two samples per process and step."""
    torch.set_num_threads(1)
    pretrain(settings_of(batch_size=2, devices=int(devices)), Path(data), Path(run))


if __name__ == "__main__":
    main(*sys.argv[1:])
