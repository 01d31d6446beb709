import io
import json
import multiprocessing
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import tifffile
from PIL import Image
from starlette.testclient import TestClient

from serve.contract.errors import SettingsError
from serve.images.readers.errors import SlideError
from serve.images.readers.registry import open_reader
from serve.service.endpoints import build_app
from serve.service.slides.folder import SlideFolder
from serve.service.slides.jobs_file import JobsError
from serve.service.slides.reading import OPERATIONS, Answer, serve_requests
from serve.service.slides.state import check_slides
from serve.settings import ServeSettings
from tests.support.bad_slides import BAD_SLIDES
from tests.support.bombs import BOMBS
from tests.support.errors import raises, refusal_of
from tests.support.pictures import png_chunk
from tests.support.slide_service import HEIGHT, WIDTH, painted_slide, run_at_start, slide_client
from tests.support.slides import tissue_pixels, write_aperio
from tests.support.vendor_tiffs import write_philips


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides, and what only looks like some."""
    root = tmp_path_factory.mktemp("service")
    slides = root / "slides"
    painted_slide(slides / "ward" / "case 7.svs")
    write_aperio(slides / "no-mpp.svs", np.full((300, 300, 3), 200, np.uint8), mpp=None)
    content = (slides / "ward" / "case 7.svs").read_bytes()
    (slides / "cut.svs").write_bytes(content[: len(content) // 3])
    (slides / "text.tiff").write_text("no slide")
    (slides / "notes.txt").write_text("none of the service's business")
    (root / "secret.svs").write_bytes(content)
    (slides / "link.svs").symlink_to(root / "secret.svs")
    (root / "secrets").mkdir()
    (root / "secrets" / "other.svs").write_bytes(content)
    (slides / "linked").symlink_to(root / "secrets")
    (slides / "loop").symlink_to(slides)
    os.mkfifo(slides / "pipe.svs")
    return slides


@pytest.fixture(scope="module")
def client(toy_bundle: Path, folder: Path) -> Iterator[TestClient]:
    with slide_client(toy_bundle, folder) as opened:
        yield opened


def id_of(client: TestClient, file: str) -> str:
    found = {entry["file"]: entry["id"] for entry in client.get("/slides").json()["slides"]}
    return str(found[file])


@pytest.fixture
def slide(client: TestClient) -> str:
    return f"/slides/{id_of(client, 'ward/case 7.svs')}"


def test_the_list_has_the_slides_of_the_folder_and_nothing_beyond_it(client: TestClient) -> None:
    entries = client.get("/slides").json()["slides"]
    files = [entry["file"] for entry in entries]
    assert files == ["cut.svs", "no-mpp.svs", "text.tiff", "ward/case 7.svs"]
    assert all("/" not in entry["id"] and "case" not in entry["id"] for entry in entries)
    assert {entry["state"] for entry in entries} == {"new"}


def test_ids_are_the_same_in_another_copy_of_the_folder(folder: Path, tmp_path: Path) -> None:
    painted_slide(tmp_path / "slides" / "ward" / "case 7.svs")
    copied = SlideFolder(tmp_path / "slides", tmp_path / "out").slides()
    here = SlideFolder(folder, tmp_path / "out").slides()
    assert copied[0].id in {slide.id for slide in here}


@pytest.mark.slow
def test_files_whose_names_cannot_be_written_down_are_listed_with_the_reason(
    toy_bundle: Path, tmp_path: Path
) -> None:
    slides = tmp_path / "slides"
    good = painted_slide(slides / "good.svs").read_bytes()
    for name in (b"latin-\xfc.svs", b"line\nfeed.svs", b"x" * 220 + b".svs", b"Summary.svs"):
        Path(os.fsdecode(bytes(slides) + b"/" + name)).write_bytes(good)
    with slide_client(toy_bundle, slides) as client:
        entries = {entry["file"]: entry for entry in client.get("/slides").json()["slides"]}
        assert [file for file, entry in entries.items() if not entry["problem"]] == ["good.svs"]
        assert "220 bytes" in entries["x" * 220 + ".svs"]["problem"]
        for file, entry in entries.items():
            if file != "good.svs":
                answer = client.post("/jobs", json={"slide": entry["id"]})
                assert refusal_of(answer) == (400, "option_invalid")
        latin = entries["latin-?.svs"]
        assert client.get(f"/slides/{latin['id']}").json()["file"] == "latin-?.svs"
        assert client.get(f"/slides/{latin['id']}/tiles/0/0_0.jpeg").status_code == 200


@pytest.mark.slow
def test_errors_of_slides_do_not_tell_where_their_folder_is(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = tmp_path / "slides"
    whole = painted_slide(slides / "case.svs").read_bytes()
    (slides / "short.svs").write_bytes(whole[:-500])
    BAD_SLIDES["bomb.png"][0](slides / "bomb.png")
    BAD_SLIDES["encrypted_pdf.tif"][0](slides / "encrypted_pdf.tif")
    (slides / "empty.zarr").mkdir()
    (slides / "empty.zarr" / ".zattrs").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with slide_client(toy_bundle, Path("slides")) as client:
        entries = client.get("/slides").json()["slides"]
        answers = [client.get(f"/slides/{entry['id']}") for entry in entries]
    refused = [answer.json()["error"] for answer in answers if answer.status_code != 200]
    assert len(refused) == 4
    for message in refused:
        assert str(tmp_path) not in message
        assert "slides/" not in message


@pytest.mark.parametrize("names", [("a/Case.svs", "b/case.svs"), ("a/\u00e9.svs", "b/e\u0301.svs")])
def test_two_slides_whose_results_would_have_one_name_are_told_apart(
    names: tuple[str, str], tmp_path: Path
) -> None:
    for name in names:
        painted_slide(tmp_path / "slides" / name)
    slides = SlideFolder(tmp_path / "slides", tmp_path / "out").slides()
    assert [bool(slide.problem) for slide in slides] == [True, True]


def test_a_slide_is_described(client: TestClient, slide: str) -> None:
    found = client.get(slide).json()
    assert (found["width_px"], found["height_px"], found["mpp"]) == (WIDTH, HEIGHT, 0.5)
    assert found["tiles"]["num_levels"] == 11
    assert found["result"] is None
    assert found["job"] is None


def test_the_tiles_are_the_slides_pixels(client: TestClient, slide: str, folder: Path) -> None:
    with open_reader(folder / "ward" / "case 7.svs") as reader:
        expected = reader.read(0, 0, 0, WIDTH, HEIGHT).astype(int)
    for column, row in ((0, 0), (1, 1), (3, 2)):
        answer = client.get(f"{slide}/tiles/10/{column}_{row}.jpeg")
        assert answer.headers["content-type"] == "image/jpeg"
        tile = np.asarray(Image.open(io.BytesIO(answer.content))).astype(int)
        top, left = max(row * 254 - 1, 0), max(column * 254 - 1, 0)
        part = expected[top : top + tile.shape[0], left : left + tile.shape[1]]
        assert np.abs(tile - part).mean() < 4
    whole = Image.open(io.BytesIO(client.get(f"{slide}/tiles/7/0_0.jpeg").content))
    assert whole.size == (113, 88)
    assert np.asarray(whole)[50, 62, 0] - np.asarray(whole)[50, 62, 1] > 120  # the red square


@pytest.mark.slow
def test_slides_of_every_size_have_a_thumbnail(toy_bundle: Path, tmp_path: Path) -> None:
    sizes = {(1, 1): (1, 1), (3, 64): (3, 64), (65, 40): (65, 40), (300, 129): (75, 33)}
    (tmp_path / "slides").mkdir()
    for width, height in sizes:
        pixels = np.full((height, width, 3), (200, 30, 90), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "slides" / f"{width}.png")
    with slide_client(toy_bundle, tmp_path / "slides") as client:
        for (width, _), expected in sizes.items():
            answer = client.get(f"/slides/{id_of(client, f'{width}.png')}/thumbnail.jpeg")
            assert answer.headers["content-type"] == "image/jpeg"
            found = Image.open(io.BytesIO(answer.content)).convert("RGB")
            assert found.size == expected
            middle = found.getpixel((found.width // 2, found.height // 2))
            assert middle == pytest.approx((200, 30, 90), abs=12)


def test_a_tile_is_kept_by_clients_and_asked_for_again_where_the_version_is_open(
    client: TestClient, slide: str
) -> None:
    path = f"{slide}/tiles/9/0_0.jpeg"
    version = client.get(slide).json()["tiles"]["version"]
    first = client.get(path)
    assert "no-cache" in first.headers["cache-control"]
    assert "immutable" in client.get(path, params={"v": version}).headers["cache-control"]
    again = client.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/slides/none",
        "/slides/..%2f..%2fsecret.svs",
        "/slides/ward%2fcase 7.svs",
        "/slides/none/thumbnail.jpeg",
        "{slide}/tiles/11/0_0.jpeg",
        "{slide}/tiles/10/4_0.jpeg",
        "{slide}/tiles/10/0_0.png",
        "{slide}/result/tiles/0/0_0.png",
        "{slide}/result/files/run.json",
        "{slide}/result/files/..%2f..%2fslides%2fcut.svs",
        "/jobs/none",
        "/jobs/none%0a",
        "/slides/none%0a/tiles/0/0_0.jpeg",
    ],
)
def test_what_is_not_there_is_a_404_and_no_path_leads_out(
    client: TestClient, slide: str, path: str
) -> None:
    answer = client.get(path.format(slide=slide))
    assert refusal_of(answer)[0] == 404


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("?mpp=3", "mpp"),
        ("/tiles/0/0_0.jpeg?w=1", "w"),
        ("/thumbnail.jpeg?w=1", "w"),
        ("/tiles/0/0_0.jpeg?v=1&v=2", "2 times"),
        ("/result/files/run.json?v=1", "v"),
        ("/../../jobs?limit=3", "limit"),
        ("/../../slides?x=1", "x"),
        ("/tiles/x/0_0.jpeg", "'x'"),
        ("/tiles/-1/0_0.jpeg", "-1"),
        ("/tiles/1/.._0.jpeg", ".._0"),
    ],
)
def test_a_query_or_a_tile_that_a_route_does_not_have_is_refused(
    client: TestClient, slide: str, path: str, wrong: str
) -> None:
    assert refusal_of(client.get(f"{slide}{path}"), wrong) == (400, "option_invalid")


@pytest.mark.parametrize("file", ["cut.svs", "text.tiff"])
def test_a_file_that_is_no_slide_is_a_400_that_names_it(client: TestClient, file: str) -> None:
    slide = f"/slides/{id_of(client, file)}"
    status, code = refusal_of(client.get(slide), file)
    assert status == 400
    assert code.startswith("slide_") or code.startswith("image_")


def test_a_region_is_segmented_where_it_lies(client: TestClient, slide: str) -> None:
    region = {"x": 380, "y": 280, "width": 240, "height": 240}
    answer = client.post(f"{slide}/region/geojson", params=region)
    assert answer.headers["x-mpp"] == "0.5"
    tumor = [
        feature
        for feature in answer.json()["features"]
        if feature["properties"]["classification"]["name"] == "Tumor"
    ]
    points = np.array(tumor[0]["geometry"]["coordinates"][0])
    assert np.abs(points.min(axis=0) - (400, 300)).max() <= 4
    assert np.abs(points.max(axis=0) - (600, 500)).max() <= 4
    summary = client.post(f"{slide}/region/segment", params=region).json()
    assert (summary["image"]["width_px"], summary["image"]["height_px"]) == (240, 240)


def test_a_region_says_who_stated_the_um_per_pixel(client: TestClient, slide: str) -> None:
    region = {"x": 380, "y": 280, "width": 240, "height": 240}
    described = client.get(slide).json()
    kept = {"X-Keep-Result": "yes"}
    for change, source in (({}, described["mpp_source"]), ({"mpp": described["mpp"]}, "request")):
        answer = client.post(f"{slide}/region/segment", params=region | change, headers=kept)
        assert answer.json()["image"]["mpp_source"] == source
        assert answer.headers["x-mpp-source"] == source
        assert answer.json()["image"]["notes"] == []


def test_a_region_tells_that_a_requested_um_per_pixel_is_not_the_files(
    client: TestClient, slide: str
) -> None:
    region = {"x": 380, "y": 280, "width": 240, "height": 240}
    region["mpp"] = 0.8 * client.get(slide).json()["mpp"]
    answer = client.post(f"{slide}/region/segment", params=region).json()
    (note,) = answer["image"]["notes"]
    assert "was given, and counts" in note


def test_a_region_is_scaled_to_the_models_um_per_pixel(client: TestClient, slide: str) -> None:
    region = {"x": 0, "y": 0, "width": 200, "height": 100, "mpp": 0.25}
    answer = client.post(f"{slide}/region/segment", params=region).json()
    assert (answer["image"]["width_px"], answer["image"]["height_px"]) == (100, 50)


@pytest.mark.slow
def test_a_region_of_a_slide_whose_pixels_are_not_squares_is_outlined_where_it_lies(
    toy_bundle: Path, tmp_path: Path
) -> None:
    pixels = np.full((350, 900, 3), 245, np.uint8)
    pixels[150:250, 400:600] = (200, 30, 30)
    (tmp_path / "slides").mkdir()
    tifffile.imwrite(
        tmp_path / "slides" / "flat.tif",
        pixels,
        tile=(256, 256),
        photometric="rgb",
        resolution=(20_000, 10_000),  # 0.5 um along rows, 1 um along columns
        resolutionunit="CENTIMETER",
    )
    with slide_client(toy_bundle, tmp_path / "slides") as client:
        slide = f"/slides/{id_of(client, 'flat.tif')}"
        assert client.get(slide).json()["mpp_xy"] == [0.5, 1.0]
        region = {"x": 380, "y": 140, "width": 240, "height": 120}
        found = client.post(f"{slide}/region/geojson", params=region).json()["features"]
    (tumor,) = [
        feature["geometry"]["coordinates"][0]
        for feature in found
        if feature["properties"]["classification"]["name"] == "Tumor"
    ]
    assert np.abs(np.min(tumor, axis=0) - (400, 150)).max() <= 4
    assert np.abs(np.max(tumor, axis=0) - (600, 250)).max() <= 4


def test_a_region_that_is_too_large_or_has_no_scale_is_refused(
    client: TestClient, slide: str
) -> None:
    region = {"x": 0, "y": 0, "width": 100_000, "height": 100_000}
    answer = client.post(f"{slide}/region/segment", params=region)
    most = client.get(slide).json()["max_region_px"]
    assert refusal_of(answer, most) == (413, "image_too_large")
    assert 21e6 < most < 64e6  # 64 MiB, however badly a PNG of them compresses
    coarse = {**region, "width": 1000, "height": most // 3000, "mpp": 1.0}  # twice the model's
    answer = client.post(f"{slide}/region/segment", params=coarse)
    pixels = 4 * coarse["width"] * coarse["height"]
    assert refusal_of(answer, f"{pixels} pixels") == (413, "image_too_large")
    unscaled = f"/slides/{id_of(client, 'no-mpp.svs')}"
    region |= {"width": 9, "height": 9}
    answer = client.post(f"{unscaled}/region/segment", params=region)
    assert refusal_of(answer, "no-mpp.svs") == (400, "slide_scale")
    answer = client.post(f"{unscaled}/region/segment", params={**region, "mpp": 20})
    assert refusal_of(answer, "40 times") == (413, "enlarged_too_far")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": 900}, "900"),
        ({"x": -20}, "900"),
        ({"y": 700}, "700"),
        ({"y": -20}, "700"),
        ({"x": 1e7, "y": 1e7}, "case 7.svs"),
        ({"width": 1e-9}, "expected at least 1"),
        ({"x": "nan"}, "x is 'nan'; expected"),
        ({"height": "1e400"}, "1e400"),
        ({"height": "tall"}, "height is 'tall'; expected a number"),
        ({"widht": 20}, "'width'"),
    ],
)
def test_a_region_that_cannot_be_is_refused(
    client: TestClient, slide: str, change: dict[str, object], named: str
) -> None:
    region = {"x": 10, "y": 10, "width": 20, "height": 20, **change}
    answer = client.post(f"{slide}/region/segment", params=region)
    assert refusal_of(answer, named) == (400, "option_invalid")


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "missing"),
        (b"{", "character 1"),
        (b"[]", "[]"),
        (b"{}", "slide"),
        (b'{"slide": "x", "mpp": NaN}', "nan"),
        (b'{"slide": "x", "mpp": true}', "True; expected a number"),
        (b'{"slide": "x", "tisue": "none"}', "'tissue'"),
        (b'{"slide": "x", "formats": ["pdf"]}', "pdf"),
        (b'{"slide": "x", "path": "/etc/passwd"}', "'path'"),
        (b'{"slide": "x", "tissue": "/etc/passwd"}', "/etc/passwd"),
        (b'{"slide": "x", "mpp": 1000}', "1000"),
        (b'{"slide": "' + b"x" * 9000 + b'"}', "at most 64"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused_in_one_short_sentence(
    client: TestClient, body: bytes, named: str
) -> None:
    answer = client.post("/jobs", content=body, headers={"Content-Type": "application/json"})
    assert refusal_of(answer, named) == (400, "option_invalid")
    assert len(answer.json()["error"]) < 250


def test_a_job_of_a_slide_that_is_not_there_is_a_404(client: TestClient) -> None:
    assert refusal_of(client.post("/jobs", json={"slide": "none"})) == (404, "not_found")


@pytest.mark.slow
def test_a_slide_that_ends_its_process_is_refused_and_the_others_are_not(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = tmp_path / "slides"
    painted_slide(slides / "good.svs")
    painted_slide(slides / "deadly.svs")
    hook = (  # the process ends as in a fault of a C library
        "import os, signal, sys\n"
        "def look(event, arguments):\n"
        "    if event == 'open' and str(arguments[0]).endswith('deadly.svs'):\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "if 'serve.service.slides.reading' in ' '.join(sys.orig_argv): sys.addaudithook(look)\n"
    )
    run_at_start(hook, tmp_path, monkeypatch)
    with slide_client(toy_bundle, slides) as client:
        deadly, good = (f"/slides/{id_of(client, name)}" for name in ("deadly.svs", "good.svs"))
        for _ in range(3):
            answer = client.get(f"{deadly}/tiles/8/0_0.jpeg")
            assert refusal_of(answer, "deadly.svs") == (400, "slide_crashed")
        assert client.get(f"{good}/tiles/8/0_0.jpeg").status_code == 200
        assert "focalpath_slide_reader_crashes_total 1.0" in client.get("/metrics").text


@pytest.mark.parametrize("operation", ["info", "cells"])
def test_a_file_that_the_system_refuses_does_not_end_the_process(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> Answer:
        raise PermissionError(13, "Permission denied", str(tmp_path / "a.svs"))

    monkeypatch.setitem(OPERATIONS, operation, refused)
    ours, theirs = multiprocessing.Pipe()
    for _ in range(2):
        ours.send_bytes(json.dumps({"operation": operation, "root": str(tmp_path)}).encode())
    answers = threading.Thread(target=serve_requests, args=[theirs])
    answers.start()
    for _ in range(2):
        fields = json.loads(ours.recv_bytes())
        assert fields["error"].startswith("a.svs cannot be used: Permission denied")
        assert fields["code"] == SlideError.code
        assert "SlideError" in fields["kinds"]
        assert ours.recv_bytes() == b""
    ours.close()
    answers.join(timeout=60)
    assert not answers.is_alive()


def test_one_damaged_region_does_not_hide_the_rest_of_a_slide(
    toy_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "slides").mkdir()
    slide = write_philips(tmp_path / "slides" / "damaged.tiff", tissue_pixels(640, 768))
    with tifffile.TiffFile(slide) as tiff:
        page = tiff.pages.first
        place, size = page.dataoffsets[0], page.databytecounts[0]
    content = bytearray(slide.read_bytes())
    content[place : place + size] = bytes(size)
    slide.write_bytes(content)
    with slide_client(toy_bundle, slide.parent) as client:
        url = f"/slides/{id_of(client, 'damaged.tiff')}"
        level = client.get(url).json()["tiles"]["num_levels"] - 1
        found = [
            client.get(f"{url}/tiles/{level}/{place}.jpeg").status_code
            for place in ("2_2", "0_0", "0_0", "2_2", "1_2")
        ]
    assert found == [200, 400, 400, 200, 200]


@pytest.mark.slow
def test_decompression_bombs_are_4xx(toy_bundle: Path, tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000_000))
    parts = (png_chunk(b"IHDR", header), png_chunk(b"IDAT", pixels), png_chunk(b"IEND", b""))
    (slides / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    bombs = {f"{name}.tif": BOMBS[name] for name in ("strips", "tags")} | {
        "scans.jpg": BOMBS["scans"]
    }
    for name, content in bombs.items():
        (slides / name).write_bytes(content)
    with slide_client(toy_bundle, slides) as client:
        statuses = {
            entry["file"]: client.get(f"/slides/{entry['id']}").status_code
            for entry in client.get("/slides").json()["slides"]
        }
    assert statuses == {"huge.png": 413, **dict.fromkeys(sorted(bombs), 400)}


def test_a_folder_that_is_not_there_ends_the_start(tmp_path: Path) -> None:
    with raises(SettingsError, tmp_path / "none"):
        check_slides(ServeSettings(slides=tmp_path / "none"))
    (tmp_path / "file").write_text("")
    (tmp_path / "slides").mkdir()
    with raises(JobsError, tmp_path / "file"):
        check_slides(
            ServeSettings(slides=tmp_path / "slides", slides_out=tmp_path / "file" / "out")
        )


def test_every_route_of_slides_is_described_with_examples_that_fit(
    toy_bundle: Path, folder: Path
) -> None:
    document = build_app(ServeSettings(bundle=toy_bundle, slides=folder)).openapi()
    found = {
        (method, path): operation
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if path.startswith(("/slides", "/jobs"))
    }
    assert len(found) == 11
    for (method, path), operation in found.items():
        assert operation["description"], path
        assert {"500", "503"} < set(operation["responses"]), path
        assert ("404" in operation["responses"]) == (
            path not in ("/slides",) and path != "/jobs" or method == "post"
        ), path
        for parameter in operation.get("parameters", []):
            assert parameter["description"], parameter
        for status, response in operation["responses"].items():
            content = response.get("content", {}).get("application/json", {})
            if "example" in content:
                whole = {**content["schema"], "components": document["components"]}
                jsonschema.validate(content["example"], whole)
            elif status in ("200", "201"):
                assert response["content"], path


def test_slides_need_the_key_that_everything_needs(
    toy_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("ward:the-right-key-of-the-ward\n")
    with slide_client(toy_bundle, folder, api_keys_file=tmp_path / "keys") as client:
        for path in ("/slides", "/slides/x/tiles/0/0_0.jpeg", "/jobs"):
            assert refusal_of(client.get(path)) == (401, "key_refused")
        key = {"X-API-Key": "the-right-key-of-the-ward"}
        assert client.get("/slides", headers=key).status_code == 200
        assert refusal_of(client.delete("/jobs/x")) == (401, "key_refused")
