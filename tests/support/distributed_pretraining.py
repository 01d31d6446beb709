"""A small pretraining that several processes share; see its test."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from tests.support.tiny_pretraining import tiny_pretraining
from train.pretraining.run import pretrain
from train.pretraining.settings import PretrainSettings


def settings_of(*, batch_size: int, devices: int = 1) -> PretrainSettings:
    """Without KoLeo, which is no mean over samples: parts of a batch learn what the whole does."""
    tiny = tiny_pretraining(drop_path=0.0, batch_size=batch_size, devices=devices)
    return replace(
        tiny,
        views=replace(tiny.views, num_local=0),
        distillation=replace(tiny.distillation, ibot_weight=0.0, spread_weight=0.0),
        encoder=replace(tiny.encoder, depth=1),
    )


def main(data: str, run: str, devices: str) -> None:
    """Pretrain on two samples per process and step."""
    torch.set_num_threads(1)
    pretrain(settings_of(batch_size=2, devices=int(devices)), Path(data), Path(run))


if __name__ == "__main__":
    main(*sys.argv[1:])
