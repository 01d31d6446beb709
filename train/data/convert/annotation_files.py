"""Reads a file of annotations in any of the known formats.

A format is a file in this folder and an entry of `FORMATS`; the content decides, not the name.
"""

import gzip
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from train.data.convert.asap import read_asap
from train.data.convert.dsa_annotations import read_dsa
from train.data.convert.imagescope import read_imagescope
from train.data.convert.qupath import read_qupath
from train.data.convert.shapes import Annotation
from train.errors import AnnotationError

SUFFIXES = (".geojson", ".json", ".anot", ".xml", ".geojson.gz", ".json.gz")


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of annotations."""

    name: str
    takes: Callable[[Any], bool]
    """Whether the parsed content, JSON or the root of XML, is of this format."""
    read: Callable[[Path, Any], list[Annotation]]
    within_bounds: bool = False
    """Coordinates begin where the scanned part of a slide does."""


def _is_geojson(content: Any) -> bool:
    first = content[0] if isinstance(content, list) and content else content
    return isinstance(first, dict) and first.get("type") in ("Feature", "FeatureCollection")


def _is_ours(content: Any) -> bool:
    return _is_geojson(content) and "focalpath" in content


def _is_dsa(content: Any) -> bool:
    first = content[0] if isinstance(content, list) and content else content
    return isinstance(first, dict) and ("elements" in first or "annotation" in first)


def _has_root(name: str) -> Callable[[Any], bool]:
    return lambda content: isinstance(content, ElementTree.Element) and content.tag == name


FORMATS = (
    # Outlines of a whole slide, as `serve slides run` writes them: in level 0, whatever the bounds.
    Format(name="FocalPath GeoJSON", takes=_is_ours, read=read_qupath),
    Format(
        name="QuPath GeoJSON",
        takes=_is_geojson,
        read=read_qupath,
        within_bounds=True,
    ),
    Format(name="Digital Slide Archive JSON", takes=_is_dsa, read=read_dsa),
    Format(name="ASAP XML", takes=_has_root("ASAP_Annotations"), read=read_asap),
    Format(name="ImageScope XML", takes=_has_root("Annotations"), read=read_imagescope),
)


def read_annotation_file(path: Path) -> tuple[list[Annotation], Format]:
    """Read a file of annotations.

    Raises:
        AnnotationError: the file cannot be read, or is in no known format.
    """
    content = _parse(path)
    for entry in FORMATS:
        if entry.takes(content):
            return entry.read(path, content), entry
    raise AnnotationError(
        f"{path} is in no known format of annotations; expected "
        f"{', '.join(entry.name for entry in FORMATS)}. Export the annotations again."
    )


def _parse(path: Path) -> Any:
    try:
        stored = path.read_bytes()
        text = (gzip.decompress(stored) if path.suffix == ".gz" else stored).decode("utf-8-sig")
        return ElementTree.fromstring(text.encode()) if "<" in text[:1] else json.loads(text)
    except (OSError, EOFError, zlib.error, ValueError, ElementTree.ParseError) as error:
        raise AnnotationError(
            f"{path} cannot be read as JSON or XML ({error}). Export it again."
        ) from error
