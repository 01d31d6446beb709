"""Segments whole images, for validation, for test and for comparisons.

Images are resampled, cut and blended as in serving (`train.data.scale`, `serve.images.tiles`), so
that a score says what a user of the service will get. It is counted on the image's own grid.

Shape legend: H, W: the image; T: tile size; C: classes; N: tiles; h, w: T/4, or T for a U-Net.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor
from torch.nn.functional import interpolate

from serve.images.tiles import Blend, upsample_and_label
from train.data.augmentation import NUM_VIEWS, turn, turn_back
from train.data.dataset import WholeImage, WholeImageDataset
from train.data.folder import Split, TileFolder
from train.data.scale import Placement, TileScale
from train.fitting.loading import whole_image_loader
from train.metrics import PooledConfusion
from train.model.checkpoint import CheckpointCard
from train.model.image_encoder import PATCH_SIZE
from train.model.segmenter import Segmenter, SegmenterOutput, encode_for_training

LOW_RES_STRIDE = 4
"""Pixels of the tile for one of the decoder's masks, along each axis."""
Segment = Callable[[Mapping[str, Tensor]], SegmenterOutput]
"""Runs the model on a batch: "image" (B, 3, T, T) uint8, or "features" of the embedding cache."""
Observe = Callable[[SegmenterOutput, Tensor], None]
"""Called with each batch's output and labels (B, T, T) uint8."""


class LabelledImage(NamedTuple):
    """An image's answer and its mask."""

    tile_id: str
    predicted: Tensor
    """(H, W) int64 in 1..C, on the CPU."""
    labels: Tensor
    """(H, W) int64 in 0..C, on the CPU."""


def scale_of(card: CheckpointCard) -> TileScale:
    """The scale at which a checkpoint sees tissue."""
    model = card.settings.model
    return TileScale(tile_size_px=model.input_px, mpp=card.input_mpp, squeeze=model.squeeze)


def predict_split(
    segmenter: Segmenter, card: CheckpointCard, folder: TileFolder, split: Split, *, tta: bool
) -> Iterator[LabelledImage]:
    """Segment every image of a split, in order, on a GPU where there is one.

    With `tta`, each tile's answer is the mean over its flips and quarter turns (test-time
    augmentation).
    """
    settings = card.settings
    dataset = WholeImageDataset(folder.tiles[split], len(card.classes), scale_of(card))
    batch_size = settings.optimization.batch_size
    loader = whole_image_loader(dataset, batch_size, settings.augmentation.num_workers)
    segment = segment_on_device(segmenter, card)
    for images in loader:
        predictions = label_images(segment, images, batch_size, tta=tta)
        for image, predicted in zip(images, predictions, strict=True):
            yield LabelledImage(image["tile_id"], predicted, image["labels"].long())


def count_split(
    segmenter: Segmenter, card: CheckpointCard, folder: TileFolder, split: Split, *, tta: bool
) -> Tensor:
    """The confusion (C, C) of all pixels of a split, target x prediction; see `predict_split`."""
    confusion = PooledConfusion(len(card.classes))
    images = predict_split(segmenter, card, folder, split, tta=tta)
    for image in track(images, f"Scoring {split} images", total=len(folder.tiles[split])):
        confusion.update(image.predicted[None], image.labels[None])
    return Tensor(confusion.compute())


