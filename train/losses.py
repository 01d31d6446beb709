"""The loss of SAM-Path with Dynamic Focal Attention (arXiv 2604.13479, Eq. 7)."""

import torch
import torch.nn.functional as F
from monai.losses.dice import DiceLoss
from monai.losses.focal_loss import FocalLoss
from torch import Tensor, nn

from train.segmenter import SegmenterOutput, upsample
from train.settings import LossSettings


class SegmentationLoss(nn.Module):
    """(1 - lambda) Dice + lambda Focal + beta MSE of the predicted IoU.

    Unlabelled pixels (label 0) count nowhere. Dice is over the softmax of all 1 + C channels,
    without the unlabelled one; Focal is the sigmoid focal loss of the C class channels, a mean
    over labelled pixels.
    """

    def __init__(self, settings: LossSettings) -> None:
        super().__init__()
        self.focal_weight = settings.focal_weight if settings.focal else 0.0
        self.iou_weight = settings.iou_weight
        self._dice = DiceLoss(include_background=False, batch=not settings.dice_per_image)
        self._focal = FocalLoss(gamma=settings.focal_gamma, reduction="none")

    def forward(self, output: SegmenterOutput, labels: Tensor) -> dict[str, Tensor]:
        """Compare masks with labels (B, H, W) int64 in 0..C.

        Returns:
            `loss` and its parts `dice_loss`, `focal_loss`, `iou_loss`, scalars.
        """
        logits = upsample(output.low_res_logits.float(), labels.shape[-1])  # B x (1 + C) x H x W
        labelled = (labels > 0).unsqueeze(1).float()
        probabilities = logits.softmax(dim=1) * labelled
        target = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).float() * labelled

        parts = {"dice_loss": self._dice(probabilities, target)}
        loss = (1 - self.focal_weight) * parts["dice_loss"]
        if self.focal_weight:
            focal = self._focal(logits[:, 1:], target[:, 1:]) * labelled
            num_terms = labelled.sum().clamp(min=1) * target[:, 1:].shape[1]
            parts["focal_loss"] = focal.sum() / num_terms
            loss = loss + self.focal_weight * parts["focal_loss"]
        if self.iou_weight:
            true_iou = mask_iou(probabilities[:, 1:], target[:, 1:])
            parts["iou_loss"] = F.mse_loss(output.iou_scores[:, 1:].float(), true_iou)
            loss = loss + self.iou_weight * parts["iou_loss"]
        return {"loss": loss, **parts}


@torch.no_grad()
def mask_iou(probabilities: Tensor, target: Tensor) -> Tensor:
    """IoU (B, C) of probabilities >= 0.5 with a one-hot target, both (B, C, H, W).

    0 where a class is neither predicted nor present, as in SAM-Path.
    """
    predicted, present = probabilities >= 0.5, target >= 0.5
    intersection = (predicted & present).sum(dim=(2, 3)).float()
    union = (predicted | present).sum(dim=(2, 3)).float()
    return intersection / union.clamp(min=1)
