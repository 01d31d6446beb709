"""Reads a file of annotations in any of the known formats.

A format is a file in this folder and an entry of `FORMATS`; the content decides, not the name.
"""

import codecs
import gzip
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import ParseError

from serve.contract.json_text import parse_json
from serve.images.readers.geojson import STATED, begins_at_bounds, is_focalpath, stated_origin
from train.data.convert.asap import read_asap
from train.data.convert.dsa_annotations import read_dsa
from train.data.convert.imagescope import read_imagescope
from train.data.convert.qupath import read_qupath
from train.data.convert.shapes import Annotation, plain_label
from train.errors import AnnotationError

SUFFIXES = (
    *(".geojson", ".json", ".anot", ".xml", ".geojson.gz", ".json.gz"),
    *(".geojson.zip", ".json.zip", ".zip"),
)
_GZIP, _ZIP = b"\x1f\x8b", b"PK\3\4"
_IS_BESIDE = re.compile(r"/$|^__MACOSX/|(^|/)\.DS_Store$")
"""Folders, and what macOS adds to archives."""
_UNREADABLE = (
    *(OSError, EOFError, ValueError, LookupError, RuntimeError),
    *(zlib.error, zipfile.BadZipFile, ParseError),
)
"""Of a zip archive with a password, a RuntimeError; of an unknown encoding, a LookupError."""
_BEFORE_XML = b"\xef\xbb\xbf\xff\xfe\0 \t\r\n"
"""Byte-order marks, and white space."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of annotations."""

    name: str
    takes: Callable[[Any], bool]
    """Whether the parsed content, JSON or the root of XML, is of this format."""
    read: Callable[[Path, Any], list[Annotation]]
    within_bounds: bool = False
    """Coordinates begin where the scanned part of a slide does."""
    upright: bool = False
    """Coordinates are of an image as FocalPath reads it: turned by its EXIF orientation."""


def _is_geojson(content: Any) -> bool:
    if content == []:  # a list without any object, which the archive exports, too
        return True
    first = content[0] if isinstance(content, list) and content else content
    return isinstance(first, dict) and first.get("type") in ("Feature", "FeatureCollection")


def _is_qupaths(content: Any) -> bool:
    return _is_geojson(content) and begins_at_bounds(content)


def _is_ours(content: Any) -> bool:
    return _is_geojson(content) and is_focalpath(content)


def _read_ours(path: Path, content: Any) -> list[Annotation]:
    try:
        origin = stated_origin(content)
    except ValueError as error:
        raise AnnotationError(
            f"{path} states no place at which it begins: its focalpath.{STATED} is not x and y "
            f"({error}). Write the outlines again."
        ) from error
    return [annotation.moved(*origin) for annotation in read_qupath(path, content)]


def _is_dsa(content: Any) -> bool:
    first = content[0] if isinstance(content, list) and content else content
    return isinstance(first, dict) and ("elements" in first or "annotation" in first)


def _has_root(name: str) -> Callable[[Any], bool]:
    return lambda content: isinstance(content, ElementTree.Element) and content.tag == name


FORMATS = (
    # Outlines of a whole slide, as `serve slides run` writes them.
    Format(name="FocalPath GeoJSON", takes=_is_ours, read=_read_ours, upright=True),
    Format(name="QuPath GeoJSON", takes=_is_qupaths, read=read_qupath, within_bounds=True),
    Format(name="GeoJSON", takes=_is_geojson, read=read_qupath),
    Format(name="Digital Slide Archive JSON", takes=_is_dsa, read=read_dsa),
    Format(name="ASAP XML", takes=_has_root("ASAP_Annotations"), read=read_asap),
    Format(name="ImageScope XML", takes=_has_root("Annotations"), read=read_imagescope),
)


def read_annotation_file(path: Path) -> tuple[list[Annotation], Format]:
    """Read a file of annotations.

    Raises:
        AnnotationError: the file cannot be read, or is in no known format.
    """
    try:
        content = parse(_unpacked(path))
    except _UNREADABLE as error:
        raise AnnotationError(
            f"{path} cannot be read as JSON or XML ({error}). Export it again."
        ) from error
    for entry in FORMATS:
        if entry.takes(content):
            return [_with_plain_label(found) for found in entry.read(path, content)], entry
    raise AnnotationError(
        f"{path} is in no known format of annotations; expected "
        f"{', '.join(entry.name for entry in FORMATS)}. Export the annotations again."
    )


def _with_plain_label(annotation: Annotation) -> Annotation:
    """Of labels that look the same, one: umlauts may have two parts, and spaces beside them."""
    return replace(annotation, label=plain_label(annotation.label))


def _unpacked(path: Path) -> bytes:
    """A file's content; of QuPath's zip archives that of the one file in them."""
    stored = path.read_bytes()
    if stored.startswith(_GZIP):
        return gzip.decompress(stored)
    if not stored.startswith(_ZIP):
        return stored
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not _IS_BESIDE.search(name)]
        if len(names) != 1:
            raise ValueError(f"the archive holds {len(names)} files, expected one")
        return archive.read(names[0])


def parse(stored: bytes) -> Any:
    """JSON, or the root of XML, in any encoding that the bytes themselves tell.

    Raises:
        ValueError: it is not JSON.
        ElementTree.ParseError: it is not XML.
    """
    if not stored.lstrip(_BEFORE_XML).startswith(b"<"):
        return parse_json(stored)
    try:
        return ElementTree.fromstring(stored.lstrip())
    except ParseError:
        if stored.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise
        # Programs write text as UTF-8 under a declaration that says UTF-16.
        return ElementTree.fromstring(stored.decode("utf-8-sig").lstrip())