def segment_on_device(segmenter: Segmenter, card: CheckpointCard) -> Segment:
    """Run a checkpoint's model in evaluation mode, in the precision of its training."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    segmenter = segmenter.to(device).eval()
    is_mixed = card.settings.mixed_precision
    is_float16 = card.settings.optimization.precision == "16-mixed"
    half = torch.float16 if is_float16 else torch.bfloat16

    @torch.inference_mode()
    def segment(batch: Mapping[str, Tensor]) -> SegmenterOutput:
        with torch.autocast(device.type, dtype=half, enabled=is_mixed):
            images = batch["image"].to(device)
            features = encode_for_training(segmenter, images, mixed_precision=is_mixed)
            return segmenter.decode(features)

    return segment


@torch.no_grad()
def label_images(
    segment: Segment,
    images: Sequence[WholeImage],
    batch_size: int,
    *,
    tta: bool = False,
    observe: Observe | None = None,
) -> list[Tensor]:
    """Segment whole images.

    Args:
        segment: Runs the model.
        images: Images, cut into tiles.
        batch_size: Tiles that the model takes at once.
        tta: Average over the flips and quarter turns of each tile.
        observe: Called with each batch's output and the labels of its tiles.

    Returns:
        (H, W) int64 labels in 1..C of each image, on the CPU.
    """
    name, key = ("features", "features") if "features" in images[0] else ("image", "tiles")
    assert not (tta and name == "features")
    inputs = torch.cat([image[key] for image in images])  # type: ignore[literal-required]
    tile_size_px = inputs.shape[-1] * (PATCH_SIZE if name == "features" else 1)
    labels = None
    if observe is not None:
        labels = torch.cat([image["tile_labels"] for image in images])
    logits_of_parts, probabilities_of_parts = [], []
    for start in range(0, len(inputs), batch_size):
        part = inputs[start : start + batch_size]
        output = segment({name: part})
        if observe is not None and labels is not None:
            observe(output, labels[start : start + batch_size])
        probabilities = _probabilities(output, tile_size_px)
        if tta:
            probabilities = _average_views(segment, part, probabilities)
        as_exported = (probabilities * 255).round().to(torch.uint8)
        logits_of_parts.append(output.low_res_logits[:, 1:].float())
        probabilities_of_parts.append(as_exported.cpu().numpy())
    logits, in_bytes = torch.cat(logits_of_parts), np.concatenate(probabilities_of_parts)
    labelled, start = [], 0
    for image in images:
        mine = slice(start, start + len(image["placement"].places))
        is_own = image["placement"].own_pixels and not tta
        labelled.append(
            _argmax(logits[mine], image["size"], tile_size_px)
            if is_own
            else _blended(in_bytes[mine], image["placement"], image["size"], tile_size_px)
        )
        start = mine.stop
    return labelled


def _average_views(segment: Segment, tiles: Tensor, first: Tensor) -> Tensor:
    """The mean of the probabilities over all views of the tiles, turned back."""
    total = first.clone()
    for view in range(1, NUM_VIEWS):
        output = segment({"image": turn(tiles, view).contiguous()})
        total += turn_back(_probabilities(output, tiles.shape[-1]), view)
    return total / NUM_VIEWS


def _probabilities(output: SegmenterOutput, tile_size_px: int) -> Tensor:
    """Of the classes, (B, C, h, w) float32, at least one for LOW_RES_STRIDE pixels of the tile."""
    logits = output.low_res_logits[:, 1:].float()
    factor = tile_size_px / LOW_RES_STRIDE / logits.shape[-1]
    if factor > 1:  # the model has resized its tile
        logits = interpolate(logits, scale_factor=factor, mode="bilinear")
    return logits.softmax(dim=1)


def _argmax(logits: Tensor, size: tuple[int, int], tile_size_px: int) -> Tensor:
    """Labels (H, W) of an image that is one tile, from its logits (1, C, h, w)."""
    logits = interpolate(logits, (tile_size_px, tile_size_px), mode="bilinear")
    return (logits.argmax(dim=1)[0] + 1)[: size[0], : size[1]].cpu()


def _blended(
    probabilities: NDArray[np.uint8],
    placement: Placement,
    size: tuple[int, int],
    tile_size_px: int,
) -> Tensor:
    """Labels (H, W) of an image from its tiles' (N, C, h, w), 255 = 1.0, as serving finds them.

    Masks of a U-Net are finer than the decoder's. They are blended in the same way, on a grid that
    is as many times finer.
    """
    _, num_classes, side, _ = probabilities.shape
    stride = tile_size_px // side
    finer = LOW_RES_STRIDE // stride
    rows, columns = (length * finer for length in placement.padded)
    blend = Blend(num_classes, rows, columns, tile_size_px * finer)
    nothing = np.zeros(num_classes, np.float32)
    for (y, x), of_tile in zip(placement.places, probabilities, strict=True):
        blend.add((y * finer, x * finer), of_tile, nothing)
    extent = placement.size[0] / stride, placement.size[1] / stride
    labels, _ = upsample_and_label(blend.probabilities(), *size, extent)
    return torch.from_numpy(labels).long()
