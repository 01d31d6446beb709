"""Segments image files into a folder, several at a time: the command `focalpath-segment`."""

import dataclasses
import functools
import sys
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, cast

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from serve.answers.format import AnswerFormat, Options, Source
from serve.answers.registry import FORMATS, file_formats, merged_options, needs_probabilities
from serve.client.calls import check_answer
from serve.client.finished import RECORD_FORMAT, SUMMARY_FILE, Recipe
from serve.client.http import HttpClient
from serve.client.image_files import find_images
from serve.client.interrupts import EXIT_STATUS, second_interrupt_ends
from serve.client.segment_report import assumed_line, image_table, summary_csv
from serve.client.triton import TritonClient
from serve.client.whole_files import write_together
from serve.contract.errors import FocalPathError, ImageError, SettingsError, message_of
from serve.contract.interrupts import safe_interrupts
from serve.contract.key_file import read_key
from serve.contract.manifest import read_bundle, sha256_of
from serve.contract.printing import printing
from serve.contract.strict import CommandOptions
from serve.images.decode import read_picture
from serve.images.mpp import check_mpp
from serve.inference.segmenter import TileSegmenter, open_segmenter
from serve.inference.summary import Summary
from serve.settings import InferenceSettings


def _format_type() -> type[tuple[str, ...]]:
    """The names of the formats, as choices."""
    names = tuple(entry.name for entry in file_formats())
    return cast(type[tuple[str, ...]], tuple[Literal[names], ...])  # type: ignore[valid-type]


class FlagOptions(CommandOptions, Options):
    """The options of the formats, as flags."""


def _option_type() -> type[Options]:
    """The options of all formats."""
    return _merged_options(tuple(file_formats()))


@functools.cache
def _merged_options(formats: tuple[AnswerFormat, ...]) -> type[Options]:
    return merged_options(formats, FlagOptions, name_users=True)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Segment images: writes the chosen formats and a JSON per image, and one CSV of all images.

    Skips images whose files exist already, made by the same model with the same options. No file is
    ever seen half-written. The first Ctrl-C finishes the images under way; the second ends at once.
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    """PNG, JPEG, TIFF or WebP files, or folders of them, which are not searched recursively."""
    settings: Annotated[InferenceSettings, tyro.conf.arg(name="")] = field(
        default_factory=InferenceSettings.from_environment
    )
    """What to run if no --url is given, and the limits."""
    url: str | None = None
    """What segments the images: http://host:port of the service, grpc://host:port of Triton (with
    the --bundle that its repository was filled from), or the folder of a bundle."""
    api_key_file: Path | None = None
    """File with the API key of the service, on its first line."""
    out: Path = Path("artifacts/segmentations")
    """Folder to write to; created if it is missing."""
    format: Annotated[tuple[str, ...], tyro.conf.arg(constructor_factory=_format_type)] = (
        "labels",
        "overlay",
    )
    """What to write besides the JSON."""
    mpp: float | None = None
    """um per pixel of all images; by default each file's own, or else the model's."""
    options: Annotated[
        Options, tyro.conf.arg(name="", constructor_factory=lambda: _option_type())
    ] = field(default_factory=lambda: _option_type()())
    """Options of the formats."""
    jobs: int = 2
    """Images to work on at the same time."""
    again: bool = False
    """Also make files that exist already."""

    @property
    def recipe(self) -> Recipe:
        """How the files of each image are made."""
        formats = dict.fromkeys(name for name in self.format if name != RECORD_FORMAT)
        precision = self.settings.precision if self.runs_here else None
        options = self.options.model_dump(mode="json")
        return Recipe(
            formats=(*formats, RECORD_FORMAT),
            options={"mpp": self.mpp, "precision": precision, **options},
        )

    @property
    def runs_here(self) -> bool:
        """Whether the model runs in this process."""
        is_bundle = self.url is None or _is_bundle(self.url)
        return is_bundle and self.settings.backend == "onnxruntime"


@dataclass
class _Progress:
    """What has become of the images; threads add to it."""

    made: dict[Path, Summary] = field(default_factory=dict)
    failures: dict[Path, str] = field(default_factory=dict)
    under_way: dict[Path, None] = field(default_factory=dict)
    is_stopped: threading.Event = field(default_factory=threading.Event)


def run_segment(command: Segment) -> int:
    """Segment every image and write its files; return the exit status.

    An image that fails is named at the end, with exit status 1; the others are segmented all the
    same. The CSV is also written if Ctrl-C stops the command.

    Raises:
        FocalPathError: nothing can be segmented at all.
    """
    with second_interrupt_ends():
        return _run(command)


def _run(command: Segment) -> int:
    command = dataclasses.replace(command, images=find_images(command.images, command.out))
    command.recipe.refuse_overwriting(command.images, command.out, again=command.again)
    if command.jobs < 1:
        raise SettingsError(f"--jobs is {command.jobs}, expected at least 1.")
    if command.mpp is not None:
        check_mpp(command.mpp)
    progress = _Progress()
    with closing(_open(command)) as segmenter:
        manifest = segmenter.manifest
        command.options.check(manifest)
        finished: dict[Path, Summary] = {}
        if not command.again:
            for path in command.images:
                if summary := command.recipe.finished(path, command.out, manifest):
                    finished[path] = summary
        to_do = [path for path in command.images if path not in finished]
        try:
            _segment_all(command, segmenter, to_do, progress)
        finally:
            known = finished | progress.made
            summaries = {path: known[path] for path in command.images if path in known}
            if summaries:
                write_together(command.out, {SUMMARY_FILE: summary_csv(summaries)})
    _report(command, summaries, len(progress.made))
    for path in command.images:
        if path in progress.failures:
            print(f"error: {progress.failures[path]}", file=sys.stderr)
    return 1 if progress.failures else 0


