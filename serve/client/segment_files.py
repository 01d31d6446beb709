"""Segment image files into a folder, several at a time: what `focalpath-segment` does."""

import csv
import dataclasses
import functools
import io
import json
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from serve.answers.format import AnswerFormat, Options, Source
from serve.answers.registry import FORMATS, file_formats, merged_options, needs_probabilities
from serve.client.clients import HttpClient, TritonClient
from serve.contract.arguments import read_arguments
from serve.contract.errors import FocalPathError, ImageError, SettingsError
from serve.contract.key_file import read_key_file
from serve.contract.manifest import Manifest, read_bundle, sha256_of
from serve.images.decode import read_picture
from serve.images.mpp import FROM_REQUEST, check_mpp
from serve.inference.segmenter import TileSegmenter, open_segmenter
from serve.inference.summary import Summary
from serve.settings import InferenceSettings

SUMMARY_FILE = "summary.csv"
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp"})
"""Of the files that are taken from a folder; a file that is named may have any."""
_MADE_WITH = "made_with"
"""Where an image's JSON, beside the service's answer, has how its files were made."""
_NUMBERS = "json"
"""The format that is always written."""
_IMAGE_COLUMNS = ("image", "width_px", "height_px", "mpp", "mpp_source", "model", "version")
_CLASS_COLUMNS = (
    "label",
    "name",
    "pixel_count",
    "pixel_share",
    "area_um2",
    "mean_confidence",
    "low_confidence_share",
    "predicted_iou",
)


def _format_type() -> type[tuple[str, ...]]:
    """The names of the formats, as choices."""
    names = tuple(entry.name for entry in file_formats())
    return cast(type[tuple[str, ...]], tuple[Literal[names], ...])  # type: ignore[valid-type]


def _option_type() -> type[Options]:
    """The options of all formats."""
    return _merged_options(tuple(file_formats()))


@functools.cache
def _merged_options(formats: tuple[AnswerFormat, ...]) -> type[Options]:
    return merged_options(formats, Options, name_users=True)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Segment images: for each the chosen formats and a JSON of numbers, and one CSV of them all.

    Files that are already there, made by the same model with the same options, are not made again;
    none is ever seen half-written.
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    """PNG, JPEG, TIFF or WebP files, or folders of them; what lies deeper is not looked for."""
    settings: Annotated[InferenceSettings, tyro.conf.arg(name="")] = field(
        default_factory=InferenceSettings.from_environment
    )
    """What to run when no --url is given, and the limits."""
    url: str | None = None
    """What answers: http://host:port of the service, grpc://host:port of Triton (with the --bundle
    that its repository was filled from), or a bundle's folder."""
    api_key_file: Path | None = None
    """File with the API key of the service, on its first line."""
    out: Path = Path("artifacts/segmentations")
    """Folder to write to; made if it is missing."""
    format: Annotated[tuple[str, ...], tyro.conf.arg(constructor_factory=_format_type)] = (
        "labels",
        "overlay",
    )
    """What to write beside the JSON."""
    mpp: float | None = None
    """um per pixel of all images; by default each file's own, or else the model's."""
    options: Annotated[
        Options, tyro.conf.arg(name="", constructor_factory=lambda: _option_type())
    ] = field(default_factory=lambda: _option_type()())
    """Options of the formats."""
    jobs: int = 2
    """Images to work on at the same time."""
    again: bool = False
    """Also make the files that are already there."""

    @property
    def formats(self) -> tuple[str, ...]:
        """What is written for an image; the JSON last, since it says that the others are there."""
        return (*(name for name in dict.fromkeys(self.format) if name != _NUMBERS), _NUMBERS)


def run_segment(command: Segment) -> int:
    """Segment every image and write its files; return the exit status.

    An image that cannot be used, or that the service does not answer, is named at the end, and the
    others are worked on all the same. The summary is written also when this is stopped.

    Raises:
        FocalPathError: nothing can be segmented at all.
    """
    command = dataclasses.replace(command, images=tuple(_files_of(command.images)))
    _check(command)
    made: dict[Path, Summary] = {}
    failures: dict[Path, str] = {}
    with closing(_open(command)) as segmenter:
        manifest = segmenter.manifest
        command.options.check(manifest)
        finished = {} if command.again else _finished(command, manifest)
        to_do = [path for path in command.images if path not in finished]
        try:
            _segment_all(command, segmenter, to_do, made, failures)
        finally:
            known = finished | made
            summaries = {path: known[path] for path in command.images if path in known}
            if summaries:
                write_whole(command.out, {SUMMARY_FILE: _summary_csv(summaries)})
    _report(command, summaries, made)
    for path in command.images:
        if path in failures:
            print(f"error: {failures[path]}", file=sys.stderr)
    return 1 if failures else 0


