"""OME-Zarr images, versions 0.4 and 0.5, that are brightfield RGB."""

import contextlib
import itertools
import lzma
import math
import os
import zlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import zarr
import zarr.errors
from numpy.typing import NDArray

from serve.images.mpp import Stated, judge
from serve.images.readers.errors import (
    SlideChannelsError,
    SlideError,
    SlideFormatError,
    SlideReadError,
)
from serve.images.readers.reader import Bounds, RegionReader, pyramid
from serve.images.tiff_channels import color_of, rgb_order
from serve.images.units import um_per_unit

_ZARR_ERRORS = (
    zarr.errors.BaseZarrError,
    zlib.error,
    lzma.LZMAError,
    ArithmeticError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    MemoryError,
    TypeError,
    RuntimeError,
    SystemError,
)
"""What zarr and its codecs raise on broken metadata and chunks."""
_BLOSC_HEAD_BYTES, _BLOSC_SIZE_AT = 16, 12
"""A chunk's own size is in the last four bytes of its head."""


class OmeZarrReader(RegionReader):
    """See `RegionReader`. Takes the first multiscale image of the group.

    Of a group in the layout of bioformats2raw, it takes the largest image, as of an OME-TIFF.
    """

    name: ClassVar[str] = "ome-zarr"

    def __init__(self, path: Path, *, mpp: float | None = None) -> None:
        super().__init__(path, mpp=mpp)
        try:
            self._open(path)
        except SlideError:
            raise
        except (*_ZARR_ERRORS, AttributeError) as error:
            # Python's own words on metadata of another form than expected tell nobody anything.
            is_plain = isinstance(error, LookupError | TypeError | AttributeError)
            found = "its metadata are of another form" if is_plain else str(error)
            raise SlideFormatError(
                f"{path.name} is no OME-Zarr image: {found.replace(f'{path.parent}/', '')}. Name "
                "the folder with the attribute `multiscales`."
            ) from error
        self.bounds = Bounds(0, 0, self.width_px, self.height_px)
        self.version = f"zarr {zarr.__version__}"

    def _open(self, path: Path) -> None:
        group = zarr.open_group(path, mode="r")
        if "bioformats2raw.layout" in _stated_of(group):
            images = [one for _, one in group.groups() if "multiscales" in _stated_of(one)]
            group = max(images, key=lambda one: _levels_of(one, path)[0].size, default=group)
        image = _stated_of(group)["multiscales"][0]
        self._axes = "".join(axis["name"] for axis in image["axes"])
        self._arrays = _levels_of(group, path)
        for array in self._arrays:
            self._check_channels(array)
        self._channel_order = self._order_of(_stated_of(group).get("omero") or {})
        y, x = self._axes.index("y"), self._axes.index("x")
        self.levels = pyramid([(array.shape[x], array.shape[y]) for array in self._arrays])
        self.properties = {"ome.name": str(image.get("name", ""))}
        self._stated = _stated(image, y, x)

    @classmethod
    def takes(cls, path: Path) -> bool:
        """See `RegionReader.takes`."""
        return any((path / name).is_file() for name in ("zarr.json", ".zattrs"))

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """See `RegionReader.read`."""
        found = np.full((height, width, 3), 255, np.uint8)
        rows, columns = (slice(max(y, 0), max(y + height, 0)), slice(max(x, 0), max(x + width, 0)))
        place = tuple({"y": rows, "x": columns}.get(axis, slice(None)) for axis in self._axes)
        try:
            self._refuse_cut_off(self._arrays[level], place)
            part = np.asarray(self._arrays[level][place])
        except _ZARR_ERRORS as error:
            raise SlideReadError(
                f"{self.path.name}: the region at x {x}, y {y} of level {level} cannot be read: "
                f"{str(error).rstrip('.')}. Copy the slide again."
            ) from error
        for axis in reversed(range(part.ndim)):  # time and depth are 1
            if self._axes[axis] in "tz":
                part = part.take(0, axis)
        names = [axis for axis in self._axes if axis not in "tz"]
        part = part.transpose([names.index(axis) for axis in "yxc"])[..., self._channel_order]
        top, left = rows.start - y, columns.start - x
        found[top : top + part.shape[0], left : left + part.shape[1]] = part
        return found

    def close(self) -> None:
        """See `RegionReader.close`."""

    def _refuse_cut_off(self, array: zarr.Array[Any], place: tuple[slice, ...]) -> None:
        """Raise ValueError for a file of chunks that was cut off, where zarr would not.

        An empty file of shards counts as one that was never written. A chunk of Blosc is read
        beyond its end.

        Args:
            array: of a level.
            place: rows and columns that are wanted; of other axes everything.
        """
        names = {type(codec).__name__ for codec in array.compressors}
        is_blosc = array.shards is None and not names.isdisjoint(("Blosc", "BloscCodec"))
        spans = []
        sides = array.shards or array.chunks
        for part, side, size in zip(place, sides, array.shape, strict=True):
            start, stop, _ = part.indices(size)
            spans.append(range(start // side, -(-stop // side)))
        for index in itertools.product(*spans):
            path = Path(self.path, array.path, array.metadata.encode_chunk_key(index))
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                head = file.read(_BLOSC_HEAD_BYTES)
                stated = int.from_bytes(head[_BLOSC_SIZE_AT:], "little") if is_blosc else 0
                least = max(stated, _BLOSC_HEAD_BYTES if is_blosc else 1)
                if os.fstat(file.fileno()).st_size < least:
                    raise ValueError(f"{path.relative_to(self.path)} is cut off")

    def _check_channels(self, level: zarr.Array[Any]) -> None:
        shape, dtype = level.shape, level.dtype
        sizes = dict(zip(self._axes, shape, strict=False))
        others = {axis: size for axis, size in sizes.items() if axis in "tz"}
        if dtype != np.uint8:
            raise SlideChannelsError(
                f"{self.path.name} has values of {dtype}, expected 8 bits per channel. Convert it, "
                "so that you choose which value is white."
            )
        if sizes.get("c") != 3 or set(others.values()) - {1} or not {"x", "y"} <= set(sizes):
            raise SlideChannelsError(
                f"{self.path.name} is {sizes}, expected one brightfield image with 3 channels, "
                "red, green and blue. Fluorescence and stacks are not segmented."
            )

    def _order_of(self, omero: dict[str, Any]) -> list[int]:
        """Which channel is red, green and blue; in this order where nothing is said of them."""
        channels = omero.get("channels", ())
        labels = [str(channel.get("label", "")) for channel in channels]
        shown = [str(channel.get("color", "")) for channel in channels]
        if len(channels) != 3:
            return [0, 1, 2]
        order = rgb_order([color_of(*found) for found in zip(labels, shown, strict=True)])
        if order is None and len(set(shown)) == 3:
            raise SlideChannelsError(
                f"{self.path.name} has the channels {', '.join(labels)} in the colours "
                f"{', '.join(shown)}, expected red, green and blue of a brightfield image. "
                "Fluorescence is not segmented."
            )
        return order or [0, 1, 2]


def _stated_of(group: zarr.Group) -> dict[str, Any]:
    """What a group says of its images: in version 0.5 below `ome`."""
    attributes: dict[str, Any] = dict(group.attrs)
    found: dict[str, Any] = attributes.get("ome", attributes)
    return found


def _levels_of(group: zarr.Group, slide: Path) -> list[zarr.Array[Any]]:
    """The arrays of the first image of a slide's group, the finest first.

    Raises:
        SlideFormatError: one is missing.
    """
    found = []
    for level in _stated_of(group)["multiscales"][0]["datasets"]:
        array = group.get(level["path"])
        if not isinstance(array, zarr.Array):
            raise SlideFormatError(
                f"{slide.name} lacks its array {level['path']}. Copy all of the folder again."
            )
        found.append(array)
    return found


def _stated(image: dict[str, Any], y: int, x: int) -> Stated:
    """Um per pixel of level 0: its own scale, times the one of all levels."""
    scales = [
        step["scale"]
        for entry in (image["datasets"][0], image)
        for step in entry.get("coordinateTransformations", ())
        if step.get("type") == "scale"
    ]
    sides = []
    for axis in (x, y):
        um = um_per_unit(image["axes"][axis].get("unit") or "")
        if um is None or not scales:
            return Stated()
        sides.append(um * math.prod(float(scale[axis]) for scale in scales))
    return judge(sides[0], sides[1], "OME-Zarr scale")
