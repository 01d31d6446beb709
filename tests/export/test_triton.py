import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as triton

from export.errors import BundleError, DestinationError, SettingsError, StorageError
from export.triton import CONFIG_FILE, Target, publish, render_config
from serve.contract.manifest import Artefact, Manifest, TensorRTBuild, read_bundle, sha256_of
from tests.support import ROOT
from tests.support.errors import raises
from tests.support.toy_bundle import replace_bundle, write_toy_bundle

GOLDEN = ROOT / "model_repository" / "segmenter" / "config.pbtxt"


@pytest.fixture
def manifest(toy_bundle: Path) -> Manifest:
    return read_bundle(toy_bundle)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "repository"


def _parse(text: str) -> triton.ModelConfig:
    return text_format.Parse(text, triton.ModelConfig())


def _retrain(bundle: Path, folder: Path) -> Path:
    """A bundle of the same interface with another model."""
    shutil.copytree(bundle, folder)
    model = onnx.load(folder / "model.onnx")
    model.doc_string = str(folder)
    onnx.save(model, folder / "model.onnx")
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    artefact = manifest.artefacts[0].model_copy(update={"sha256": sha256_of(folder / "model.onnx")})
    manifest.model_copy(update={"artefacts": (artefact,)}).write(folder)
    return folder


def _add_artefact(bundle: Path, folder: Path, file: str, **fields: object) -> Path:
    """A copy of the bundle with one more artefact, of which only the checksum is right."""
    shutil.copytree(bundle, folder)
    (folder / file).write_bytes(file.encode())
    manifest = read_bundle(folder)
    values = manifest.artefacts[0].model_dump() | fields
    values |= {"file": file, "sha256": sha256_of(folder / file)}
    artefacts = (*manifest.artefacts, Artefact.model_validate(values))
    manifest.model_copy(update={"artefacts": artefacts}).write(folder)
    return folder


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_the_committed_config_is_the_rendering_of_the_synthetic_preset(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path, tile_size_px=256, max_batch_size=8)
    assert render_config(read_bundle(bundle)) == GOLDEN.read_text(encoding="utf-8")


def test_training_again_does_not_change_the_config(manifest: Manifest) -> None:
    trained_again = manifest.model_copy(
        update={
            "version": "2.0.0",
            "checkpoint_sha256": "1" * 64,
            "class_attention_bias": (1.0, 2.0, 3.0, 4.0, 5.0),
            "artefacts": (manifest.artefacts[0].model_copy(update={"sha256": "2" * 64}),),
        }
    )
    assert render_config(trained_again) == render_config(manifest)


@pytest.mark.parametrize(
    ("max_batch_size", "preferred"), [(1, [1]), (2, [1, 2]), (6, [3, 6]), (8, [4, 8])]
)
def test_preferred_batches_are_the_largest_and_its_half(
    manifest: Manifest, max_batch_size: int, preferred: list[int]
) -> None:
    config = _parse(render_config(manifest.model_copy(update={"max_batch_size": max_batch_size})))
    assert list(config.dynamic_batching.preferred_batch_size) == preferred


@pytest.mark.parametrize(
    ("target", "platform", "graphs"),
    [("onnxruntime-gpu", "onnxruntime_onnx", []), ("tensorrt-a100", "tensorrt_plan", [1, 2, 4, 6])],
)
def test_a_gpu_is_warmed_up_for_powers_of_two_and_the_largest_batch_as_cuda_graphs_in_tensorrt(
    manifest: Manifest, target: Target, platform: str, graphs: list[int]
) -> None:
    text = render_config(manifest.model_copy(update={"max_batch_size": 6}), target)
    assert f"target {target}" in text.splitlines()[0]
    config = _parse(text)
    assert config.platform == platform
    assert [group.kind for group in config.instance_group] == [triton.ModelInstanceGroup.KIND_GPU]
    assert [sample.batch_size for sample in config.model_warmup] == [1, 2, 4, 6]
    assert config.optimization.cuda.graphs is bool(graphs)
    assert [graph.batch_size for graph in config.optimization.cuda.graph_spec] == graphs


