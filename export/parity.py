"""Whether an exported graph answers as torch does, measured on real pixels."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from export.deployable import Deployable, DeployableOutput
from export.onnx_graph import PARITY_OUTPUT
from serve.manifest import Parity
from train.dataset import read_image, read_tile_folder
from train.errors import FocalPathError
from train.tissue import make_tile

Images = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an artefact may be from torch in float32."""

    min_label_agreement: float = 0.999
    """Smallest share of pixels with the same label."""
    max_logit_difference: float = 1e-3
    """Largest difference of a low-resolution logit."""


def measure_parity(deployable: Deployable, onnx_path: Path, images: Images) -> Parity:
    """Run torch and ONNX Runtime on images (N, H, W, 3) uint8, in batches of several sizes.

    The graph must still have its `low_res_logits` output.
    """
    session = ort.InferenceSession(str(onnx_path), providers=["CPUExecutionProvider"])
    num_agreeing, num_pixels, difference = 0, 0, 0.0
    for batch in _batches(images):
        with torch.inference_mode():
            expected = DeployableOutput(*deployable(torch.from_numpy(batch)))
        labels, logits = session.run(["labels", PARITY_OUTPUT], {"image": batch})
        num_agreeing += int((labels == expected.labels.numpy()).sum())
        num_pixels += labels.size
        largest = np.abs(logits - expected.low_res_logits.numpy()).max()
        # A NaN anywhere must not pass: a comparison with NaN is never true.
        difference = max(difference, float(np.nan_to_num(largest, nan=np.inf)))
    return Parity(
        num_tiles=len(images),
        label_agreement=num_agreeing / num_pixels,
        max_logit_difference=difference,
    )


def check_parity(parity: Parity, tolerance: Tolerance, artefact: str) -> None:
    """Refuse an artefact that is too far from torch.

    Raises:
        FocalPathError: it is.
    """
    if parity.label_agreement < tolerance.min_label_agreement:
        raise FocalPathError(
            f"{artefact} gives the same label as torch on {parity.label_agreement:.4%} of the "
            f"pixels of {parity.num_tiles} tiles; expected at least "
            f"{tolerance.min_label_agreement:.2%}. No bundle was written."
        )
    if not parity.max_logit_difference < tolerance.max_logit_difference:
        raise FocalPathError(
            f"a logit of {artefact} differs from torch by {parity.max_logit_difference:.2e}; "
            f"expected less than {tolerance.max_logit_difference:.0e}. No bundle was written."
        )


def parity_images(data: Path | None, tile_size_px: int, num_tiles: int) -> Images:
    """Tiles to compare on, (N, H, W, 3) uint8: from a data set, or else drawn tissue.

    A data set's held-out tiles come first: test, then validation, then training.
    """
    if data is None:
        rng = np.random.default_rng(0)
        return np.stack([make_tile(rng, tile_size_px)[0] for _ in range(num_tiles)])
    folder = read_tile_folder(data)
    tiles = [*folder.tiles["test"], *folder.tiles["validation"], *folder.tiles["training"]]
    if not tiles:
        raise FocalPathError(f"{data} has no tile to compare on; expected lines in folds.csv")
    return np.stack([_fit(read_image(tile.image), tile_size_px) for tile in tiles[:num_tiles]])


def _batches(images: Images) -> Iterator[Images]:
    """One tile alone, then by threes: the graph must not have fixed its batch."""
    yield images[:1]
    for start in range(1, len(images), 3):
        yield images[start : start + 3]


def _fit(image: Images, size_px: int) -> Images:
    """Cut or mirror an image to the model's tile, without resampling."""
    image = image[:size_px, :size_px]
    missing = [(0, size_px - length) for length in image.shape[:2]]
    return np.ascontiguousarray(np.pad(image, [*missing, (0, 0)], mode="symmetric"))
