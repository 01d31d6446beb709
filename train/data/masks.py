"""Masks in the forms that people have, read as labels: 0 unlabelled, 1..C the classes.

- One channel of whole numbers, of 1 to 32 bits: each value is its label, unless `mask_values` of
  dataset.json says otherwise, such as {"0": "Background", "1": "Gland"}.
- Colours, as RGB or in a palette: those of the classes in dataset.json, or of its `mask_colors`,
  such as {"#ff0000": "Tumor", "#ffffff": null}. Black is unlabelled unless a table says otherwise.
- A palette of greys: as one channel of its greys. GIF and programs that make PNG files smaller
  write such palettes, whose indices mean nothing.
- A palette of other colours: its indices are the labels, as in the masks of Pascal VOC.
- 255, in 16 bits also 65535, and transparent pixels are unlabelled.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from train.data.mask_files import (
    ONE_CHANNEL,
    greys_of,
    lacks_colors,
    open_mask,
    palette_of,
    transparent_pixels,
    used_values,
    whole_numbers,
)
from train.errors import MaskError

IGNORED = (255, 65_535)
"""Values that mean unlabelled, too: many data sets write them."""
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
"""Lossless formats. JPEG changes labels along the edges of regions."""
_MAX_NAMED = 3
_MAX_VALUE = 65_535
_NO_LABEL = 255
_MANY_COLORS = 64


@dataclass(frozen=True)
class MaskCode:
    """What the values and colours of a data set's masks mean.

    Args:
        num_classes: C.
        colors: pairs of a colour, as 0xRRGGBB, and its label; the first is black's.
        values: pairs of a value and its label; None where each value is its label.
    """

    num_classes: int
    colors: tuple[tuple[int, int], ...]
    values: tuple[tuple[int, int], ...] | None = None
    orientation: Literal["stored", "upright"] | None = None
    """Whether masks without an orientation of their own lie on the image as it is stored or as it
    is shown; None: not said."""


def mask_code(
    names: Sequence[str],
    colors: Sequence[str],
    mask_colors: Mapping[str, str | None] | None = None,
    mask_values: Mapping[str, str | None] | None = None,
    mask_orientation: Literal["stored", "upright"] | None = None,
) -> MaskCode:
    """Make the code of masks from dataset.json's content.

    Args:
        names: of the classes, in the order of their labels.
        colors: of the classes, as #rrggbb.
        mask_colors: name of the class of each colour, None for unlabelled.
        mask_values: name of the class of each value, None for unlabelled.
        mask_orientation: see `MaskCode`.

    Raises:
        ValueError: a name is not a class's, a colour is not #rrggbb, or a value is not a whole
            number.
    """
    if mask_orientation not in (None, "stored", "upright"):
        raise ValueError(f"mask_orientation is {mask_orientation!r}")
    labels: dict[str | None, int] = {None: 0, **{name: i for i, name in enumerate(names, 1)}}

    def label(name: str | None) -> int:
        if name not in labels:
            raise ValueError(f"{name!r} is not one of the classes {', '.join(names)}")
        return labels[name]

    used_once = [color for color in colors if colors.count(color) == 1]
    own = {color: name for color, name in zip(colors, names, strict=True) if color in used_once}
    table = mask_colors if mask_colors else own
    by_color = {0: 0} | {_as_number(color): label(name) for color, name in table.items()}
    by_value = None
    if mask_values:
        by_value = tuple((_as_value(value), label(name)) for value, name in mask_values.items())
    return MaskCode(len(names), tuple(by_color.items()), by_value, mask_orientation)


def _as_value(text: str) -> int:
    if not text.isdecimal() or int(text) > _MAX_VALUE:
        raise ValueError(f"{text!r} is not a value of a mask; expected 0 to {_MAX_VALUE}")
    return int(text)


def _as_number(color: str) -> int:
    if not re.fullmatch("#[0-9a-fA-F]{6}", color):
        raise ValueError(f"{color!r} is not a colour; expected #rrggbb")
    return int(color[1:], 16)


def read_mask(path: Path, num_classes: int, code: MaskCode | None = None) -> NDArray[np.uint8]:
    """Read a mask, upright, as (H, W) uint8 labels in 0..C.

    Args:
        path: the file.
        num_classes: C.
        code: what its values and colours mean; None: values are labels, and colours mean nothing.

    Raises:
        MaskError: the file is unreadable, of a kind that holds no labels, or has a value or colour
            that means no class.
    """
    code = code or MaskCode(num_classes, ((0, 0),))
    image = open_mask(path)
    transparent = transparent_pixels(path, image)
    if image.mode in ("LA", "PA", "RGBA"):
        image = image.convert({"LA": "L", "PA": "RGB", "RGBA": "RGB"}[image.mode])
    if image.mode == "P":
        labels = _from_palette(path, image, code, transparent)
    elif image.mode == "RGB":
        labels = _from_colors(path, np.asarray(image), code, transparent)
    elif image.mode in ONE_CHANNEL:
        labels = _from_values(path, whole_numbers(image), code, transparent)
    else:
        raise MaskError(
            f"{path} has the mode {image.mode}; expected one channel of whole numbers with 0 "
            f"unlabelled and 1..{code.num_classes} the classes, or RGB in the classes' colours",
        )
    if transparent is not None:
        labels = np.where(transparent, np.uint8(0), labels)
    return labels


def mask_values(path: Path) -> set[int]:
    """The values that a mask of one channel or a palette holds; none for other kinds."""
    image = open_mask(path)
    greys = greys_of(image) if image.mode == "P" else None
    if greys is not None:
        return set(used_values(greys))
    is_values = image.mode in (*ONE_CHANNEL, "P")
    return set(np.unique(whole_numbers(image)).tolist()) if is_values else set()


def _from_values(
    path: Path, values: NDArray[np.integer], code: MaskCode, ignored: NDArray[np.bool_] | None
) -> NDArray[np.uint8]:
    table = _value_table(code)
    checked = values if ignored is None else values[~ignored]
    if checked.size and not 0 <= checked.min() <= checked.max() <= _MAX_VALUE:
        outside = int(checked.min()) if checked.min() < 0 else int(checked.max())
        raise _unknown_labels(path, [outside], code)
    is_found = np.bincount(checked.ravel(), minlength=1) > 0
    unknown = [value for value in np.flatnonzero(is_found).tolist() if value not in table]
    if unknown:
        raise _unknown_labels(path, unknown, code)
    labels = np.zeros(_MAX_VALUE + 1, np.uint8)
    for value, label in table.items():
        labels[value] = label
    return np.asarray(labels[values if ignored is None else np.where(ignored, 0, values)])


def _value_table(code: MaskCode) -> dict[int, int]:
    stated = code.values or tuple((value, value) for value in range(code.num_classes + 1))
    return dict.fromkeys(IGNORED, 0) | dict(stated)


def _unknown_labels(path: Path, unknown: Sequence[int], code: MaskCode) -> MaskError:
    expected = f"0 to {code.num_classes}"
    if code.values is not None:
        expected = _listed([value for value, _ in code.values])
    return MaskError(
        f"{path} has the label {_listed(unknown)}; dataset.json names {code.num_classes} classes, "
        f"so expected {expected}, or 255 for unlabelled. Correct the mask, name the class, or say "
        f'in dataset.json what the values mean: "mask_values": {{"{unknown[0]}": "name of a '
        'class, or null"}.'
    )


def _from_palette(
    path: Path, image: Image.Image, code: MaskCode, ignored: NDArray[np.bool_] | None
) -> NDArray[np.uint8]:
    """Read by colours where all of them are the classes', else by greys or indices."""
    indices = np.asarray(image)
    used = used_values(indices if ignored is None else indices[~ignored])
    number = [int.from_bytes(bytes(color)) for color in palette_of(image)[used].tolist()]
    table = dict(code.colors)
    has_colors = any(number) and number.count(0) <= 1 and not lacks_colors(image)
    if code.values is None and has_colors and table.keys() >= set(number):
        labels = np.zeros(256, np.uint8)
        labels[used] = [table[color] for color in number]
        return np.asarray(labels[indices])
    greys = greys_of(image)
    if greys is not None and code.values is not None:
        stated = {value for value, _ in code.values}
        if stated >= set(used) and not stated >= set(used_values(greys)):
            greys = None  # the table is of indices
    return _from_values(path, indices if greys is None else greys, code, ignored)


