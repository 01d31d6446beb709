"""JPEGs that were cut short and end as whole ones do."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from serve.contract.errors import ImageError
from serve.images.decode import decode_picture
from serve.images.kinds import JPEG_SCAN, jpeg_segments
from tests.support.errors import raises
from tests.support.pictures import blobs, encoded

IMAGE = blobs(123, 170)
GREY_BELOW = IMAGE.copy()
GREY_BELOW[40:] = 128
KINDS: list[dict[str, Any]] = [
    {},
    {"progressive": True},
    {"optimize": True},
    {"subsampling": 0},
    {"restart_marker_blocks": 3},
    {"progressive": True, "restart_marker_rows": 2},
]
END = b"\xff\xd9"


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_jpeg_whose_end_was_set_behind_half_of_its_data_is_refused(
    mode: str, options: dict[str, Any], share: float
) -> None:
    whole = encoded(Image.fromarray(IMAGE).convert(mode), "JPEG", quality=90, **options)
    scan = dict(jpeg_segments(whole))[JPEG_SCAN]
    kept = whole[: scan + int(share * (len(whole) - scan))].rstrip(b"\xff")
    with raises(ImageError, code="image_damaged"):
        decode_picture(kept + END)


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("behind", [b"", b"anything", END * 3])
@pytest.mark.parametrize("image", [GREY_BELOW, np.full_like(IMAGE, 128), IMAGE, IMAGE[:1, :1]])
def test_a_whole_jpeg_that_is_grey_below_or_progressive_is_read(
    image: NDArray[np.uint8], behind: bytes, options: dict[str, Any]
) -> None:
    content = encoded(image, "JPEG", quality=90, **options)
    assert decode_picture(content + behind).pixels.shape == image.shape


@pytest.mark.parametrize("progressive", [False, True])
def test_a_whole_jpeg_with_a_preview_in_its_exif_is_read(progressive: bool) -> None:
    content = encoded(GREY_BELOW, "JPEG", progressive=progressive)
    preview = b"Exif\0\0" + encoded(IMAGE[::4, ::4], "JPEG")
    segment = b"\xff\xe1" + (len(preview) + 2).to_bytes(2, "big") + preview
    content = content[:2] + segment + content[2:]
    assert decode_picture(content).pixels.shape == IMAGE.shape
