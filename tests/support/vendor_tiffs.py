"""Slides in the TIFF layouts of Philips, Leica, Ventana and Trestle, small and written here.

What the layouts are is told by OpenSlide's pages on formats. No scanner's own file is used.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

TILE_PX = 64
XML_PACKET = 700
GARISH = (255, 0, 255)
"""Colour of what must never be seen: padding, labels and macro images."""
_SCN_NAMESPACE = "http://www.leica-microsystems.com/scn/2010/10/01"
_NM_PER_UM = 1000
_LABEL: dict[str, Any] = {
    "photometric": "rgb",
    "compression": "jpeg",
    "rowsperstrip": 16,
    "metadata": None,
}


def tiled(**more: Any) -> dict[str, Any]:
    """How tifffile writes a level: JPEG tiles without subsampling, hardly any loss."""
    return {
        "photometric": "rgb",
        "subsampling": (1, 1),
        "compression": "jpeg",
        "compressionargs": {"level": 97},
        "tile": (TILE_PX, TILE_PX),
        "metadata": None,
        **more,
    }


def shrunk(pixels: Pixels, factor: int) -> Pixels:
    """Pixels of a coarser level: means of whole squares; the last rows and columns are left out."""
    height, width = (length // factor for length in pixels.shape[:2])
    whole = pixels[: height * factor, : width * factor]
    means = whole.reshape(height, factor, width, factor, 3).mean(axis=(1, 3))
    return np.rint(means).astype(np.uint8)


def garish(height: int, width: int) -> Pixels:
    """An image that must never be taken for tissue."""
    return np.full((height, width, 3), GARISH, np.uint8)


def write_philips(
    path: Path,
    pixels: Pixels,
    *,
    mpp: tuple[float, float] = (0.25, 0.25),
    downsamples: Sequence[int] = (2, 4),
    missing_tiles: Sequence[tuple[int, int]] = (),
) -> Path:
    """Write a Philips TIFF, whose coarser levels are padded to whole tiles.

    Args:
        path: the file.
        pixels: (H, W, 3), whole tiles.
        mpp: um per pixel along x and y.
        downsamples: of the coarser levels.
        missing_tiles: (row, column) of tiles of level 0 that were not scanned.
    """
    spacings = [
        "&quot;{:.8f}&quot; &quot;{:.8f}&quot;".format(
            *(side * factor / _NM_PER_UM for side in mpp[::-1])
        )
        for factor in (1, *downsamples)
    ]
    levels = "".join(
        '<DataObject ObjectType="PixelDataRepresentation">'
        f'<Attribute Name="DICOM_PIXEL_SPACING">{spacing}</Attribute></DataObject>'
        for spacing in spacings
    )
    description = (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">'
        '<Attribute Name="PIM_DP_SCANNED_IMAGES"><Array><DataObject ObjectType="DPScannedImage">'
        '<Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute>'
        f'<Attribute Name="DICOM_PIXEL_SPACING">{spacings[0]}</Attribute>'
        '<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>'
        f"{levels}</Array></Attribute></DataObject></Array></Attribute></DataObject>"
    )
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(
            _some_tiles(pixels, missing_tiles),
            shape=pixels.shape,
            dtype=np.uint8,
            description=description,
            software="Philips DP v1.0",
            **tiled(),
        )
        for factor in downsamples:
            level = shrunk(pixels, factor)
            height, width = (-(-length // TILE_PX) * TILE_PX for length in level.shape[:2])
            padded = garish(height, width)
            padded[: level.shape[0], : level.shape[1]] = level
            tiff.write(padded, subfiletype=1, **tiled())
        for name in ("Label", "Macro"):
            tiff.write(garish(48, 64), description=name, **_LABEL)
    return path


def _some_tiles(pixels: Pixels, missing: Sequence[tuple[int, int]]) -> Iterator[Pixels | None]:
    for row in range(pixels.shape[0] // TILE_PX):
        for column in range(pixels.shape[1] // TILE_PX):
            top, left = row * TILE_PX, column * TILE_PX
            tile = pixels[top : top + TILE_PX, left : left + TILE_PX]
            yield None if (row, column) in missing else np.ascontiguousarray(tile)


@dataclass(frozen=True)
class Region:
    """A part of a slide that was scanned, in pixels of level 0."""

    x: int
    y: int
    width: int
    height: int

    @property
    def rows_and_columns(self) -> tuple[slice, slice]:
        """Of the slide's pixels."""
        return slice(self.y, self.y + self.height), slice(self.x, self.x + self.width)


