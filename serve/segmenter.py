"""Image in, segmentation out: what the service, the clients and the command line share."""

from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from serve.backends import Backend, open_backend
from serve.errors import ImageError
from serve.manifest import Manifest, read_bundle
from serve.outputs import Summary, summarise
from serve.settings import ServeSettings
from serve.tiling import predict


@dataclass(frozen=True)
class Segmentation:
    """An image's segmentation."""

    labels: NDArray[np.uint8]
    """(H, W) uint8, 1..C in the order of the manifest's classes."""
    confidence: NDArray[np.uint8]
    """(H, W) uint8, probability of the label, 255 = 1.0."""
    summary: Summary
    """Numbers per class, and which model answered."""


class ImageSegmenter(Protocol):
    """Segments images: `Segmenter` in this process, `HttpClient` and `TritonClient` elsewhere."""

    @property
    def manifest(self) -> Manifest:
        """The model that answers."""
        ...

    def segment(self, image: NDArray[np.uint8]) -> Segmentation:
        """Segment an (H, W, 3) uint8 RGB image."""
        ...

    def close(self) -> None:
        """Free what is held; not used after."""
        ...


class Segmenter:
    """Segments images of any size with one backend; many threads may use it at once."""

    def __init__(self, backend: Backend, manifest: Manifest) -> None:
        self._backend = backend
        self.manifest = manifest

    def segment(self, image: NDArray[np.uint8]) -> Segmentation:
        """Segment an image of any size.

        Args:
            image: (H, W, 3) uint8, RGB in [0, 255].

        Raises:
            ImageError: the array is of another shape or dtype.
            BackendUnavailableError: the backend does not answer.
        """
        check_image(image)
        prediction = predict(image, self._backend, self.manifest)
        summary = summarise(prediction, self.manifest)
        return Segmentation(prediction.labels, prediction.confidence, summary)

    def warm_up(self) -> None:
        """Run one black tile, so that the first request does not pay for what is set up lazily."""
        side = self.manifest.tile_size_px
        self.segment(np.zeros((side, side, 3), np.uint8))

    def is_ready(self) -> bool:
        """Whether the backend would answer now."""
        return self._backend.is_ready()

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_segmenter(settings: ServeSettings, manifest: Manifest | None = None) -> Segmenter:
    """Read the bundle, open the backend and run it once.

    Args:
        settings: name the bundle and the backend.
        manifest: the bundle's, if it has been read and checked already.

    Raises:
        BundleError: the bundle is missing, damaged or of another version.
        BackendUnavailableError: Triton is not reachable or serves something else.
    """
    manifest = manifest or read_bundle(settings.bundle)
    segmenter = Segmenter(open_backend(settings, manifest), manifest)
    segmenter.warm_up()
    return segmenter


def check_image(image: NDArray[np.uint8]) -> None:
    """Raise ImageError unless `image` is (H, W, 3) uint8 with at least one pixel."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ImageError(
            f"the array is {image.shape} {image.dtype}, expected (H, W, 3) uint8 with RGB in "
            "[0, 255]. Convert it first."
        )
