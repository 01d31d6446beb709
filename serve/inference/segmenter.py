"""Image in, segmentation out: what the service, the clients and the command line share."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.contract.closing import Closing
from serve.contract.errors import BundleError, FocalPathError, ImageError, ImageTooLargeError
from serve.contract.machine import this_processor
from serve.contract.manifest import Manifest, read_bundle
from serve.contract.unchanged import while_unchanged
from serve.images.decode import Picture
from serve.images.mpp import (
    ASSUMED,
    FROM_REQUEST,
    UNKNOWN,
    Mpp,
    MppSource,
    check_aspect,
    check_mpp,
    sides_of,
)
from serve.images.tiles import UNSCALED, Scale, check_enlargement, num_tiles, scale_to, scaled_size
from serve.inference.backend import Backend, RunsOn
from serve.inference.batching import ObserveWait, TileBatcher, TileRunner, pool_of
from serve.inference.patient_triton import PatientTriton
from serve.inference.providers import open_in_process
from serve.inference.summary import Summary, summarise
from serve.inference.tiling import LowResProbabilities, predict
from serve.inference.trial import share_of_equal, too_few_labels, warm_up_tile
from serve.settings import InferenceSettings

MAX_PIXELS = InferenceSettings().max_image_pixels


@dataclass(frozen=True)
class Segmentation:
    """An image's segmentation, in its own pixels."""

    labels: NDArray[np.uint8]
    """(H, W) uint8, 1..C in the order of the manifest's classes."""
    confidence: NDArray[np.uint8]
    """(H, W) uint8, probability of the label, 255 = 1.0."""
    summary: Summary
    """Numbers per class, and which model answered."""
    low_res: LowResProbabilities | None = None
    """The probabilities of all classes, if requested."""


