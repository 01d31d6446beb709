"""Shards: parts of a cohort that separate machines run, each by itself.

Slide number k of the list, sorted by name, belongs to shard k mod N. So shards differ by one slide
at most, and every slide belongs to exactly one of them, as long as all are given the same list.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter, ValidationError

from serve.contract.errors import SettingsError
from serve.slides.cohort import SlideTask
from serve.slides.disk import write_whole, written
from serve.slides.job import WORK_FOLDER

LIST_FILE = ".slides.json"
"""In the work folder: the names of all slides of the last run, those of other shards included."""


@dataclass(frozen=True)
class Shard:
    """Part `index`, from 0, of `count`."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `I/N`.

        Raises:
            SettingsError: it has another form, or I is not from 0 to N - 1.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if match is None or not int(match[1]) < int(match[2]):
            raise SettingsError(
                f"--shard is {text!r}, expected I/N with I from 0 to N - 1, such as 0/8 to 7/8."
            )
        return cls(int(match[1]), int(match[2]))

    def of(self, tasks: Sequence[SlideTask]) -> list[SlideTask]:
        """The slides that belong to this shard."""
        return sorted(tasks, key=lambda task: task.name)[self.index :: self.count]


def write_list(out: Path, tasks: Sequence[SlideTask]) -> None:
    """Keep the names of all slides, so that `status` knows those that no shard has begun.

    Raises:
        OutputError: the disk is full or may not be written.
    """
    folder = out / WORK_FOLDER
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(task.name for task in tasks)
        write_whole(folder / LIST_FILE, json.dumps(names, indent=1).encode())


def read_list(out: Path) -> list[str]:
    """The names that `write_list` kept; none where there is no such file, or it is damaged."""
    try:
        return TypeAdapter(list[str]).validate_json((out / WORK_FOLDER / LIST_FILE).read_bytes())
    except (FileNotFoundError, ValidationError):  # the next run writes it again
        return []
