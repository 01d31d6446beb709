"""Clients of a Triton server: `TritonClient`, and `AsyncTritonClient` to await.

Both cut, blend and count on this side, with the segmenter that the service runs.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from serve.client.patience import Patience
from serve.contract.closing import AsyncClosing
from serve.contract.errors import BackendUnreachableError
from serve.contract.manifest import Manifest
from serve.images.mpp import FROM_REQUEST, Mpp, MppSource
from serve.inference.batching import pool_of
from serve.inference.segmenter import MAX_PIXELS, Segmentation, TileSegmenter
from serve.inference.triton import TritonBackend
from serve.settings import SharedMemory


class TritonOptions(TypedDict, total=False):
    """The keyword arguments of both clients; see `TritonClient`."""

    timeout_s: float
    shared_memory: SharedMemory
    max_pixels: int
    max_tiles: int
    patience_s: float


class _PatientTriton(TritonBackend):
    """Sends a batch again while the server, which has answered before, cannot be reached."""

    patience_s = 0.0

    def infer(self, images: NDArray[np.uint8], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See `Backend.infer`."""
        patience = Patience(self.patience_s)
        while True:
            try:
                return super().infer(images, outputs)
            except BackendUnreachableError:
                pause_s = patience.after_failure()
                if pause_s is None:
                    raise
            time.sleep(pause_s)


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

    Raises:
        BackendUnavailableError: Triton cannot be reached or serves something else.
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
    ) -> None:
        backend = _PatientTriton(url, manifest, timeout_s=timeout_s, shared_memory=shared_memory)
        backend.patience_s = patience_s
        runner = pool_of(backend, manifest)
        super().__init__(runner, manifest, max_pixels=max_pixels, max_tiles=max_tiles)


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
