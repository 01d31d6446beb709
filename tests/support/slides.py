"""Slides for tests: small ones that are written here, a virtual one, and a real one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tifffile
from numpy.typing import NDArray

from serve.images.readers.reader import Bounds, Level, RegionReader


def write_aperio(
    path: Path,
    pixels: NDArray[np.uint8],
    *,
    mpp: float | None = 0.5,
    downsamples: Sequence[int] = (4,),
    compression: str = "jpeg",
) -> Path:
    """Write (H, W, 3) pixels as a tiled pyramid that OpenSlide takes for one of Aperio's."""
    height, width = pixels.shape[:2]
    stated = "" if mpp is None else f"|AppMag = 20|MPP = {mpp:.4f}"
    description = (
        f"Aperio Image Library v12.0.15\r\n{width}x{height} [0,0 {width}x{height}] (240x240) "
        f"JPEG/RGB Q=85{stated}"
    )
    options: dict[str, Any] = {
        "photometric": "rgb",
        "compression": compression,
        "tile": (256, 256),
        "metadata": None,
    }
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(pixels, description=description, subfiletype=0, **options)
        thumbnail = np.ascontiguousarray(pixels[::8, ::8])
        tiff.write(
            thumbnail,
            description=description,
            photometric="rgb",
            compression="jpeg",
            rowsperstrip=16,
            metadata=None,
        )
        for factor in downsamples:
            part = pixels[: height // factor * factor : factor, : width // factor * factor : factor]
            level = np.ascontiguousarray(part)
            tiff.write(level, description=description, subfiletype=1, **options)
    return path


def write_ome_zarr(
    path: Path,
    pixels: NDArray[Any],
    *,
    unit: str = "micrometer",
    scale: float = 0.5,
    of_all: float | None = None,
    omero: dict[str, Any] | None = None,
) -> Path:
    """Write (H, W, C) pixels as two levels of an OME-Zarr 0.5, channels first.

    Args:
        path: the folder.
        pixels: of level 0.
        unit: of the scales.
        scale: of each level's transformation.
        of_all: scale of all levels, beside their own.
        omero: what is said of the channels.
    """
    import zarr

    group = zarr.open_group(path, mode="w", zarr_format=3)
    for index, step in enumerate((1, 2)):
        stored = np.moveaxis(pixels[::step, ::step], -1, 0)
        group.create_array(str(index), data=np.ascontiguousarray(stored))
    axes = [{"name": "c", "type": "channel"}]
    axes += [{"name": name, "type": "space", "unit": unit} for name in "yx"]

    def scaled(scale: float) -> list[dict[str, Any]]:
        return [{"type": "scale", "scale": [1, scale, scale]}]

    levels = [{"path": str(i), "coordinateTransformations": scaled(scale)} for i in (0, 1)]
    image: dict[str, Any] = {"axes": axes, "datasets": levels}
    if of_all is not None:
        image["coordinateTransformations"] = scaled(of_all)
    content = {"version": "0.5", "multiscales": [image], **({"omero": omero} if omero else {})}
    group.attrs["ome"] = content
    return path


def tissue_pixels(height: int, width: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth pink and purple with some noise, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = np.sin(x / 47 + rng.random()) + np.cos(y / 61 + rng.random()) + np.sin((x + y) / 93)
    share = ((waves + 3) / 6)[..., None]
    colors = np.array([120, 60, 160], np.float32) * share + np.array([235, 150, 190]) * (1 - share)
    noise = rng.normal(0, 4, (height, width, 1))
    return np.clip(colors + noise, 0, 255).astype(np.uint8)


def write_dicom_head(path: Path, series: str, *, referenced: str = "1.2.3") -> Path:
    """Write what tells of which series a DICOM file is; it has no pixels."""
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset

    other = Dataset()
    other.SeriesInstanceUID = referenced
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.VLWholeSlideMicroscopyImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.4"
    dataset.ReferencedSeriesSequence = [other]  # comes before the series' own
    dataset.SeriesInstanceUID = series
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


class VirtualSlide(RegionReader):
    """A slide that is a function of its pixels' place: red and green are x and y of level 0.

    Args:
        path: any file, for the fingerprint.
        size: (height, width) of level 0.
        downsamples: of the levels, 1 first.
        bounds: of level 0; by default all of it.
        mpp: um per pixel of level 0.
    """

    name: ClassVar[str] = "virtual"

    def __init__(
        self,
        path: Path,
        size: tuple[int, int],
        *,
        downsamples: Sequence[float] = (1,),
        bounds: Bounds | None = None,
        mpp: float = 0.5,
    ) -> None:
        super().__init__(path, mpp=mpp)
        height, width = size
        self.levels = tuple(
            Level(int(width / factor), int(height / factor), factor, factor)
            for factor in downsamples
        )
        self.bounds = bounds or Bounds(0, 0, width, height)
        self.properties = {}
        self.version = "virtual 1"

    @classmethod
    def takes(cls, path: Path) -> bool:
        return False

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        shape = self.levels[level]
        rows = (np.arange(y, y + height) + 0.5) * shape.downsample_y
        columns = (np.arange(x, x + width) + 0.5) * shape.downsample_x
        found = np.empty((height, width, 3), np.uint8)
        found[..., 0] = position_byte(columns)[None, :]
        found[..., 1] = position_byte(rows)[:, None]
        found[..., 2] = 40
        outside_rows = (rows < 0) | (rows >= self.height_px)
        outside_columns = (columns < 0) | (columns >= self.width_px)
        found[outside_rows[:, None] | outside_columns[None, :]] = 255
        return found

    def close(self) -> None:
        pass


def position_byte(position: NDArray[np.float64]) -> NDArray[np.uint8]:
    """A triangle wave of a place in pixels: slow enough to be resampled, never flat."""
    return np.abs(position / 4 % 400 - 200).astype(np.uint8)
