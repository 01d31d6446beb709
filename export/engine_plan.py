"""`engine_plan.json`: all that a TensorRT builder needs to know, decided at the export.

Building is then only an execution, on another machine: `python -m export engine BUNDLE`.
"""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve.errors import BundleError, FocalPathError
from serve.manifest import Artefact, Manifest, Sha256

ENGINE_PLAN_FILE = "engine_plan.json"
RELEASE: Final = "26.06"
"""NVIDIA's monthly release; all of its containers hold the same TensorRT, here 11.0."""
A100: Final = "8.0"
BUNDLE_MOUNT: Final = "/bundle"
DATA_MOUNT: Final = "/data"
SOURCE_MOUNT: Final = "/focalpath"

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
Version = Annotated[str, Field(pattern=r"^\d+(\.\d+)*$")]

_SOURCE = Path(__file__).resolve().parents[1]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BatchProfile(_Strict):
    """The one optimization profile: the batches that a plan takes, and which it is tuned for."""

    min: Literal[1] = 1
    opt: int
    max: int

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"opt is {self.opt}, expected {self.min} to max, {self.max}")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batches to measure, each once."""
        return tuple(sorted({self.min, self.opt, self.max}))


class EnginePlan(_Strict):
    """How to make a TensorRT plan from one ONNX file of the bundle.

    The network is strongly typed: its precision lives in the ONNX graph, and no flag changes it.
    """

    schema_version: Literal[1] = 1
    onnx_file: FileName
    onnx_sha256: Sha256
    plan_file: FileName = "model.plan"
    precision: Literal["fp32", "fp16", "bf16"]
    image_size_px: int = Field(gt=0)
    batch: BatchProfile
    workspace_bytes: int = Field(gt=0)
    builder_optimization_level: int = Field(ge=0, le=5)
    allow_tf32: bool
    """Whether float32 products may round their factors to 10 bits of mantissa, as fp16 has."""
    hardware_compatibility_level: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    timing_cache_file: FileName = "timing.cache"
    tensorrt_min: Version = "10.16"
    tensorrt_below: Version = "12"
    compute_capability: Version = A100
    container_image: str
    """The image to build in: TensorRT with its Python bindings."""
    serving_image: str
    """The image whose TensorRT has to be the same, as a plan runs on no other version."""
    min_label_agreement: float = Field(ge=0, le=1)
    """The gate: the share of pixels that must have ONNX Runtime's label."""

    def write(self, folder: Path) -> Path:
        """Write `engine_plan.json` into `folder` and return its path."""
        path = folder / ENGINE_PLAN_FILE
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return path

    def takes_version(self, version: str) -> bool:
        """Tell whether this version of TensorRT, as `11.0.0.114`, is in the plan's range."""
        low, high = _numbers(self.tensorrt_min), _numbers(self.tensorrt_below)
        return low <= _numbers(version) < high


def plan_for(
    manifest: Manifest,
    artefact: Artefact,
    *,
    opt_batch_size: int | None = None,
    workspace_bytes: int = 8 << 30,
    builder_optimization_level: int = 4,
    compute_capability: str = A100,
    release: str = RELEASE,
    min_label_agreement: float = 0.995,
) -> EnginePlan:
    """Decide how `artefact`, an ONNX file of the manifest's bundle, becomes a TensorRT plan.

    TF32 is off for a float32 graph, which is the reference, and on for the float32 parts of a half
    precision one: they are there for their range, and TF32 has float32's.

    Raises:
        FocalPathError: the artefact is not an ONNX graph in floating point.
    """
    if artefact.format != "onnx" or artefact.precision == "int8":
        raise FocalPathError(
            f"{artefact.file} is {artefact.format} in {artefact.precision}; TensorRT builds from "
            "onnx in fp32, fp16 or bf16. Choose another artefact of the bundle."
        )
    largest = manifest.max_batch_size
    return EnginePlan(
        onnx_file=artefact.file,
        onnx_sha256=artefact.sha256,
        precision=artefact.precision,
        image_size_px=manifest.tile_size_px,
        batch=BatchProfile(opt=opt_batch_size or max(1, largest // 2), max=largest),
        workspace_bytes=workspace_bytes,
        builder_optimization_level=builder_optimization_level,
        allow_tf32=artefact.precision != "fp32",
        compute_capability=compute_capability,
        container_image=f"nvcr.io/nvidia/tensorrt:{release}-py3",
        serving_image=f"nvcr.io/nvidia/tritonserver:{release}-py3",
        min_label_agreement=min_label_agreement,
    )


def read_engine_plan(bundle: Path) -> EnginePlan:
    """Read a bundle's `engine_plan.json`.

    Raises:
        BundleError: it is missing, or of another version.
    """
    path = bundle / ENGINE_PLAN_FILE
    if not path.is_file():
        raise BundleError(
            f"{path} is missing: it says how to build the plan. Export the checkpoint again."
        )
    try:
        return EnginePlan.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValidationError, ValueError) as error:
        raise BundleError(
            f"{path} cannot be followed: {error}. Export the checkpoint again with this version "
            "of FocalPath."
        ) from error


def container_command(
    plan: EnginePlan, bundle: Path, *, data: Path | None = None, num_tiles: int | None = None
) -> Sequence[str]:
    """The command that builds the plan in its container, on a machine with the GPU.

    Args:
        plan: how to build.
        bundle: the bundle's folder, which gets the plan.
        data: data set to compare on; by default drawn tissue.
        num_tiles: tiles to compare on; by default as many as the builder takes.
    """
    build = f"python3 -m export engine {BUNDLE_MOUNT}"
    volumes = ["--volume", f"{bundle.resolve()}:{BUNDLE_MOUNT}"]
    if data is not None:
        # Under its own name, which the report tells.
        mount = f"{DATA_MOUNT}/{data.resolve().name}"
        volumes += ["--volume", f"{data.resolve()}:{mount}:ro"]
        build += f" --validate {shlex.quote(mount)}"
    if num_tiles is not None:
        build += f" --num-tiles {num_tiles}"
    script = f'python3 -m pip install --quiet "{SOURCE_MOUNT}[export]" && {build}'
    return (
        *("docker", "run", "--rm", "--gpus", "all"),
        *("--env", "PIP_BREAK_SYSTEM_PACKAGES=1"),
        *("--volume", f"{_SOURCE}:{SOURCE_MOUNT}:ro"),
        *volumes,
        *("--workdir", SOURCE_MOUNT),
        plan.container_image,
        *("bash", "-c", script),
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
