"""How a run is shown: a bar in a terminal, one JSON per line in a log, or not at all."""

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from serve.slides.cohort import Outcome
from serve.slides.engine import Watcher

Mode = Literal["auto", "bar", "json", "quiet"]
_LOG_EVERY_S = 10.0


@dataclass
class _Count:
    """The tiles of the slide at work."""

    total: int = 0
    done: int = 0
    stage: str = ""
    _first: int = 0
    """Tiles that were done when the first of this run was."""
    _since: float | None = None
    """When that was: a slide may wait for the one before."""

    def add(self, num_tiles: int) -> None:
        """More tiles are done."""
        self.done += num_tiles
        if self._since is None:
            self._first, self._since = self.done, time.monotonic()

    @property
    def per_second(self) -> float:
        seconds = 0.0 if self._since is None else time.monotonic() - self._since
        return (self.done - self._first) / seconds if seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.done) / self.per_second if self.per_second else None


class _Counting(Watcher):
    """Counts the tiles of each slide at work, and the slides that have ended."""

    def __init__(self, num_slides: int) -> None:
        self._num_slides = num_slides
        self._ended = 0
        self._counts: dict[str, _Count] = {}

    def begin_slide(self, name: str, num_tiles: int, num_done: int) -> None:
        """See `Watcher`."""
        self._counts[name] = _Count(num_tiles, num_done)

    def end_slide(self, outcome: Outcome) -> None:
        """See `Watcher`."""
        self._ended += 1


class JsonLines(_Counting):
    """One JSON object per line: what begins and ends, and every ten seconds how far it is.

    Args:
        num_slides: of the whole run.
        file: where to.
    """

    def __init__(
        self, num_slides: int, file: TextIO, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(num_slides)
        self._file = file
        self._clock = clock
        self._told = clock()
        self._lock = threading.Lock()

    def begin_slide(self, name: str, num_tiles: int, num_done: int) -> None:
        """See `Watcher`."""
        super().begin_slide(name, num_tiles, num_done)
        self._tell(event="begin", slide=name, tiles=num_tiles, tiles_done=num_done)

    def add_tiles(self, name: str, num_tiles: int) -> None:
        """See `Watcher`."""
        count = self._counts[name]
        count.add(num_tiles)
        if self._clock() - self._told < _LOG_EVERY_S:
            return
        self._told = self._clock()
        left = count.seconds_left
        self._tell(
            event="progress",
            slide=name,
            slides=self._num_slides,
            slides_ended=self._ended,
            tiles=count.total,
            tiles_done=count.done,
            tiles_per_second=round(count.per_second, 2),
            seconds_left=None if left is None else round(left),
            bound_by=count.stage,
        )

    def bound_by(self, name: str, stage: str) -> None:
        """See `Watcher`."""
        self._counts[name].stage = stage

    def step(self, name: str, step: str) -> None:
        """See `Watcher`."""
        self._tell(event="output", slide=name, output=step)

    def end_slide(self, outcome: Outcome) -> None:
        """See `Watcher`."""
        super().end_slide(outcome)
        ended = outcome.model_dump(exclude={"name"})
        self._tell(event="end", slide=outcome.name, **ended)

    def note(self, text: str) -> None:
        """See `Watcher`."""
        self._tell(event="note", text=text)

    def _tell(self, **fields: object) -> None:
        with self._lock:
            print(json.dumps(fields), file=self._file, flush=True)


class Bar(_Counting):
    """A line per slide at work, with its bar, rate, time left and binding stage.

    Args:
        num_slides: of the whole run.
        console: where to.
    """

    def __init__(self, num_slides: int, console: Console) -> None:
        super().__init__(num_slides)
        self._progress = Progress(
            TextColumn("{task.fields[slides]}"),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} tiles"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[stage]}", style="dim"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._progress.start()

    def begin_slide(self, name: str, num_tiles: int, num_done: int) -> None:
        """See `Watcher`."""
        super().begin_slide(name, num_tiles, num_done)
        self._tasks[name] = self._progress.add_task(
            name,
            total=max(num_tiles, 1),
            completed=num_done,
            slides=f"{self._ended + len(self._tasks) + 1}/{self._num_slides}",
            rate="",
            stage="",
        )

    def add_tiles(self, name: str, num_tiles: int) -> None:
        """See `Watcher`."""
        count = self._counts[name]
        count.add(num_tiles)
        self._progress.update(
            self._tasks[name], completed=count.done, rate=f"{count.per_second:.1f}/s"
        )

    def bound_by(self, name: str, stage: str) -> None:
        """See `Watcher`."""
        self._progress.update(self._tasks[name], stage=f"bound by {stage}")

    def step(self, name: str, step: str) -> None:
        """See `Watcher`."""
        self._progress.update(self._tasks[name], stage=f"writing {step}")

    def end_slide(self, outcome: Outcome) -> None:
        """See `Watcher`."""
        super().end_slide(outcome)
        task = self._tasks.pop(outcome.name, None)
        if task is not None:
            self._progress.remove_task(task)

    def note(self, text: str) -> None:
        """See `Watcher`."""
        self._progress.console.print(text, markup=False, style="dim")

    def close(self) -> None:
        """See `Watcher`."""
        self._progress.stop()


def watcher_of(mode: Mode, num_slides: int) -> Watcher:
    """What shows a run on standard error; `auto` is a bar in a terminal and JSON elsewhere."""
    if mode == "auto":
        mode = "bar" if sys.stderr.isatty() else "json"
    match mode:
        case "bar":
            return Bar(num_slides, Console(stderr=True))
        case "json":
            return JsonLines(num_slides, sys.stderr)
        case "quiet":
            return Watcher()
