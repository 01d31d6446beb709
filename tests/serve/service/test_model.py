import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.contract.errors import (
    BackendUnavailableError,
    BackendUnreachableError,
    BundleError,
    ModelChangedError,
)
from serve.contract.manifest import read_bundle
from serve.inference.segmenter import TileSegmenter, open_segmenter
from serve.service import model as model_module
from serve.service.model import Model
from serve.service.telemetry import Telemetry
from serve.settings import ServeSettings
from tests.support.errors import raises
from tests.support.meanwhile import before_call
from tests.support.pictures import blobs, painted
from tests.support.ports import free_port
from tests.support.toy_bundle import TILE_SIZE_PX, add_warm_up, replace_bundle, write_toy_bundle

LABELS = np.repeat([[1, 2, 3, 4]], 4, axis=0).repeat(TILE_SIZE_PX // 4, 0).repeat(16, 1)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_toy_bundle(tmp_path / "bundle", version="1")


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Versions of the segmenters that were closed."""
    found: list[str] = []
    monkeypatch.setattr(TileSegmenter, "close", lambda self: found.append(self.manifest.version))
    return found


def _model(bundle: Path, **settings: Any) -> Model:
    return Model(ServeSettings(bundle=bundle, threads=1, **settings), Telemetry())


def _version(model: Model) -> str:
    return model.run(lambda segmenter: segmenter.manifest.version)


def test_a_new_bundle_in_the_folder_answers_from_then_on_and_the_old_model_is_closed(
    bundle: Path, closed: list[str]
) -> None:
    model = _model(bundle)
    assert _version(model) == "1"
    replace_bundle(bundle, "2", tile_size_px=128)
    model.look_for_update()
    assert closed == ["1"]
    assert _version(model) == "2"
    assert model.manifest().version == "2"
    image = blobs(100, 120)
    assert model.run(lambda segmenter: segmenter.segment(image)).labels.shape == (100, 120)


def test_a_link_that_leads_to_a_new_bundle_is_noticed(bundle: Path) -> None:
    link = bundle.parent / "current"
    link.symlink_to(bundle)
    model = _model(link)
    assert _version(model) == "1"
    write_toy_bundle(bundle.parent / "second", version="2")
    link.unlink()
    link.symlink_to(bundle.parent / "second")
    model.look_for_update()
    assert _version(model) == "2"


def test_a_bundle_that_stays_or_is_gone_for_a_moment_changes_nothing(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = _model(bundle)
    before = model.run(lambda segmenter: segmenter)
    model.look_for_update()
    bundle.rename(bundle.parent / "away")
    model.look_for_update()
    bundle.mkdir()  # a copy is on its way
    (bundle / "model.onnx").touch()
    model.look_for_update()
    assert model.run(lambda segmenter: segmenter) is before
    assert model.is_ready()
    assert "is refused" not in caplog.text


def test_a_broken_new_bundle_is_refused_until_it_is_mended_and_the_old_model_answers_on(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = _model(bundle)
    _version(model)
    whole = (bundle / "model.onnx").read_bytes()
    replace_bundle(bundle, "2", is_broken=True)
    with caplog.at_level(logging.ERROR):
        model.look_for_update()
        model.look_for_update()
    assert _version(model) == "1"
    assert model.is_ready()
    assert caplog.text.count("the new bundle is refused") == 1
    assert "model.onnx is damaged" in caplog.text
    (bundle / "model.onnx").write_bytes(whole)
    model.look_for_update()
    assert _version(model) == "2"


def test_what_began_with_the_old_model_ends_with_it_before_it_is_closed(
    bundle: Path, closed: list[str]
) -> None:
    model = _model(bundle)
    begun = threading.Barrier(3)

    def work(may_end: threading.Event) -> str:
        def wait_and_segment(segmenter: TileSegmenter) -> str:
            begun.wait(60)
            assert may_end.wait(60)
            segmenter.segment(blobs(20, 20))
            return segmenter.manifest.version

        return model.run(wait_and_segment)

    with ThreadPoolExecutor(2) as pool:
        events = [threading.Event(), threading.Event()]
        first, second = [pool.submit(work, event) for event in events]
        begun.wait(60)
        replace_bundle(bundle, "2")
        model.look_for_update()
        assert _version(model) == "2"
        events[0].set()
        assert first.result() == "1"
        assert closed == []
        events[1].set()
        assert second.result() == "1"
    assert closed == ["1"]


def test_a_model_that_is_closed_ends_what_it_has_begun_and_begins_nothing(
    bundle: Path, closed: list[str]
) -> None:
    model = _model(bundle)

    def close_and_segment(segmenter: TileSegmenter) -> None:
        model.close()
        assert closed == []
        segmenter.segment(blobs(20, 20))

    model.run(close_and_segment)
    assert closed == ["1"]
    with raises(BackendUnavailableError, code="stopping"):
        _version(model)
    assert not model.is_ready()


def test_a_model_that_is_closed_while_it_is_opened_is_closed_after(
    bundle: Path, closed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(bundle)

    def open_and_close(*arguments: Any, **options: Any) -> TileSegmenter:
        model.close()
        return open_segmenter(*arguments, **options)

    monkeypatch.setattr("serve.service.model.open_segmenter", open_and_close)
    with raises(BackendUnavailableError, code="stopping"):
        _version(model)
    assert closed == ["1"]


def test_requests_in_many_threads_all_get_right_answers_while_the_model_changes(
    bundle: Path,
) -> None:
    model = _model(bundle)
    _version(model)
    image = painted(LABELS)
    stop = threading.Event()

    def ask() -> set[str]:
        versions = set()
        while not stop.is_set():
            result = model.run(lambda segmenter: segmenter.segment(image))
            # The toy model blurs the borders.
            assert np.mean(result.labels == LABELS) > 0.9
            versions.add(result.summary.model.version)
        return versions

    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask) for _ in range(4)]
        for version in ("2", "3", "4"):
            replace_bundle(bundle, version)
            model.look_for_update()
        stop.set()
        seen = set().union(*(answer.result() for answer in answers))
    assert "4" in seen | {_version(model)}
    assert len(seen) > 1


def test_the_model_info_names_the_model_that_answers(bundle: Path) -> None:
    telemetry = Telemetry()
    swapped = 'focalpath_model_changes_total{outcome="swapped"}'
    assert f"{swapped} 0.0" in telemetry.render().decode().splitlines()
    model = Model(ServeSettings(bundle=bundle, threads=1), telemetry)
    _version(model)
    replace_bundle(bundle, "2")
    model.look_for_update()
    lines = telemetry.render().decode().splitlines()
    info = 'focalpath_model_info{backend="onnxruntime",name="segmenter",version='
    assert {f'{info}"1"}} 0.0', f'{info}"2"}} 1.0'} < set(lines)
    assert f"{swapped} 1.0" in lines


def test_a_backend_that_was_lost_is_opened_and_compared_anew(
    bundle: Path, closed: list[str]
) -> None:
    model = _model(bundle)
    work, versions = _work_that_fails(1, BackendUnreachableError("gone"))
    with raises(BackendUnreachableError, "gone"):
        model.run(work)
    assert closed == ["1"]
    add_warm_up(bundle, painted(LABELS), np.full_like(LABELS, 5))  # another one is back
    with raises(BundleError, "warm_up.npz", code="warm_up_differs"):
        model.run(work)
    assert versions == ["1"]


def test_a_backend_that_is_not_ready_is_opened_anew(
    bundle: Path, closed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(bundle)
    assert model.is_ready()
    with monkeypatch.context() as patch:
        patch.setattr(TileSegmenter, "is_ready", lambda _: False)
        assert not model.is_ready()
    assert closed == ["1"]
    assert model.is_ready()


@pytest.mark.parametrize("kind", [BackendUnavailableError, ModelChangedError])
def test_a_failure_to_open_is_answered_at_once_for_a_while(
    kind: type[BackendUnavailableError], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def fail(*_: object, **__: object) -> TileSegmenter:
        opened.append(1)
        raise kind("not now")

    now = [100.0]
    monkeypatch.setattr("serve.service.model.open_segmenter", fail)
    monkeypatch.setattr("serve.service.model.time.monotonic", lambda: now[0])
    model = _model(bundle)
    for wait in (0.0, 0.5, 1.0):
        now[0] += wait
        with raises(kind, "not now"):
            _version(model)
    assert len(opened) == 2


def test_the_warm_up_image_gets_the_labels_of_the_export(bundle: Path) -> None:
    with open_segmenter(ServeSettings(bundle=bundle, threads=1)) as segmenter:
        labels = segmenter.segment(painted(LABELS)).labels
    add_warm_up(bundle, painted(LABELS), labels)
    assert _model(bundle).is_ready()


def test_a_model_that_labels_the_warm_up_image_otherwise_is_not_ready(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_warm_up(bundle, painted(LABELS), np.full_like(LABELS, 5))
    model = _model(bundle)
    with caplog.at_level(logging.WARNING):
        assert not model.is_ready()
    assert "3.125% of the warm-up image's labels are those of the export" in caplog.text


def test_labels_of_another_size_do_not_agree(bundle: Path) -> None:
    add_warm_up(bundle, painted(LABELS), LABELS[:10])
    with raises(BundleError, "warm_up.npz", "0.000%", code="warm_up_differs"):
        open_segmenter(ServeSettings(bundle=bundle, threads=1))


@pytest.mark.parametrize("content", [b"", b"no archive", "pickle", "other"])
def test_a_file_without_a_warm_up_image_is_a_damaged_bundle(
    bundle: Path, content: bytes | str
) -> None:
    add_warm_up(bundle, painted(LABELS), LABELS)
    manifest = read_bundle(bundle)
    if isinstance(content, bytes):
        (bundle / "warm_up.npz").write_bytes(content)
    else:
        image = np.array([{}], object) if content == "pickle" else painted(LABELS)
        np.savez(bundle / "warm_up.npz", **{"image": image, content: LABELS})
    with raises(BundleError, "warm_up.npz", code="bundle_damaged"):
        open_segmenter(ServeSettings(bundle=bundle, threads=1), manifest)


def test_a_damaged_warm_up_image_is_a_damaged_bundle(bundle: Path) -> None:
    add_warm_up(bundle, painted(LABELS), LABELS)
    with (bundle / "warm_up.npz").open("ab") as file:
        file.write(b"x")
    with raises(BundleError, "warm_up.npz", code="bundle_damaged"):
        read_bundle(bundle)


def _work_that_fails(
    times: int, error: Exception
) -> tuple[Callable[[TileSegmenter], str], list[str]]:
    versions: list[str] = []

    def work(segmenter: TileSegmenter) -> str:
        versions.append(segmenter.manifest.version)
        if len(versions) <= times:
            raise error
        return segmenter.manifest.version

    return work, versions


def test_work_is_done_again_with_the_new_model_when_triton_changed_it(bundle: Path) -> None:
    model = _model(bundle)
    _version(model)
    replace_bundle(bundle, "2")
    work, versions = _work_that_fails(1, ModelChangedError("another one"))
    assert model.run(work) == "2"
    assert versions == ["1", "2"]


def test_work_that_fails_otherwise_is_not_done_again(bundle: Path) -> None:
    work, versions = _work_that_fails(9, BackendUnavailableError("lost"))
    with raises(BackendUnavailableError, "lost"):
        _model(bundle).run(work)
    assert len(versions) == 1


def test_a_model_that_changes_again_and_again_ends_in_an_error(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.service.model.time.sleep", lambda _: None)
    work, versions = _work_that_fails(99, ModelChangedError("another one"))
    with raises(ModelChangedError, "another one"):
        _model(bundle).run(work)
    assert len(versions) < 10


def test_a_bundle_that_is_replaced_while_it_is_opened_is_opened_again(
    bundle: Path, closed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def open_slowly(*arguments: Any, **options: Any) -> TileSegmenter:
        opened.append(1)
        if len(opened) == 1:
            replace_bundle(bundle, "2")
        return open_segmenter(*arguments, **options)

    monkeypatch.setattr("serve.service.model.open_segmenter", open_slowly)
    assert _version(_model(bundle)) == "2"
    assert len(opened) == 2
    assert closed == ["1"]


def test_a_bundle_that_is_replaced_where_it_is_opened_first_is_no_error(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = partial(replace_bundle, bundle, "2", tile_size_px=128)
    # It refuses the other tile size.
    before_call(monkeypatch, model_module, "open_segmenter", replace)
    assert _version(_model(bundle)) == "2"


def test_a_copy_with_the_same_content_is_no_error(bundle: Path) -> None:
    model = _model(bundle)
    _version(model)
    copied = shutil.copytree(bundle, bundle.parent / "copy")
    bundle.rename(bundle.parent / "before")
    copied.rename(bundle)
    model.look_for_update()
    assert _version(model) == "1"


def test_triton_that_is_lost_is_not_ready(bundle: Path) -> None:
    settings = ServeSettings(bundle=bundle, backend="triton", triton_url=f"127.0.0.1:{free_port()}")
    assert not Model(settings.model_copy(update={"triton_load": True}), Telemetry()).is_ready()
