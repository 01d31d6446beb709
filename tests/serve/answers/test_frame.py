import pytest

from serve.answers.frame import Frame, frame_in_name
from serve.contract.errors import OptionError
from tests.support.errors import raises


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("slide [x=1024,y=2048,w=512,h=256].png", Frame((1024, 2048), (1, 1))),
        ("slide [d=4,x=1024,y=2048,w=2048,h=1024].tif", Frame((1024, 2048), (4, 4))),
        ("slide [x=8,y=9,w=1024,h=512].png", Frame((8, 9), (2, 2))),  # 512 px wide
        ("slide [x=8,y=9,w=1024].png", Frame((8, 9), (2, 2))),
        ("s[1] [d=2.5,x=0,y=10,w=1280,h=640,z=3,t=1]_labels.png", Frame((0, 10), (2.5, 2.5))),
        ("folder/slide [d=2, x=-4, y=6].png", Frame((-4, 6), (2, 2))),
        ("slide [d=2,5,x=1,y=10,w=1280,h=640].png", Frame((1, 10), (2.5, 2.5))),  # decimal comma
        ("slide [d=2,x=1,y=10,w=1023,h=513].png", Frame((1, 10), (2, 2))),  # rounded
        ("slide [d=2,x=1,y=10,w=700,h=512].png", Frame((1, 10), (2, 2))),  # an edge, filled up
        ("slide [x=8,y=9,w=350,h=256].png", Frame((8, 9), (1, 1))),  # the same at full size
        ("slide [x=8,y=9,w=512,h=99].png", Frame((8, 9), (1, 1))),
        ("slide [x=8,y=9,w=350,h=99].png", Frame((8, 9), (1, 1))),  # a corner
        ("s [d=2,x=1,y=2] [d=4,x=8,y=9].png", Frame((8, 9), (4, 4))),  # the last tells
        ("slide.png", Frame()),
        ("slide [HE] [1].png", Frame()),
        ("slide [d=2].png", Frame()),
        ("slide [x=1,y=two].png", Frame()),
        ("slide [d=0,x=1,y=2].png", Frame()),
    ],
)
def test_the_name_of_a_tile_of_qupath_tells_its_frame(name: str, expected: Frame) -> None:
    assert frame_in_name(name, 512, 256) == expected


@pytest.mark.parametrize(("width", "height"), [(256, 128), (1024, 512), (480, 240)])
def test_a_tile_that_was_resized_after_it_was_named_is_refused(width: int, height: int) -> None:
    name = "slide [d=2,x=8,y=9,w=1024,h=512].png"
    with raises(OptionError, name, f"{width} x {height}", "512 x 256"):
        frame_in_name(name, width, height)
    stated = frame_in_name(name, width, height, is_downsample_given=True)
    assert stated.origin == (8, 9)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("slide [x=8,y=9,w=256,h=512].png", "256 x 512"),
        ("slide [d=2,x=8,y=9,w=512,h=1024].png", "256 x 512"),
        ("slide [d=4,x=8,y=9,w=4096,h=3000].png", "1024 x 750"),
        ("slide [x=8,y=9,w=1024,h=1024].png", "1024 x 1024"),
    ],
)
def test_a_tile_that_was_turned_or_cut_after_it_was_named_is_refused(name: str, named: str) -> None:
    with raises(OptionError, name, named, "512 x 256", "turned or cut"):
        frame_in_name(name, 512, 256)
    assert frame_in_name(name, 512, 256, is_downsample_given=True).origin == (8, 9)


@pytest.mark.parametrize(("width", "height"), [(33, 17), (34, 16), (10, 5)])
def test_a_small_tile_of_a_rounded_size_is_not_taken_for_one_that_was_cut(
    width: int, height: int
) -> None:
    frame = frame_in_name("slide [x=8,y=9,w=100,h=50].png", width, height)
    assert frame.downsample == (100 / width, 50 / height)
