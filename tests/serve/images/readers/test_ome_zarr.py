"""Scale and channels of OME-Zarr as its metadata say them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from serve.images.readers.errors import SlideChannelsError
from serve.images.readers.registry import open_reader
from tests.support.errors import raises
from tests.support.slides import tissue_pixels

PIXELS = tissue_pixels(40, 56)


def write(
    path: Path,
    *,
    order: str = "RGB",
    unit: str = "micrometer",
    scale: float = 0.25,
    of_all: float | None = None,
    omero: dict[str, Any] | None = None,
) -> Path:
    group = zarr.open_group(path, mode="w", zarr_format=3)
    stored = np.moveaxis(PIXELS[..., ["RGB".index(name) for name in order]], -1, 0)
    group.create_array("0", data=np.ascontiguousarray(stored), chunks=(3, 40, 56))
    axes = [{"name": "c", "type": "channel"}]
    axes += [{"name": name, "type": "space", "unit": unit} for name in "yx"]
    level = {
        "path": "0",
        "coordinateTransformations": [{"type": "scale", "scale": [1, scale, scale]}],
    }
    image: dict[str, Any] = {"axes": axes, "datasets": [level]}
    if of_all is not None:
        image["coordinateTransformations"] = [{"type": "scale", "scale": [1, of_all, of_all]}]
    content = {"version": "0.5", "multiscales": [image], **({"omero": omero} if omero else {})}
    group.attrs["ome"] = content
    return path


def channels(*found: str) -> dict[str, Any]:
    pairs = (channel.split() for channel in found)
    return {"channels": [{"label": label, "color": color} for label, color in pairs]}


@pytest.mark.parametrize(
    ("stated", "mpp"),
    [
        ({"unit": "nanometer", "scale": 250}, 0.25),
        ({"unit": "centimeter", "scale": 0.25e-4}, 0.25),
        ({"unit": "meter", "scale": 0.25e-6}, 0.25),
        ({"unit": "angstrom", "scale": 2500}, 0.25),
        ({"unit": "\u00b5m"}, 0.25),
        ({"scale": 1, "of_all": 0.25}, 0.25),
        ({"scale": 0.5, "of_all": 0.5}, 0.25),
        ({"unit": "pixel"}, None),
        ({"unit": ""}, None),
        ({"scale": float("nan")}, None),
    ],
)
def test_the_scale_is_read_in_every_unit_and_from_both_places(
    stated: dict[str, Any], mpp: float | None, tmp_path: Path
):
    with open_reader(write(tmp_path / "a.zarr", **stated)) as slide:
        assert slide.mpp == (mpp and pytest.approx(mpp))


@pytest.mark.parametrize(
    ("order", "omero"),
    [
        ("RGB", None),
        ("BGR", channels("Blue 0000FF", "Green 00FF00", "Red FF0000")),
        ("GRB", channels("0 00ff00", "1 ff0000", "2 0000ff")),
        ("RGB", channels("a FFFFFF", "b FFFFFF", "c FFFFFF")),
    ],
)
def test_channels_are_red_green_and_blue_as_they_say(
    order: str, omero: dict[str, Any] | None, tmp_path: Path
):
    with open_reader(write(tmp_path / "a.zarr", order=order, omero=omero)) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, 56, 40), PIXELS)


def test_three_channels_of_fluorescence_are_refused(tmp_path: Path):
    path = write(tmp_path / "a.zarr", omero=channels("DAPI 0000FF", "FITC 00FF00", "Cy5 FF00FF"))
    with raises(SlideChannelsError, "a.zarr", "DAPI, FITC, Cy5"):
        open_reader(path)
