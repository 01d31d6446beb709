"""The reference for the exported graph, in plain torch: uint8 image in, uint8 labels out.

`export.graph.encoders` computes the same outputs in the form that is exported to ONNX. The gate
compares the two.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from serve.contract.manifest import LOW_RES_STRIDE
from train.model.class_bias import ClassTerms
from train.model.segmenter import Segmenter


class DeployableOutput(NamedTuple):
    """The graph's outputs. The last one is for the parity check; the bundle's graph omits it.

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
    """Pre- and post-processing around a trained segmenter with frozen class terms."""

    class_attention_bias: Tensor
    class_temperature: Tensor | None
    class_mask_bias: Tensor | None

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter.eval()
        # One value per token: iou, single-mask, unlabelled, then the classes.
        with torch.no_grad():
            terms = segmenter.class_attention_bias()
        self.register_buffer("class_attention_bias", terms.attention_bias.clone())
        self.register_buffer("class_temperature", terms.temperature)
        self.register_buffer("class_mask_bias", terms.mask_bias)

    @property
    def terms(self) -> ClassTerms:
        """The terms that the bias strategy adds to the decoder."""
        return ClassTerms(self.class_attention_bias, self.class_temperature, self.class_mask_bias)

    def forward(self, image: Tensor) -> DeployableOutput:
        """Segment (B, H, W, 3) uint8, RGB in [0, 255], H = W = `ModelSettings.input_px`."""
        images = image.float().permute(0, 3, 1, 2)
        features = self.segmenter.encode(images)
        low_res_logits, iou_scores = self.segmenter.decode(features, self.terms)
        return outputs(low_res_logits[:, 1:], iou_scores[:, 1:], self.segmenter.input_px)


def outputs(low_res_logits: Tensor, iou_scores: Tensor, input_px: int) -> DeployableOutput:
    """Compute the outputs from (B, C, h, w) logits and (B, C) scores of the classes.

    h = w = a quarter of the tile that the encoders see; `input_px` is larger where the model
    resizes its image itself.

    Unlabelled is never predicted, so the softmax is over the C classes (our choice).
    """
    # By factor, because an output size would make the graph compute the batch's shape.
    logits = _enlarged(low_res_logits, input_px)
    largest = logits.amax(dim=1)
    # The softmax's maximum is 1 / sum(exp(logits - largest)), which needs one map instead of C.
    confidence = 1 / (logits - largest[:, None]).exp().sum(dim=1)
    # Casts from float32: TensorRT allows uint8 only at the graph's inputs and outputs.
    labels = logits.argmax(dim=1).float() + 1
    return DeployableOutput(
        labels=labels.to(torch.uint8),
        confidence=_to_byte(confidence),
        low_res_probabilities=_to_byte(
            _enlarged(low_res_logits, input_px // LOW_RES_STRIDE).softmax(dim=1)
        ),
        iou_scores=iou_scores,
        low_res_logits=low_res_logits,
    )


def _enlarged(logits: Tensor, side: int) -> Tensor:
    factor = side / logits.shape[-1]
    if factor == 1:
        return logits
    return nn.functional.interpolate(logits, scale_factor=factor, mode="bilinear")


def _to_byte(probabilities: Tensor) -> Tensor:
    return (probabilities * 255).round().to(torch.uint8)
