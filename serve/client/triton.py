"""Clients of a Triton server: `TritonClient`, and `AsyncTritonClient` to await.

Both cut, blend and count on this side, with the segmenter that the service runs.
"""

import asyncio
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from serve.contract.closing import AsyncClosing
from serve.contract.manifest import Manifest
from serve.images.mpp import FROM_REQUEST, Mpp, MppSource
from serve.inference.batching import pool_of
from serve.inference.patient_triton import PatientTriton
from serve.inference.segmenter import MAX_PIXELS, Segmentation, TileSegmenter, check_warm_up
from serve.settings import SharedMemory


class TritonOptions(TypedDict, total=False):
    """The keyword arguments of both clients; see `TritonClient`."""

    timeout_s: float
    shared_memory: SharedMemory
    max_pixels: int
    max_tiles: int
    patience_s: float
    bundle: Path | None


class TritonClient(TileSegmenter):
    """Segments images on a Triton server over gRPC; many threads may use it at once.

    Args:
        url: host:port of Triton's gRPC endpoint.
        manifest: of the bundle that Triton's model repository was filled from.
        timeout_s: seconds to wait for one answer of Triton.
        shared_memory: whether to pass tensors through it; `auto` if Triton is on loopback.
        max_pixels: largest image in pixels, after it is resampled to the model's um per pixel.
        max_tiles: most tiles of one image; 0 sets no limit besides `max_pixels`.
        patience_s: seconds during which a tile is sent again while Triton cannot be reached, as
            when it restarts, with growing pauses.
        bundle: folder of that bundle. With it, the labels of its warm-up image are compared, also
            after Triton was lost: Triton alone cannot tell another model of the same interface.

    Raises:
        BackendUnavailableError: Triton cannot be reached or serves something else.
        BundleError: too few labels of the warm-up image are those of the export.
    """

    def __init__(
        self,
        url: str,
        manifest: Manifest,
        *,
        timeout_s: float = 30.0,
        shared_memory: SharedMemory = "auto",
        max_pixels: int = MAX_PIXELS,
        max_tiles: int = 0,
        patience_s: float = 120.0,
        bundle: Path | None = None,
    ) -> None:
        backend = PatientTriton(
            url,
            manifest,
            bundle=bundle,
            patience_s=patience_s,
            timeout_s=timeout_s,
            shared_memory=shared_memory,
        )
        runner = pool_of(backend, manifest)
        super().__init__(runner, manifest, max_pixels=max_pixels, max_tiles=max_tiles)
        if bundle is not None:
            check_warm_up(self, bundle)


class AsyncTritonClient(AsyncClosing):
    """`TritonClient`, to await; takes the same arguments. It works in threads."""

    def __init__(self, url: str, manifest: Manifest, **options: Unpack[TritonOptions]) -> None:
        self._client = TritonClient(url, manifest, **options)

    async def manifest(self) -> Manifest:
        """The manifest that this client was given."""
        return self._client.manifest

    async def segment(
        self,
        image: NDArray[np.uint8],
        *,
        mpp: Mpp | None = None,
        mpp_source: MppSource = FROM_REQUEST,
        with_probabilities: bool = False,
    ) -> Segmentation:
        """Segment an image of any size; see `TileSegmenter.segment`."""
        return await asyncio.to_thread(
            self._client.segment,
            image,
            mpp=mpp,
            mpp_source=mpp_source,
            with_probabilities=with_probabilities,
        )

    async def close(self) -> None:
        """Close the connection to Triton."""
        await asyncio.to_thread(self._client.close)
