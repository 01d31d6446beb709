from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from train.fitting.timing import seconds_now, timed_trainer


@pytest.mark.parametrize("has_gpu", [False, True])
def test_the_clock_is_read_once_a_gpu_has_done_its_work(
    has_gpu: bool, monkeypatch: pytest.MonkeyPatch
):
    done: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append(True))
    clock = SimpleNamespace(perf_counter=lambda: float(len(done)))
    monkeypatch.setattr("train.fitting.timing.time", clock)
    assert seconds_now() == float(has_gpu)


def test_timed_steps_are_those_of_training_on_one_device():
    trainer = timed_trainer(Callback(), precision="bf16-mixed", gradient_clip=0.7)
    assert (trainer.precision, trainer.gradient_clip_val) == ("bf16-mixed", 0.7)
    assert (trainer.num_devices, trainer.max_epochs, trainer.limit_val_batches) == (1, 1, 0)
    assert not trainer.loggers
    assert not trainer.checkpoint_callbacks
