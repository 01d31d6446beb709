"""Triton's model repository: `config.pbtxt` from the manifest, and a folder for each version.

```
repository/segmenter/config.pbtxt     what every version answers to
repository/segmenter/1/model.onnx     an older export, kept for going back
repository/segmenter/2/model.onnx     the newest: the only one that Triton loads
```
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as triton

from export.errors import BundleError, DestinationError, SettingsError, errors_translated
from export.files import one_at_a_time, staging_folder, uninterrupted
from serve.contract.manifest import Artefact, Manifest, TensorSpec, read_bundle, sha256_of
from train.files import write_errors_explained

Target = Literal["onnxruntime", "onnxruntime-gpu", "tensorrt-a100"]
"""What executes the model inside Triton."""

CONFIG_FILE = "config.pbtxt"
_HEADER = "# Rendered from the bundle's manifest by export/triton.py"
"""Begins every config of ours, of this version and others."""
_STAGING = ".staging-"
MAX_QUEUE_DELAY_US = 2_000
"""How long a request may wait for others to share its batch: little beside a tile's inference."""

ENGINE_PRECISIONS = ("fp16", "bf16", "fp32")
"""Of the graph that a TensorRT plan is built from: the first that the bundle has."""

_DTYPES = {"uint8": triton.TYPE_UINT8, "float32": triton.TYPE_FP32}


@dataclass(frozen=True, kw_only=True)
class _Runtime:
    platform: str
    model_file: str
    """The file name that Triton's backend looks for in a version's folder."""
    format: Literal["onnx", "tensorrt_plan"]
    precisions: tuple[str, ...]
    """Which artefact of the bundle is served: the first precision that it has."""
    on_gpu: bool
    missing: str = "Export it first, or choose another target."
    """Advice where the bundle has no such artefact."""


_RUNTIMES: dict[Target, _Runtime] = {
    "onnxruntime": _Runtime(
        platform="onnxruntime_onnx",
        model_file="model.onnx",
        format="onnx",
        precisions=("fp32",),
        on_gpu=False,
    ),
    "onnxruntime-gpu": _Runtime(
        platform="onnxruntime_onnx",
        model_file="model.onnx",
        format="onnx",
        precisions=("fp16", "fp32"),  # no bf16: not tried with ONNX Runtime's CUDA provider
        on_gpu=True,
    ),
    "tensorrt-a100": _Runtime(
        platform="tensorrt_plan",
        model_file="model.plan",
        format="tensorrt_plan",
        precisions=ENGINE_PRECISIONS,
        on_gpu=True,
        missing="Build it: python -m export engine BUNDLE.",
    ),
}