def test_an_unknown_target_is_refused_with_the_known_ones(manifest: Manifest) -> None:
    with raises(SettingsError, "tensorflow", "onnxruntime-gpu"):
        render_config(manifest, "tensorflow")  # type: ignore[arg-type]


def test_the_first_export_becomes_version_1(toy_bundle: Path, repository: Path) -> None:
    version = publish(toy_bundle, repository)

    assert version == repository / "segmenter" / "1"
    assert _files(repository) == ["segmenter/1/model.onnx", "segmenter/config.pbtxt"]
    assert (version / "model.onnx").read_bytes() == (toy_bundle / "model.onnx").read_bytes()
    config = (repository / "segmenter" / "config.pbtxt").read_text(encoding="utf-8")
    assert config == render_config(read_bundle(toy_bundle))


def _version_names(repository: Path) -> list[str]:
    return sorted(path.name for path in (repository / "segmenter").iterdir() if path.is_dir())


def test_a_bundle_becomes_the_next_version_unless_the_newest_serves_it_already(
    toy_bundle: Path, repository: Path, tmp_path: Path
) -> None:
    other = _retrain(toy_bundle, tmp_path / "retrained")
    found = [publish(bundle, repository) for bundle in (toy_bundle, toy_bundle, other, toy_bundle)]
    assert [version.name for version in found] == ["1", "1", "2", "3"]
    first, second, third = (sha256_of(version / "model.onnx") for version in found[1:])
    assert first == third != second
    assert _version_names(repository) == ["1", "2", "3"]


def _write_config(repository: Path) -> None:
    """As of an earlier publication."""
    (repository / "segmenter" / "config.pbtxt").write_bytes(GOLDEN.read_bytes())


@pytest.mark.parametrize(
    ("there", "expected"), [(["9", "10"], "11"), (["007", "notes", ".staging-interrupted"], "1")]
)
def test_versions_are_counted_as_triton_reads_them(
    toy_bundle: Path, repository: Path, there: list[str], expected: str
) -> None:
    for name in there:
        (repository / "segmenter" / name).mkdir(parents=True)
    _write_config(repository)
    assert publish(toy_bundle, repository).name == expected


def test_a_file_takes_its_number_too(toy_bundle: Path, repository: Path) -> None:
    (repository / "segmenter").mkdir(parents=True)
    (repository / "segmenter" / "4").touch()
    _write_config(repository)
    assert publish(toy_bundle, repository).name == "5"


@pytest.mark.parametrize(
    "config", ['name: "segmenter"\nbackend: "python"\n', b"\xff\xfe", "", "a folder", "missing"]
)
def test_another_model_of_the_same_name_is_left_alone(
    toy_bundle: Path, repository: Path, config: str | bytes
) -> None:
    version = repository / "segmenter" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text("theirs")
    path = repository / "segmenter" / "config.pbtxt"
    content = config if isinstance(config, bytes) else config.encode()
    if config == "a folder":
        path.mkdir()
    elif config != "missing":
        path.write_bytes(content)
    before = _files(repository)
    with raises(DestinationError, repository / "segmenter", "config.pbtxt", "--name"):
        publish(toy_bundle, repository, keep=1)
    assert _files(repository) == before
    assert (version / "model.py").read_text() == "theirs"
    if path.is_file():
        assert path.read_bytes() == content


@pytest.mark.parametrize("at", ["repository", "repository/segmenter"])
@pytest.mark.parametrize("kind", ["file", "broken link"])
def test_a_repository_that_is_no_folder_is_refused(
    toy_bundle: Path, repository: Path, at: str, kind: str
) -> None:
    path = repository.parent / at
    path.parent.mkdir(exist_ok=True)
    if kind == "file":
        path.touch()
    else:
        path.symlink_to("/nowhere")
    with raises(DestinationError, path, "not a folder"):
        publish(toy_bundle, repository)


