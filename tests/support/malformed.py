"""More than a thousand uploads that are no images, or no uploads, each with why it is none."""

import io
import random
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from PIL import Image

from tests.support.bombs import BOMBS
from tests.support.pictures import blobs, encoded, rgb_png

LIMITS = {"max_upload_mib": "1", "max_image_megapixels": "1", "max_batch_mib": "16"}
"""Of the service that they are sent to."""
MAX_PIXELS = 10**6
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP")
SMALL = blobs(40, 60)
GOOD = encoded(SMALL)
GOOD_FILES: tuple[tuple[str, bytes], ...] = (
    ("PNG", GOOD),
    ("PNG with a palette", encoded(Image.fromarray(SMALL).convert("P"))),
    ("JPEG", encoded(SMALL, "JPEG")),
    ("progressive JPEG", encoded(SMALL, "JPEG", progressive=True)),
    ("TIFF", encoded(SMALL, "TIFF")),
    ("TIFF in LZW", encoded(SMALL, "TIFF", compression="tiff_lzw")),
    ("TIFF in JPEG", encoded(SMALL, "TIFF", compression="jpeg")),
    ("WebP", encoded(SMALL, "WEBP")),
    ("lossless WebP", encoded(SMALL, "WEBP", lossless=True)),
)
FORM_TYPE = "multipart/form-data; boundary=x"
_FILE_HEAD = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'


@dataclass(frozen=True)
class Upload:
    """A request that `httpx.Client.post` is given."""

    kind: str
    path: str
    arguments: dict[str, Any]
    chunks: Callable[[], Iterator[bytes]] | None = None
    """A body without a length before it."""

    def request(self) -> dict[str, Any]:
        content = {} if self.chunks is None else {"content": self.chunks()}
        return {**self.arguments, **content}