def render_config(manifest: Manifest, target: Target = "onnxruntime") -> str:
    """Render `config.pbtxt`: the same manifest and target always give the same text.

    It depends on the model's interface only, so that training again does not change it.

    Raises:
        SettingsError: the target is not known.
    """
    runtime = _runtime(target)
    # Triton's own message type, not a text template: a field that does not exist or has another
    # type fails here, and not on the server.
    config = triton.ModelConfig(
        name=manifest.name, platform=runtime.platform, max_batch_size=manifest.max_batch_size
    )
    config.version_policy.latest.num_versions = 1
    for tensor in manifest.inputs:
        config.input.add(**_tensor(tensor))
    for tensor in manifest.outputs:
        config.output.add(**_tensor(tensor))
    # Without `gpus`, KIND_GPU places one instance on each GPU that the server sees.
    group = triton.ModelInstanceGroup
    config.instance_group.add(count=1, kind=group.KIND_GPU if runtime.on_gpu else group.KIND_CPU)
    batching = config.dynamic_batching
    batching.preferred_batch_size.extend(
        sorted({max(1, manifest.max_batch_size // 2), manifest.max_batch_size})
    )
    batching.max_queue_delay_microseconds = MAX_QUEUE_DELAY_US
    if runtime.on_gpu:
        config.optimization.input_pinned_memory.enable = True
        config.optimization.output_pinned_memory.enable = True
    if runtime.platform == "tensorrt_plan":
        _capture_cuda_graphs(config, manifest)
    # A GPU chooses kernels and allocates for each batch size, a CPU does so at its first request.
    for batch_size in _batch_sizes(manifest.max_batch_size) if runtime.on_gpu else (1,):
        _warm_up(config, manifest, batch_size)
    text: str = text_format.MessageToString(config, use_short_repeated_primitives=True)
    return f"{_HEADER}, target {target}.\n# Do not edit: the next export writes it again.\n{text}"


@errors_translated()
def publish(
    bundle: Path, repository: Path, target: Target = "onnxruntime", *, keep: int | None = None
) -> Path:
    """Put the bundle into Triton's repository as the newest version; return the version's folder.

    The version appears whole or not at all. Publishing what the newest version already serves adds
    no version; what an older one served does, because Triton loads only the newest.

    Args:
        bundle: the bundle's folder.
        repository: the model repository.
        target: what executes the model inside Triton.
        keep: delete the oldest versions beyond so many, but never the newest, nor the one that was
            the newest until now: Triton serves it until it loads the new one. None keeps all.

    Raises:
        BundleError: the bundle is damaged, incomplete, or has no artefact for the target.
        DestinationError: the repository has another model of this name, or something else there.
        SettingsError: the target is not known, or `keep` is below 1.
        StorageError: the disk is full, or may not be written.
        KeyboardInterrupt: with what it says, where Ctrl-C came too late to stop the publication.
    """
    check_keep(keep)
    runtime = _runtime(target)
    manifest = read_bundle(bundle)
    artefact = _select_artefact(manifest, runtime, target, bundle)
    folder = repository / manifest.name
    check_folder(repository, manifest.name)
    # Inside the model's folder, where Triton ignores what is not a number: it would take a
    # folder in the repository for another model.
    with _published_alone(folder), staging_folder(folder, _STAGING) as staging:
        (staging / CONFIG_FILE).write_text(render_config(manifest, target), encoding="utf-8")
        versions = _versions(folder)
        newest = folder / str(versions[-1]) if versions else None
        if newest is None or not _serves(newest, runtime, artefact):
            newest = folder / str(versions[-1] + 1 if versions else 1)
            staged = staging / newest.name / runtime.model_file
            _stage_version(bundle / artefact.file, staged)
            if sha256_of(staged) != artefact.sha256:
                raise BundleError(
                    f"{bundle} was replaced while it was published; nothing was changed in "
                    f"{repository}. Publish it again."
                )
        with uninterrupted(f"{newest} is published"):
            # The config first: versions without one are of another model, see `check_folder`.
            (staging / CONFIG_FILE).replace(folder / CONFIG_FILE)
            if (staging / newest.name).exists():
                (staging / newest.name).rename(newest)
            if keep is not None:
                _prune(folder, staging, keep, {int(newest.name), *versions[-1:]})
    return newest


def check_folder(repository: Path, name: str) -> None:
    """Check that a model's folder is missing, or one that an export made.

    Raises:
        DestinationError: it is not.
    """
    folder = repository / name
    for path in (repository, folder):
        if os.path.lexists(path) and not path.is_dir():
            raise DestinationError(
                f"{path} is not a folder; expected Triton's model repository with a folder for "
                "each model. Nothing was changed; move it away, or give another repository."
            )
    config = folder / CONFIG_FILE
    # First: the config of a version is there before it.
    has_versions = folder.exists() and bool(_versions(folder))
    try:
        is_ours = config.read_text(encoding="utf-8").startswith(_HEADER)
    except FileNotFoundError:
        # New, or the first publication was killed. Triton serves models without a config, too.
        is_ours = not has_versions
    except (IsADirectoryError, UnicodeDecodeError):
        is_ours = False
    if not is_ours:
        raise DestinationError(
            f"{folder} is of another model: its {CONFIG_FILE} is missing, or not of an export. "
            "Nothing was changed; export with another --name, or give another repository."
        )


@contextmanager
def _published_alone(folder: Path) -> Iterator[None]:
    """Wait for other publications, make the folder, and remove what one that was killed left there.

    A new folder in which nothing is published is removed. So the lock is the repository's.
    """
    with write_errors_explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder.parent) as is_held:
        is_new = not folder.exists()
        with write_errors_explained(folder):
            folder.mkdir(exist_ok=True)
        try:
            for left in folder.glob(f"{_STAGING}*") if is_held else ():
                shutil.rmtree(left, ignore_errors=True)
            yield
        finally:
            if is_new and not any(folder.iterdir()):
                folder.rmdir()


def check_keep(keep: int | None) -> None:
    """Check how many versions are to be kept.

    Raises:
        SettingsError: fewer than one.
    """
    if keep is not None and keep < 1:
        raise SettingsError(f"--keep is {keep}; expected at least 1")


def _runtime(target: Target) -> _Runtime:
    if target not in _RUNTIMES:
        raise SettingsError(f"target is {target!r}, expected one of {', '.join(get_args(Target))}")
    return _RUNTIMES[target]


def _tensor(tensor: TensorSpec) -> dict[str, object]:
    # Triton adds the batch by itself where max_batch_size is above 0.
    return {
        "name": tensor.name,
        "data_type": _DTYPES[tensor.dtype],
        "dims": tensor.shape[1:],
    }


def _batch_sizes(max_batch_size: int) -> list[int]:
    """Powers of two up to the maximum, and the maximum."""
    powers = {1 << exponent for exponent in range(max_batch_size.bit_length())}
    return sorted(powers | {max_batch_size})


def _capture_cuda_graphs(config: triton.ModelConfig, manifest: Manifest) -> None:
    cuda = config.optimization.cuda
    cuda.graphs = True
    for batch_size in _batch_sizes(manifest.max_batch_size):
        graph = cuda.graph_spec.add(batch_size=batch_size)
        for tensor in manifest.inputs:
            graph.input[tensor.name].dim.extend(tensor.shape[1:])


def _warm_up(config: triton.ModelConfig, manifest: Manifest, batch_size: int) -> None:
    sample = config.model_warmup.add(name=f"batch_{batch_size}", batch_size=batch_size, count=1)
    for tensor in manifest.inputs:
        data = sample.inputs[tensor.name]
        data.data_type = _DTYPES[tensor.dtype]
        data.dims.extend(tensor.shape[1:])
        data.random_data = True


def _select_artefact(
    manifest: Manifest, runtime: _Runtime, target: Target, bundle: Path
) -> Artefact:
    for precision in runtime.precisions:
        for artefact in manifest.artefacts:
            if (artefact.format, artefact.precision) == (runtime.format, precision):
                return artefact
    found = ", ".join(f"{a.file} ({a.format}, {a.precision})" for a in manifest.artefacts)
    raise BundleError(
        f"target {target} needs an artefact in {runtime.format} with precision "
        f"{' or '.join(runtime.precisions)}, but {bundle} has only {found}. {runtime.missing}"
    )


def _versions(folder: Path) -> list[int]:
    # As Triton reads them: a number without leading zeros. A file takes its number, too.
    names = (path.name for path in folder.iterdir())
    return sorted(int(name) for name in names if name.isdecimal() and name[0] != "0")


def _serves(version: Path, runtime: _Runtime, artefact: Artefact) -> bool:
    model = version / runtime.model_file
    return model.is_file() and sha256_of(model) == artefact.sha256


def _prune(folder: Path, staging: Path, keep: int, served: set[int]) -> None:
    """Delete the oldest versions; each vanishes at once, whole, before its files do."""
    for version in _versions(folder)[:-keep]:
        if version not in served:
            pruned = (folder / str(version)).rename(staging / f"pruned-{version}")
            shutil.rmtree(pruned, ignore_errors=True)


def _stage_version(source: Path, destination: Path) -> None:
    destination.parent.mkdir()
    shutil.copyfile(source, destination)
    # On the disk before the folder is renamed: a machine that stops here leaves no empty model.
    with destination.open("rb+") as file:
        os.fsync(file.fileno())