def test_two_publications_at_once_become_two_versions(
    toy_bundle: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = [_retrain(toy_bundle, tmp_path / str(index)) for index in range(3)]

    def slowly(source: Path, target: Path) -> None:
        time.sleep(0.2)
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(shutil, "copyfile", slowly)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda bundle: publish(bundle, repository), bundles))
    assert sorted(version.name for version in found) == ["1", "2", "3"]
    for version, bundle in zip(found, bundles, strict=True):
        assert sha256_of(version / "model.onnx") == sha256_of(bundle / "model.onnx")


def test_a_first_publication_that_ends_while_another_looks_is_not_of_another_model(
    toy_bundle: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_text = Path.read_text

    def just_too_early(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name != CONFIG_FILE:
            return read_text(path, *arguments, **options)
        monkeypatch.undo()
        publish(toy_bundle, repository)
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", just_too_early)
    assert publish(_retrain(toy_bundle, tmp_path / "other"), repository).name == "2"


def test_a_publication_goes_on_where_the_first_failed_meanwhile(
    toy_bundle: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first made the model's folder, and takes it away again."""
    damaged = _retrain(toy_bundle, tmp_path / "damaged")
    copyfile = shutil.copyfile

    def copy(source: Path, target: Path) -> None:
        if damaged not in source.parents:
            copyfile(source, target)
            return
        found.append(pool.submit(publish, toy_bundle, repository))
        wait(found, 0.3)  # as far as it gets
        target.write_text("another")

    found: list[Future[Path]] = []
    monkeypatch.setattr(shutil, "copyfile", copy)
    with ThreadPoolExecutor() as pool:
        with raises(BundleError, "was replaced"):
            publish(damaged, repository)
        assert found[0].result().name == "1"
    assert _files(repository) == ["segmenter/1/model.onnx", "segmenter/config.pbtxt"]


def test_what_a_publication_that_was_killed_left_goes_with_the_next(
    toy_bundle: Path, repository: Path
) -> None:
    left = repository / "segmenter" / ".staging-killed"
    (left / "2").mkdir(parents=True)
    (left / "2" / "model.onnx").write_text("half")
    assert publish(toy_bundle, repository).name == "1"
    assert _files(repository) == ["segmenter/1/model.onnx", "segmenter/config.pbtxt"]
    assert not left.exists()


@pytest.mark.parametrize("written", [CONFIG_FILE, "1"])
def test_a_first_publication_that_was_killed_anywhere_is_done_again(
    toy_bundle: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    class Killed(BaseException):
        pass

    def then_killed(move: Callable[..., Path]) -> Callable[..., Path]:
        def moved(path: Path, to: Path) -> Path:
            done = move(path, to)
            if to.name == written:
                raise Killed
            return done

        return moved

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(Path, name, then_killed(getattr(Path, name)))
        with pytest.raises(Killed):
            publish(toy_bundle, repository)
    assert publish(toy_bundle, repository).name == "1"
    assert _files(repository) == ["segmenter/1/model.onnx", "segmenter/config.pbtxt"]


def _with_versions(repository: Path, count: int) -> None:
    for version in range(1, count + 1):
        folder = repository / "segmenter" / str(version)
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_text(str(version))
    if count:
        _write_config(repository)


@pytest.mark.parametrize(
    ("keep", "left"), [(None, ["1", "2", "3", "4", "5"]), (3, ["3", "4", "5"]), (1, ["4", "5"])]
)
def test_the_oldest_versions_go_on_request_but_never_the_one_that_is_still_served(
    toy_bundle: Path, repository: Path, keep: int | None, left: list[str]
) -> None:
    _with_versions(repository, 4)
    publish(toy_bundle, repository, keep=keep)
    assert _version_names(repository) == left


def test_keeping_one_where_nothing_new_is_published_leaves_the_newest(
    toy_bundle: Path, repository: Path
) -> None:
    _with_versions(repository, 2)
    for keep in (None, 1):
        publish(toy_bundle, repository, keep=keep)
    assert _version_names(repository) == ["3"]


def test_keeping_no_version_is_refused(toy_bundle: Path, repository: Path) -> None:
    with raises(SettingsError, "--keep", 0):
        publish(toy_bundle, repository, keep=0)

    assert not repository.exists()


def test_a_damaged_bundle_is_refused_and_changes_nothing(
    toy_bundle: Path, repository: Path, tmp_path: Path
) -> None:
    publish(toy_bundle, repository)
    damaged = _retrain(toy_bundle, tmp_path / "damaged")
    with (damaged / "model.onnx").open("ab") as file:
        file.write(b"!")

    with raises(BundleError, "model.onnx"):
        publish(damaged, repository)

    assert _files(repository) == ["segmenter/1/model.onnx", "segmenter/config.pbtxt"]


def _fail_half_way(source: Path, destination: Path) -> None:
    destination.write_bytes(source.read_bytes()[:100])
    raise OSError("No space left on device")


@pytest.mark.parametrize("num_versions", [0, 3])
def test_a_publication_that_fails_half_way_leaves_everything_as_it_was(
    toy_bundle: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, num_versions: int
) -> None:
    repository.mkdir()
    _with_versions(repository, num_versions)
    before = _files(repository)
    monkeypatch.setattr(shutil, "copyfile", _fail_half_way)
    with raises(StorageError, "No space left"):
        publish(toy_bundle, repository, keep=1)
    assert _files(repository) == before
    assert bool(list(repository.iterdir())) is bool(num_versions)


def test_a_bundle_that_is_replaced_while_it_is_published_is_not_published(
    toy_bundle: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(toy_bundle, repository)
    before = (repository / "segmenter" / CONFIG_FILE).read_bytes()
    bundle = write_toy_bundle(tmp_path / "bundle", tile_size_px=128, version="2")
    copy = shutil.copyfile

    def replace_and_copy(source: Path, destination: Path) -> None:
        replace_bundle(bundle, "3", tile_size_px=32)
        copy(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", replace_and_copy)
        with raises(BundleError, bundle, "was replaced", repository):
            publish(bundle, repository)
    assert _files(repository) == ["segmenter/1/model.onnx", "segmenter/config.pbtxt"]
    assert (repository / "segmenter" / CONFIG_FILE).read_bytes() == before
    assert publish(bundle, repository).name == "2"


def test_an_export_of_another_tile_size_changes_the_config(
    toy_bundle: Path, repository: Path, tmp_path: Path
) -> None:
    publish(toy_bundle, repository)
    publish(write_toy_bundle(tmp_path / "larger", tile_size_px=128), repository)

    config = _parse((repository / "segmenter" / "config.pbtxt").read_text(encoding="utf-8"))
    assert list(config.input[0].dims) == [128, 128, 3]


@pytest.mark.parametrize(
    ("target", "file"), [("onnxruntime-gpu", "model.fp16.onnx"), ("onnxruntime", "model.onnx")]
)
def test_a_gpu_gets_half_precision_where_the_bundle_has_it_and_the_cpu_does_not(
    toy_bundle: Path, repository: Path, tmp_path: Path, target: Target, file: str
) -> None:
    bundle = _add_artefact(toy_bundle, tmp_path / "fp16", "model.fp16.onnx", precision="fp16")
    version = publish(bundle, repository, target)
    assert (version / "model.onnx").read_bytes() == (bundle / file).read_bytes()


def test_tensorrt_gets_the_plan(toy_bundle: Path, repository: Path, tmp_path: Path) -> None:
    build = TensorRTBuild(version="10.16", compute_capability="8.0").model_dump()
    plan = {"format": "tensorrt_plan", "precision": "fp16", "tensorrt": build}
    bundle = _add_artefact(toy_bundle, tmp_path / "plan", "model.plan", **plan)
    publish(bundle, repository, "tensorrt-a100")
    assert _files(repository) == ["segmenter/1/model.plan", "segmenter/config.pbtxt"]


def test_a_bundle_without_a_plan_is_refused_for_tensorrt(
    toy_bundle: Path, repository: Path
) -> None:
    with raises(BundleError, "model.onnx", "python -m export engine"):
        publish(toy_bundle, repository, "tensorrt-a100")

    assert not repository.exists()
