"""The model that is exported: uint8 image in, uint8 labels out, the learned bias folded in."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.segmenter import Segmenter, upsample


class DeployableOutput(NamedTuple):
    """What the graph computes; the last is for the parity check and leaves the bundle's graph.

    labels: (B, H, W) uint8, argmax over the classes, 1..C.
    confidence: (B, H, W) uint8, softmax probability of that label, 255 = 1.0.
    low_res_probabilities: (B, C, H/4, W/4) uint8, softmax at the decoder's resolution.
    iou_scores: (B, C) float32, the predicted IoU of each class's mask.
    low_res_logits: (B, C, H/4, W/4) float32.
    """

    labels: Tensor
    confidence: Tensor
    low_res_probabilities: Tensor
    iou_scores: Tensor
    low_res_logits: Tensor


class Deployable(nn.Module):
    """Pre- and post-processing around a trained segmenter, all inside one graph.

    Unlabelled is never predicted, so the softmax is over the C classes alone (our choice).
    """

    class_attention_bias: Tensor

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter.eval()
        # A buffer, not a parameter: in the graph the bias is a constant of this name, one value a
        # token (iou, single-mask, unlabelled, then the classes), added in both blocks.
        with torch.no_grad():
            self.register_buffer("class_attention_bias", segmenter.class_attention_bias().clone())

    def forward(self, image: Tensor) -> DeployableOutput:
        """Segment (B, H, W, 3) uint8, RGB in [0, 255], H = W = the tile size."""
        images = image.float().permute(0, 3, 1, 2)
        features = self.segmenter.encode(images)
        low_res_logits, iou_scores = self.segmenter.decode(features, self.class_attention_bias)
        low_res_logits = low_res_logits[:, 1:]
        logits = upsample(low_res_logits, self.segmenter.tile_size_px)
        # Casts by way of float32: TensorRT takes uint8 only at the graph's edge.
        labels = logits.argmax(dim=1).float() + 1
        return DeployableOutput(
            labels=labels.to(torch.uint8),
            confidence=_to_byte(logits.softmax(dim=1).amax(dim=1)),
            low_res_probabilities=_to_byte(low_res_logits.softmax(dim=1)),
            iou_scores=iou_scores[:, 1:],
            low_res_logits=low_res_logits,
        )


def _to_byte(probabilities: Tensor) -> Tensor:
    return (probabilities * 255).round().to(torch.uint8)