def write_leica(
    path: Path,
    pixels: Pixels,
    regions: Sequence[Region],
    *,
    mpp: float = 0.5,
    downsamples: Sequence[int] = (4,),
    light: str = "brightfield",
) -> Path:
    """Write a Leica SCN: several regions of a slide, each a pyramid of its own, and a macro image.

    Args:
        path: the file.
        pixels: (H, W, 3) of the whole slide.
        regions: which parts of it are in the file.
        mpp: um per pixel.
        downsamples: of the coarser levels.
        light: how the slide was lit, as the file says.
    """
    height, width = pixels.shape[:2]
    nm = round(mpp * _NM_PER_UM)
    factors = (1, *downsamples)
    whole = f'sizeX="{width * nm}" sizeY="{height * nm}"'
    images = [
        _scn_image(f'{whole} offsetX="0" offsetY="0"', [(0, width // 16, height // 16)], light)
    ]
    for index, region in enumerate(regions):
        view = (
            f'sizeX="{region.width * nm}" sizeY="{region.height * nm}" '
            f'offsetX="{region.x * nm}" offsetY="{region.y * nm}"'
        )
        sizes = [
            (1 + index * len(factors) + place, region.width // factor, region.height // factor)
            for place, factor in enumerate(factors)
        ]
        images.append(_scn_image(view, sizes, light))
    description = (
        f'<?xml version="1.0"?><scn xmlns="{_SCN_NAMESPACE}"><collection {whole}>'
        f"{''.join(images)}</collection></scn>"
    )
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(garish(height // 16, width // 16), description=description, **tiled())
        for region in regions:
            part = pixels[region.rows_and_columns]
            for factor in factors:
                per_cm = 10_000 / (mpp * factor)
                scale = {"resolution": (per_cm, per_cm), "resolutionunit": 3}
                tiff.write(shrunk(part, factor), **tiled(**scale))
    return path


def _scn_image(view: str, sizes: Sequence[tuple[int, int, int]], light: str) -> str:
    width, height = sizes[0][1:]
    # Another focal plane, which is not read.
    dimensions = f'<dimension sizeX="{width}" sizeY="{height}" r="0" z="1" ifd="0"/>' + "".join(
        f'<dimension sizeX="{width}" sizeY="{height}" r="{place}" ifd="{page}"/>'
        for place, (page, width, height) in enumerate(sizes)
    )
    return (
        f'<image><view {view}/><device model="Leica SCN400"/><pixels>{dimensions}</pixels>'
        "<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings>"
        f"<illuminationSettings><illuminationSource>{light}</illuminationSource>"
        "</illuminationSettings></scanSettings></image>"
    )


@dataclass(frozen=True)
class Area:
    """An area of interest of a Ventana slide."""

    x: int
    """Left edge in pixels of level 0."""
    y: int
    rows: int
    """Of tiles."""
    columns: int
    first_row: int
    """Where its tiles begin among those of the file."""
    first_column: int


def write_ventana(
    path: Path,
    pixels: Pixels,
    areas: Sequence[Area],
    *,
    overlap: tuple[int, int] = (8, 4),
    mpp: float = 0.25,
    downsamples: Sequence[int] = (2, 4),
) -> Path:
    """Write a Ventana BIF: areas of tiles that overlap.

    Args:
        path: the file.
        pixels: (H, W, 3) of the whole slide.
        areas: which parts of it are in the file; the first one begins at the top.
        overlap: (y, x) pixels by which neighbours overlap.
        mpp: um per pixel.
        downsamples: of the coarser levels.
    """
    last_row = max(area.first_row + area.rows for area in areas)
    last_column = max(area.first_column + area.columns for area in areas)
    mosaic = garish(last_row * TILE_PX, last_column * TILE_PX)
    advance = TILE_PX - overlap[0], TILE_PX - overlap[1]
    for area in areas:
        for row, column in np.ndindex(area.rows, area.columns):
            top, left = area.y + row * advance[0], area.x + column * advance[1]
            y, x = (area.first_row + row) * TILE_PX, (area.first_column + column) * TILE_PX
            tile = pixels[top : top + TILE_PX, left : left + TILE_PX]
            mosaic[y : y + TILE_PX, x : x + TILE_PX] = tile
    return _write_iscan(path, mosaic, _encode_info(areas, overlap).encode(), mpp, downsamples)


def write_ventana_tiff(
    path: Path, pixels: Pixels, *, mpp: float = 0.25, downsamples: Sequence[int] = (2, 4)
) -> Path:
    """Write a Ventana TIFF: as a BIF, without areas and without overlap."""
    return _write_iscan(path, pixels, b"", mpp, downsamples)


def _write_iscan(
    path: Path, tiles: Pixels, stitched: bytes, mpp: float, downsamples: Sequence[int]
) -> Path:
    """Write the pages of a Ventana slide: the label, and the tiles as they are in the file."""
    scan = f'<iScan Magnification="20" ScanRes="{mpp}" Z-layers="1"/>'.encode()
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tags = [(XML_PACKET, 1, len(scan), scan, True)]
        tiff.write(garish(48, 64), description="Label Image", extratags=tags, **_LABEL)
        for index, factor in enumerate((1, *downsamples)):
            has_areas = index == 0 and stitched
            tags = [(XML_PACKET, 1, len(stitched), stitched, True)] if has_areas else []
            name = f"level={index} mag={20 / factor:g} quality=97"
            tiff.write(shrunk(tiles, factor), description=name, extratags=tags, **tiled())
    return path


def _encode_info(areas: Sequence[Area], overlap: tuple[int, int]) -> str:
    """What a Ventana slide says of its areas; heights are counted from the bottom."""
    heights = [(area.rows - 1) * (TILE_PX - overlap[0]) + TILE_PX for area in areas]
    bottom = max(area.y + height for area, height in zip(areas, heights, strict=True))
    infos = "".join(
        f'<ImageInfo AOIScanned="1" AOIIndex="{index}" Width="{TILE_PX}" Height="{TILE_PX}" '
        f'Pos-X="{area.x}" Pos-Y="{bottom - area.y - height}" NumRows="{area.rows}" '
        f'NumCols="{area.columns}">{_joints(area.rows, area.columns, overlap)}</ImageInfo>'
        for index, (area, height) in enumerate(zip(areas, heights, strict=True))
    )
    origins = "".join(
        f'<AOI{index} OriginX="{area.first_column * TILE_PX}" '
        f'OriginY="{area.first_row * TILE_PX}"/>'
        for index, area in enumerate(areas)
    )
    return (
        f'<?xml version="1.0"?><EncodeInfo Ver="2"><SlideStitchInfo>{infos}</SlideStitchInfo>'
        f"<AoiOrigin>{origins}</AoiOrigin></EncodeInfo>"
    )


def _joints(rows: int, columns: int, overlap: tuple[int, int]) -> str:
    """How neighbours are joined; tiles are numbered in a serpentine from the bottom left."""

    def number(row: int, column: int) -> int:
        from_bottom = rows - 1 - row
        return from_bottom * columns + (columns - 1 - column if from_bottom % 2 else column) + 1

    joints = []
    for row in range(rows):
        for column in range(columns):
            here = number(row, column)
            if column + 1 < columns:
                joints.append(("RIGHT", here, number(row, column + 1), overlap[1], 0))
            if row > 0:
                joints.append(("UP", here, number(row - 1, column), 0, overlap[0]))
    return "".join(
        f'<TileJointInfo FlagJoined="1" Confidence="99" Direction="{direction}" Tile1="{one}" '
        f'Tile2="{other}" OverlapX="{x}" OverlapY="{y}"/>'
        for direction, one, other, x, y in joints
    )


def write_trestle(path: Path, pixels: Pixels, *, mpp: float = 0.5) -> Path:
    """Write a Trestle TIFF: tiles of level 0 overlap, and a coarser level without overlap.

    Args:
        path: the file.
        pixels: (H, W, 3), at least 512 x 512; what is beyond is left out, so that levels agree.
        mpp: um per pixel.
    """
    overlap, side = 8, 512
    whole, advance = pixels[:side, :side], TILE_PX - overlap
    places = range(0, side - TILE_PX + 1, advance)
    tiles = [[whole[y : y + TILE_PX, x : x + TILE_PX] for x in places] for y in places]
    mosaic = np.concatenate([np.concatenate(row, axis=1) for row in tiles])
    description = f"Background Color=ffffff;Objective Power=20;OverlapsXY= {overlap} {overlap} 0 0"
    with tifffile.TiffWriter(path) as tiff:
        for level, factor in ((mosaic, 1), (shrunk(whole, 2), 2)):
            scale = {"resolution": (mpp * factor, mpp * factor), "resolutionunit": 1}
            tiff.write(level, description=description, software="MedScan 1.0", **tiled(**scale))
    return path