def _files_of(paths: Iterable[Path]) -> Iterator[Path]:
    """The images that are named, and those in the folders that are named, in order of names.

    Raises:
        ImageError: a folder cannot be read, or has no image in it.
    """
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        try:
            files = sorted(file for file in path.iterdir() if _looks_like_image(file))
        except OSError as error:
            raise ImageError(f"{path} cannot be read: {error.strerror}.") from error
        if not files:
            raise ImageError(
                f"{path} has no image in it; expected names that end in "
                f"{', '.join(sorted(_SUFFIXES))}. Folders in it are not looked into."
            )
        yield from files


def _looks_like_image(path: Path) -> bool:
    is_hidden = path.name.startswith(".")
    return path.suffix.lower() in _SUFFIXES and not is_hidden and path.is_file()


def _check(command: Segment) -> None:
    """Refuse what cannot work before anything is opened or written."""
    if not command.images:
        raise ImageError("no image is named. Name one or more files.")
    stems: dict[str, Path] = {}
    for path in command.images:
        if not path.is_file():
            raise ImageError(f"{path} is no file. Check the path; nothing was segmented.")
        if path.stem in stems:
            raise ImageError(
                f"more than one image is called {path.stem}; their outputs would overwrite each "
                "other. Segment them into different folders with --out."
            )
        stems[path.stem] = path
    if command.jobs < 1:
        raise FocalPathError(f"--jobs is {command.jobs}, expected at least 1.")
    if command.mpp is not None:
        check_mpp(command.mpp)


def _open(command: Segment) -> HttpClient | TileSegmenter:
    """What answers: the service, Triton, or a bundle in this process."""
    settings, url = command.settings, command.url
    if _is_in_process(command):
        if url is not None:
            settings = settings.model_copy(update={"bundle": Path(url)})
        return open_segmenter(settings)
    assert url is not None
    if url.startswith("grpc://"):
        return TritonClient(
            url,
            read_bundle(settings.bundle),
            timeout_s=settings.triton_timeout_s,
            shared_memory=settings.triton_shared_memory,
            max_pixels=settings.max_image_pixels,
        )
    return HttpClient(url, api_key=read_key(command.api_key_file))


def _is_in_process(command: Segment) -> bool:
    return command.url is None or ("://" not in command.url and Path(command.url).is_dir())


def read_key(path: Path | None) -> str | None:
    """The API key on a file's first line; None without a file."""
    if path is None:
        return None
    words = [line.strip() for line in read_key_file(path) if line.strip()]
    if not words or not (words[0].isascii() and words[0].isprintable()):
        found = "no printable ASCII text" if words else "nothing"
        raise SettingsError(f"{path} has {found} on its first line, expected an API key.")
    return words[0]


def _finished(command: Segment, manifest: Manifest) -> dict[Path, Summary]:
    """The images whose files are all there, made by the same model in the same way."""
    finished = {}
    for path in command.images:
        outputs = [command.out / f"{path.stem}{FORMATS[name].suffix}" for name in command.formats]
        if not all(output.is_file() for output in outputs):
            continue
        try:
            content = json.loads(outputs[-1].read_bytes())
            found = content.pop(_MADE_WITH)
            summary = Summary.model_validate(content)
            formats = set(found.pop("formats"))
        except (ValueError, LookupError, TypeError, AttributeError):  # not ours, or older
            continue
        wanted = _made_with(command, path)
        is_same = formats.issuperset(wanted.pop("formats")) and found == wanted
        if is_same and (summary.model.name, summary.model.version) == (
            manifest.name,
            manifest.version,
        ):
            finished[path] = summary
    return finished


def _made_with(command: Segment, path: Path) -> dict[str, Any]:
    """What an image's files depend on, beside the model; kept in its JSON."""
    return {
        "image_sha256": sha256_of(path),
        "mpp": command.mpp,
        "precision": command.settings.precision if _is_in_process(command) else None,
        **command.options.model_dump(mode="json"),
        "formats": list(command.formats),
    }


def _segment_all(
    command: Segment,
    segmenter: HttpClient | TileSegmenter,
    paths: Sequence[Path],
    made: dict[Path, Summary],
    failures: dict[Path, str],
) -> None:
    """Work on the images; puts what becomes of each into `made` or `failures`."""
    stopped = threading.Event()
    under_way: dict[Path, None] = {}

    def work(path: Path) -> None:
        if stopped.is_set():
            return
        under_way[path] = None
        try:
            made[path] = _segment_one(command, segmenter, path)
        except FocalPathError as error:
            failures[path] = _named(path, error)
        finally:
            del under_way[path]

    with _progress() as progress, ThreadPoolExecutor(command.jobs) as pool:
        task = progress.add_task("segmenting", total=len(paths))
        futures = [pool.submit(work, path) for path in paths]
        try:
            for future in as_completed(futures):
                progress.advance(task)
                future.result()
        except BaseException:  # nothing can be written, or Ctrl+C: what has not begun is left
            stopped.set()
            progress.stop()
            _say_what_is_waited_for(list(under_way))
            raise


