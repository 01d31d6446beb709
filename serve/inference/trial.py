"""A short trial that finds the fastest provider for one tile."""

import hashlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from serve.contract.errors import BundleError, FocalPathError
from serve.contract.file_lock import file_lock
from serve.contract.manifest import Manifest
from serve.contract.npz import read_npz
from serve.inference.backend import Backend, InferBatch, Trial

HOME_VARIABLE = "HOME_OF_FOCALPATH"
"""Names a folder that the processes of one service share; deleted when the service stops."""
_LONG_RUN_S = 5.0
"""A tile that took longer is not timed again."""
_TIMED_RUNS = 3
_TRIALS = TypeAdapter(list[Trial])

Tile = tuple[NDArray[np.uint8], NDArray[np.uint8] | None]
"""(T, T, 3) uint8 RGB, and its labels (T, T) uint8, where they are known."""


@dataclass(frozen=True)
class Candidate:
    """A file of the bundle on one provider."""

    provider: str
    precision: str
    is_proven: bool
    """Whether the gate proved it on this kind of processor."""
    min_agreement: float
    """Share of the warm-up image's labels that it must reproduce."""
    open: Callable[[], Backend]

    @property
    def title(self) -> str:
        """As `Trial.title`."""
        return f"{self.provider} in {self.precision}"


def try_on(candidate: Candidate, bundle: Path, manifest: Manifest) -> Trial:
    """Open a candidate, compare its labels with the export's, time it, and close it."""
    trial = Trial(
        provider=candidate.provider,
        precision=candidate.precision,
        is_proven=candidate.is_proven,
    )
    if manifest.warm_up is None and candidate.min_agreement > 0:
        problem = (
            "the gate did not prove it on this kind of processor, and the bundle has no warm-up "
            "image to compare with"
        )
        return trial.model_copy(update={"problem": problem})
    try:
        with closing(candidate.open()) as backend:
            return _measure(trial, candidate, backend, warm_up_tile(bundle, manifest))
    except FocalPathError as error:
        return trial.model_copy(update={"problem": str(error)})


def warm_up_tile(bundle: Path, manifest: Manifest) -> Tile:
    """The bundle's warm-up image and its labels at export; a black tile where it has none.

    Raises:
        BundleError: the file is not one of a warm-up image.
    """
    if manifest.warm_up is None:
        return np.zeros((manifest.tile_size_px, manifest.tile_size_px, 3), np.uint8), None
    path = bundle / manifest.warm_up.file
    try:
        arrays = read_npz(path)
        return arrays["image"], arrays["labels"]
    except (OSError, ValueError, LookupError) as error:
        raise BundleError(
            f"{path} holds no warm-up image ({error}), expected arrays `image` and `labels`. "
            "Export the checkpoint again.",
            code="bundle_damaged",
        ) from error


def agreement(infer: InferBatch, tile: Tile) -> float | None:
    """Share of the tile's labels that a backend reproduces; None if they are not known."""
    image, labels = tile
    found = infer(image[None], ("labels",))["labels"][0]
    return None if labels is None else share_of_equal(found, labels)


def share_of_equal(found: NDArray[np.uint8], labels: NDArray[np.uint8]) -> float:
    """Share of labels that are as expected; 0 where there are more or fewer of them."""
    return float(np.mean(found == labels)) if found.shape == labels.shape else 0.0


def too_few_labels(found: float, asked: float) -> str:
    """Message for a provider that reproduces too few labels of the warm-up image."""
    return (
        f"{found:.3%} of the warm-up image's labels are those of the export, expected at least "
        f"{asked:.3%}"
    )


def fastest(trials: Sequence[Trial]) -> Trial:
    """The fastest of the trials that have no problem.

    Raises:
        BundleError: every trial has a problem.
    """
    timed = [trial for trial in trials if trial.seconds is not None and trial.problem is None]
    if not timed:
        problems = "; ".join(f"{trial.title}: {trial.problem}" for trial in trials)
        raise BundleError(
            f"no provider may run this bundle on this machine: {problems}. Export the checkpoint "
            "again, or choose one with FOCALPATH_PROVIDER."
        )
    return min(timed, key=lambda trial: trial.seconds or 0.0)


def in_words(trials: Sequence[Trial]) -> str:
    """Summarise the trials in one line, the fastest first, what may not run last."""
    right = sorted((t.seconds, t.title) for t in trials if t.seconds is not None and not t.problem)
    return "; ".join(
        [f"{title} takes {seconds:.3g} s for a tile" for seconds, title in right]
        + [f"{t.title} was left out: {t.problem.rstrip('.')}" for t in trials if t.problem]
    )


def shared_trials(key: Sequence[object], run: Callable[[], list[Trial]]) -> list[Trial]:
    """Run a trial once for all processes of a service, so that all choose the same provider.

    Args:
        key: what the trial depends on.
        run: the trial; the first process runs it, the others wait and read its result.
    """
    home = os.environ.get(HOME_VARIABLE)
    if not home or not Path(home).is_dir():
        return run()
    # The processes of one service have one parent.
    name = hashlib.sha256(repr((os.getppid(), *key)).encode()).hexdigest()[:16]
    path = Path(home) / f"focalpath-trial-{name}.json"
    with file_lock(path.with_suffix(".lock"), wait=True):
        try:
            return _TRIALS.validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):  # none yet, or of a process that was killed
            trials = run()
        path.write_bytes(_TRIALS.dump_json(trials))
        return trials


def _measure(trial: Trial, candidate: Candidate, backend: Backend, tile: Tile) -> Trial:
    started = time.perf_counter()
    found = agreement(backend.infer, tile)
    seconds = [time.perf_counter() - started]
    trial = trial.model_copy(update={"label_agreement": found})
    if found is not None and found < candidate.min_agreement:
        return trial.model_copy(update={"problem": too_few_labels(found, candidate.min_agreement)})
    if seconds[0] < _LONG_RUN_S:  # the first run also pays for what is set up lazily
        seconds = [_timed_run(backend, tile[0]) for _ in range(_TIMED_RUNS)]
    return trial.model_copy(update={"seconds": statistics.median(seconds)})


def _timed_run(backend: Backend, image: NDArray[np.uint8]) -> float:
    started = time.perf_counter()
    backend.infer(image[None], ("labels",))
    return time.perf_counter() - started
