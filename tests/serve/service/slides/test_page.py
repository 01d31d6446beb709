"""The page of slides in a headless Chromium: a real slide, and a large generated one."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import tifffile
from PIL import Image
from playwright.sync_api import BrowserContext, Page, Route, expect

from serve.service.page import LIBRARY_FILE
from serve.slides.outputs.registry import DEFAULT, FORMATS
from tests.support.browser import SLOW_MS, contrasts_of, running_browser
from tests.support.http_service import running_service, wait_until_ready
from tests.support.nginx import running_nginx
from tests.support.real_slide import real_slide
from tests.support.slide_service import slow_jobs
from tests.support.toy_bundle import CLASSES

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not LIBRARY_FILE.is_file(), reason="`make page` installs OpenSeadragon"),
]

KEY = "the-right-key-of-the-ward"
LARGE_SIDE = 6_000
TUMOR = (4_500, 1_500)
"""x and y in the square of the toy model's Tumor on the large slide."""
REFUSAL = "Failed to load resource: the server responded with a status of"


def write_large(path: Path) -> None:
    """A slide of 36 megapixels: stripes of tissue, and a square of the toy model's Tumor."""
    stripes = np.array([(150, 60, 120), (220, 120, 180)], np.uint8)
    row = stripes[np.arange(LARGE_SIDE) // 500 % 2]
    pixels = np.broadcast_to(row, (LARGE_SIDE, LARGE_SIDE, 3)).copy()
    pixels[1000:2000, 4000:5000] = (200, 30, 30)
    options: dict[str, Any] = {
        "photometric": "rgb",
        "compression": "jpeg",
        "tile": (512, 512),
        "metadata": None,
    }
    size = f"{LARGE_SIDE}x{LARGE_SIDE}"
    text = f"Aperio Image Library v12\r\n{size} (512x512) JPEG/RGB Q=85|AppMag = 20|MPP = 0.5"
    with tifffile.TiffWriter(path) as tiff:
        for factor in (1, 8, 64):
            level = np.ascontiguousarray(pixels[::factor, ::factor])
            tiff.write(level, description=text, subfiletype=int(factor > 1), **options)


@pytest.fixture(scope="module")
def service(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Real, large, small and damaged slides, behind a prefix and with a key.

    The large one takes a minute and more, so that a run of it can be cancelled.
    """
    root = tmp_path_factory.mktemp("page")
    slides = root / "slides"
    slides.mkdir()
    (slides / "real.svs").write_bytes(real_slide().read_bytes())
    (slides / "damaged.svs").write_bytes((slides / "real.svs").read_bytes()[:30_000])
    write_large(slides / "large.svs")
    Image.new("RGB", (40, 30), (200, 30, 90)).save(slides / "small.png")
    (root / "keys").write_text(f"ward:{KEY}\n")
    settings = {"slides": str(slides), "api_keys_file": str(root / "keys"), "threads": "1"}
    settings |= {"root_path": "/focalpath", "max_image_megapixels": "2"}
    with pytest.MonkeyPatch.context() as monkeypatch, ExitStack() as stack:
        slow_jobs(root, monkeypatch, seconds=60, slide="large")
        url = stack.enter_context(running_service(toy_bundle, root / "log.txt", **settings))
        wait_until_ready(url)
        port = urlsplit(url).port
        assert port is not None
        yield stack.enter_context(running_nginx(tmp_path_factory.mktemp("nginx"), port))


@pytest.fixture(scope="module")
def profile(service: str) -> Iterator[BrowserContext]:
    """A browser's profile with a tab that stays open: a new one takes a second."""
    with running_browser() as browser:
        context = browser.new_context(viewport={"width": 1400, "height": 900}, locale="en-GB")
        context.set_default_timeout(SLOW_MS)
        context.new_page().goto(f"{service}viewer/slides.html")
        yield context


@pytest.fixture
def page(profile: BrowserContext, service: str) -> Iterator[Page]:
    """The page, its key given; afterwards it may have met no error and no other host."""
    page = profile.new_page()
    said: list[str] = []
    hosts: set[str] = set()
    page.on("console", lambda message: message.type == "error" and said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.goto(f"{service}viewer/slides.html")
    page.get_by_label("Access key").last.fill(KEY)
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#list li")).to_have_count(4)
    yield page
    page.evaluate("localStorage.clear()")
    page.close()
    assert [text for text in said if not text.startswith(REFUSAL)] == []
    assert hosts - {"", urlsplit(service).netloc} == set()


def choose(page: Page, name: str) -> None:
    page.get_by_role("button", name=re.compile(name)).click()
    expect(page.locator("body")).to_have_attribute("data-state", "done")
    page.wait_for_function("() => window.focalpath.isComplete")


def wait_for_color(page: Page, place: tuple[float, float], canvas: str, wanted: str) -> None:
    """Wait until RGBA of a canvas at a place of the stage, in CSS pixels, is as an expression says.

    It is of JavaScript, on red, green, blue and alpha.
    """
    script = f"""([x, y, selector]) => {{
        const canvas = document.querySelector(selector);
        const scale = canvas.width / canvas.clientWidth;
        const pixel = canvas.getContext("2d").getImageData(x * scale, y * scale, 1, 1);
        const [red, green, blue, alpha] = pixel.data;
        return {wanted};
    }}"""
    page.wait_for_function(script, arg=[*place, canvas])


def exactly(color: str) -> str:
    """That a pixel is opaque and of this color."""
    red, green, blue = bytes.fromhex(color[1:])
    return f"[red, green, blue, alpha].join() === '{red},{green},{blue},255'"


def on_stage(page: Page, x: float, y: float) -> tuple[float, float]:
    """Where a pixel of level 0 is on the stage."""
    found = page.evaluate("([x, y]) => window.focalpath.onStage(x, y)", [x, y])
    return found["x"], found["y"]


def move_to(page: Page, place: tuple[float, float]) -> None:
    box = page.locator("#view").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + place[0], box["y"] + place[1])


SLIDE, OVERLAY = ".osd canvas:not(.overlay)", "canvas.overlay"


def test_a_large_slide_is_shown_segmented_and_explained(page: Page) -> None:
    choose(page, "large")
    place = on_stage(page, *TUMOR)
    wait_for_color(page, place, SLIDE, "red > 150 && green < 90 && blue < 90")
    expect(page.locator("#scale-bar")).to_have_text(re.compile(r"^(1|2|5)0* (µm|mm)$"))
    expect(page.locator("#file-facts")).to_contain_text("3.00 mm × 3.00 mm")

    page.get_by_text("Options").click()
    boxes = page.locator("#job-formats input")
    offered = {b.get_attribute("value"): (b.is_checked(), b.is_disabled()) for b in boxes.all()}
    assert offered == {name: (name in DEFAULT, name == "ome-zarr") for name in FORMATS}
    page.get_by_label("Segment everything").check()
    page.get_by_role("button", name="Segment this slide").click()
    expect(page.locator("#job-progress")).to_be_visible()
    expect(page.locator("#job-detail")).to_contain_text("tiles")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Go on with this slide")).to_be_visible()
    expect(page.locator("#list small", has_text="stopped")).to_be_visible()

    page.get_by_label("Segment everything").uncheck()  # other settings than those of the work
    page.get_by_role("button", name="Go on with this slide").click()
    expect(page.locator("#job-failure")).to_contain_text("other settings")
    expect(page.locator("#job-failure")).not_to_contain_text("--overwrite")
    page.get_by_role("button", name="Replace it").click()
    expect(page.locator("#job-detail")).to_contain_text("tiles")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Go on with this slide")).to_be_visible()


def test_a_run_that_the_service_no_longer_knows_is_not_waited_for(page: Page) -> None:
    """As where the file of jobs is removed."""

    def forget(route: Route) -> None:
        if "/jobs/" in route.request.url:
            route.fulfill(status=404, json={"error": "There is no job.", "code": "not_found"})
        else:
            answer = route.fetch()
            route.fulfill(response=answer, json={**answer.json(), "job": None, "state": "new"})

    choose(page, "large")
    page.get_by_role("button", name=re.compile("Go on with|Segment this")).click()
    expect(page.locator("#job-progress")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    page.route(re.compile("/jobs/|/slides/[0-9a-f]{16}$"), forget)
    expect(page.get_by_role("button", name="Segment this slide")).to_be_visible()
    expect(page.locator("#job-failure")).to_be_empty()


def test_a_real_slide_is_segmented_and_its_result_can_be_looked_at_and_taken_home(
    page: Page, service: str
) -> None:
    choose(page, "real")
    page.get_by_role("button", name="Segment this slide").click()
    expect(page.locator("body")).to_have_class(re.compile("has-result"))
    rows = page.locator("#classes tr")
    expect(rows.locator(".name")).to_have_text([tissue.name for tissue in CLASSES])
    headers = {"X-API-Key": KEY}
    listed = httpx.get(f"{service}slides", headers=headers).json()["slides"]
    slide_id = next(entry["id"] for entry in listed if entry["name"] == "real")
    found = httpx.get(f"{service}slides/{slide_id}", headers=headers).json()["result"]["summary"]
    areas = [float(text.lstrip("<")) for text in rows.locator("td:nth-child(2)").all_inner_texts()]
    assert areas == pytest.approx([entry["area_mm2"] for entry in found["classes"]], abs=0.006)

    page.wait_for_function("() => window.focalpath.isComplete")
    page.get_by_label("Hatch where confidence is low").uncheck()
    place = on_stage(page, 1000, 1500)
    move_to(page, place)
    name = page.locator("#readout strong").inner_text()
    color = next(tissue.color for tissue in CLASSES if tissue.name == name)
    page.get_by_label("Opacity").fill("100")
    wait_for_color(page, place, OVERLAY, exactly(color))
    page.get_by_role("checkbox", name=f"Show {name}").uncheck()
    wait_for_color(page, place, OVERLAY, "alpha === 0")
    page.get_by_role("checkbox", name=f"Show {name}").check()
    page.locator("#view").focus()
    page.keyboard.press("h")
    wait_for_color(page, place, OVERLAY, "alpha === 0")
    page.keyboard.press("h")

    with page.expect_download() as download:
        page.get_by_role("link", name="Summary").click()
    assert json.loads(download.value.path().read_text()) == found
    links = page.locator("#outputs a")
    expect(links.filter(has_text="OME-Zarr")).to_contain_text("zip")
    expect(links.filter(has_text="GeoJSON")).to_contain_text("for QuPath")

    def with_notes(route: Route) -> None:
        answer = route.fetch()
        described = answer.json()
        described["result"]["summary"]["notes"] = ["the finest level is missing", "<b>odd</b>"]
        route.fulfill(response=answer, json=described)

    expect(page.locator("#notes")).to_be_hidden()
    page.route(f"**/slides/{slide_id}", with_notes)
    choose(page, "large")
    choose(page, "real")
    expect(page.locator("#notes")).to_have_text(
        "As segmented: the finest level is missing; <b>odd</b>."
    )
    page.unroute(f"**/slides/{slide_id}")


def test_a_region_is_drawn_and_segmented_where_it_lies(page: Page) -> None:
    choose(page, "large")
    page.get_by_role("button", name="Draw a region").click()
    corners = [(4250, 1250), (4750, 1750)]
    move_to(page, on_stage(page, *corners[0]))
    page.mouse.down()
    move_to(page, on_stage(page, 4500, 1450))
    move_to(page, on_stage(page, *corners[1]))
    page.mouse.up()
    expect(page.locator("#region-help")).to_contain_text("is segmented")
    tumor = page.locator("#classes tr").first
    expect(tumor.locator("td").nth(1)).to_have_text("100.0 %")
    assert float(tumor.locator("td").nth(0).inner_text()) == pytest.approx(0.0625, abs=0.008)
    page.get_by_label("Hatch where confidence is low").uncheck()
    page.get_by_label("Opacity").fill("100")
    page.wait_for_function("() => window.focalpath.isComplete")
    wait_for_color(page, on_stage(page, *TUMOR), OVERLAY, exactly(CLASSES[0].color))
    wait_for_color(page, on_stage(page, 4150, 1500), OVERLAY, "alpha === 0")
    page.get_by_text("Download the region's result").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="GeoJSON").click()
    features = json.loads(download.value.path().read_text())["features"]
    points = np.array(features[0]["geometry"]["coordinates"][0])
    assert np.abs(points.min(axis=0) - corners[0]).max() < 40
    page.get_by_role("button", name="Back to the slide's result").click()
    expect(page.locator("#region-result")).to_be_hidden()


def test_slides_of_every_size_have_a_thumbnail_in_the_list(page: Page) -> None:
    for name in ("real", "large", "small"):
        thumbnail = page.get_by_role("button", name=re.compile(name)).locator(".thumbnail img")
        expect(thumbnail).to_be_visible()
        assert thumbnail.evaluate("(image) => image.decode().then(() => image.naturalWidth)") > 30


def test_what_is_too_large_or_damaged_is_told(page: Page) -> None:
    choose(page, "large")
    page.get_by_role("button", name="What is in view").click()
    expect(page.locator("#region-failure")).to_contain_text("at most 2000000")
    page.get_by_role("button", name=re.compile("damaged")).click()
    expect(page.get_by_role("alert").filter(has_text="damaged.svs")).to_be_visible()
    choose(page, "large")


def test_all_text_of_the_page_of_slides_has_the_contrast_of_wcag_aa(page: Page) -> None:
    page.emulate_media(color_scheme="light", reduced_motion="reduce")
    choose(page, "real")
    found = contrasts_of(page)
    page.emulate_media(color_scheme="dark", reduced_motion="reduce")
    found += contrasts_of(page)
    assert len(found) > 40
    assert [(text, ratio) for text, ratio in found if ratio < 4.5] == []


def test_a_slide_can_be_chosen_and_looked_at_by_keyboard(page: Page) -> None:
    page.get_by_role("button", name=re.compile("real")).focus()
    page.keyboard.press("Enter")
    expect(page.locator("body")).to_have_attribute("data-state", "done")
    assert "real" in page.evaluate("() => document.activeElement.innerText")
    page.locator("#view").focus()
    before = page.locator("#zoom").inner_text()
    page.keyboard.press("+")
    expect(page.locator("#zoom")).not_to_have_text(before)
    x = on_stage(page, 0, 0)[0]
    page.keyboard.press("ArrowRight")
    page.wait_for_function("(x) => window.focalpath.onStage(0, 0).x < x - 40", arg=x)


def test_a_narrow_window_does_not_scroll_sideways(page: Page) -> None:
    choose(page, "real")
    for width in (1024, 800, 360):
        page.set_viewport_size({"width": width, "height": 760})
        script = "() => document.documentElement.scrollWidth <= innerWidth"
        page.wait_for_function(script)


def test_without_the_viewers_library_the_page_says_what_to_do(page: Page, service: str) -> None:
    page.route("**/openseadragon.min.js", lambda route: route.fulfill(status=404))
    page.goto(f"{service}viewer/slides.html?again")
    expect(page.get_by_role("alert").filter(has_text="make page")).to_be_visible()