class TileSegmenter(Closing):
    """Segments images of any size with one backend; many threads may use it at once.

    Args:
        backend: runs the model; closed with this object.
        manifest: of that model.
        max_pixels: largest image in pixels, after it is resampled to the model's um per pixel.
        max_tiles: most tiles of one image; 0 sets no limit besides `max_pixels`.
        runs_on: what the backend runs on, if known.
    """

    def __init__(
        self,
        backend: TileRunner,
        manifest: Manifest,
        *,
        max_pixels: int = MAX_PIXELS,
        max_tiles: int = 0,
        runs_on: RunsOn | None = None,
    ) -> None:
        self._backend = backend
        self._max_pixels = max_pixels
        self._max_tiles = max_tiles
        self.manifest = manifest
        self.runs_on = runs_on

    def segment(
        self,
        image: NDArray[np.uint8],
        *,
        mpp: Mpp | None = None,
        mpp_source: MppSource = FROM_REQUEST,
        with_probabilities: bool = False,
    ) -> Segmentation:
        """Segment an image of any size.

        Args:
            image: (H, W, 3) uint8, RGB in [0, 255].
            mpp: um per pixel of the image, a `PixelSize` where pixels are not squares; None takes
                it as the model's, and the summary says so.
            mpp_source: where `mpp` comes from, such as "request" or "OME-XML"; see
                `serve.images.mpp`.
            with_probabilities: also return the probabilities of all classes.

        Raises:
            ImageError: the array is of another shape or dtype, or its pixels are far from squares.
            ImageTooLargeError: the image is too large, or has too many tiles, at the model's um per
                pixel.
            OptionError: `mpp` is out of range.
            BackendUnavailableError: the backend does not answer.
        """
        check_image(image)
        prediction = predict(
            image,
            self._backend,
            self.manifest,
            scale=self._scale(image.shape[0], image.shape[1], mpp, mpp_source),
            with_probabilities=with_probabilities,
        )
        if mpp is None:
            mpp, mpp_source = self.manifest.mpp, ASSUMED if self.manifest.mpp else UNKNOWN
        summary = summarise(prediction, self.manifest, mpp=mpp, mpp_source=mpp_source)
        return Segmentation(prediction.labels, prediction.confidence, summary, prediction.low_res)

    def segment_picture(
        self,
        picture: Picture,
        *,
        mpp: float | None = None,
        mpp_source: MppSource = FROM_REQUEST,
        with_probabilities: bool = False,
    ) -> Segmentation:
        """Segment a decoded file; the summary has the notes from reading it.

        Args:
            picture: the file's pixels, and what it states of them.
            mpp: um per pixel that comes before the file's own.
            mpp_source: where `mpp` comes from.
            with_probabilities: also return the probabilities of all classes.

        Raises:
            FocalPathError: as `segment`.
        """
        result = self.segment(
            picture.pixels,
            mpp=picture.pixel_size if mpp is None else mpp,
            mpp_source=picture.mpp_source if mpp is None else mpp_source,
            with_probabilities=with_probabilities,
        )
        summary = result.summary.with_notes(picture.mpp_note, picture.notes_at(mpp))
        return replace(result, summary=summary)

    def num_tiles(
        self, height: int, width: int, mpp: Mpp | None, mpp_source: MppSource = FROM_REQUEST
    ) -> int:
        """How many tiles an image costs: what `segment` would take, without its pixels.

        Raises:
            ImageError: `segment` would refuse it.
        """
        scale = self._scale(height, width, mpp, mpp_source)
        return num_tiles(*scaled_size(height, width, scale), self.manifest.tile_size_px)

    def _scale(self, height: int, width: int, mpp: Mpp | None, mpp_source: MppSource) -> Scale:
        """Factors from the image's pixels to the model's; refuses an image over the limits."""
        if mpp is not None:
            check_aspect(sides_of(mpp), mpp_source)
            for side in sides_of(mpp):
                check_mpp(side)
        scale = scale_to(self.manifest.mpp, mpp)
        rows, columns = scaled_size(height, width, scale)
        at = ""
        if scale != UNSCALED and mpp is not None:
            at = f"At {sides_of(mpp)} um per pixel, for the model's {self.manifest.mpp:g}, "
        check_enlargement(self.manifest.mpp, mpp, "the image")
        tile = self.manifest.tile_size_px
        tiles = num_tiles(rows, columns, tile)
        limit = f"{self._max_tiles} tiles" if self._max_tiles else f"{self._max_pixels} pixels"
        # A thin image costs whole tiles, as one as wide as a tile would.
        costs = max(rows, tile) * max(columns, tile)
        is_over = scale != UNSCALED and rows * columns > self._max_pixels
        is_over |= min(rows, columns) < tile and costs > max(self._max_pixels, tile**2)
        if is_over or tiles > self._max_tiles > 0:
            raise ImageTooLargeError(
                f"{at}the image is {columns} x {rows}: {rows * columns} pixels, {tiles} tiles of "
                f"{tile}. At most {limit} are accepted. Crop it, or check its um per pixel.",
                code="too_many_tiles",
            )
        return scale

    @property
    def backend(self) -> TileRunner:
        """The tile runner that all requests share."""
        return self._backend

    def warm_up(self) -> None:
        """Run one black tile, so that the first request does not pay for lazy initialisation."""
        side = self.manifest.tile_size_px
        self.segment(np.zeros((side, side, 3), np.uint8))

    def is_ready(self) -> bool:
        """Whether the backend can answer now."""
        return self._backend.is_ready()

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()


