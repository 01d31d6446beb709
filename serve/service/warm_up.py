"""Segments a bundle's warm-up image before the model answers requests."""

import zipfile
from pathlib import Path

import numpy as np

from serve.contract.errors import BundleError
from serve.inference.segmenter import TileSegmenter


def check_warm_up(segmenter: TileSegmenter, bundle: Path) -> None:
    """Segment the bundle's warm-up image, if it has one, and compare with the labels at export.

    Raises:
        BundleError: too few labels agree, or the file is not one of a warm-up image.
    """
    expected = segmenter.manifest.warm_up
    if expected is None:
        return
    try:
        with np.load(bundle / expected.file, allow_pickle=False) as arrays:
            image, labels = arrays["image"], arrays["labels"]
    except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(
            f"{bundle / expected.file} holds no warm-up image ({error}), expected arrays `image` "
            "and `labels`. Export the checkpoint again.",
            code="bundle_damaged",
        ) from error
    found = segmenter.segment(image).labels
    agreement = float(np.mean(found == labels)) if found.shape == labels.shape else 0.0
    if agreement < expected.min_agreement:
        raise BundleError(
            f"{bundle / expected.file}: {agreement:.1%} of the warm-up image's labels are those of "
            f"the export, expected at least {expected.min_agreement:.1%}. Check that the runtime "
            "and its precision suit this machine, and export again.",
            code="warm_up_differs",
        )
