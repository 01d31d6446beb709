"""The model of the running service: opens it, watches its bundle, replaces it without downtime."""

import copy
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from serve.contract.errors import (
    BackendUnavailableError,
    BackendUnreachableError,
    BundleError,
    FocalPathError,
    ModelChangedError,
)
from serve.contract.manifest import MANIFEST_FILE, Manifest, read_bundle
from serve.contract.unchanged import Stamp, stamp_of, while_unchanged
from serve.inference.backend import RunsOn
from serve.inference.segmenter import TileSegmenter, open_segmenter
from serve.inference.triton import load_on_triton, version_on_triton
from serve.service.telemetry import ObservedBackend, Telemetry
from serve.settings import ServeSettings

_RETRY_AFTER_S = 1.0
"""Seconds after a failure to open the model during which requests get the same error at once."""
_ATTEMPTS = 5
"""Attempts per request while Triton changes the model."""
_PAUSE_S = 0.2
"""Between two attempts: Triton answers with the old and the new version for a moment."""
_STOPPING = "The service is being stopped. Try again."
_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class _Opened:
    """An open segmenter, and how many requests use it."""

    segmenter: TileSegmenter
    stamp: Stamp
    """The bundle's files as they were when it was opened."""
    triton_version: str | None
    """Triton's own number of the version, where it is asked."""
    users: int = 0
    is_retired: bool = False


