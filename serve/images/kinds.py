"""What a file that is not read as an image is, by its first bytes, for the error that says so."""

from collections.abc import Iterator

_STARTS = {
    b"BM": "a BMP image",
    b"GIF8": "a GIF image",
    b"\x00\x00\x00\x0cjP  ": "a JPEG 2000 image",
    b"\xff\x4f\xff\x51": "a JPEG 2000 image",
    b"\x00\x00\x00\x0cJXL ": "a JPEG XL image",
    b"\xff\x0a": "a JPEG XL image",
    b"II\xbc": "a JPEG XR image",
    b"8BPS": "a Photoshop image",
    b"\x76\x2f\x31\x01": "an OpenEXR image",
    b"P5": "a PGM image",
    b"P6": "a PPM image",
    b"SIMPLE  =": "a FITS image",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"ZISRAWFILE": "a CZI slide",
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "an empty zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\xfd7zXZ": "an xz archive",
    b"BZh": "a bzip2 archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive",
    b"\xd0\xcf\x11\xe0": "an OLE file, such as a ZVI or OIB image",
    b"\xda\xce\xbe\x0a": "an ND2 image",
    b"\x70\x00\x00\x00": "a LIF image",
    b"version https://git-lfs": "a pointer of Git LFS, without the file that it stands for",
    b"data:": "a data URL",
    b"iVBORw0KGgo": "a PNG in Base64",
    b"/9j/": "a JPEG in Base64",
    b"<": "XML or HTML",
    b"{": "JSON",
}
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "an AVIF image"),
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1"), "a HEIC image"),
}
_DICOM, _DICOM_OFFSET = b"DICM", 128
_JPEG_START, JPEG_SCAN = b"\xff\xd8", 0xDA
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_LS_FRAME = 0xF7
HEAD_BYTES = 256
"""Of a file, what `kind_of` looks at."""


def kind_of(head: bytes) -> str | None:
    """What a file is, such as "a GIF image"; None where its first bytes do not say."""
    if head[_DICOM_OFFSET:].startswith(_DICOM):
        return "a DICOM file"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "a video, or another file of its kind")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next(
        (name for start, name in _STARTS.items() if head.startswith(start) or text[:1] == start),
        None,
    )


def jpeg_frame(data: bytes) -> tuple[int, bool]:
    """Bits per channel of a JPEG, and whether it is a JPEG-LS; (0, False) where it does not say.

    Args:
        data: the file, whose header is of a size that was found acceptable.
    """
    for marker, position in jpeg_segments(data):
        if marker in _JPEG_FRAMES or marker == _JPEG_LS_FRAME:
            return data[position + 4], marker == _JPEG_LS_FRAME
    return 0, False


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """The marker of each segment of a JPEG and where it is, up to the first scan's."""
    position = len(_JPEG_START) if data.startswith(_JPEG_START) else len(data)
    while position + 5 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        yield marker, position
        if marker == JPEG_SCAN:
            return
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