def _is_bundle(url: str) -> bool:
    return "://" not in url and Path(url).is_dir()


def _open(command: Segment) -> HttpClient | TileSegmenter:
    """Open the service, Triton, or a bundle in this process."""
    settings, url = command.settings, command.url
    if url is not None:
        if _is_bundle(url):
            settings = settings.model_copy(update={"bundle": Path(url)})
        elif url.startswith("grpc://"):
            settings = settings.model_copy(update={"backend": "triton", "triton_url": url})
        else:
            return HttpClient(url, api_key=read_key(command.api_key_file))
    if settings.backend == "triton":
        return TritonClient(
            settings.triton_url,
            read_bundle(settings.bundle),
            timeout_s=settings.triton_timeout_s,
            shared_memory=settings.triton_shared_memory,
            max_pixels=settings.max_image_pixels,
            max_tiles=settings.max_image_tiles,
            bundle=settings.bundle,
        )
    return open_segmenter(settings)


def _segment_all(
    command: Segment,
    segmenter: HttpClient | TileSegmenter,
    paths: Sequence[Path],
    progress: _Progress,
) -> None:
    """Segment the images in several threads; `progress` gets the result of each."""

    def work(path: Path) -> None:
        if progress.is_stopped.is_set():
            return
        progress.under_way[path] = None
        try:
            progress.made[path] = _segment_one(command, segmenter, path)
        except FocalPathError as error:
            progress.failures[path] = _with_name(path, error)
        finally:
            del progress.under_way[path]

    with _bar() as bar, ThreadPoolExecutor(command.jobs) as pool:
        task = bar.add_task("segmenting", total=len(paths))
        futures = [pool.submit(work, path) for path in paths]
        try:
            for future in as_completed(futures):
                bar.advance(task)
                future.result()
        except BaseException:  # Ctrl-C, or nothing can be written: leave what has not begun
            progress.is_stopped.set()
            bar.stop()
            if names := ", ".join(str(path) for path in list(progress.under_way)):
                print(f"stopping: finishing {names}; Ctrl-C again ends at once", file=sys.stderr)
            raise


def _segment_one(command: Segment, segmenter: HttpClient | TileSegmenter, path: Path) -> Summary:
    sha256 = _sha256_of(path)
    picture = read_picture(path, command.settings)
    options, recipe = dict(command.options), command.recipe
    with_probabilities = needs_probabilities(recipe.formats, options)
    if isinstance(segmenter, HttpClient):  # the service reads the file itself, and its mpp
        result = segmenter.segment(path, mpp=command.mpp, with_probabilities=with_probabilities)
        check_answer(result, picture.pixels.shape[:2], segmenter.manifest)
    else:
        result = segmenter.segment_picture(
            picture, mpp=command.mpp, with_probabilities=with_probabilities
        )
    if _sha256_of(path) != sha256:  # its files would be of two images, and count as finished
        raise ImageError("it was replaced while it was segmented. Give the same command again.")
    source = Source(picture.pixels, result, segmenter.manifest, path.name)
    files: dict[str, Iterable[bytes]] = {}
    for name in recipe.formats:
        blocks: Iterable[bytes] = FORMATS[name].blocks(source, options)
        if name == RECORD_FORMAT:
            blocks = (recipe.record(sha256, b"".join(blocks), segmenter.manifest),)
        files[f"{path.stem}{FORMATS[name].suffix}"] = blocks
    write_together(command.out, files)
    return result.summary


def _sha256_of(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:  # an image that was removed fails alone
        raise ImageError(f"{path} cannot be read: {error.strerror}. Check the path.") from error


def _with_name(path: Path, error: FocalPathError) -> str:
    return str(error) if str(error).startswith(str(path)) else f"{path}: {error}"


def _bar() -> Progress:
    """A progress bar, if there is a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _report(command: Segment, summaries: dict[Path, Summary], num_made: int) -> None:
    """Print what was done: a table for a single image, one line for several."""
    if len(command.images) == 1:
        for path, summary in summaries.items():
            Console().print(image_table(path, summary))
    num_skipped = len(summaries) - num_made
    already = f", {num_skipped} existed already" if num_skipped else ""
    print(f"wrote {num_made} of {len(command.images)} images to {command.out}{already}", flush=True)
    if summaries:
        print(assumed_line(summaries), flush=True)


@safe_interrupts()
def main(arguments: Sequence[str] | None = None) -> int:
    """`focalpath-segment`: run the command line and return its exit status."""
    try:
        with printing():
            command = tyro.cli(Segment, prog="focalpath-segment", args=arguments)
            return run_segment(command)
    except (FocalPathError, OSError) as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues where it stopped", file=sys.stderr)
        return EXIT_STATUS
