"""Training, evaluation and resuming on a GPU, held against the CPU."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.gpu import DEVICE, ON_GPU, needs_gpu, no_gpu, no_waiting
from tests.support.toy_bundle import CLASSES
from tests.support.toy_data import changed, rows_of, toy_settings, write_toy_data
from train.data.folder import TileFolder, read_tile_folder
from train.data.pixels import require_trainable
from train.errors import RunError
from train.fitting.evaluation import predict_split
from train.fitting.leverage import measure_leverage
from train.fitting.loaders import make_loaders
from train.fitting.losses import SegmentationLoss
from train.fitting.run import at_scale, fit
from train.fitting.scores import evaluate
from train.fitting.task import SegmentationTask
from train.fitting.trainer import trainer_of
from train.metrics import PooledConfusion
from train.model.checkpoint import load_checkpoint
from train.model.segmenter import Segmenter, SegmenterOutput
from train.settings import LabelClass, LossSettings, Settings

pytestmark = needs_gpu

NAMES = tuple(LabelClass(name=entry.name, color=entry.color) for entry in CLASSES)
EPOCHS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("data") / "data", num_train=16)


@pytest.fixture(scope="module")
def folder(data: Path) -> TileFolder:
    return read_tile_folder(data)


def still(**optimization: Any) -> Settings:
    """Toy settings that learn within the few epochs of a test."""
    return toy_settings(
        model={"image_encoder": "tiny_conv"},
        augmentation={"augment": "dihedral"},
        optimization={"learning_rate": 3e-3, **optimization},
    )


def labels_of(run: Path, folder: TileFolder) -> torch.Tensor:
    found = predict_split(*load_checkpoint(run), folder, "test", tta=False)
    return torch.stack([image.predicted for image in found])


@pytest.fixture(scope="module", params=["32-true", "bf16-mixed"])
def runs(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same training on both devices."""
    settings = still(epochs=EPOCHS, precision=request.param, keep_epoch="last")
    folder = tmp_path_factory.mktemp("runs")
    for name, device in (("gpu", nullcontext()), ("cpu", no_gpu())):
        with device:
            fit(settings, data, folder / name)
    return {name: folder / name for name in ("gpu", "cpu")}


def test_training_learns_as_on_the_cpu(runs: dict[str, Path], folder: TileFolder):
    gpu, cpu = rows_of(runs["gpu"]), rows_of(runs["cpu"])
    assert gpu[0]["loss"] == pytest.approx(cpu[0]["loss"], rel=0.03)
    assert gpu[-1]["loss"] < 0.7 * gpu[0]["loss"]
    assert gpu[-1]["loss"] == pytest.approx(cpu[-1]["loss"], rel=0.25)
    assert gpu[-1]["validation/dice/mean"] > 0.6
    agreement = (labels_of(runs["gpu"], folder) == labels_of(runs["cpu"], folder)).float().mean()
    assert agreement > 0.75


def test_a_checkpoint_labels_images_on_either_device_alike(
    runs: dict[str, Path], folder: TileFolder
):
    for run in runs.values():
        there = labels_of(run, folder)
        with no_gpu():
            here = labels_of(run, folder)
        assert (there == here).float().mean() > 0.99


@pytest.mark.parametrize("tta", [False, True])
def test_scores_and_leverage_are_those_of_the_cpu(
    runs: dict[str, Path], data: Path, folder: TileFolder, tta: bool
):
    def measured() -> tuple[dict[str, float], list[Any]]:
        segmenter, card = load_checkpoint(runs["gpu"])
        scores = evaluate(segmenter, card, data, "test", tta=tta)
        return scores, [] if tta else measure_leverage(segmenter, card, folder, "test")

    scores, leverage = measured()
    with no_gpu():
        expected, expected_leverage = measured()
    assert scores == pytest.approx(expected, abs=0.02)
    for found, wanted in zip(leverage, expected_leverage, strict=True):
        assert found.change == wanted.change
        assert found.labels_changed == pytest.approx(wanted.labels_changed, abs=0.01)
        assert found.mean_dice == pytest.approx(wanted.mean_dice, abs=0.02)


def test_pixels_are_counted_as_on_the_cpu():
    predicted = torch.randint(1, 6, (3, 64, 64))
    labels = torch.randint(0, 6, (3, 64, 64))
    counted = []
    for device in (DEVICE, torch.device("cpu")):
        confusion = PooledConfusion(5).to(device)
        confusion.update(predicted.to(device), labels.to(device))
        counted.append(confusion.compute().cpu())
    assert torch.equal(*counted)


class Stop(Exception):
    pass


@pytest.mark.parametrize("start", ["gpu", "cpu"])
def test_a_run_goes_on_bit_for_bit_on_the_other_device(
    start: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = still(epochs=2)
    devices = {"gpu": nullcontext, "cpu": no_gpu}
    run, seen = tmp_path / "run", []

    def stop(task: SegmentationTask, *_: object) -> None:
        if task.trainer.current_epoch == 1:
            optimizer = task.trainer.optimizers[0].state_dict()["state"]
            state = [value for entry in optimizer.values() for value in entry.values()]
            seen.append([v.detach().cpu().clone() for v in (*task.state_dict().values(), *state)])
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "on_train_batch_start", stop)
        with devices[start](), pytest.raises(Stop):
            fit(settings, data, run)
        (other,) = set(devices) - {start}
        with devices[other](), pytest.raises(Stop):
            fit(settings, data, run, resume=True)
    before, after = seen
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    with devices[other]():
        fit(settings, data, run, resume=True)
    assert [row["epoch"] for row in rows_of(run)] == [1, 2]


