"""Files that are no slides that can be segmented, by how they are made."""

import io
import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from tests.support.slides import tissue_pixels, write_aperio

_ENCRYPTED = 1
"""Bit of a zip entry's flags: its content needs a password."""


def encrypted_zip(path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("slide.svs", os.urandom(2000))
    content = bytearray(buffer.getvalue())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= _ENCRYPTED
    path.write_bytes(content)


def encrypted_pdf(path: Path) -> None:
    path.write_bytes(
        b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R/Encrypt 2 0 R>>\n%%EOF"
    )


def truncated(path: Path) -> None:
    whole = write_aperio(path, tissue_pixels(900, 900), downsamples=()).read_bytes()
    path.write_bytes(whole[: len(whole) // 3])


def damaged_in_the_middle(path: Path) -> None:
    content = bytearray(write_aperio(path, tissue_pixels(900, 900), downsamples=()).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = bytes(20_000)
    path.write_bytes(content)


def without_mpp(path: Path) -> None:
    write_aperio(path, tissue_pixels(300, 300), mpp=None)


def with_absurd_mpp(path: Path) -> None:
    write_aperio(path, tissue_pixels(300, 300), mpp=352.8)


def without_codec(path: Path) -> None:
    """A compression that is known to TIFF, in tiles that nobody can decode."""
    tifffile.imwrite(path, tissue_pixels(300, 300), tile=(256, 256), photometric="rgb")
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages.first.tags["Compression"].overwrite(34661)  # JBIG


def without_its_pictures(path: Path) -> None:
    """A VMS that was copied alone."""
    text = "NoJpegColumns=1\nNoJpegRows=1\nImageFile=gone.jpg\nMapFile=gone_map.jpg\n"
    path.write_text(f"[Virtual Microscope Specimen]\n{text}")


def of_one_channel(path: Path) -> None:
    """One wavelength of an Aperio fluorescence scanner."""
    description = "Aperio Image Library v12\r\n300x300 (256x256)|MPP = 0.5"
    tiled = {"tile": (256, 256), "photometric": "minisblack", "metadata": None}
    tifffile.imwrite(path, tissue_pixels(300, 300)[..., 0], description=description, **tiled)


def of_16_bits(path: Path) -> None:
    pixels = tissue_pixels(300, 300).astype(np.uint16) * 257
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb")


def bomb(path: Path) -> None:
    """A picture of more pixels than are held in memory, in a few kilobytes."""
    image = Image.new("1", (20_000, 20_000))
    image.save(path, "PNG")


BAD_SLIDES: dict[str, tuple[Callable[[Path], object], str]] = {
    "encrypted_zip.svs": (encrypted_zip, "slide_format"),
    "encrypted_pdf.tif": (encrypted_pdf, "image_unknown"),
    "empty.ndpi": (Path.touch, "slide_format"),
    "text.mrxs": (partial(Path.write_text, data="[GENERAL]\n"), "slide_format"),
    "noise.svs": (partial(Path.write_bytes, data=os.urandom(50_000)), "slide_format"),
    "pipe.svs": (os.mkfifo, "slide_format"),
    "dangling.svs": (lambda path: path.symlink_to("gone.svs"), "slide_format"),
    "truncated.svs": (truncated, "slide_format"),
    "damaged.svs": (damaged_in_the_middle, "slide_region"),
    "no_mpp.svs": (without_mpp, "slide_scale"),
    "absurd_mpp.svs": (with_absurd_mpp, "slide_scale"),
    "no_codec.tif": (without_codec, "image_compression"),
    "alone.vms": (without_its_pictures, "slide_format"),
    "dark.svs": (of_one_channel, "slide_channels"),
    "deep.tif": (of_16_bits, "slide_channels"),
    "bomb.png": (bomb, "image_too_large"),
}
"""By file name: how it is made, and the code of the error that is expected."""
