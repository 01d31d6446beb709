"""Units of length in the spellings that microscopes' programs have for them."""

import unicodedata

UM_PER_INCH = 25_400.0
_UM_PER_UNIT = {
    1.0: ("um", "\u03bcm", "micron", "micrometer", "micrometre", "\u03bc", "\u00e2\u03bcm"),
    1e-3: ("nm", "nanometer", "nanometre"),
    1e-4: ("\u00e5", "angstrom", "\u00e5ngstr\u00f6m"),
    1e-6: ("pm", "picometer", "picometre"),
    1e-9: ("fm", "femtometer", "femtometre"),
    1e3: ("mm", "millimeter", "millimetre"),
    1e4: ("cm", "centimeter", "centimetre"),
    1e5: ("dm", "decimeter", "decimetre"),
    1e6: ("m", "meter", "metre"),
    1e7: ("dam",),
    1e8: ("hm",),
    1e9: ("km", "kilometer", "kilometre"),
    25.4: ("thou", "mil"),
    UM_PER_INCH / 72: ("pt", "point"),
    UM_PER_INCH / 12: ("li", "line"),
    UM_PER_INCH: ("in", "inch", "inches", '"'),
    12 * UM_PER_INCH: ("ft", "foot", "feet"),
    36 * UM_PER_INCH: ("yd", "yard"),
}
"""The last spelling of the micrometre is UTF-8 that was taken for Latin-1."""
_UNITS = {name: um for um, names in _UM_PER_UNIT.items() for name in names}
_PER_PIXEL = ("/pixel", "/px", " per pixel")


def um_per_unit(name: str) -> float | None:
    """Micrometres in a unit of length, however it is spelt; None for pixels and unknown words."""
    word = unicodedata.normalize("NFKC", name).strip().casefold()
    for suffix in _PER_PIXEL:
        word = word.removesuffix(suffix)
    return _UNITS.get(word, _UNITS.get(word.removesuffix("s")))


def number(text: str) -> float | None:
    """A number; programs write a decimal comma where the system does."""
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return None
