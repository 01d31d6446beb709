"""The image files that a command line names: files, and folders of files."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from serve.contract.errors import ImageError, SettingsError
from serve.contract.tables import is_text

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp"})
"""Suffixes of the files that are taken from a folder. A file that is named may have any."""


def find_images(paths: Iterable[Path], out: Path) -> tuple[Path, ...]:
    """List the images that are named, and those in the folders that are named, in order of names.

    Args:
        paths: files and folders.
        out: folder of the outputs. It cannot be one of the folders: its pictures are no images.

    Raises:
        ImageError: there is no image, a path does not exist, or a folder cannot be read or has no
            image in it.
        SettingsError: `out` is one of the folders.
    """
    paths = tuple(paths)
    for path in paths:
        if path.is_dir() and path.resolve() == out.resolve():
            raise SettingsError(
                f"{path} has the images, and is the folder of outputs, too: masks and overlays "
                "would be taken for images next time. Give --out a folder of its own."
            )
    images = tuple(image for path in paths for image in _images_at(path))
    if not images:
        raise ImageError("no image is named. Name one or more files.")
    for path in images:
        if not path.is_file():
            raise ImageError(f"{path} is not a file. Check the path; nothing was segmented.")
        if not is_text(path):
            raise ImageError(
                f"{str(path)!a} is not in UTF-8, so it cannot be written into the results. Rename "
                "the file or its folder; nothing was segmented."
            )
    return images


def _images_at(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    try:
        files = sorted(file for file in path.iterdir() if _looks_like_image(file))
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}.") from error
    if not files:
        raise ImageError(
            f"{path} has no image in it; expected names that end in "
            f"{', '.join(sorted(_SUFFIXES))}. Folders in it are not searched."
        )
    yield from files


def _looks_like_image(path: Path) -> bool:
    is_hidden = path.name.startswith(".")
    return path.suffix.lower() in _SUFFIXES and not is_hidden and path.is_file()
