"""The training task for Lightning's Trainer: loss, scores, optimizer and schedule."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from train.data.dataset import WholeImage
from train.fitting.evaluation import label_images
from train.fitting.losses import FiniteLosses, SegmentationLoss
from train.metrics import ClassScores, PooledConfusion, class_scores
from train.model.segmenter import (
    Segmenter,
    SegmenterOutput,
    encode_for_training,
)
from train.settings import LabelClass, Settings

Batch = dict[str, Any]
"""Collated `Sample`s: tile_id list of B, image (B, 3, H, W) uint8, labels (B, H, W) int64.

From an embedding cache come features (B, D, H/16, W/16) in the place of the image.
"""


class SegmentationTask(L.LightningModule):
    """Train a segmenter and score it on validation and test tiles."""

    def __init__(
        self,
        segmenter: Segmenter,
        settings: Settings,
        classes: tuple[LabelClass, ...],
        frequencies: Tensor | None = None,
    ) -> None:
        """Train with `frequencies` (C,), the classes' shares of the labelled training pixels."""
        super().__init__()
        self.segmenter = segmenter
        self.settings = settings
        self.classes = classes
        self.loss = SegmentationLoss(settings.loss, frequencies)
        self.confusion = PooledConfusion(len(classes))
        self._losses = FiniteLosses()
        if not settings.loss.iou_weight:
            segmenter.freeze_iou_head()

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """One step's loss.

        Raises:
            RunError: the loss is not a number; on a GPU, that of the step before.
        """
        output = self._segment(batch)
        parts = self.loss(output, batch["labels"])
        loss: Tensor = parts["loss"] + self.bias_penalty()
        step, tiles = self.global_step, batch["tile_id"]
        self._losses.watch(loss, lambda value: self._not_finite(value, step, tiles))
        self.log("loss", loss, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True)
        for name, value in parts.items():
            if name != "loss":
                self.log(name, value, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def _not_finite(self, loss: float, step: int, tiles: Sequence[str]) -> str:
        return (
            f"the loss is {loss} at step {step}, on the tiles {', '.join(tiles)}; expected a "
            "finite number. Lower --learning-rate (now "
            f"{self.settings.optimization.learning_rate:g}), or train with --precision 32-true; "
            "the last whole checkpoint is kept."
        )

    def on_validation_start(self) -> None:
        """Look at the epoch's last loss, before its checkpoint is written.

        Raises:
            RunError: it is not a number.
        """
        self._losses.check()

    def bias_penalty(self) -> Tensor:
        """The l2 term of Eq. 7, or 0 where the settings leave it out."""
        delta, bias = self.segmenter.class_attention_bias.delta, self.settings.bias
        if not delta.requires_grad or bias.bias_regularisation != "l2":
            return delta.new_zeros(())
        return bias.bias_l2 * delta.square().sum()

    def validation_step(self, images: list[WholeImage], batch_index: int) -> None:
        """Segment whole images, count their pixels and the loss of their tiles."""
        batch_size = self.settings.optimization.batch_size
        labelled = label_images(self._segment, images, batch_size, observe=self._log_loss)
        for image, predicted in zip(images, labelled, strict=True):
            labels = image["labels"][None].to(self.device).long()
            self.confusion.update(predicted[None].to(self.device), labels)

    def _log_loss(self, output: SegmenterOutput, labels: Tensor) -> None:
        """Log the loss of validation tiles, without what the bias adds to it."""
        loss = self.loss(output, labels.to(self.device).long())["loss"]
        self.log("validation/loss", loss, batch_size=len(labels), sync_dist=True)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, index: int) -> Any:
        """Leave whole images where they are: their tiles go to the device batch by batch."""
        if isinstance(batch, list):
            return batch
        return super().transfer_batch_to_device(batch, device, index)

    def on_validation_epoch_end(self) -> None:
        """Log Dice and IoU of the pooled pixels, and the bias of each class."""
        scores = class_scores(self.confusion.compute())
        self.confusion.reset()
        for name, value in named_scores(scores, self.classes).items():
            is_mean = name == "dice/mean"
            self.log(f"validation/{name}", value, prog_bar=is_mean, sync_dist=True)
        bias = self.segmenter.class_attention_bias
        values = {"bias": bias.per_class(), "bias_prior": bias.per_class(bias.prior)}
        for name, of_class in values.items():
            for entry, value in zip(self.classes, of_class.tolist(), strict=True):
                self.log(f"{name}/{entry.name}", value, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW in two groups, linear warm-up, then the schedule of the settings."""
        optimization, bias = self.settings.optimization, self.settings.bias
        class_bias = self.segmenter.class_attention_bias
        learned = [p for p in class_bias.parameters() if p.requires_grad]
        own = {id(p) for p in class_bias.parameters()}
        weights = [p for p in self.segmenter.parameters() if p.requires_grad and id(p) not in own]
        groups: list[dict[str, Any]] = [
            {"params": weights, "weight_decay": optimization.weight_decay},
        ]
        if learned:
            learning_rate = bias.bias_lr_factor * optimization.learning_rate
            groups.append({"params": learned, "lr": learning_rate, "weight_decay": 0.0})
        optimizer = AdamW(groups, lr=optimization.learning_rate)
        if learned and bias.bias_regularisation == "decay":
            optimizer.register_step_post_hook(self._decay_bias)
        num_steps = int(self.trainer.estimated_stepping_batches)
        warmup = min(optimization.warmup_steps, num_steps // 2)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            if optimization.schedule == "constant":
                return 1.0
            progress = (step - warmup) / max(1, num_steps - warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

        scheduler = LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _decay_bias(self, optimizer: Optimizer, *_: Any) -> None:
        """Pull the bias towards its prior, as AdamW's decay pulls weights towards zero.

        A step of Adam moves a bias by at most about its learning rate, and this by learning rate *
        decay * distance: so the distance stays below about 1 / decay, and a bias without a
        gradient returns to its prior.
        """
        rate = self.settings.bias.bias_decay * optimizer.param_groups[-1]["lr"]
        self.segmenter.class_attention_bias.approach_prior(rate)

    def compile_parts(self) -> None:
        """Compile what every step computes. Names of weights do not change."""
        for part in (*self.segmenter.parts, self.loss):
            part.compile()

    def _segment(self, batch: Mapping[str, Any]) -> SegmenterOutput:
        features = batch.get("features")
        if features is None:
            features = encode_for_training(
                self.segmenter,
                batch["image"].to(self.device, non_blocking=True),
                mixed_precision=self.settings.mixed_precision,
            )
        return self.segmenter.decode(features.to(self.device).float())


def named_scores(scores: ClassScores, classes: tuple[LabelClass, ...]) -> dict[str, float]:
    """Scores under names such as `dice/mean` and `iou/Tumor`."""
    named = {"dice/mean": scores.mean_dice, "iou/mean": scores.mean_iou}
    for index, entry in enumerate(classes):
        named[f"dice/{entry.name}"] = float(scores.dice[index])
        named[f"iou/{entry.name}"] = float(scores.iou[index])
    return named
