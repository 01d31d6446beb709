"""Scale and channels of OME-Zarr as its metadata say them."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec
from zarr.registry import get_numcodec

from serve.images.readers.errors import SlideChannelsError, SlideFormatError, SlideReadError
from serve.images.readers.registry import open_reader
from tests.support.errors import raises
from tests.support.slides import tissue_pixels, write_ome_zarr

PIXELS = tissue_pixels(40, 56)


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
        ({"unit": "\u00b5m", "scale": 0.25}, 0.25),
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
    with open_reader(write_ome_zarr(tmp_path / "a.zarr", PIXELS, **stated)) as slide:
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
    stored = PIXELS[..., ["RGB".index(name) for name in order]]
    with open_reader(write_ome_zarr(tmp_path / "a.zarr", stored, omero=omero)) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, 56, 40), PIXELS)


def test_three_channels_of_fluorescence_are_refused(tmp_path: Path):
    stains = channels("DAPI 0000FF", "FITC 00FF00", "Cy5 FF00FF")
    path = write_ome_zarr(tmp_path / "a.zarr", PIXELS, omero=stains)
    with raises(SlideChannelsError, "a.zarr", "DAPI, FITC, Cy5"):
        open_reader(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("multiscales",), "text"),
        (("multiscales", 0, "axes", 0), 5),
        (("multiscales", 0, "axes", 1, "unit"), [1]),
        (("multiscales", 0, "datasets", 0, "path"), "../other"),
        (("multiscales", 0, "datasets", 0, "coordinateTransformations", 0), "scale"),
        (("multiscales", 0, "datasets", 0, "coordinateTransformations", 0, "scale"), [1]),
        (("multiscales", 0, "datasets"), []),
        (
            ("multiscales", 0, "datasets", 0, "coordinateTransformations", 0, "scale"),
            [1, 10**400, 1],
        ),
    ],
)
def test_an_ome_zarr_with_metadata_of_another_form_is_refused(
    tmp_path: Path, place: tuple[str | int, ...], value: object
) -> None:
    slide = write_ome_zarr(tmp_path / "odd.zarr", tissue_pixels(64, 64))
    group = zarr.open_group(slide, mode="a")
    metadata: Any = dict(group.attrs)["ome"]
    part = metadata
    for step in place[:-1]:
        part = part[step]
    part[place[-1]] = value
    group.attrs["ome"] = metadata
    with raises(SlideFormatError):
        open_reader(slide)


@pytest.mark.parametrize(
    "shape_and_type",
    [((3, 20, 28), "u2"), ((2, 20, 28), "u1"), ((4, 20, 28), "u1"), ((20, 28), "u1")],
    ids=["16 bits", "2 channels", "4 channels", "no channels"],
)
def test_a_coarse_level_of_another_kind_is_refused(
    shape_and_type: tuple[tuple[int, ...], str], tmp_path: Path
) -> None:
    path = write_ome_zarr(tmp_path / "a.zarr", PIXELS)
    level = np.zeros(*shape_and_type)
    zarr.open_group(path, mode="a").create_array("1", data=level, overwrite=True)
    with raises(SlideChannelsError, "a.zarr"):
        open_reader(path)


def test_a_level_that_was_not_copied_is_named(tmp_path: Path) -> None:
    path = write_ome_zarr(tmp_path / "a.zarr", PIXELS)
    shutil.rmtree(path / "1")
    with raises(SlideFormatError, "a.zarr", "array 1"):
        open_reader(path)


@pytest.mark.parametrize("damage", [slice(-400, None), slice(20, 400)], ids=["cut", "changed"])
@pytest.mark.parametrize("name", ["gzip", "zlib", "lzma", "bz2", "zstd"])
def test_a_damaged_chunk_is_told_whatever_compressed_it(
    name: str, damage: slice, tmp_path: Path
) -> None:
    axes = [{"name": "c"}, *({"name": axis, "unit": "micrometer"} for axis in "yx")]
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    group.attrs["multiscales"] = [{"axes": axes, "datasets": [{"path": "0"}]}]
    stored = np.ascontiguousarray(np.moveaxis(PIXELS, -1, 0))
    codec = get_numcodec({"id": name})
    group.create_array("0", data=stored, chunks=stored.shape, compressors=[codec])
    with open_reader(tmp_path / "a.zarr") as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, 56, 40), PIXELS)
        chunk = tmp_path / "a.zarr" / "0" / "0.0.0"
        content = bytearray(chunk.read_bytes())
        content[damage] = b"" if damage.stop is None else b"\xaa" * 380
        chunk.write_bytes(content)
        with raises(SlideReadError, "a.zarr"):
            slide.read(0, 0, 0, 56, 40)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("length", [0, 10, 16, 300, -1])
def test_a_chunk_of_blosc_that_was_cut_off_is_told(
    length: int, zarr_format: Literal[2, 3], tmp_path: Path
) -> None:
    """It is read beyond its end otherwise, without an error where nothing could be compressed."""
    path = tmp_path / "a.zarr"
    pixels = np.random.default_rng(0).integers(0, 255, (3, 80, 80), np.uint8)
    codec = BloscCodec() if zarr_format == 3 else get_numcodec({"id": "blosc"})
    axes = [{"name": "c"}, *({"name": axis, "unit": "micrometer"} for axis in "yx")]
    image = {"multiscales": [{"axes": axes, "datasets": [{"path": "0"}]}]}
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    group.attrs.update(image if zarr_format == 2 else {"ome": image})
    group.create_array("0", data=pixels, chunks=(1, 40, 40), compressors=[codec])
    with open_reader(path) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, 80, 80), np.moveaxis(pixels, 0, -1))
        chunk = path / "0" / ("c/1/1/0" if zarr_format == 3 else "1.1.0")
        chunk.write_bytes(chunk.read_bytes()[:length])
        slide.read(0, 40, 0, 40, 80)
        with raises(SlideReadError, "a.zarr"):
            slide.read(0, 0, 60, 10, 10)


@pytest.mark.parametrize("length", [0, 3, -1])
def test_a_file_of_shards_that_was_cut_off_is_told(length: int, tmp_path: Path) -> None:
    path = write_ome_zarr(tmp_path / "a.zarr", PIXELS)
    stored = np.ascontiguousarray(np.moveaxis(PIXELS, -1, 0))
    options: dict[str, Any] = {"chunks": (1, 10, 14), "shards": (3, 20, 28), "overwrite": True}
    zarr.open_group(path, mode="a").create_array("0", data=stored, **options)
    with open_reader(path) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, 56, 40), PIXELS)
        shard = path / "0" / "c" / "0" / "1" / "1"
        shard.write_bytes(shard.read_bytes()[:length])
        np.testing.assert_array_equal(slide.read(0, 0, 0, 56, 20), PIXELS[:20])
        with raises(SlideReadError, "a.zarr"):
            slide.read(0, 30, 30, 10, 10)


def test_of_the_layout_of_bioformats2raw_the_largest_image_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    zarr.open_group(path, mode="w").attrs["ome"] = {"bioformats2raw.layout": 3}
    for name, pixels in (("0", PIXELS[:8]), ("1", PIXELS), ("2", PIXELS[::4, ::4])):
        write_ome_zarr(path / name, pixels)
    zarr.open_group(path / "OME", mode="w")
    with open_reader(path) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, 56, 40), PIXELS)
        assert slide.mpp == 0.5


@pytest.mark.parametrize(("key", "value"), [("fill_value", -1), ("shape", [3, 10**400, 9])])
def test_an_array_of_impossible_numbers_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    slide = write_ome_zarr(tmp_path / "odd.zarr", tissue_pixels(64, 64))
    path = slide / "0" / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {key: value}))
    with raises(SlideFormatError, "odd.zarr"):
        open_reader(slide)


def test_an_ome_zarr_without_pixels_is_refused(tmp_path: Path) -> None:
    slide = write_ome_zarr(tmp_path / "none.zarr", tissue_pixels(64, 64))
    zarr.open_group(slide, mode="a").create_array("0", shape=(3, 0, 64), dtype="u1", overwrite=True)
    with raises(SlideFormatError):
        open_reader(slide)
