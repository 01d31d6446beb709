"""All formats of slides' results, in the order in which they are offered.

A new format is a module with a `SlideFormat`, and one entry here.
"""

from collections.abc import Sequence

from serve.contract.errors import OptionError
from serve.slides.outputs.annotations import DSA, GEOJSON, QUPATH
from serve.slides.outputs.dicom_seg import DICOM_SEG
from serve.slides.outputs.format import SlideFormat
from serve.slides.outputs.ome_tiff import OME_TIFF
from serve.slides.outputs.ome_zarr import OME_ZARR
from serve.slides.outputs.overview import OVERVIEW

FORMATS: dict[str, SlideFormat] = {
    entry.name: entry for entry in (OME_ZARR, OVERVIEW, GEOJSON, QUPATH, DSA, OME_TIFF, DICOM_SEG)
}
"""By name."""
DEFAULT = ("ome-zarr", "overview", "geojson")


def formats_of(names: Sequence[str]) -> list[SlideFormat]:
    """The formats by their names, each once.

    Raises:
        OptionError: a name is unknown.
    """
    for name in names:
        if name not in FORMATS:
            raise OptionError(f"no format is called {name!r}, only {', '.join(FORMATS)}.")
    return [entry for name, entry in FORMATS.items() if name in names]