def open_segmenter(
    settings: InferenceSettings,
    manifest: Manifest | None = None,
    *,
    observe: Callable[[Backend], Backend] = lambda backend: backend,
    observe_wait: ObserveWait | None = None,
    before: RunsOn | None = None,
    patience_s: float = 0.0,
) -> TileSegmenter:
    """Open a bundle's backend for many requests to share, and compare its warm-up image.

    Args:
        settings: name the bundle and the backend.
        manifest: the bundle's, if it has been read and checked already.
        observe: wraps the backend, for instance to measure every batch.
        observe_wait: called with the seconds that each tile waited for its batch.
        before: what the previous version of the model runs on.
        patience_s: seconds during which a tile is sent again to a Triton that cannot be reached.

    Raises:
        BundleError: the bundle is missing, damaged or of another version, or the labels of its
            warm-up image are not those of the export.
        BackendUnavailableError: Triton is not reachable or serves something else.
    """
    if manifest is None:
        return while_unchanged(
            settings.bundle,
            lambda: open_segmenter(
                settings,
                read_bundle(settings.bundle),
                observe=observe,
                observe_wait=observe_wait,
                before=before,
                patience_s=patience_s,
            ),
            discard=TileSegmenter.close,
        )
    opened, runs_on = open_backend(settings, manifest, before, patience_s=patience_s)
    backend = observe(opened)
    shared: TileRunner
    if settings.backend == "triton":
        shared = pool_of(backend, manifest)
    else:
        shared = TileBatcher(
            backend,
            max_batch_size=settings.max_batch_size or manifest.max_batch_size,
            max_delay_s=settings.batch_delay_ms / 1000,
            parallel=settings.parallel_batches,
            observe_wait=observe_wait,
        )
    segmenter = TileSegmenter(
        shared,
        manifest,
        max_pixels=settings.max_image_pixels,
        max_tiles=settings.max_image_tiles,
        runs_on=runs_on,
    )
    check_warm_up(segmenter, settings.bundle)
    return segmenter


def check_warm_up(segmenter: TileSegmenter, bundle: Path) -> None:
    """Segment the bundle's warm-up image and compare with its labels at export, where it has one.

    What answers may be another model of the same interface: a Triton's, or one that this machine
    computes wrongly. Then, and where it does not answer, the segmenter is closed.

    Raises:
        BundleError: too few labels agree, or the file is not one of a warm-up image.
    """
    try:
        _compare_warm_up(segmenter, bundle)
    except FocalPathError:
        segmenter.close()
        raise


def _compare_warm_up(segmenter: TileSegmenter, bundle: Path) -> None:
    manifest = segmenter.manifest
    image, labels = warm_up_tile(bundle, manifest)
    found = segmenter.segment(image).labels
    if manifest.warm_up is None or labels is None:
        return
    agreement = share_of_equal(found, labels)
    if agreement < manifest.warm_up.min_agreement:
        raise BundleError(
            f"{bundle / manifest.warm_up.file}: "
            f"{too_few_labels(agreement, manifest.warm_up.min_agreement)}. Check that the runtime "
            "and its precision suit this machine, or, with Triton, that it serves this bundle; "
            "else export again.",
            code="warm_up_differs",
        )


def open_backend(
    settings: InferenceSettings,
    manifest: Manifest,
    before: RunsOn | None = None,
    *,
    patience_s: float = 0.0,
) -> tuple[Backend, RunsOn]:
    """Open the backend that the settings name, and describe what it runs on.

    Args:
        settings: name the bundle and the backend.
        manifest: the bundle's.
        before: what the previous version of the model runs on.
        patience_s: see `open_segmenter`.

    Raises:
        BundleError: the bundle has no file that the backend may run.
        BackendUnavailableError: Triton is not reachable or serves something else, or this machine
            lacks the provider.
    """
    if settings.backend == "onnxruntime":
        return open_in_process(settings, manifest, before)
    backend = PatientTriton(
        settings.triton_url,
        manifest,
        bundle=settings.bundle,
        patience_s=patience_s,
        timeout_s=settings.triton_timeout_s,
        shared_memory=settings.triton_shared_memory,
    )
    return backend, RunsOn(
        provider="triton",
        precision=None,
        runtime=f"Triton at {settings.triton_url}",
        processor=this_processor().title,
        reason="the settings name it",
    )


def check_image(image: NDArray[np.uint8]) -> None:
    """Raise ImageError unless `image` is (H, W, 3) uint8 with at least one pixel."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ImageError(
            f"the array is {image.shape} {image.dtype}, expected (H, W, 3) uint8 with RGB in "
            "[0, 255]. Convert it first."
        )
