"""A Triton server that may restart, or load its model again, while it is asked.

Tiles are sent again until a server that restarts is back. A model that was loaded again is compared
again, also where its version has the same number.
"""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.contract.errors import BackendUnreachableError
from serve.contract.manifest import Manifest
from serve.inference.patience import Patience
from serve.inference.trial import agreement, too_few_labels, warm_up_tile
from serve.inference.triton import TritonBackend
from serve.settings import SharedMemory

_COUNTED_WITHIN_S = 0.02
"""How long after an answer Triton has surely counted it."""


class PatientTriton(TritonBackend):
    """Sends a batch again while the server, which has answered before, cannot be reached.

    A server that comes back may have another model, and so may one whose repository was made anew
    and numbers its versions from 1 again: what it serves is compared again.

    Args:
        url: host:port of Triton's gRPC endpoint.
        manifest: of the model that Triton must serve.
        bundle: whose warm-up image is compared; None compares the interface and the version only.
        patience_s: seconds during which a batch is sent again, with growing pauses.
        timeout_s: seconds to wait for one answer.
        shared_memory: whether to pass tensors through it; see `InferenceSettings`.

    Raises:
        BackendUnavailableError: Triton cannot be reached or serves something else.
    """

    def __init__(
        self,
        url: str,
        manifest: Manifest,
        *,
        bundle: Path | None,
        patience_s: float,
        timeout_s: float = 30.0,
        shared_memory: SharedMemory = "auto",
    ) -> None:
        super().__init__(url, manifest, timeout_s=timeout_s, shared_memory=shared_memory)
        self._bundle = bundle
        self._patience_s = patience_s
        self._was_lost = False
        self._comparing = threading.Lock()
        self._num_counted = self._count_tiles() or 0

    def infer(self, images: NDArray[np.uint8], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See `Backend.infer`."""
        patience = Patience(self._patience_s)
        while True:
            try:
                self._compare_if_lost()
                least = self._num_counted + len(images)
                answers = super().infer(images, outputs)
                if self._was_loaded_again(least):
                    self._was_lost = True
                    self._compare_if_lost()
                return answers
            except BackendUnreachableError:
                self._was_lost = True
                pause_s = patience.after_failure()
                if pause_s is None:
                    raise
            time.sleep(pause_s)

    def _was_loaded_again(self, least: int) -> bool:
        """Whether Triton has counted fewer tiles: it counts from 0 when it loads a model.

        It may count a moment after it has answered, so a low count is asked for once more.
        """
        count = self._count_tiles()
        if count is not None and count < least:
            time.sleep(_COUNTED_WITHIN_S)
            count = self._count_tiles()
        if count is not None and count < least:
            return True
        self._num_counted = count or self._num_counted
        return False

    def _compare_if_lost(self) -> None:
        with self._comparing:
            if not self._was_lost:
                return
            self._was_lost = False  # first: another thread may lose it again meanwhile
            try:
                self._compare()
            except BaseException:
                self._was_lost = True
                raise
            self._num_counted = self._count_tiles() or 0

    def _compare(self) -> None:
        """Raise ModelChangedError if Triton serves another model than when it was opened."""
        if (version := self._check_interface()) != self._version:
            raise self._changed(f"version {version}")
        warm_up = self._manifest.warm_up
        if self._bundle is None or warm_up is None:
            return
        found = agreement(super().infer, warm_up_tile(self._bundle, self._manifest))
        if found is not None and found < warm_up.min_agreement:
            raise self._changed(
                too_few_labels(found, warm_up.min_agreement), "the model that it was opened with"
            )
