"""Passes tensors to and from a Triton server on this machine through system shared memory.

Triton must see this machine's /dev/shm (in a container, `--ipc=host` or a shared volume), and
/dev/shm must have room for the tensors of all tiles that are in flight. Where this does not work,
tensors are sent over gRPC.
"""

import logging
import os
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

from serve.contract.manifest import Manifest

_log = logging.getLogger(__name__)
_ERRORS = (InferenceServerException, shm.SharedMemoryException, OSError)
_NOT_NOW = ("StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED", "StatusCode.CANCELLED")
"""Triton cannot be reached, which says nothing about its memory."""
_SHARED_MEMORY = Path("/dev/shm")
_TIMEOUT_S = 2.0
"""Seconds to wait for Triton to take or let go a region."""
_PAUSES_S = (0.05, 0.2, 1.0)
"""Triton answers before it lets a request's regions go, and keeps what is in use."""


class SharedTensors:
    """A pool of regions in shared memory for the tensors of requests; they are reused.

    Args:
        client: registers the regions with Triton; many threads use it.
        manifest: shapes and dtypes.
    """

    def __init__(self, client: triton.InferenceServerClient, manifest: Manifest) -> None:
        self._client = client
        self._manifest = manifest
        self._guard = threading.Lock()
        self._free: dict[int, list[Place]] = {}
        self._works = True

    def take(self, num_tiles: int) -> "Place | None":
        """Take a region for a batch; None if shared memory does not work."""
        with self._guard:
            if not self._works:
                return None
            free = self._free.setdefault(num_tiles, [])
            if free:
                return free.pop()
        try:
            return Place(self._client, self._manifest, num_tiles)
        except _ERRORS as error:
            if isinstance(error, InferenceServerException) and error.status() in _NOT_NOW:
                return None
            with self._guard:
                self._works = False
            _log.warning(
                "tensors go to Triton over gRPC, since shared memory does not work: %s", error
            )
            return None

    def give_back(self, place: "Place") -> None:
        """Keep the region for another batch of its size."""
        with self._guard:
            self._free[place.num_tiles].append(place)

    def close(self) -> None:
        """Free the regions that are not in use."""
        with self._guard:
            self._works = False
            places = [place for free in self._free.values() for place in free]
            self._free.clear()
        answers = True
        for place in places:
            answers = place.close(ask=answers)


class Place:
    """A region for the input and the outputs of a batch of one size."""

    def __init__(
        self, client: triton.InferenceServerClient, manifest: Manifest, num_tiles: int
    ) -> None:
        self.num_tiles = num_tiles
        self._client = client
        self._name = f"focalpath-{os.getpid()}-{uuid.uuid4().hex}"
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._offsets: dict[str, int] = {}
        size = 0
        for spec in (*manifest.inputs, *manifest.outputs):
            shape, dtype = (num_tiles, *spec.shape[1:]), np.dtype(spec.dtype)
            self._shapes[spec.name], self._dtypes[spec.name] = shape, dtype
            self._offsets[spec.name] = size
            size += -(-int(np.prod(shape)) * dtype.itemsize // 64) * 64  # aligned
        self._region = shm.create_shared_memory_region(self._name, f"/{self._name}", size)
        try:
            with (_SHARED_MEMORY / self._name).open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a write to a full one is fatal
            client.register_system_shared_memory(
                self._name, f"/{self._name}", size, client_timeout=_TIMEOUT_S
            )
        except (InferenceServerException, OSError):
            shm.destroy_shared_memory_region(self._region)
            raise

    def write(self, images: NDArray[np.uint8]) -> triton.InferInput:
        """Copy the images into the region, and return the input that refers to them."""
        shm.set_shared_memory_region(self._region, [images], offset=self._offsets["image"])
        tensor = triton.InferInput("image", list(images.shape), "UINT8")
        tensor.set_shared_memory(self._name, images.nbytes, self._offsets["image"])
        return tensor

    def requested(self, names: Sequence[str]) -> list[triton.InferRequestedOutput]:
        """The outputs to request, each with its place in the region."""
        wanted = []
        for name in names:
            output = triton.InferRequestedOutput(name)
            nbytes = int(np.prod(self._shapes[name])) * self._dtypes[name].itemsize
            output.set_shared_memory(self._name, nbytes, self._offsets[name])
            wanted.append(output)
        return wanted

    def read(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Copy the outputs, since the region is reused."""
        return {
            name: shm.get_contents_as_numpy(
                self._region, self._dtypes[name], self._shapes[name], self._offsets[name]
            ).copy()
            for name in names
        }

    def close(self, *, ask: bool = True) -> bool:
        """Unregister the region, if Triton still knows it, and free it.

        Args:
            ask: Triton; false where it does not answer.

        Returns:
            Whether to ask it about the next one.
        """
        for pause_s in (*_PAUSES_S, None) if ask else ():
            try:
                self._client.unregister_system_shared_memory(self._name, client_timeout=_TIMEOUT_S)
                break
            except InferenceServerException as error:
                ask = error.status() not in _NOT_NOW
                if pause_s is None or not ask:
                    _log.debug("Triton did not give back %s: %s", self._name, error)
                    break
                time.sleep(pause_s)
        shm.destroy_shared_memory_region(self._region)
        return ask


def is_about_shared_memory(error: InferenceServerException) -> bool:
    """Whether Triton does not know a region, as after a restart."""
    return "shared memory" in str(error.message()).lower()
