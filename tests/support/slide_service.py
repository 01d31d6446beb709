"""A folder of small slides, and the service over it in this process, for tests."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from serve.service.endpoints import build_app
from serve.service.gateway import build_gateway
from serve.settings import ServeSettings
from tests.support import ROOT
from tests.support.slides import tissue_pixels, write_aperio

HEIGHT, WIDTH = 700, 900


def painted_slide(path: Path) -> Path:
    """Tissue on glass, with a square of the toy model's Tumor at x 400 to 600, y 300 to 500."""
    pixels = np.full((HEIGHT, WIDTH, 3), 245, np.uint8)
    pixels[100:600, 150:800] = tissue_pixels(500, 650)
    pixels[300:500, 400:600] = (200, 30, 30)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_aperio(path, pixels)


@contextmanager
def slide_client(bundle: Path, slides: Path, **settings: object) -> Iterator[TestClient]:
    """A client of the whole application; jobs run while it is open."""
    fields = {"bundle": bundle, "slides": slides, "threads": 1, "slide_readers": 1, **settings}
    chosen = ServeSettings.model_validate(fields)
    app = build_app(chosen)
    gateway = build_gateway(app, chosen)
    app.state.slides.start()
    try:
        with TestClient(gateway, raise_server_exceptions=False) as client:
            yield client
    finally:
        app.state.slides.close()
        app.state.model.close()


def copy_of(slide: Path, folder: Path, name: str) -> Path:
    """A copy of a slide in a folder that is made."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(slide, folder / name))


_SLOW = """
import os, sys, time
if 'serve.service.slides.job_process' in ' '.join(sys.orig_argv):
    slide = os.environ.get('TEST_SLOW_SLIDE', '')
    def look(event, arguments):
        name = str(arguments[0]) if event == 'open' else ''
        if '/done/' in name and name.endswith('.partial') and slide in name:
            time.sleep(float(os.environ['TEST_SLOW_S']))
    sys.addaudithook(look)
"""


def slow_jobs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, seconds: float, slide: str = ""
) -> None:
    """Have jobs wait before they mark a block as done, so that tests meet them at work.

    Args:
        folder: for the code that does it.
        monkeypatch: sets the environment of the processes to come.
        seconds: how long they wait; TEST_SLOW_S changes it.
        slide: only slides with this in their name.
    """
    run_at_start(_SLOW, folder, monkeypatch)
    monkeypatch.setenv("TEST_SLOW_S", str(seconds))
    monkeypatch.setenv("TEST_SLOW_SLIDE", slide)


_RUN_OR_END = """
try:
    import at_start
except BaseException:  # Python would go on without it
    import os, traceback
    traceback.print_exc()
    os._exit(70)
"""


def run_at_start(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each Python process that starts run this code first, and end where that fails."""
    hook = folder / "hook"
    hook.mkdir()
    (hook / "at_start.py").write_text(code)
    (hook / "sitecustomize.py").write_text(_RUN_OR_END)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hook), str(ROOT)]))
