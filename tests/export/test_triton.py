import shutil
from pathlib import Path
from typing import get_args

import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as triton

from export.errors import BundleError, SettingsError, StorageError
from export.triton import Target, publish, render_config
from serve.contract.manifest import Artefact, Manifest, TensorRTBuild, read_bundle, sha256_of
from tests.support import ROOT
from tests.support.errors import raises
from tests.support.toy_bundle import write_toy_bundle

GOLDEN = ROOT / "model_repository" / "segmenter" / "config.pbtxt"
TARGETS: tuple[Target, ...] = get_args(Target)


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


@pytest.mark.parametrize("target", TARGETS)
def test_the_config_says_that_it_is_rendered_and_by_what(
    manifest: Manifest, target: Target
) -> None:
    first_line = render_config(manifest, target).splitlines()[0]

    assert first_line.startswith("#")
    assert "export/triton.py" in first_line
    assert target in first_line


@pytest.mark.parametrize("target", TARGETS)
def test_names_types_and_dims_are_the_manifests(manifest: Manifest, target: Target) -> None:
    config = _parse(render_config(manifest, target))

    names = {triton.TYPE_UINT8: "uint8", triton.TYPE_FP32: "float32"}
    described = [(t.name, names[t.data_type], (-1, *t.dims)) for t in config.input]
    assert described == [(t.name, t.dtype, t.shape) for t in manifest.inputs]
    described = [(t.name, names[t.data_type], (-1, *t.dims)) for t in config.output]
    assert described == [(t.name, t.dtype, t.shape) for t in manifest.outputs]
    assert config.name == manifest.name
    assert config.max_batch_size == manifest.max_batch_size


@pytest.mark.parametrize(
    ("max_batch_size", "preferred"), [(1, [1]), (2, [1, 2]), (6, [3, 6]), (8, [4, 8])]
)
def test_preferred_batches_are_the_largest_and_its_half(
    manifest: Manifest, max_batch_size: int, preferred: list[int]
) -> None:
    config = _parse(render_config(manifest.model_copy(update={"max_batch_size": max_batch_size})))

    assert list(config.dynamic_batching.preferred_batch_size) == preferred


def test_only_the_newest_version_is_served(manifest: Manifest) -> None:
    assert _parse(render_config(manifest)).version_policy.latest.num_versions == 1


@pytest.mark.parametrize(
    ("target", "platform", "kind"),
    [
        ("onnxruntime", "onnxruntime_onnx", triton.ModelInstanceGroup.KIND_CPU),
        ("onnxruntime-gpu", "onnxruntime_onnx", triton.ModelInstanceGroup.KIND_GPU),
        ("tensorrt-a100", "tensorrt_plan", triton.ModelInstanceGroup.KIND_GPU),
    ],
)
def test_each_target_has_its_platform_and_device(
    manifest: Manifest, target: Target, platform: str, kind: int
) -> None:
    config = _parse(render_config(manifest, target))

    assert config.platform == platform
    assert [group.kind for group in config.instance_group] == [kind]


@pytest.mark.parametrize("target", ["onnxruntime-gpu", "tensorrt-a100"])
def test_a_gpu_is_warmed_up_for_each_power_of_two_and_the_largest_batch(
    manifest: Manifest, target: Target
) -> None:
    config = _parse(render_config(manifest.model_copy(update={"max_batch_size": 6}), target))

    assert [sample.batch_size for sample in config.model_warmup] == [1, 2, 4, 6]


def test_the_warm_up_feeds_every_input(manifest: Manifest) -> None:
    (sample,) = _parse(render_config(manifest)).model_warmup

    assert {name: (-1, *data.dims) for name, data in sample.inputs.items()} == {
        tensor.name: tensor.shape for tensor in manifest.inputs
    }


def test_tensorrt_captures_a_cuda_graph_for_each_warmed_up_batch(manifest: Manifest) -> None:
    config = _parse(render_config(manifest, "tensorrt-a100"))

    assert config.optimization.cuda.graphs
    graphs = [graph.batch_size for graph in config.optimization.cuda.graph_spec]
    assert graphs == [sample.batch_size for sample in config.model_warmup]


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


def test_a_new_export_becomes_the_next_version_beside_the_old_one(
    toy_bundle: Path, repository: Path, tmp_path: Path
) -> None:
    first = publish(toy_bundle, repository)
    second = publish(_retrain(toy_bundle, tmp_path / "retrained"), repository)

    assert second.name == "2"
    assert sha256_of(first / "model.onnx") != sha256_of(second / "model.onnx")


def test_the_tenth_version_comes_after_the_ninth(toy_bundle: Path, repository: Path) -> None:
    for version in ("9", "10"):
        (repository / "segmenter" / version).mkdir(parents=True)

    assert publish(toy_bundle, repository).name == "11"


def test_folders_that_triton_ignores_are_not_counted(toy_bundle: Path, repository: Path) -> None:
    for name in ("007", "notes", ".staging-interrupted"):
        (repository / "segmenter" / name).mkdir(parents=True)

    assert publish(toy_bundle, repository).name == "1"


def test_publishing_the_same_bundle_again_adds_no_version(
    toy_bundle: Path, repository: Path
) -> None:
    first = publish(toy_bundle, repository)

    assert publish(toy_bundle, repository) == first
    assert _files(repository) == ["segmenter/1/model.onnx", "segmenter/config.pbtxt"]


