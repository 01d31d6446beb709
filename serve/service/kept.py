"""Keeps the last results in memory, for clients that ask for several formats of one image."""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Self

from serve.contract.manifest import Manifest
from serve.images.mpp import MppSource
from serve.inference.segmenter import Segmentation

KEEP_HEADER = "X-Keep-Result"
"""Request header. Any value but `no` keeps the result in memory for further requests with the same
image, or takes a kept one. Without it a request runs the model, unless the result was kept because
its outlines had too many corners to be answered."""


@dataclass(frozen=True)
class ResultKey:
    """Everything that a result depends on."""

    sha256: str
    """Of the uploaded file."""
    mpp: float | None
    """um per pixel that comes before the file's own."""
    mpp_source: MppSource
    """Where `mpp` comes from: it is in the result."""
    model: tuple[str, ...]
    """Name and version, and the checksums of the files."""

    @classmethod
    def of(cls, data: bytes, mpp: float | None, mpp_source: MppSource, manifest: Manifest) -> Self:
        """The key of an upload's result by a model."""
        files = sorted(artefact.sha256 for artefact in manifest.artefacts)
        model = (manifest.name, manifest.version, *files)
        return cls(hashlib.sha256(data).hexdigest(), mpp, mpp_source, model)


class KeptResults:
    """Results by their key; drops the least recently used first.

    Many threads may use it at once.

    Args:
        max_bytes: limit for all results together; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._guard = threading.Lock()
        self._results: OrderedDict[ResultKey, Segmentation] = OrderedDict()
        self._for_all: set[ResultKey] = set()

    def get(
        self, key: ResultKey, *, with_probabilities: bool, asked: bool = True
    ) -> Segmentation | None:
        """The kept result; None if there is none, or it lacks the probabilities asked for.

        Args:
            key: of the result.
            with_probabilities: whether the probabilities of all classes are needed.
            asked: whether the request asks for a kept result; else it gets only one for all.
        """
        with self._guard:
            result = self._results.get(key)
            if result is None or (with_probabilities and result.low_res is None):
                return None
            if not (asked or key in self._for_all):
                return None
            self._results.move_to_end(key)
        return result if with_probabilities else replace(result, low_res=None)

    @property
    def has_for_all(self) -> bool:
        """Whether a request that does not ask for kept results may find one."""
        return bool(self._for_all)

    def put(self, key: ResultKey, result: Segmentation, *, for_all: bool = False) -> None:
        """Keep a result, unless it alone is larger than the limit.

        Args:
            key: of the result.
            result: what to keep.
            for_all: whether requests that do not ask for a kept result get it, too.
        """
        if _num_bytes(result) > self._max_bytes:
            return
        with self._guard:
            self._results[key] = result
            self._results.move_to_end(key)
            if for_all:
                self._for_all.add(key)
            while sum(map(_num_bytes, self._results.values())) > self._max_bytes:
                self._for_all.discard(self._results.popitem(last=False)[0])


def _num_bytes(result: Segmentation) -> int:
    low_res = result.low_res.probabilities.nbytes if result.low_res else 0
    return int(result.labels.nbytes + result.confidence.nbytes + low_res)
