"""The JSON file that maps the labels of annotations to classes.

{
  "classes": [{"name": "Tumor", "color": "#d62728"}, {"name": "Stroma", "color": "#2ca02c"}],
  "labels": {"Tumor": "Tumor", "DCIS": "Tumor", "Artefact": "unlabelled", "ROI": "roi",
             "Landmark": "ignore"},
  "uncovered": "unlabelled"
}

A label becomes one of the classes, or `unlabelled` (drawn, so that it hides what is below it),
`roi` (a region of interest: pixels outside of all of them are unlabelled), or `ignore` (not drawn).
`uncovered` is what pixels in a region of interest are that no other area covers.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from serve.contract.json_text import parse_json
from train.data.convert.shapes import Annotation, plain_label
from train.data.folder import is_color, read_classes
from train.errors import AnnotationError
from train.files import unique_keys, whole_file, write_errors_explained
from train.settings import LabelClass

UNLABELLED, ROI, IGNORE = _MEANINGS = "unlabelled", "roi", "ignore"
_ROI_NAMES = re.compile(r"\b(roi|region.?of.?interest|region\*?)\b", re.IGNORECASE)
_QUPATHS_IGNORE = "ignore*"
PALETTE = ("#d55e00", "#0072b2", "#009e73", "#f0e442", "#cc79a7", "#56b4e9", "#e69f00", "#999999")
"""For classes without a colour: the palette of Okabe and Ito, in our order."""


@dataclass(frozen=True, kw_only=True)
class ClassMapping:
    """What the labels of annotations mean."""

    classes: tuple[LabelClass, ...]
    labels: Mapping[str, str]
    uncovered: str = UNLABELLED

    def value(self, label: str) -> int | None:
        """The label of pixels, 0..C, or None for what is not drawn."""
        meaning = self.labels[label]
        if meaning in (ROI, IGNORE):
            return None
        return self.index(meaning)

    def index(self, meaning: str) -> int:
        """1..C of a class, or 0 for `unlabelled`."""
        names = [UNLABELLED, *(entry.name for entry in self.classes)]
        return names.index(meaning)


def read_mapping(path: Path, found: Sequence[str]) -> ClassMapping:
    """Read a mapping file and check it against the labels that the annotations have.

    Raises:
        AnnotationError: the file is not of that form, names a class that it does not define, or
            lacks a label.
    """
    try:
        content = parse_json(path.read_bytes(), object_pairs_hook=unique_keys)
        mapping = ClassMapping(
            classes=read_classes(path, content["classes"], AnnotationError, _MEANINGS),
            labels=_read_labels(path, content["labels"]),
            uncovered=str(content.get("uncovered", UNLABELLED)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AnnotationError(
            f"{path} is not a mapping of labels to classes ({error!r}); expected JSON with classes "
            "and labels. Move it away and repeat the command: it writes a template."
        ) from error
    known = [*(entry.name for entry in mapping.classes), *_MEANINGS]
    for label, meaning in [*mapping.labels.items(), ("uncovered", mapping.uncovered)]:
        if meaning not in known or (label == "uncovered" and meaning in (ROI, IGNORE)):
            raise AnnotationError(
                f"{path} maps {label!r} to {meaning!r}, which it does not define; expected one of "
                f"{', '.join(known)}. Add it to classes, or correct it."
            )
    if missing := sorted(set(found) - set(mapping.labels)):
        raise AnnotationError(
            f"{path} does not say what {', '.join(map(repr, missing))} mean; the annotations have "
            f"them. Add them to labels: a class, {UNLABELLED}, {ROI} or {IGNORE}."
        )
    return mapping


def _read_labels(path: Path, stored: Mapping[str, object]) -> dict[str, str]:
    """The meaning of each label in its one spelling.

    Raises:
        AnnotationError: labels that look the same have several meanings.
    """
    labels: dict[str, str] = {}
    for label, meaning in ((plain_label(label), str(value)) for label, value in stored.items()):
        if labels.setdefault(label, meaning) != meaning:
            raise AnnotationError(
                f"{path} maps {label!r}, written in several ways, to {labels[label]!r} and to "
                f"{meaning!r}; expected one meaning, since more spaces make no other label. Remove "
                "one of them."
            )
    return labels


def write_template(path: Path, annotations: Sequence[Annotation]) -> None:
    """Write a mapping in which each label is a class of its own, to be edited."""
    classes: dict[str, LabelClass] = {}
    labels: dict[str, str] = {}
    for annotation in annotations:
        label = annotation.label
        if label in labels:
            continue
        if _ROI_NAMES.search(label):
            labels[label] = ROI
        elif not annotation.rings:
            labels[label] = IGNORE
        elif label.casefold() == _QUPATHS_IGNORE:
            labels[label] = UNLABELLED
        else:
            labels[label] = label
            if label in _MEANINGS:
                continue
            color = annotation.color or ""
            used = {entry.color for entry in classes.values()}
            if not is_color(color) or color in used:
                free = (c for c in PALETTE if c not in used)
                color = next(free, PALETTE[len(classes) % len(PALETTE)])
            classes[label] = LabelClass(name=label, color=color.lower())
    content = {
        "classes": [asdict(entry) for entry in classes.values()],
        "labels": labels,
        "uncovered": UNLABELLED,
    }
    with write_errors_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