@pytest.mark.parametrize(
    "settings",
    [
        LossSettings(),
        LossSettings(dice_per_image=False, class_weights="sqrt"),
        LossSettings(focal=False, iou_weight=0.0),
    ],
    ids=["paper", "pooled and weighted", "dice alone"],
)
def test_losses_and_gradients_are_those_of_the_cpu(settings: LossSettings):
    logits, scores = 3 * torch.randn(2, 6, 16, 16), torch.rand(2, 6)
    labels = torch.randint(0, 6, (2, 64, 64))
    shares = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01])
    results = []
    for device in (DEVICE, torch.device("cpu")):
        output = SegmenterOutput(
            logits.to(device).requires_grad_(), scores.to(device).requires_grad_()
        )
        parts = SegmentationLoss(settings, shares).to(device)(output, labels.to(device))
        parts["loss"].backward()
        results.append({**parts, "logits": output.low_res_logits.grad})
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name].cpu(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("frozen", [True, False])
def test_no_step_makes_the_cpu_wait_for_the_gpu(
    precision: str, frozen: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = still(epochs=2, precision=precision)
    settings = changed(
        settings, model={"encoders_frozen": frozen}, weights={"random_encoders": True}
    )
    steps = []
    step = SegmentationTask.training_step
    backward, update = SegmentationTask.backward, SegmentationTask.optimizer_step

    def quiet_step(task: SegmentationTask, batch: Any, index: int) -> Any:
        if task.global_step == 0:  # sets libraries up
            return step(task, batch, index)
        with no_waiting():
            steps.append(task.global_step)
            return step(task, batch, index)

    def quiet_backward(task: SegmentationTask, *given: Any, **named: Any) -> None:
        with no_waiting() if task.global_step else nullcontext():
            backward(task, *given, **named)

    def quiet_update(task: SegmentationTask, *given: Any, **named: Any) -> None:
        update(task, *given, **named)

    monkeypatch.setattr(SegmentationTask, "training_step", quiet_step)
    monkeypatch.setattr(SegmentationTask, "backward", quiet_backward)
    monkeypatch.setattr(SegmentationTask, "optimizer_step", quiet_update)
    fit(settings, data, tmp_path / "run")
    assert len(steps) == 7


def test_a_loss_that_is_not_a_number_ends_the_run_and_keeps_the_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, loss = tmp_path / "run", SegmentationLoss.forward
    last_of_epoch = []

    def broken(self: SegmentationLoss, *given: Any) -> dict[str, torch.Tensor]:
        parts = loss(self, *given)
        last_of_epoch.append(1)
        # The 8th batch of training is the last of the second epoch; 1 of validation lies between.
        return parts if len(last_of_epoch) < 9 else {**parts, "loss": parts["loss"] * torch.nan}

    monkeypatch.setattr(SegmentationLoss, "forward", broken)
    with pytest.raises(RunError, match="step 7") as caught:
        fit(still(epochs=3), data, run)
    assert "tile" in str(caught.value)
    segmenter, _ = load_checkpoint(run)
    assert all(value.isfinite().all() for value in segmenter.state_dict().values())


def test_workers_hand_over_pinned_tiles_that_are_those_of_the_main_process(
    folder: TileFolder, tmp_path: Path
):
    batches = []
    for num_workers in (2, 0):
        settings = changed(still(), augmentation={"num_workers": num_workers})
        settings = at_scale(settings, folder, ("training", "validation"))
        segmenter = Segmenter(settings.model, len(folder.classes))
        trainer = trainer_of(settings, tmp_path, [])
        counts = require_trainable(folder)
        training, validation = make_loaders(folder, settings, segmenter, trainer, 0, counts)
        (images,) = list(validation)
        assert images[0]["tiles"].is_pinned() == ON_GPU
        height, width = images[0]["size"]
        assert (height, width) == tuple(images[0]["labels"].shape)
        batches.append(list(training))
    for found, expected in zip(*batches, strict=True):
        assert found["image"].is_pinned() == ON_GPU
        assert torch.equal(found["image"], expected["image"])
        assert torch.equal(found["labels"], expected["labels"])


def test_features_come_from_the_cache_as_the_gpu_computed_them(data: Path, tmp_path: Path):
    frozen = {"model": {"encoders_frozen": True}, "weights": {"random_encoders": True}}
    losses = []
    for name, cache in (("plain", None), ("cached", str(tmp_path / "cache"))):
        settings = changed(still(epochs=2), **frozen, runtime={"embedding_cache": cache})
        fit(settings, data, tmp_path / name)
        losses.append([row["validation/loss"] for row in rows_of(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.slow
def test_a_compiled_model_trains_as_a_plain_one(data: Path, tmp_path: Path):
    for name, compiled in (("plain", False), ("compiled", True)):
        settings = changed(still(epochs=2), runtime={"compile": compiled})
        fit(settings, data, tmp_path / name)
    for found, expected in zip(
        rows_of(tmp_path / "compiled"), rows_of(tmp_path / "plain"), strict=True
    ):
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.03)