@functools.lru_cache(maxsize=4)
def _label_of_color(colors: tuple[tuple[int, int], ...]) -> NDArray[np.uint8]:
    """(2^24,) uint8: the label of each colour, _NO_LABEL for none."""
    labels = np.full(2**24, _NO_LABEL, np.uint8)
    for color, label in colors:
        labels[color] = label
    return labels


def _from_colors(
    path: Path, pixels: NDArray[np.uint8], code: MaskCode, ignored: NDArray[np.bool_] | None
) -> NDArray[np.uint8]:
    red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
    colors = red << 16 | green << 8 | blue
    if ignored is not None:
        colors[ignored] = code.colors[0][0]
    labels = _label_of_color(code.colors)[colors]
    is_unknown = labels == _NO_LABEL
    if not is_unknown.any():
        return np.asarray(labels)
    if np.array_equal(red, green) and np.array_equal(red, blue):
        return _from_values(path, red, code, ignored)
    unknown, counts = np.unique(colors[is_unknown], return_counts=True)
    often = [f"#{unknown[place]:06x}" for place in np.argsort(-counts)]
    smooth = " Smoothed edges make many colours: save it without smoothing and not as JPEG."
    raise MaskError(
        f"{path} has {len(unknown)} colours that stand for no class, such as {_listed(often)}; "
        "expected the classes' colours of dataset.json, or those of its table "
        '"mask_colors": {"#rrggbb": "name of a class, or null"}.'
        + (smooth if len(unknown) > _MANY_COLORS else "")
    )


def _listed(values: Sequence[object]) -> str:
    more = f" and {len(values) - _MAX_NAMED} more" if len(values) > _MAX_NAMED else ""
    return ", ".join(str(value) for value in values[:_MAX_NAMED]) + more