def is_readable(data: bytes) -> bool:
    """Whether Pillow reads an image of an allowed size from these bytes without an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                image.verify()
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if not 0 < image.width * image.height <= MAX_PIXELS:
                    return False
                image.load()
        except Exception:  # each of Pillow's readers has errors of its own
            return False
    return True


def _file(kind: str, data: bytes, *, name: str = "a.png", path: str = "/segment") -> Upload:
    return Upload(kind, path, {"files": {"image": (name, data)}})


def _form(kind: str, body: bytes, content_type: str = FORM_TYPE) -> Upload:
    return Upload(kind, "/segment", {"content": body, "headers": {"Content-Type": content_type}})


def altered_files(num_flips: int = 150, seed: int = 0) -> list[tuple[str, bytes]]:
    """Files cut off anywhere, and files with one bit changed; many are still images."""
    rng = random.Random(seed)
    altered = []
    for kind, data in GOOD_FILES:
        for share in range(1, 50):
            altered.append((f"truncated {kind}", data[: len(data) * share // 50]))
        for _ in range(num_flips):
            damaged = bytearray(data)
            # Half of them where the header is, or a TIFF's tags: at either end.
            near = rng.choice((len(data), 200))
            place = rng.randrange(min(near, len(data)))
            damaged[rng.choice((place, len(data) - 1 - place))] ^= 1 << rng.randrange(8)
            altered.append((f"bit-flipped {kind}", bytes(damaged)))
    return altered


def malformed_uploads() -> list[Upload]:
    """Uploads of which none may be answered with anything but a 4xx."""
    return [
        *(_file(kind, data) for kind, data in altered_files() if not is_readable(data)),
        *_wrong_types(),
        *_bombs(),
        *_path_tricks(),
        *_absurd_mpp(),
        *_broken_forms(),
        *_bodies_over_the_limit(),
        *_batches(),
    ]


def readable_uploads() -> list[Upload]:
    """Altered files that Pillow still reads: an answer or a 4xx is right, and nothing else."""
    return [_file(kind, data) for kind, data in altered_files() if is_readable(data)]


def _wrong_types() -> Iterator[Upload]:
    image = Image.fromarray(SMALL)
    for kind in ("GIF", "BMP", "PPM", "ICO", "PDF", "TGA", "JPEG2000", "DIB", "PCX", "SGI", "EPS"):
        yield _file("wrong type", encoded(image, kind))
    texts = (
        "text", "<html></html>", "<svg xmlns='http://www.w3.org/2000/svg'/>", "{}", "[1, 2]",
        "%PDF-1.7", "#!/bin/sh", "\x7fELF", "MZ", "PK\x03\x04", "\x1f\x8b", "BZh9", "RIFF", "II*",
        "<?xml version='1.0'?><!DOCTYPE x [<!ENTITY y SYSTEM 'file:///etc/passwd'>]><x>&y;</x>",
    )  # fmt: skip
    for text in texts:
        for endpoint in ("/segment", "/labels", "/geojson"):
            yield _file("wrong type", text.encode("latin-1") * 9, path=endpoint)
    yield _file("wrong type", encoded(Image.new("I;16", (8, 8))))
    yield _file("wrong type", encoded(Image.new("F", (8, 8)), "TIFF"))
    yield _file("wrong type", encoded(image, "PNG", save_all=True, append_images=[image.rotate(9)]))
    yield _file("wrong type", rgb_png(8, 8, bit_depth=16, pixels=bytes(8 * 49)))
    for size in (0, 1, 2, 3, 7, 8, 12, 64, 1000, 4096, 65_536, 500_000):
        yield _file("zero bytes", bytes(size))
        yield _file("zero bytes", GOOD[:8] + bytes(size))
    rng = random.Random(1)
    for size in (1, 10, 100, 1000, 10_000):
        yield _file("random bytes", rng.randbytes(size))


def _bombs() -> Iterator[Upload]:
    for data in BOMBS.values():
        yield _file("bomb", data)
    for side in (1001, 5_000, 20_000, 65_535, 2**31 - 1):
        yield _file("bomb", rgb_png(side, side))
        yield _file("bomb", rgb_png(1, side * side) if side < 65_536 else rgb_png(side, 1))
    huge = encoded(Image.new("1", (12_000, 12_000)), "PNG")
    yield _file("bomb", huge)
    yield _file("bomb", encoded(Image.new("1", (12_000, 12_000)), "TIFF", compression="group4"))
    yield _file("bomb", encoded(Image.new("L", (8_000, 8_000)), "JPEG", quality=1))
    yield _file("bomb", encoded(Image.new("RGB", (8_000, 8_000)), "WEBP", quality=1))
    jpeg = bytearray(encoded(SMALL, "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff" * 4
    yield _file("bomb", bytes(jpeg))


def _path_tricks() -> Iterator[Upload]:
    names = (
        "../a.png", "../../etc/passwd", "/etc/passwd", "a/../../b.png", "..", "a/..", "..\\a.png",
        "a\\b.png", "a/./../b.png", "a\x7f.png", "/dev/stdin",
        "/proc/self/mem", "../" * 50 + "a.png",
    )  # fmt: skip
    for name in names:
        for endpoint in ("/segment", "/labels", "/overlay", "/arrays"):
            yield _file("path trick", GOOD, name=name, path=endpoint)


def _absurd_mpp() -> Iterator[Upload]:
    values = (
        "0", "-1", "nan", "inf", "-inf", "1e308", "1e-308", "1e999", "0.0499", "20.1", "abc", " ",
        "0x1", "1,5", "1 2", "None", "9" * 400, "\N{ARABIC-INDIC DIGIT THREE}0", "-0", "1e", "\0",
    )  # fmt: skip
    for value in values:
        for endpoint in ("/segment", "/labels", "/geojson"):
            files = {"image": ("a.png", GOOD)}
            yield Upload("absurd mpp", endpoint, {"files": files, "params": {"mpp": value}})
            yield Upload("absurd mpp", endpoint, {"files": files, "data": {"mpp": value}})


def _broken_forms() -> Iterator[Upload]:
    whole = _FILE_HEAD + GOOD + b"\r\n--x--\r\n"
    for share in range(20):
        yield _form("broken form", whole[: len(_FILE_HEAD) * share // 20])
    for content_type in (
        "application/json", "image/png", "text/plain", "application/octet-stream",
        "application/x-www-form-urlencoded", "multipart/mixed; boundary=x", "multipart/form-data",
        "multipart/form-data; boundary=", "multipart/form-data; boundary=y", "x" * 10_000,
        "multipart/form-data; boundary=" + "b" * 10_000,
    ):  # fmt: skip
        yield _form("wrong content type", whole, content_type)
        yield _form("wrong content type", GOOD, content_type)
    for length in (10_000, 100_000, 1_000_000):
        name = b"a" * length
        yield _form("huge headers", whole.replace(b"a.png", name))
        yield _form("huge headers", whole.replace(b'name="image"', b'name="' + name + b'"'))
        yield _form("huge headers", whole.replace(b"\r\n\r\n", b"\r\nX-A: " + name + b"\r\n\r\n"))
        lines = b"\r\nX-A: a" * (length // 8)
        yield _form("huge headers", whole.replace(b"\r\n\r\n", lines + b"\r\n\r\n", 1))
        yield _form("huge headers", name + whole)
    text = b'--x\r\nContent-Disposition: form-data; name="mpp"\r\n\r\n1\r\n'
    for count in (9, 100, 10_000):
        yield _form("too many fields", text * count + whole)
        yield _form("too many fields", (_FILE_HEAD + b"\r\n") * count + whole)
    for field in ("picture", "images", "", "image[]", "IMAGE"):
        yield Upload("wrong field", "/segment", {"files": {field: ("a.png", GOOD)}})
    for value in ("abc", "http://127.0.0.1/x.png", "file:///etc/passwd", "/etc/passwd"):
        yield Upload("wrong field", "/segment", {"files": {"image": (None, value)}})


def _bodies_over_the_limit() -> Iterator[Upload]:
    for mebibytes in (2, 3, 8):
        arguments = {"headers": {"Content-Type": FORM_TYPE}}
        for head in (_FILE_HEAD, _FILE_HEAD + GOOD, b""):
            for size in (1_000_000, 65_536, 4_096):

                def chunks(
                    head: bytes = head, size: int = size, total: int = mebibytes * 2**20
                ) -> Iterator[bytes]:
                    yield head
                    for _ in range(0, total, size):
                        yield bytes(size)

                yield Upload("chunked over the limit", "/segment", arguments, chunks)
        yield _file("over the limit", GOOD + bytes(mebibytes * 2**20))


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _batches() -> Iterator[Upload]:
    many = _zip({f"{index}.png": b"" for index in range(257)})
    for data in (many, _zip({"a.png": bytes(17 * 2**20)}), _zip({"a": bytes(9 * 2**20)}) * 2):
        files = [("images", ("a.zip", data))] * 2
        yield Upload("batch over the limits", "/batch", {"files": files})
    yield Upload("batch over the limits", "/batch", {"files": [("images", ("a", GOOD))] * 257})
    yield Upload("wrong field", "/batch", {"files": {"image": ("a.png", GOOD)}})
    for outputs in ("everything", "", "../labels"):
        arguments = {"files": {"images": ("a.png", GOOD)}, "params": {"outputs": outputs}}
        yield Upload("unknown option", "/batch", arguments)
    for options in (
        {"alpha": "2"}, {"alpha": "x"}, {"classes": "Nothing"}, {"classes": "\0"}, {"alpha": "nan"},
    ):  # fmt: skip
        arguments = {"files": {"image": ("a.png", GOOD)}, "params": options}
        yield Upload("unknown option", "/overlay", arguments)


def post(client: httpx.Client, url: str, upload: Upload) -> httpx.Response:
    return client.post(f"{url}{upload.path}", **upload.request())


def is_refused(response: httpx.Response) -> bool:
    """Whether it is a 4xx with an error in JSON, as every refusal is."""
    if not 400 <= response.status_code < 500:
        return False
    try:
        answer = response.json()
    except ValueError:
        return False
    return set(answer) == {"error", "code"} and all(isinstance(one, str) for one in answer.values())


def answers_rightly(client: httpx.Client, url: str) -> bool:
    response = client.post(f"{url}/segment", files={"image": ("a.png", GOOD)})
    if response.status_code != 200:
        return False
    image = response.json()["image"]
    return [image["height_px"], image["width_px"]] == [*SMALL.shape[:2]]
