from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from serve.contract import manifest, unchanged
from serve.contract.errors import BackendUnavailableError, BundleError
from serve.contract.manifest import read_bundle, sha256_of
from serve.contract.unchanged import while_unchanged
from serve.inference import segmenter
from serve.inference.batching import TileBatcher
from serve.inference.segmenter import open_segmenter
from serve.settings import InferenceSettings
from serve.slides.local import open_model
from tests.support.errors import raises
from tests.support.meanwhile import before_call
from tests.support.toy_bundle import replace_bundle, write_toy_bundle

During = Callable[[Callable[[], object]], None]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_toy_bundle(tmp_path / "bundle", version="1")


@pytest.fixture
def in_the_pause(monkeypatch: pytest.MonkeyPatch) -> During:
    """What to do in the pause after an error."""

    def do(work: Callable[[], object]) -> None:
        monkeypatch.setattr(unchanged.time, "sleep", lambda _: work())

    return do


def test_what_was_read_of_two_bundles_is_discarded_and_read_again(bundle: Path) -> None:
    versions, discarded = iter("2"), list[int]()
    reads = iter(range(10))

    def read() -> int:
        for version in versions:
            replace_bundle(bundle, version)
        return next(reads)

    assert while_unchanged(bundle, read, discard=discarded.append) == 1
    assert discarded == [0]


@pytest.mark.parametrize(
    "error", [BundleError("a part of each"), FileNotFoundError("gone"), KeyError("a name")]
)
def test_an_error_counts_where_the_bundle_stayed_as_it_was(
    bundle: Path, in_the_pause: During, error: Exception
) -> None:
    reads: list[str] = []
    in_the_pause(lambda: pytest.fail("there is nothing to wait for"))

    def read() -> None:
        reads.append("read")
        if len(reads) == 1:
            (bundle / "new").touch()
        raise error

    with pytest.raises(type(error)) as caught:
        while_unchanged(bundle, read)
    assert caught.value is error
    assert reads == ["read", "read"]  # the second time, nothing had changed


def test_a_bundle_that_changes_at_every_attempt_is_told_as_that(bundle: Path) -> None:
    numbers, discarded = iter(range(9)), list[int]()

    def read() -> int:
        number = next(numbers)
        (bundle / f"new-{number}").touch()
        return number

    with raises(BackendUnavailableError, bundle.name, "changes again and again"):
        while_unchanged(bundle, read, discard=discarded.append)
    assert discarded == [0, 1, 2, 3, 4]


def test_files_that_do_not_count_may_change(bundle: Path) -> None:
    def read(name: str) -> int:
        (bundle / name).touch()
        return next(numbers)

    numbers = iter(range(9))
    assert while_unchanged(bundle, lambda: read(f"{next(numbers)}"), names=("model.onnx",)) == 1
    with raises(BackendUnavailableError, bundle.name):
        while_unchanged(bundle, lambda: read("model.onnx"), names=("model.onnx",))


def test_a_folder_within_the_bundle_is_none_of_its_files(bundle: Path) -> None:
    (bundle / "results").mkdir()
    numbers = iter(range(9))

    def read() -> int:
        number = next(numbers)
        (bundle / "results" / str(number)).touch()
        return number

    assert while_unchanged(bundle, read) == 0


def test_a_bundle_that_is_replaced_between_its_manifest_and_its_model_is_read_again(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = partial(replace_bundle, bundle, "2", tile_size_px=128)
    before_call(monkeypatch, manifest, "sha256_of", replace)
    assert read_bundle(bundle).version == "2"


@pytest.mark.parametrize("opener", ["segmenter", "model of slides"])
def test_a_model_is_never_opened_with_the_manifest_of_another_bundle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, opener: str
) -> None:
    closed: list[str] = []
    replace = partial(replace_bundle, bundle, "2")  # of the same interface: both open
    before_call(monkeypatch, segmenter, "open_backend", replace)
    close = TileBatcher.close

    def noted(batcher: TileBatcher) -> None:
        closed.append("closed")
        close(batcher)

    monkeypatch.setattr(TileBatcher, "close", noted)
    settings = InferenceSettings(bundle=bundle, threads=1)
    if opener == "segmenter":
        with open_segmenter(settings) as found:
            assert found.manifest.version == "2"
            assert closed == ["closed"]
    else:
        opened = open_model(settings)
        assert opened.model.version == "2"
        assert closed == ["closed"]
        opened.runner.close()


@pytest.mark.parametrize("at", ["the start", "the manifest", "the model"])
def test_a_bundle_that_is_not_there_for_a_moment_is_waited_for(
    bundle: Path, in_the_pause: During, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    old, new = bundle.parent / "old", write_toy_bundle(bundle.parent / "new", version="2")
    in_the_pause(lambda: new.rename(bundle))

    def gone(path: Path, *_: object, **__: object) -> str:
        monkeypatch.undo()
        in_the_pause(lambda: new.rename(bundle))
        bundle.rename(old)
        return path.read_text() if at == "the manifest" else sha256_of(path)

    if at == "the start":
        bundle.rename(old)
    elif at == "the manifest":
        monkeypatch.setattr(Path, "read_text", gone)
    else:
        monkeypatch.setattr(manifest, "sha256_of", gone)
    assert read_bundle(bundle).version == "2"
