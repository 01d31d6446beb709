import base64
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import BrowserContext, Page, Route, expect

from tests.support.browser import SLOW_MS, contrasts_of, running_browser
from tests.support.http_service import running_service, wait_until_ready
from tests.support.pictures import encoded, painted
from tests.support.toy_bundle import CLASSES, REFERENCE_RGB

pytestmark = pytest.mark.browser

SIDE = 256
STROMA, NECROSIS = 2, 4
REFUSAL = "Failed to load resource: the server responded with a status of"
READ_CANVAS = """([x, y]) => {
    const canvas = document.querySelector("canvas");
    return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data.slice(0, 3)];
}"""


def tissue() -> NDArray[np.uint8]:
    """Stroma on the left, necrosis on the right, and below a band of either tumor or other."""
    truth = np.full((SIDE, SIDE), STROMA)
    truth[:, SIDE // 2 :] = NECROSIS
    image = painted(truth)
    image[SIDE * 3 // 4 :] = REFERENCE_RGB[[0, 4]].mean(axis=0).astype(np.uint8)
    return image


TISSUE = encoded(tissue())
IN_STROMA, IN_NECROSIS, IN_THE_BAND = (60, 90), (190, 90), (60, 230)  # x, y in the image


@dataclass
class Visit:
    """A page in a browser of its own, and what it said and asked for."""

    page: Page
    url: str
    console: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def upload(self, content: bytes = TISSUE, name: str = "tissue.png") -> None:
        """Choose a file as a person does, without waiting for what becomes of it."""
        file = {"name": name, "mimeType": "image/png", "buffer": content}
        self.page.locator("#file").set_input_files(files=[file])

    def segment(self, content: bytes = TISSUE, name: str = "tissue.png") -> None:
        self.upload(content, name)
        self.wait_for_state("done")

    def download(self, button: str) -> tuple[str, bytes]:
        """Name and content of what a button of the panel downloads."""
        with self.page.expect_download() as download:
            self.page.get_by_role("button", name=button).click()
        return download.value.suggested_filename, download.value.path().read_bytes()

    def download_picture(self) -> tuple[str, NDArray[np.int64]]:
        name, content = self.download("Overlay PNG")
        return name, read_rgb(content)

    def wait_for_state(self, state: str) -> None:
        expect(self.page.locator("body")).to_have_attribute("data-state", state)

    def on_canvas(self, place: tuple[int, int]) -> tuple[float, float]:
        """Where a pixel of the fitted image is on the canvas."""
        width, height = self.page.evaluate("""() => {
            const canvas = document.querySelector("canvas");
            return [canvas.width, canvas.height];
        }""")
        scale = min((width - 40) / SIDE, (height - 92) / SIDE, 8)
        left, top = (width - SIDE * scale) / 2, 20 + (height - 92 - SIDE * scale) / 2
        return left + (place[0] + 0.5) * scale, top + (place[1] + 0.5) * scale

    def color_at(self, place: tuple[int, int]) -> tuple[int, ...]:
        return tuple(self.page.evaluate(READ_CANVAS, self.on_canvas(place)))

    def wait_for_color(self, place: tuple[int, int], color: NDArray[np.floating]) -> None:
        script = f"""([place, color]) => {{
            const found = ({READ_CANVAS})(place);
            return found.every((value, i) => Math.abs(value - color[i]) <= 2);
        }}"""
        argument = [self.on_canvas(place), [float(value) for value in color]]
        self.page.wait_for_function(script, arg=argument)

    def wait_for_colors(
        self, place: tuple[int, int], *, at_least: int = 1, at_most: int = 12
    ) -> None:
        """Wait for so many different colours among twelve canvas pixels in a row."""
        script = f"""([[x, y], low, high]) => {{
            const row = Array.from({{ length: 12 }}, (_, i) => ({READ_CANVAS})([x + i, y]).join());
            const {{ size }} = new Set(row);
            return low <= size && size <= high;
        }}"""
        argument = [self.on_canvas(place), at_least, at_most]
        self.page.wait_for_function(script, arg=argument)

    def hover(self, place: tuple[int, int]) -> None:
        box = self.page.locator("#view").bounding_box()
        assert box is not None
        x, y = self.on_canvas(place)
        self.page.mouse.move(box["x"] + x, box["y"] + y)


def class_color(label: int) -> NDArray[np.float64]:
    return np.array([int(CLASSES[label - 1].color[i : i + 2], 16) for i in (1, 3, 5)], np.float64)


def read_rgb(png: bytes) -> NDArray[np.int64]:
    with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
        return np.asarray(picture.convert("RGB")).astype(np.int64)


def post(url: str, endpoint: str, content: bytes = TISSUE, **query: object) -> bytes:
    answer = httpx.post(f"{url}/{endpoint}", params=query, files={"image": content}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.content


@pytest.fixture(scope="module")
def contexts(service_url: str) -> Iterator[Callable[[bool], BrowserContext]]:
    """One profile with and one without a touch screen; a tab of each stays open.

    A new profile or process of the browser takes longer than most tests.
    """
    opened: dict[bool, BrowserContext] = {}
    with running_browser() as browser:

        def context_of(has_touch: bool) -> BrowserContext:
            if has_touch not in opened:
                opened[has_touch] = browser.new_context(locale="en-GB", has_touch=has_touch)
                opened[has_touch].set_default_timeout(SLOW_MS)
                opened[has_touch].new_page().goto(service_url)
            return opened[has_touch]

        yield context_of


@pytest.fixture
def open_page(
    contexts: Callable[[bool], BrowserContext], service_url: str
) -> Iterator[Callable[..., Visit]]:
    """Opens the page in a new tab; afterwards no visit may have met an error or another host."""
    visits: list[Visit] = []

    def open_(
        url: str = service_url,
        *,
        size: tuple[int, int] = (1200, 800),
        has_touch: bool = False,
        **media: Any,
    ) -> Visit:
        visit = Visit(contexts(has_touch).new_page(), url)
        visits.append(visit)
        visit.page.set_viewport_size({"width": size[0], "height": size[1]})
        visit.page.emulate_media(**media)
        visit.page.on(
            "console",
            lambda message: message.type == "error" and visit.console.append(message.text),
        )
        visit.page.on("pageerror", lambda error: visit.console.append(str(error)))
        visit.page.on("request", lambda request: visit.hosts.add(urlsplit(request.url).netloc))
        visit.page.goto(url)
        return visit

    yield open_
    for visit in visits:
        visit.page.evaluate('() => origin === "null" || localStorage.clear()')  # about:blank: null
        visit.page.close()
    for visit in visits:
        assert [text for text in visit.console if not text.startswith(REFUSAL)] == []
        assert visit.hosts - {"", urlsplit(visit.url).netloc} == set()


@pytest.fixture
def visit(open_page: Callable[..., Visit]) -> Visit:
    return open_page()


def test_an_uploaded_image_gets_a_row_for_each_class_and_is_told_to_screen_readers(
    visit: Visit,
) -> None:
    visit.segment(encoded(tissue()[: SIDE // 2]))
    rows = visit.page.locator("#classes tr")
    expect(rows.locator(".name")).to_have_text([tissue.name for tissue in CLASSES])
    shares = rows.locator("td:nth-child(2)").all_inner_texts()
    assert shares == ["0.0 %", "50.0 %", "0.0 %", "50.0 %", "0.0 %"]
    spoken = visit.page.get_by_role("status").filter(has_text="Segmented")
    expect(spoken).to_contain_text("Segmented tissue.png. Stroma 50 %, Necrosis 50 %.")


def test_a_dropped_image_is_segmented(visit: Visit) -> None:
    visit.page.evaluate(
        """(content) => {
            const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
            const options = { dataTransfer, bubbles: true, cancelable: true };
            document.getElementById("welcome").dispatchEvent(new DragEvent("drop", options));
        }""",
        base64.b64encode(TISSUE).decode(),
    )
    visit.wait_for_state("done")
    expect(visit.page.locator("#file-name")).to_have_text("dropped.png")


def test_the_shown_classes_are_blended_over_the_image(visit: Visit) -> None:
    def wait_for(*shown: int) -> None:
        for place, label in ((IN_STROMA, STROMA), (IN_NECROSIS, NECROSIS)):
            own = REFERENCE_RGB[label - 1]
            visit.wait_for_color(place, (own + class_color(label)) / 2 if label in shown else own)

    visit.segment()
    wait_for(STROMA, NECROSIS)
    visit.page.get_by_role("checkbox", name="Show Stroma").uncheck()
    wait_for(NECROSIS)
    visit.page.get_by_role("button", name="Show none").click()
    wait_for()
    visit.page.get_by_role("button", name="Show all").click()
    wait_for(STROMA, NECROSIS)


def test_the_opacity_goes_from_image_to_class_and_outlines_leave_the_inside_clear(
    visit: Visit,
) -> None:
    visit.segment()
    for opacity, color in ((0, REFERENCE_RGB[STROMA - 1]), (100, class_color(STROMA))):
        visit.page.get_by_label("Opacity").fill(str(opacity))
        visit.wait_for_color(IN_STROMA, color)
    visit.page.get_by_label("Outlines").check(force=True)  # the visible part is its label
    visit.wait_for_color(IN_STROMA, REFERENCE_RGB[STROMA - 1])
    visit.wait_for_color((SIDE // 2, 90), class_color(NECROSIS))


def test_hovering_tells_class_and_confidence_of_the_pixel(visit: Visit, service_url: str) -> None:
    arrays = np.load(io.BytesIO(post(service_url, "arrays")))
    visit.segment()
    for x, y in (IN_STROMA, IN_NECROSIS, IN_THE_BAND):
        visit.hover((x, y))
        readout = visit.page.locator("#readout")
        expect(readout).to_contain_text(f"x {x}, y {y}")
        expect(readout.locator("strong")).to_have_text(CLASSES[arrays["labels"][y, x] - 1].name)
        confidence = float(arrays["confidence"][y, x]) / 255
        expect(readout.locator(".value")).to_have_text(f"{100 * confidence:.0f} %")


def test_low_confidence_is_hatched_and_high_confidence_is_not(visit: Visit) -> None:
    visit.segment()
    visit.wait_for_colors(IN_THE_BAND, at_least=4)
    visit.wait_for_colors(IN_STROMA, at_most=1)
    visit.page.get_by_label("Hatch where confidence is low").uncheck()
    visit.wait_for_colors(IN_THE_BAND, at_most=1)


def test_the_threshold_says_how_much_of_the_image_is_below_it(
    visit: Visit, service_url: str
) -> None:
    confidence = np.load(io.BytesIO(post(service_url, "arrays")))["confidence"]
    visit.segment()
    for threshold in (50, 97):
        visit.page.get_by_label("Low means below").fill(str(threshold))
        share = 100 * float((confidence < np.ceil(threshold / 100 * 255)).mean())
        expect(visit.page.locator("#low-share")).to_contain_text(f"{share:.1f} %")


def test_dragging_moves_the_image_and_the_wheel_keeps_the_pixel_under_the_pointer(
    visit: Visit,
) -> None:
    visit.segment()
    x, y = IN_STROMA
    visit.hover((x, y))
    visit.page.mouse.down()
    visit.hover((x + 40, y + 20))
    visit.page.mouse.up()
    expect(visit.page.locator("#readout")).to_contain_text(f"x {x}, y {y}")
    before = visit.page.locator("#zoom").inner_text()
    visit.page.mouse.wheel(0, -400)
    expect(visit.page.locator("#zoom")).not_to_have_text(before)
    expect(visit.page.locator("#readout")).to_contain_text(f"x {x}, y {y}")


def test_pinching_magnifies_the_image(open_page: Callable[..., Visit]) -> None:
    visit = open_page(has_touch=True)
    visit.segment()
    before = visit.page.locator("#zoom").inner_text()
    fingers = visit.page.context.new_cdp_session(visit.page)
    for kind, spread in (("touchStart", 40), ("touchMove", 80), ("touchMove", 120)):
        points = [{"x": 400 - spread, "y": 400, "id": 0}, {"x": 400 + spread, "y": 400, "id": 1}]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    expect(visit.page.locator("#zoom")).not_to_have_text(before)
    after = visit.page.locator("#zoom").inner_text()
    assert float(after.removesuffix(" %")) > float(before.removesuffix(" %"))


def test_downloads_are_the_services_answers_for_what_is_shown_whatever_is_typed_since(
    visit: Visit, service_url: str
) -> None:
    visit.page.get_by_label("µm per pixel").fill("0.5")
    visit.segment()
    visit.page.get_by_label("µm per pixel").fill("1.0")
    labels = post(service_url, "labels", mpp=0.5)
    assert visit.download("Labels") == ("tissue.labels.png", labels)
    outlines = post(service_url, "geojson", mpp=0.5, min_area_px=64)
    assert visit.download("Outlines GeoJSON") == ("tissue.geojson", outlines)


def test_how_small_an_outline_may_be_is_chosen_and_said_in_um2(
    visit: Visit, service_url: str
) -> None:
    visit.page.get_by_label("µm per pixel").fill("0.5")
    visit.segment()
    smallest = visit.page.get_by_label("Smallest outline")
    expect(visit.page.locator("#smallest-help")).to_contain_text("64 px are 16 µm²")
    smallest.fill("0")
    assert visit.download("Outlines GeoJSON")[1] == post(service_url, "geojson", mpp=0.5)
    smallest.fill("1.5")
    visit.page.get_by_role("button", name="Outlines GeoJSON").click()
    expect(visit.page.locator("#download-failure")).to_contain_text("whole number of pixels")


def test_the_downloaded_overlay_has_the_opacity_and_the_classes_that_are_shown(
    visit: Visit, service_url: str
) -> None:
    wide = np.tile(tissue()[:128], (1, 9, 1))  # 2,304 pixels: drawn in more than one block
    visit.segment(encoded(wide))
    visit.page.get_by_label("Hatch where confidence is low").uncheck()
    visit.page.get_by_label("Opacity").fill("25")
    visit.page.get_by_role("checkbox", name="Show Stroma").uncheck()
    name, found = visit.download_picture()
    others = [row.name for row in CLASSES if row.name != "Stroma"]
    overlay = post(service_url, "overlay", encoded(wide), alpha=0.25, classes=others)
    assert name == "tissue.overlay.png"
    assert found.shape == wide.shape
    assert np.abs(found - read_rgb(overlay)).max() <= 2


def test_the_downloaded_overlay_has_hatches_outlines_or_nothing_as_it_is_shown(
    visit: Visit,
) -> None:
    visit.segment()
    x, y = IN_THE_BAND

    def num_colors() -> int:
        part = visit.download_picture()[1][y : y + 12, x : x + 12]
        return len(np.unique(part.reshape(-1, 3), axis=0))

    assert num_colors() >= 4
    visit.page.get_by_label("Hatch where confidence is low").uncheck()
    assert num_colors() == 1
    visit.page.get_by_label("Outlines").check(force=True)
    _, found = visit.download_picture()
    x, y = IN_STROMA
    assert np.abs(found[y, x] - REFERENCE_RGB[STROMA - 1]).max() <= 2
    assert np.abs(found[y, SIDE // 2] - class_color(NECROSIS)).max() <= 2
    visit.page.get_by_role("button", name="Overlay", exact=True).click()
    assert np.array_equal(visit.download_picture()[1], tissue())


def test_a_picture_that_the_browser_cannot_draw_is_said_so(visit: Visit) -> None:
    visit.segment()
    visit.page.evaluate(
        "() => { OffscreenCanvas.prototype.convertToBlob = () => Promise.reject(); }"
    )
    visit.page.get_by_role("button", name="Overlay PNG").click()
    expect(visit.page.locator("#download-failure")).to_contain_text("too large for this browser")


def test_a_download_that_fails_says_why_and_can_be_tried_again(visit: Visit) -> None:
    visit.segment()
    visit.page.route("**/labels*", lambda route: route.abort(), times=1)
    visit.page.get_by_role("button", name="Labels").click()
    expect(visit.page.locator("#download-failure")).to_contain_text("cannot be reached")
    again = visit.page.locator("#download-again")
    with visit.page.expect_download():
        again.click()
    expect(again).to_be_hidden()
    expect(visit.page.locator("#download-failure")).to_be_empty()
    visit.console.clear()  # the browser reports the request that was cut


def test_a_download_tells_that_it_is_under_way_and_can_be_cancelled(visit: Visit) -> None:
    visit.segment()
    visit.page.route("**/labels*", lambda _: None, times=1)  # never answered
    button = visit.page.get_by_role("button", name="Labels")
    button.click()
    expect(button).to_contain_text("cancel")
    button.click()
    expect(button).not_to_contain_text("cancel")
    expect(visit.page.locator("#download-failure")).to_be_empty()
    assert visit.download("Labels")[0] == "tissue.labels.png"


def test_downloads_do_not_run_the_model_again(visit: Visit, service_url: str) -> None:
    def segmented() -> str:
        metrics = httpx.get(f"{service_url}/metrics").text
        (line,) = re.findall(r'focalpath_stage_seconds_count{stage="segment"} (.+)', metrics)
        return str(line)

    content = tissue().copy()
    content[0, 0] = 7  # an image of this test only
    visit.segment(encoded(content))
    before = segmented()
    visit.download("Labels")
    visit.download("Outlines GeoJSON")
    assert segmented() == before


@pytest.mark.parametrize(
    ("content", "title", "advice"),
    [
        (b"no image", "This image cannot be used", "PNG, JPEG, TIFF or WebP"),
        (bytes(2 * 2**20), "The image is too large", "Crop"),
    ],
)
def test_a_refused_file_shows_what_the_service_says_of_it(
    content: bytes, title: str, advice: str, visit: Visit
) -> None:
    visit.upload(content, "broken.png")
    alert = visit.page.get_by_role("alert").filter(has_text=title)
    expect(alert).to_contain_text(advice)
    expect(alert.get_by_role("button", name="Try again")).to_be_hidden()
    expect(alert.get_by_role("button", name="Choose another image")).to_be_visible()


def test_a_lost_network_can_be_tried_again(visit: Visit) -> None:
    visit.page.route("**/arrays*", lambda route: route.abort())
    visit.upload()
    expect(visit.page.get_by_role("alert")).to_contain_text(["The service cannot be reached"])
    visit.console.clear()  # the browser reports the request that was cut
    visit.page.unroute("**/arrays*")
    visit.page.get_by_role("button", name="Try again").click()
    visit.wait_for_state("done")


def test_a_busy_service_is_asked_again_after_the_time_it_says(visit: Visit) -> None:
    refused = []

    def refuse_once(route: Route) -> None:
        if refused:
            route.continue_()
            return
        refused.append(route.request.url)
        headers = {"Retry-After": "0.2"}
        route.fulfill(status=429, headers=headers, json={"error": "Too many requests."})

    visit.page.route("**/arrays*", refuse_once)
    visit.segment()
    assert len(refused) == 1


@pytest.mark.parametrize("status", [413, 502, 504])
def test_an_answer_of_a_proxy_is_told_as_one(visit: Visit, status: int) -> None:
    body = "<html><h1>nginx</h1></html>"
    visit.page.route("**/arrays*", lambda route: route.fulfill(status=status, body=body))
    visit.upload()
    card = visit.page.get_by_role("alert").first
    expect(card).to_contain_text("proxy")
    expect(card).not_to_contain_text("nginx")


def test_a_wait_can_be_cancelled_or_ended_by_another_image(visit: Visit) -> None:
    visit.page.route("**/arrays*", lambda _: None, times=2)  # never answered
    visit.upload()
    visit.page.get_by_role("button", name="Cancel").click()
    expect(visit.page.get_by_role("button", name="Choose an image")).to_be_focused()
    expect(visit.page.locator("#file-name")).to_have_text("No image yet")
    visit.upload(name="first.png")
    expect(visit.page.get_by_role("button", name="Cancel")).to_be_visible()
    visit.segment(name="second.png")
    expect(visit.page.locator("#file-name")).to_have_text("second.png")


def test_a_key_that_the_service_asks_for_is_sent_until_the_tab_is_closed(
    toy_bundle: Path, tmp_path: Path, open_page: Callable[..., Visit]
) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("ward:the-right-key-of-the-ward\n")
    with running_service(toy_bundle, tmp_path / "log.txt", api_keys_file=str(keys)) as url:
        wait_until_ready(url)
        visit = open_page(url)
        dialog = visit.page.get_by_role("dialog", name="This service asks for a key")
        dialog.get_by_label("Access key").fill("the-wrong-key-of-the-ward")
        dialog.get_by_label("Access key").press("Enter")
        expect(dialog).to_contain_text("does not know the key")
        dialog.get_by_label("Access key").fill("the-right-key-of-the-ward")
        dialog.get_by_label("Access key").press("Enter")
        expect(visit.page.locator("#model")).to_have_text("segmenter 1.0.0")
        visit.page.reload()
        visit.segment()
        visit.page.goto("about:blank")


def test_what_the_browser_cannot_decode_is_shown_by_the_service_and_a_name_is_never_markup(
    visit: Visit,
) -> None:
    name = '<img src=x onerror="document.title=`hacked`">.tif'
    visit.segment(encoded(tissue(), "TIFF"), name)
    expect(visit.page.locator("#file-name")).to_have_text(name)
    assert visit.page.locator("#file-name img").count() == 0
    visit.page.get_by_label("Opacity").fill("0")
    visit.wait_for_color(IN_STROMA, REFERENCE_RGB[STROMA - 1])
    visit.wait_for_color(IN_NECROSIS, REFERENCE_RGB[NECROSIS - 1])


def test_the_pixel_size_gives_areas_and_a_scale_bar(visit: Visit) -> None:
    visit.page.get_by_label("µm per pixel").fill("0.5")
    visit.segment(encoded(tissue()[: SIDE // 2]))
    stroma = visit.page.locator("#classes tr").nth(STROMA - 1)
    expect(stroma.locator("td").nth(1)).to_have_text("4,096")  # 128 x 128 x 0.25 um2
    expect(visit.page.locator("#scale-bar")).to_have_text(re.compile(r"^(1|2|5)0* µm$"))


def test_without_a_pixel_size_no_area_is_claimed_until_it_is_given(visit: Visit) -> None:
    expect(visit.page.locator("#mpp-help")).to_contain_text("changes the labels")
    visit.segment()
    expect(visit.page.locator("th.area")).to_be_hidden()
    expect(visit.page.locator("#scale-bar")).to_be_hidden()
    expect(visit.page.locator("#mpp-help")).to_contain_text("Not known: taken to be 0.5")
    visit.page.get_by_label("µm per pixel").fill("0.4")
    visit.page.get_by_role("button", name="Segment again").click()
    expect(visit.page.locator("#scale-bar")).to_be_visible()
    expect(visit.page.locator("#file-facts")).to_contain_text("102 µm × 102 µm")


def test_a_pixel_size_typed_for_one_image_does_not_stay_for_the_next(visit: Visit) -> None:
    field, help_text = visit.page.locator("#mpp"), visit.page.locator("#mpp-help")
    field.fill("0.4")  # before any image: it is meant for the first
    visit.segment()
    expect(help_text).to_contain_text("As you stated for this image")
    expect(field).to_have_value("0.4")
    visit.segment(encoded(tissue(), dpi=(101_600, 101_600)), "next.png")
    expect(field).to_have_value("")
    expect(help_text).to_contain_text("The file says 0.25 µm per pixel (PNG density)")
    visit.segment(encoded(tissue()), "third.png")
    expect(help_text).to_contain_text("Not known: taken to be 0.5")


def test_a_printers_resolution_is_told_and_not_used(visit: Visit) -> None:
    visit.segment(encoded(tissue(), dpi=(2400, 2400)))
    expect(visit.page.locator("#mpp-help")).to_contain_text("2400 dpi")
    expect(visit.page.locator("#scale-bar")).to_be_hidden()


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "JPEG"])
def test_the_picture_is_of_the_pixels_that_were_segmented(visit: Visit, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    content = encoded(tissue(), kind, exif=exif.tobytes(), **options.get(kind, {}))
    visit.segment(content, "turned")
    visit.page.get_by_label("Opacity").fill("0")
    visit.page.get_by_label("Hatch where confidence is low").uncheck()
    _, picture = visit.download_picture()
    assert np.abs(picture - tissue()[::-1, ::-1]).max() <= 3
    expect(visit.page.locator("#notes")).to_contain_text("turned upright, from orientation 3")


def test_pixels_that_are_not_squares_are_told_and_measured_along_each_axis(visit: Visit) -> None:
    buffer = io.BytesIO()
    resolution = {"resolution": (20_000, 10_000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(buffer, tissue(), photometric="rgb", **resolution)
    visit.segment(buffer.getvalue(), "flat.tif")
    side = len(tissue())
    expect(visit.page.locator("#file-facts")).to_contain_text(f"{side / 2:.0f} µm × {side} µm")
    expect(visit.page.locator("#mpp-help")).to_contain_text("0.5 × 1 µm per pixel")
    expect(visit.page.locator("#mpp-help")).to_contain_text("height should look 2 times as large")


def test_an_impossible_pixel_size_is_refused_before_anything_is_sent(visit: Visit) -> None:
    visit.page.get_by_label("µm per pixel").fill("500")
    visit.upload()
    alert = visit.page.get_by_role("alert").filter(has_text="The pixel size cannot be used")
    expect(alert).to_contain_text("from 0.05 to 20")


def test_everything_can_be_done_by_keyboard(visit: Visit) -> None:
    keyboard = visit.page.keyboard

    def tab_to(name: str) -> None:
        script = """() => document.activeElement.getAttribute("aria-label")
            ?? document.activeElement.innerText.replace(/\\s+/g, " ")"""
        for _ in range(40):
            keyboard.press("Tab")
            if visit.page.evaluate(script) == name:
                return
        pytest.fail(f"Tab does not reach {name!r}")

    tab_to("Try the example")
    keyboard.press("Enter")
    visit.wait_for_state("done")
    expect(visit.page.locator("#file-facts")).to_contain_text("512 × 512 px")
    tab_to("Image")
    keyboard.press("ArrowRight")
    expect(visit.page.locator("#readout strong")).to_be_visible()
    keyboard.press("h")
    expect(visit.page.locator("#show-overlay")).to_have_attribute("aria-pressed", "false")
    tab_to("Show Stroma")
    keyboard.press("Space")
    expect(visit.page.get_by_role("checkbox", name="Show Stroma")).not_to_be_checked()
    tab_to("Labels PNG")
    with visit.page.expect_download():
        keyboard.press("Enter")


def test_the_theme_follows_the_system_until_it_is_chosen(open_page: Callable[..., Visit]) -> None:
    def lightness(visit: Visit) -> int:
        color = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", color)))

    dark, light = open_page(color_scheme="dark"), open_page(color_scheme="light")
    assert lightness(dark) < 150
    assert lightness(light) > 700
    dark.page.get_by_role("button", name="Light theme").click()
    assert lightness(dark) > 700
    dark.page.reload()
    expect(dark.page.get_by_role("button", name="Dark theme")).to_be_visible()
    assert lightness(dark) > 700


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_has_the_contrast_of_wcag_aa(theme: str, open_page: Callable[..., Visit]) -> None:
    visit = open_page(color_scheme=theme, reduced_motion="reduce")
    expect(visit.page.locator("#about")).to_contain_text("segmenter")
    expect(visit.page.locator("#model")).to_have_text("segmenter 1.0.0")
    expect(visit.page.get_by_text("Not a medical device")).to_be_visible()
    contrasts = contrasts_of(visit.page)
    visit.segment()
    contrasts += contrasts_of(visit.page)
    visit.upload(b"no image", "broken.png")
    visit.wait_for_state("bare")
    contrasts += contrasts_of(visit.page)
    assert len(contrasts) > 100
    assert [(text, ratio) for text, ratio in contrasts if ratio < 4.5] == []


def test_nothing_moves_for_who_asks_for_less_motion(open_page: Callable[..., Visit]) -> None:
    script = """() => [...document.querySelectorAll("*")].filter((element) => {
        const { transitionDuration, animationName } = getComputedStyle(element);
        return transitionDuration !== "0s" || animationName !== "none";
    }).length"""
    assert open_page(reduced_motion="reduce").page.evaluate(script) == 0
    assert open_page(reduced_motion="no-preference").page.evaluate(script) > 0


@pytest.mark.parametrize("width", [320, 360, 480])
def test_a_narrow_window_neither_scrolls_sideways_nor_breaks_words(
    width: int, open_page: Callable[..., Visit]
) -> None:
    visit = open_page(size=(width, 740))
    visit.page.get_by_label("µm per pixel").fill("0.5")  # for the column of areas
    visit.segment()
    root = "document.documentElement"
    assert visit.page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth")
    heights = "(names) => names.map((name) => name.getClientRects()[0].height)"
    assert max(visit.page.locator("#classes .name").evaluate_all(heights)) < 30


def test_going_through_the_panel_by_keyboard_does_not_move_the_page(
    open_page: Callable[..., Visit],
) -> None:
    visit = open_page(size=(1366, 600))
    visit.segment()
    for _ in range(40):
        visit.page.keyboard.press("Tab")
        assert visit.page.evaluate("window.scrollY") == 0


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_stored_and_deflated_npz_are_read(save: Callable[..., None], visit: Visit) -> None:
    buffer = io.BytesIO()
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    save(buffer, labels=array, flat=array.ravel())
    script = """async (content) => {
        const { readNpz } = await import("/viewer/npz.js");
        const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
        const arrays = await readNpz(bytes.buffer);
        return [...arrays].map(([name, { shape, data }]) => [name, shape, [...data]]);
    }"""
    found = visit.page.evaluate(script, base64.b64encode(buffer.getvalue()).decode())
    numbers = list(range(12))
    assert found == [["labels", [3, 4], numbers], ["flat", [12], numbers]]