def _say_what_is_waited_for(paths: Sequence[Path]) -> None:
    if paths:
        names = ", ".join(str(path) for path in paths)
        print(f"stopping: waiting for {names}, which cannot be left half-done", file=sys.stderr)


def _segment_one(command: Segment, segmenter: HttpClient | TileSegmenter, path: Path) -> Summary:
    picture = read_picture(path, command.settings)
    with_probabilities = needs_probabilities(command.formats, dict(command.options))
    if isinstance(segmenter, HttpClient):  # the service reads the file itself, also its mpp
        result = segmenter.segment(path, mpp=command.mpp, with_probabilities=with_probabilities)
    else:
        result = segmenter.segment(
            picture.pixels,
            mpp=picture.pixel_size if command.mpp is None else command.mpp,
            mpp_source=picture.mpp_source if command.mpp is None else FROM_REQUEST,
            with_probabilities=with_probabilities,
        )
        result = result.with_notes(picture.mpp_note, picture.notes)
    source = Source(picture.pixels, result, segmenter.manifest, path.name)
    files = {
        f"{path.stem}{FORMATS[name].suffix}": FORMATS[name].render(source, dict(command.options))
        for name in command.formats
    }
    numbers = f"{path.stem}{FORMATS[_NUMBERS].suffix}"
    record = json.loads(files[numbers]) | {_MADE_WITH: _made_with(command, path)}
    files[numbers] = json.dumps(record, indent=2, ensure_ascii=False).encode()
    write_whole(command.out, files)
    return result.summary


def _named(path: Path, error: FocalPathError) -> str:
    return str(error) if str(error).startswith(str(path)) else f"{path}: {error}"


def _progress() -> Progress:
    """A bar on the terminal, if there is one."""
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


def write_whole(folder: Path, contents: dict[str, bytes]) -> list[Path]:
    """Write files beside their places and rename them, so that none is ever seen half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        for name, content in contents.items():
            (Path(scratch) / name).write_bytes(content)
        return [(Path(scratch) / name).replace(folder / name) for name in contents]


def _summary_csv(summaries: dict[Path, Summary]) -> bytes:
    """A row for each image and class."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*_IMAGE_COLUMNS, *_CLASS_COLUMNS])
    writer.writerows(_rows(summaries))
    return text.getvalue().encode()


def _rows(summaries: dict[Path, Summary]) -> Iterable[list[object]]:
    for path, summary in summaries.items():
        image, model = summary.image, summary.model
        about = [path.name, image.width_px, image.height_px, image.mpp, image.mpp_source]
        for row in summary.classes:
            numbers = [getattr(row, column) for column in _CLASS_COLUMNS]
            yield [*about, model.name, model.version, *numbers]


def _report(command: Segment, summaries: dict[Path, Summary], made: dict[Path, Summary]) -> None:
    """Say what was done: in numbers for one image, in one line for more."""
    console = Console()
    if len(command.images) == 1:
        for path, summary in summaries.items():
            console.print(_table(path, summary))
    skipped = len(summaries) - len(made)
    already = f", {skipped} were there already" if skipped else ""
    print(
        f"wrote {len(made)} of {len(command.images)} images to {command.out}{already}", flush=True
    )
    print(_assumed(summaries), flush=True)


def _assumed(summaries: dict[Path, Summary]) -> str:
    """For how many images nobody stated the um per pixel: their labels may be of another scale."""
    assumed = [path for path, summary in summaries.items() if not summary.image.is_mpp_known]
    text = f"um per pixel: assumed for {len(assumed)} of {len(summaries)} images"
    if not assumed:
        return text
    notes = {summaries[path].image.mpp_note for path in assumed} - {""}
    why = f" {min(notes)}" if notes else ""
    return f"{text}, such as {assumed[0].name}. State it with --mpp if you know it.{why}"


def _table(path: Path, summary: Summary) -> Table:
    image = summary.image
    title = f"{path.name}, {image.width_px} x {image.height_px}, {image.scale}"
    for note in (image.mpp_note, *image.notes):
        title += f"\n{note}" if note else ""
    table = Table(title=escape(title))
    table.add_column("class")
    for title in ("share", "mean confidence", "predicted IoU"):
        table.add_column(title, justify="right")
    for row in summary.classes:
        confidence = "" if row.mean_confidence is None else f"{row.mean_confidence:.2f}"
        iou = "" if row.predicted_iou is None else f"{row.predicted_iou:.2f}"
        table.add_row(row.name, f"{row.pixel_share:.1%}", confidence, iou)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """`focalpath-segment`: run the command line and return its exit status."""
    try:
        command = read_arguments(Segment, prog="focalpath-segment", arguments=arguments)
        return run_segment(command)
    except (FocalPathError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; start it again to go on where it was", file=sys.stderr)
        return 130
