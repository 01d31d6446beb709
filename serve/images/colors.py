"""From a file's colours to RGB as screens show them (sRGB), and what was changed on the way.

An embedded ICC profile is applied, so that the same tissue has the same colours whichever program
saved it; one that is sRGB already, as most are, changes nothing. A profile that cannot be used is
told in a note, and so is everything else that changes pixels.
"""

import io

import numpy as np
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import TiffImageFile

MAX_ICC_BYTES = 4 * 2**20
"""Larger profiles are not applied; those of printers have 1 to 3 MiB."""
_SAME_COLOR = 2
"""Steps of 255 by which a profile may differ from sRGB and still be it: sRGB's own differ by 1."""
_COLOR_MAP = 320
_GRID = 9
"""Steps along each axis of the colours on which profiles are compared."""


def to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Convert a loaded image of 8 bits to RGB.

    Transparency is composited on white. Grey, palette, CMYK and CIELab become RGB.

    Returns:
        The image in the mode RGB, and notes on what was changed.
    """
    profile = image.info.get("icc_profile")
    notes = []
    if image.mode == "La":  # Pillow converts that to nothing else
        image = image.convert("LA")
    is_grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data or image.mode in ("LA", "PA", "RGBA"):
        image, is_changed = _on_white(image)
        notes += ["transparent pixels became white"] if is_changed else []
    if is_grey:  # so that a profile of greys fits
        image = image.convert("L")
    elif image.mode not in ("RGB", "CMYK", "LAB"):
        image = image.convert("RGB")
    if isinstance(profile, bytes) and profile:
        converted, note = _apply_profile(image, profile)
        notes += [note] if note else []
        if converted is not None:
            return converted, notes
    if image.mode == "CMYK":
        notes.append("CMYK was converted to RGB without a colour profile")
    if image.mode == "LAB":
        notes.append("CIELab was converted to sRGB")
        return _convert(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))), notes
    return image.convert("RGB"), notes


def repair_palette(image: Image.Image) -> None:
    """Give a loaded TIFF the palette of 8 bits that its program wrote where 16 are expected.

    Of 16 bits Pillow takes the upper 8, and all would be black. libtiff reads it in this way, too.
    """
    colors = image.tag_v2.get(_COLOR_MAP) if isinstance(image, TiffImageFile) else None
    if image.mode == "P" and isinstance(colors, tuple) and 0 < max(colors) < 256:
        image.putpalette(bytes(np.reshape(colors, (3, -1)).T.ravel().tolist()))


def _on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """Composite on white; whether any pixel was transparent."""
    rgba = image.convert("RGBA")
    lowest, _ = rgba.getchannel("A").getextrema()
    if lowest == 255:
        return rgba.convert("RGB"), False
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB"), True


def _apply_profile(image: Image.Image, profile: bytes) -> tuple[Image.Image | None, str]:
    """The image in sRGB, None where nothing is to be converted, and a note."""
    if len(profile) > MAX_ICC_BYTES:
        return None, f"its colour profile of {len(profile)} bytes is too large and was not applied"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(source).strip() or "without a name"
        if image.mode in ("RGB", "L") and _is_srgb(source, image.mode):
            return None, ""
        converted = _convert(image, source)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        return None, f"its colour profile cannot be used and was not applied: {error}"
    return converted, f"colours were converted from the profile {name[:80]!r} to sRGB"


def _convert(image: Image.Image, source: ImageCms.ImageCmsProfile) -> Image.Image:
    converted = ImageCms.profileToProfile(
        image,
        source,
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert converted is not None  # it is None only where the image is converted in place
    return converted


def _is_srgb(source: ImageCms.ImageCmsProfile, mode: str) -> bool:
    """Whether a profile leaves the colours of a grid, or all greys, as they are."""
    if mode == "L":
        colors = np.arange(256, dtype=np.uint8)[None]
        expected = np.dstack([colors] * 3)
    else:
        steps = np.linspace(0, 255, _GRID).round().astype(np.uint8)
        colors = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
        expected = colors
    converted = np.asarray(_convert(Image.fromarray(colors), source), np.int16)
    return int(np.abs(converted - expected).max()) <= _SAME_COLOR
