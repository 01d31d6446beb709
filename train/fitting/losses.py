"""The loss of SAM-Path with Dynamic Focal Attention (arXiv 2604.13479, Eq. 7).

At full resolution, the loss costs as much as the whole decoder. This code gives the same values and
gradients as MONAI's in half the time and memory.

Shape letters: B images, C classes, H x W pixels.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.errors import RunError
from train.model.segmenter import SegmenterOutput, upsample
from train.settings import LossSettings

_SMOOTHING = 1e-5
"""Added to numerator and denominator of Dice, so that an absent class has zero loss."""


class SegmentationLoss(nn.Module):
    """(1 - lambda) Dice + lambda Focal + beta MSE of the predicted IoU.

    Unlabelled pixels (label 0) count as correct, whatever the prediction. Dice takes the softmax
    over all 1 + C channels and ignores the unlabelled one. Focal is the sigmoid focal loss of the C
    class channels, averaged over all pixels as in SAM-Path. So a batch's loss is the mean over its
    images on any number of devices, and a tile with few labels weighs less.
    """

    class_weights: Tensor | None

    def __init__(self, settings: LossSettings, frequencies: Tensor | None = None) -> None:
        """Take class weights from `frequencies` (C,), the classes' pixel shares, if configured."""
        super().__init__()
        weights = None
        if settings.class_weights != "none":
            assert frequencies is not None
            weights = class_weights(settings.class_weights, frequencies)
        self.register_buffer("class_weights", weights, persistent=False)
        self.focal_weight = settings.focal_weight if settings.focal else 0.0
        self.focal_gamma = settings.focal_gamma
        self.iou_weight = settings.iou_weight
        self.dice_per_image = settings.dice_per_image

    def forward(self, output: SegmenterOutput, labels: Tensor) -> dict[str, Tensor]:
        """Compare masks with labels (B, H, W) int64 in 0..C.

        Returns:
            `loss` and its parts `dice_loss`, `focal_loss`, `iou_loss`, scalars.
        """
        logits = upsample(output.low_res_logits.float(), labels.shape[-1])  # B x (1 + C) x H x W
        labels = labels.unsqueeze(1)
        labelled = labels > 0  # B x 1 x H x W
        classes = torch.arange(1, logits.shape[1], device=labels.device)
        target = labels == classes.reshape(1, -1, 1, 1)  # B x C x H x W
        probabilities = logits.softmax(dim=1)[:, 1:] * labelled

        parts = {
            "dice_loss": dice_loss(
                probabilities, target, per_image=self.dice_per_image, weights=self.class_weights
            )
        }
        loss = (1 - self.focal_weight) * parts["dice_loss"]
        if self.focal_weight:
            terms = focal_terms(logits[:, 1:], target, self.focal_gamma) * labelled
            if self.class_weights is not None:
                terms = terms * self.class_weights[:, None, None]
            parts["focal_loss"] = terms.mean()
            loss = loss + self.focal_weight * parts["focal_loss"]
        if self.iou_weight:
            true_iou = mask_iou(probabilities, target)
            parts["iou_loss"] = F.mse_loss(output.iou_scores[:, 1:].float(), true_iou)
            loss = loss + self.iou_weight * parts["iou_loss"]
        return {"loss": loss, **parts}


def class_weights(choice: Literal["sqrt", "inverse"], frequencies: Tensor) -> Tensor:
    """Weights (C,) of mean 1: one over the pixel shares (C,), or over their square roots."""
    weights = frequencies ** (-0.5 if choice == "sqrt" else -1.0)
    return weights / weights.mean()


def dice_loss(
    probabilities: Tensor, target: Tensor, *, per_image: bool, weights: Tensor | None = None
) -> Tensor:
    """1 - Dice, averaged over classes, and over images if `per_image`.

    Args:
        probabilities: (B, C, H, W) float32 in [0, 1].
        target: (B, C, H, W) bool.
        per_image: compute Dice per image; otherwise, pool the pixels of the batch.
        weights: (C,) of mean 1, or None for equal weights.
    """
    pooled = (2, 3) if per_image else (0, 2, 3)
    intersection = (probabilities * target).sum(pooled)
    size = probabilities.sum(pooled) + target.sum(pooled)
    errors = 1 - (2 * intersection + _SMOOTHING) / (size + _SMOOTHING)
    return errors.mean() if weights is None else (errors * weights).mean()


def focal_terms(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """-(1 - p_t)^gamma log p_t of each mask's sigmoid (arXiv 1708.02002, Eq. 4, without alpha).

    Args:
        logits: (B, C, H, W) float32.
        target: (B, C, H, W) bool.
        gamma: the focusing parameter.

    Returns:
        (B, C, H, W) float32.
    """
    # p_t = sigmoid(-z), so -log p_t = softplus(z) and log(1 - p_t) = z - softplus(z).
    z = torch.where(target, -logits, logits)
    cross_entropy = F.softplus(z)
    return cross_entropy * (gamma * (z - cross_entropy)).exp()


@torch.no_grad()
def mask_iou(probabilities: Tensor, target: Tensor) -> Tensor:
    """IoU (B, C) of probabilities >= 0.5 with a target, (B, C, H, W) float32 and bool.

    0 where a class is neither predicted nor present, as in SAM-Path.
    """
    predicted = probabilities >= 0.5
    intersection = (predicted & target).sum(dim=(2, 3))
    union = (predicted | target).sum(dim=(2, 3))
    return intersection / union.clamp(min=1)


class _Pending(NamedTuple):
    loss: Tensor
    """On the CPU, once `copied` has happened."""
    copied: torch.cuda.Event | None
    explain: Callable[[float], str]


class FiniteLosses:
    """Refuses a loss that is not finite: on a CPU at once, on a GPU one step later.

    To read a number from a GPU is to wait until it has done all that it was asked for, and only
    then to ask for more. So the number is copied while the GPU goes on, and read when the next one
    comes. Call `check` before anything is written, so that the last one counts, too.
    """

    def __init__(self) -> None:
        self._pending: _Pending | None = None

    def watch(self, loss: Tensor, explain: Callable[[float], str]) -> None:
        """Take a step's loss, a scalar; `explain` says what to tell of a value that is not finite.

        Raises:
            RunError: this loss, or on a GPU the one before, is not finite.
        """
        self.check()
        copied = None
        value = loss.detach().to("cpu", non_blocking=loss.is_cuda)
        if loss.is_cuda:
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._pending = _Pending(value, copied, explain)
        if copied is None:
            self.check()

    def check(self) -> None:
        """Look at the last loss.

        Raises:
            RunError: it is not finite.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.copied is not None:
            pending.copied.synchronize()
        if not torch.isfinite(pending.loss):
            raise RunError(pending.explain(float(pending.loss)))