def test_publishing_an_older_bundle_again_makes_it_the_newest(
    toy_bundle: Path, repository: Path, tmp_path: Path
) -> None:
    first = publish(toy_bundle, repository)
    publish(_retrain(toy_bundle, tmp_path / "retrained"), repository)
    third = publish(toy_bundle, repository)

    assert third.name == "3"
    assert sha256_of(third / "model.onnx") == sha256_of(first / "model.onnx")


def _publish_many(bundle: Path, repository: Path, folder: Path, num_versions: int) -> None:
    for index in range(num_versions):
        publish(_retrain(bundle, folder / f"retrained_{index}"), repository)


def _version_names(repository: Path) -> list[str]:
    return sorted(path.name for path in (repository / "segmenter").iterdir() if path.is_dir())


def test_all_versions_are_kept_unless_asked(
    toy_bundle: Path, repository: Path, tmp_path: Path
) -> None:
    _publish_many(toy_bundle, repository, tmp_path, 4)

    assert _version_names(repository) == ["1", "2", "3", "4"]


def test_keeping_three_deletes_the_oldest(
    toy_bundle: Path, repository: Path, tmp_path: Path
) -> None:
    _publish_many(toy_bundle, repository, tmp_path, 4)

    publish(toy_bundle, repository, keep=3)

    assert _version_names(repository) == ["3", "4", "5"]


def test_the_version_that_is_still_served_stays(
    toy_bundle: Path, repository: Path, tmp_path: Path
) -> None:
    _publish_many(toy_bundle, repository, tmp_path, 3)

    publish(toy_bundle, repository, keep=1)

    assert _version_names(repository) == ["3", "4"]


def test_keeping_one_where_nothing_new_is_published_leaves_the_newest(
    toy_bundle: Path, repository: Path, tmp_path: Path
) -> None:
    _publish_many(toy_bundle, repository, tmp_path, 2)
    publish(toy_bundle, repository)

    publish(toy_bundle, repository, keep=1)

    assert _version_names(repository) == ["3"]


def test_a_publication_that_fails_deletes_no_version(
    toy_bundle: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _publish_many(toy_bundle, repository, tmp_path, 3)
    monkeypatch.setattr(shutil, "copyfile", _fail_half_way)

    with raises(StorageError, "No space left"):
        publish(toy_bundle, repository, keep=1)

    assert _version_names(repository) == ["1", "2", "3"]


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


def test_a_first_export_that_fails_half_way_leaves_nothing(
    toy_bundle: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "copyfile", _fail_half_way)

    with raises(StorageError, "No space left"):
        publish(toy_bundle, repository)

    assert list(repository.iterdir()) == []


def test_a_later_export_that_fails_half_way_leaves_the_old_version_as_it_was(
    toy_bundle: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(toy_bundle, repository)
    before = (repository / "segmenter" / "config.pbtxt").read_bytes()
    larger = write_toy_bundle(tmp_path / "larger", tile_size_px=128)
    monkeypatch.setattr(shutil, "copyfile", _fail_half_way)

    with raises(StorageError, "No space left"):
        publish(larger, repository)

    names = sorted(path.name for path in (repository / "segmenter").iterdir())
    assert names == ["1", "config.pbtxt"]
    assert (repository / "segmenter" / "config.pbtxt").read_bytes() == before


def test_an_export_of_another_tile_size_changes_the_config(
    toy_bundle: Path, repository: Path, tmp_path: Path
) -> None:
    publish(toy_bundle, repository)
    publish(write_toy_bundle(tmp_path / "larger", tile_size_px=128), repository)

    config = _parse((repository / "segmenter" / "config.pbtxt").read_text(encoding="utf-8"))
    assert list(config.input[0].dims) == [128, 128, 3]


def test_a_gpu_gets_the_half_precision_model_where_the_bundle_has_one(
    toy_bundle: Path, repository: Path, tmp_path: Path
) -> None:
    bundle = _add_artefact(toy_bundle, tmp_path / "fp16", "model.fp16.onnx", precision="fp16")

    version = publish(bundle, repository, "onnxruntime-gpu")

    assert (version / "model.onnx").read_bytes() == b"model.fp16.onnx"


def test_the_cpu_gets_full_precision_even_where_the_bundle_has_half(
    toy_bundle: Path, repository: Path, tmp_path: Path
) -> None:
    bundle = _add_artefact(toy_bundle, tmp_path / "fp16", "model.fp16.onnx", precision="fp16")

    version = publish(bundle, repository, "onnxruntime")

    assert (version / "model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()


def test_tensorrt_gets_the_plan(toy_bundle: Path, repository: Path, tmp_path: Path) -> None:
    build = TensorRTBuild(version="10.16", compute_capability="8.0").model_dump()
    bundle = _add_artefact(
        toy_bundle,
        tmp_path / "plan",
        "model.plan",
        format="tensorrt_plan",
        precision="fp16",
        tensorrt=build,
    )

    publish(bundle, repository, "tensorrt-a100")

    assert _files(repository) == ["segmenter/1/model.plan", "segmenter/config.pbtxt"]


def test_a_bundle_without_a_plan_is_refused_for_tensorrt(
    toy_bundle: Path, repository: Path
) -> None:
    with raises(BundleError, "model.onnx", "python -m export engine"):
        publish(toy_bundle, repository, "tensorrt-a100")

    assert not repository.exists()