class Model:
    """Holds the newest working segmenter of a bundle; many threads may use it at once."""

    def __init__(self, settings: ServeSettings, telemetry: Telemetry) -> None:
        self._settings = settings
        self._telemetry = telemetry
        self._opening = threading.Lock()
        """Held by the thread that reads the bundle and opens or replaces the segmenter."""
        self._guard = threading.Lock()
        """Held for short moments, to read or change the attributes below."""
        self._current: _Opened | None = None
        self._served: Manifest | None = None
        """Of the model that answered last."""
        self._closed = False
        self._checked: tuple[Stamp, Manifest] | None = None
        self._failure: tuple[float, FocalPathError] | None = None
        self._refused: Stamp | None = None
        self._obstacle = ""

    def manifest(self) -> Manifest:
        """The manifest of the model that answers, or of the bundle while none does.

        Raises:
            BundleError: the bundle is missing or damaged.
        """
        with self._guard:
            if self._current is not None:
                return self._current.segmenter.manifest
        with self._opening:
            return self._read_bundle(stamp_of(self._settings.bundle))

    def runs_on(self) -> RunsOn:
        """What the model runs on, and why.

        Raises:
            FocalPathError: no model answers now.
        """
        with self._in_use() as opened:
            assert opened.segmenter.runs_on is not None, "`open_segmenter` says so"
            return opened.segmenter.runs_on

    def run(self, work: Callable[[TileSegmenter], T]) -> T:
        """Do `work` with the open segmenter; waits while it is being opened.

        The segmenter stays open until the work ends. If Triton changes the model meanwhile, the
        work is done again with the new one.

        Raises:
            FocalPathError: the segmenter cannot be opened now, or `work` raises it.
        """
        for attempt in range(_ATTEMPTS):
            with self._in_use() as opened:
                try:
                    return work(opened.segmenter)
                except BackendUnreachableError:
                    self._lose(opened)
                    raise
                except ModelChangedError as error:
                    changed = error
            if attempt:
                time.sleep(_PAUSE_S)
            try:
                self._replace(opened)
            except ModelChangedError as error:  # Triton is between the two, or not from this bundle
                changed = error
        raise changed

    def is_ready(self) -> bool:
        """Whether a request would be answered now; opens the model if it is not open."""
        return self.why_not_ready() is None

    def why_not_ready(self) -> str | None:
        """Why a request would not be answered now; None if it would."""
        if self._current is None and self._opening.locked():
            return "The model is being opened."
        try:
            with self._in_use() as opened:
                if opened.segmenter.is_ready():
                    return None
                self._lose(opened)
                return "The backend does not answer."
        except FocalPathError as error:
            _log.warning("not ready: %s", error)
            return str(error)

    def open_in_background(self) -> None:
        """Open the segmenter and watch the bundle, in a thread of their own."""
        threading.Thread(target=self._watch, name="model", daemon=True).start()

    def look_for_update(self) -> None:
        """Replace the segmenter if the bundle is new and works; otherwise keep it."""
        bundle, current = self._settings.bundle, self._current
        stamp = stamp_of(bundle)
        if current is None or stamp in (current.stamp, self._refused):
            return
        if not (bundle / MANIFEST_FILE).is_file():  # it is being replaced
            return
        try:
            self._replace(current)
        except BundleError as error:
            self._refused = stamp  # not tried again until it changes
            self._telemetry.model_refused()
            _log.error("the new bundle is refused; the old model goes on: %s", error)
        except BackendUnavailableError as error:
            if self._obstacle != str(error):  # tried again at every look, logged once
                self._obstacle = str(error)
                _log.warning("the new bundle cannot be opened yet: %s", error)

    def close(self) -> None:
        """Close the segmenter as soon as no request uses it. Later requests are refused."""
        with self._guard:
            self._closed = True
            opened, self._current = self._current, None
        if opened is not None:
            self._retire(opened)

    def _watch(self) -> None:
        self.is_ready()
        while self._settings.bundle_poll_s > 0 and not self._closed:
            time.sleep(self._settings.bundle_poll_s)
            self.look_for_update()

    @contextmanager
    def _in_use(self) -> Iterator[_Opened]:
        """Keep the segmenter open within the block; opens it if it is not open."""
        opened = self._acquire()
        try:
            yield opened
        finally:
            with self._guard:
                opened.users -= 1
                is_unused = opened.is_retired and opened.users == 0
            if is_unused:
                opened.segmenter.close()

    def _acquire(self) -> _Opened:
        while True:
            with self._guard:
                if self._closed:
                    raise BackendUnavailableError(_STOPPING, code="stopping")
                if self._current is not None:
                    self._current.users += 1
                    return self._current
            self._open_first()

    def _open_first(self) -> None:
        with self._opening:
            if self._current is not None:
                return
            if self._failure and time.monotonic() - self._failure[0] < _RETRY_AFTER_S:
                raise copy.copy(self._failure[1])
            try:
                opened = self._open()
            except FocalPathError as error:
                self._failure = (time.monotonic(), error)
                raise
            self._failure = None
            self._install(opened)

    def _replace(self, old: _Opened) -> None:
        """Open the bundle again to replace `old`, unless another thread has done so."""
        with self._opening:
            if self._current is not old:
                return
            self._install(self._open(old))
        self._retire(old)

    def _lose(self, opened: _Opened) -> None:
        """Open the model anew for the next request: a Triton that restarts may have another one."""
        with self._guard:
            if self._current is not opened:
                return
            self._current = None
        self._retire(opened)

    def _retire(self, opened: _Opened) -> None:
        """Close a segmenter as soon as no request uses it."""
        with self._guard:
            opened.is_retired = True
            is_unused = opened.users == 0
        if is_unused:
            opened.segmenter.close()

    def _install(self, opened: _Opened) -> None:
        with self._guard:
            is_late = self._closed
            if not is_late:
                self._current = opened
        if is_late:
            opened.segmenter.close()
            raise BackendUnavailableError(_STOPPING, code="stopping")
        manifest = opened.segmenter.manifest
        _log.info("%s %s answers requests now", manifest.name, manifest.version)
        if manifest.label_note:
            _log.warning("%s %s: %s", manifest.name, manifest.version, manifest.label_note)
        if manifest != self._served:  # else Triton was lost and is back
            self._telemetry.model_serves(manifest, self._settings.backend, self._served)
        self._served = manifest

    def _open(self, old: _Opened | None = None) -> _Opened:
        return while_unchanged(
            self._settings.bundle,
            lambda: self._open_once(old),
            discard=lambda opened: opened.segmenter.close(),
        )

    def _open_once(self, old: _Opened | None) -> _Opened:
        stamp = stamp_of(self._settings.bundle)
        manifest = self._read_bundle(stamp)
        triton_version = self._check_triton(manifest, old)
        segmenter = open_segmenter(
            self._settings,
            manifest,
            observe=lambda backend: ObservedBackend(backend, self._telemetry),
            observe_wait=self._telemetry.observe_batch_wait,
            before=old.segmenter.runs_on if old else None,
        )
        return _Opened(segmenter, stamp, triton_version)

    def _check_triton(self, manifest: Manifest, old: _Opened | None) -> str | None:
        """Make Triton load the model, if the settings say so; refuse a version that is not new."""
        if self._settings.backend != "triton":
            return None
        if self._settings.triton_load:
            load_on_triton(self._settings, manifest)
        version = version_on_triton(self._settings, manifest)
        # A changed model gets a new version number in Triton's repository, the same one does not.
        is_new = old is not None and manifest.artefacts != old.segmenter.manifest.artefacts
        if old is not None and is_new and version == old.triton_version:
            raise ModelChangedError(
                f"Triton still serves version {version}, of the bundle before; expected another "
                f"for {manifest.version}. Publish the bundle and wait until Triton has loaded it."
            )
        return version

    def _read_bundle(self, stamp: Stamp) -> Manifest:
        if self._checked is None or self._checked[0] != stamp:
            # Checks the files' SHA-256, so once only for the same files.
            self._checked = (stamp, read_bundle(self._settings.bundle))
        return self._checked[1]
