import gc
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest

from serve.contract import openvino
from serve.contract.machine import this_processor
from tests.support.built_once import built_once
from tests.support.http_service import running_service, wait_until_ready
from tests.support.toy_bundle import write_toy_bundle

# Before torch is imported, here and in processes that tests start: tiny models lose more to threads
# that wait than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Of requests that state none: a service may have to wait for a core. httpx has no public way.
vars(httpx._config.DEFAULT_TIMEOUT_CONFIG).update(dict.fromkeys(("connect", "read", "write"), 60))
Once = Callable[[str, Callable[[Path], object]], Path]
_WAITING = {"ray", "triton", "browser"}
_LONG = {"slow", *_WAITING}


def pytest_collection() -> None:
    """Collect no garbage while modules are imported: that takes a third of their time."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Collect seldom, and leave out what stays to the end anyway.

    Torch's exporter and Lightning make many objects and little garbage.
    """
    gc.freeze()
    gc.set_threshold(20_000, 25, 25)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run long files first, so that no process is left alone with one at the end.

    Those that wait for services and other programs alternate with those that compute, which use
    the cores meanwhile.
    """
    marks: dict[Path, set[str]] = {}
    for item in items:
        marks.setdefault(item.path, set()).update(mark.name for mark in item.iter_markers())
    long = [path for path in marks if marks[path] & _LONG]
    waiting = [path for path in long if "serve" in path.parts or marks[path] & _WAITING]
    computing = [path for path in long if path not in waiting]
    turns = [path for pair in zip_longest(waiting, computing) for path in pair if path]
    ranks = {path: rank for rank, path in enumerate(turns)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Have torch draw the same numbers whichever tests this process ran before."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """End the run when a process of pytest-xdist dies, and say in which test and how.

    Otherwise version 3.8 gives out again what that process had finished, and waits for ever.
    """
    if error:
        test = node.config.pluginmanager.getplugin("dsession").sched.remove_node(node)
        status = node.gateway._io.popen.wait()
        reason = f"the process {node.gateway.id} died with status {status} in {test}: {error}"
        pytest.exit(reason, returncode=pytest.ExitCode.INTERNAL_ERROR)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the processor: what runs, and how it rounds, differs between processors."""
    precisions = [name for name in get_args(openvino.GraphPrecision) if not openvino.problem(name)]
    terminalreporter.write_line(
        f"processor: {this_processor().title}; "
        f"OpenVINO computes in: {', '.join(precisions) or 'nothing here'}"
    )


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture(scope="session")
def service_url(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The HTTP service over the toy bundle; takes uploads of at most 1 MiB and 1 megapixel."""
    log = tmp_path_factory.mktemp("service") / "log.txt"
    limits = {"max_upload_mib": "1", "max_image_megapixels": "1", "max_batch_mib": "16"}
    with running_service(toy_bundle, log, **limits) as url:
        wait_until_ready(url)
        yield url


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> None:
    """A shell has what it starts in the background ignore SIGINT; tests of Ctrl-C need it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def _terminal() -> Iterator[None]:
    """A closed terminal ends what is started, also where the tests themselves are to outlive it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def once(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, Callable[[Path], object]], Path]:
    """Builds a folder that all processes of pytest-xdist share, and that no test may change."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    return lambda name, build: built_once(shared / "once" / name, build)


@pytest.fixture(scope="session")
def toy_data(once: Once) -> Path:
    from tests.support.toy_data import write_toy_data

    return once("toy_data", lambda folder: write_toy_data(folder / "data")) / "data"


@pytest.fixture(scope="session")
def toy_run(toy_data: Path, once: Once) -> Path:
    """A run of two epochs on the toy data set."""
    from tests.support.toy_data import toy_settings
    from train.fitting.run import fit

    return once("toy_run", lambda folder: fit(toy_settings(), toy_data, folder / "run")) / "run"


@pytest.fixture(scope="session")
def drawn_slides(once: Once) -> Path:
    """Slides to pretrain on: two for training and one for testing, of 80 um."""
    from train.data.synthetic.slides import SlideSettings, write_slides

    drawn = SlideSettings(num_train=2, num_validation=0, num_test=1, side_um=80.0)
    return once("drawn_slides", lambda folder: write_slides(folder, drawn))


@pytest.fixture(scope="session")
def labelled_slides(once: Once) -> Path:
    """Slides to measure encoders on: two of each split, of 100 um."""
    from train.data.synthetic.slides import SlideSettings, write_slides

    drawn = SlideSettings(num_train=2, num_validation=2, num_test=2, side_um=100.0)
    return once("labelled_slides", lambda folder: write_slides(folder, drawn))


@pytest.fixture(scope="session")
def _toy_export(toy_run: Path, once: Once) -> Path:
    """A folder with the toy run's bundle, and the float32 graph that it was made from."""
    import export.bundle
    from export.settings import BundleSettings

    export_onnx = export.bundle.export_onnx

    def build(folder: Path) -> None:
        def export_and_copy(model: object, path: Path, **settings: object) -> None:
            export_onnx(model, path, **settings)  # type: ignore[arg-type]
            shutil.copyfile(path, folder / "graph.onnx")

        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export.bundle, "export_onnx", export_and_copy)
            export.bundle.write_bundle(toy_run, folder / "bundle", BundleSettings())

    return once("exported", build)


@pytest.fixture(scope="session")
def exported_bundle(_toy_export: Path) -> Path:
    """The toy run's bundle."""
    return _toy_export / "bundle"


@pytest.fixture(scope="session")
def toy_graph(_toy_export: Path) -> Path:
    """The toy run's float32 graph with all outputs, the logits among them."""
    return _toy_export / "graph.onnx"
