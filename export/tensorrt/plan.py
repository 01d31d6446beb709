"""`engine_plan.json`: all that a TensorRT builder needs to know, decided during the export.

`python -m export engine BUNDLE` then follows it, possibly on another machine.
"""

from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, ValidationError, model_validator

from export.errors import BundleError, SettingsError
from export.gate.schema import Tolerances
from serve.contract.json_text import parse_json
from serve.contract.manifest import Artefact, Manifest, Sha256, TensorRTBuild
from serve.contract.refusal import first_problem
from serve.contract.strict import Strict

ENGINE_PLAN_FILE = "engine_plan.json"
RELEASE: Final = "26.06"
"""NVIDIA's monthly release. All of its containers have the same TensorRT."""
TENSORRT: Final = "11.0"
"""TensorRT of that release. Published logs of its image show 11.0.0.114; each build checks it."""
A100: Final = "8.0"

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
MajorMinor = Annotated[str, Field(pattern=r"^\d+\.\d+$")]

_OLDEST, _BELOW = (10, 16), (12, 0)
"""Range of TensorRT versions that the builder's code was checked with: from, and below."""


class BatchProfile(Strict):
    """The one optimization profile: the batch sizes that a plan accepts, and the tuned one."""

    min: Literal[1] = 1
    opt: int
    max: int

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"opt is {self.opt}, expected {self.min} to {self.max} (max)")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """The distinct batch sizes to measure."""
        return tuple(sorted({self.min, self.opt, self.max}))


class EnginePlan(Strict):
    """How to build a TensorRT plan from one ONNX file of the bundle.

    The network is strongly typed: the ONNX graph sets the precision, and no flag changes it.
    """

    schema_version: Literal[2] = 2
    onnx_file: FileName
    onnx_sha256: Sha256
    plan_file: FileName = "model.plan"
    precision: Literal["fp32", "fp16", "bf16"]
    image_size_px: int = Field(gt=0)
    batch: BatchProfile
    workspace_bytes: int = Field(default=8 << 30, gt=0)
    builder_optimization_level: int = Field(default=4, ge=0, le=5)
    allow_tf32: bool
    """Whether float32 products may round their factors to 10 bits of mantissa, as in fp16."""
    hardware_compatibility_level: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    timing_cache_file: FileName = "timing.cache"
    tensorrt_version: MajorMinor = TENSORRT
    """Major and minor version of TensorRT in both images. A plan runs on no other version."""
    compute_capability: MajorMinor = A100
    container_image: str
    """The image to build in: TensorRT with its Python bindings."""
    serving_image: str
    """The image to serve from, with the TensorRT version of `container_image`."""
    tolerances: Tolerances = Tolerances()
    """The gate's largest differences from ONNX Runtime, as set for the export."""
    max_byte_difference: int = Field(default=32, gt=0, le=255)
    """The gate's largest difference of a confidence or probability, where 255 is 1.0."""
    obstacles: tuple[str, ...] = ()
    """Why TensorRT's parser would refuse the graph. With any of them, no engine is built."""

    @model_validator(mode="after")
    def _check_version(self) -> Self:
        if not _OLDEST <= _major_minor(self.tensorrt_version) < _BELOW:
            raise ValueError(
                f"the builder does not support TensorRT {self.tensorrt_version}; expected 10.16 or "
                "later, below 12"
            )
        return self

    def write(self, folder: Path) -> Path:
        """Write `engine_plan.json` into `folder` and return its path."""
        path = folder / ENGINE_PLAN_FILE
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return path

    def takes_version(self, version: str) -> bool:
        """Return whether a TensorRT version, such as `11.0.0.114`, is the planned one."""
        return version.split(".")[:2] == self.tensorrt_version.split(".")

    def for_server(
        self, *, tensorrt_version: str | None = None, compute_capability: str | None = None
    ) -> "EnginePlan":
        """Copy the plan for another server; None keeps the planned value.

        Raises:
            SettingsError: a number cannot be read, or the builder does not support the version.
        """
        changes = {
            "tensorrt_version": tensorrt_version or self.tensorrt_version,
            "compute_capability": compute_capability or self.compute_capability,
        }
        try:
            return EnginePlan.model_validate({**self.model_dump(), **changes})
        except ValidationError as error:
            raise SettingsError(
                f"{first_problem(error)}. Give both as major.minor, such as 8.0."
            ) from error

    def serving_mismatch(self, build: TensorRTBuild) -> str | None:
        """The reason why the planned server cannot load a plan, or None if it can."""
        if build.compute_capability != self.compute_capability:
            return (
                f"{self.plan_file} was built for compute capability {build.compute_capability} and "
                f"runs on no other GPU; {ENGINE_PLAN_FILE} plans {self.compute_capability} (an "
                "A100 has 8.0). Serve it on that kind of GPU, or build it again."
            )
        if self.takes_version(build.version):
            return None
        return (
            f"{self.plan_file} was built with TensorRT {build.version} and loads in no other "
            f"version, but {self.serving_image} has {self.tensorrt_version}. Serve it from an "
            f"image with {build.version}, or build it again in {self.container_image}."
        )


def plan_for(
    manifest: Manifest,
    artefact: Artefact,
    *,
    tolerances: Tolerances | None = None,
    obstacles: tuple[str, ...] = (),
) -> EnginePlan:
    """Decide how `artefact`, an ONNX file of the manifest's bundle, becomes a TensorRT plan.

    TF32 is off for a float32 graph, which is the reference. It is on for the float32 parts of a
    half precision graph: they need the range of float32, which TF32 has.

    On the synthetic model, rounding each node to fp16 changed no confidence or probability by more
    than 1 of 255; bf16 changed them by at most 10. The limit of 32 leaves room for larger models,
    whose labels and mean confidence have their own limits.

    Raises:
        SettingsError: the artefact is not a floating point ONNX graph.
    """
    if artefact.format != "onnx" or artefact.precision == "int8":
        raise SettingsError(
            f"{artefact.file} is {artefact.format} in {artefact.precision}; TensorRT builds from "
            "onnx in fp32, fp16 or bf16. Choose another artefact of the bundle."
        )
    largest = manifest.max_batch_size
    return EnginePlan(
        onnx_file=artefact.file,
        onnx_sha256=artefact.sha256,
        precision=artefact.precision,
        image_size_px=manifest.tile_size_px,
        batch=BatchProfile(opt=max(1, largest // 2), max=largest),
        allow_tf32=artefact.precision != "fp32",
        container_image=f"nvcr.io/nvidia/tensorrt:{RELEASE}-py3",
        serving_image=f"nvcr.io/nvidia/tritonserver:{RELEASE}-py3",
        tolerances=tolerances or Tolerances(),
        max_byte_difference=2 if artefact.precision == "fp32" else 32,
        obstacles=obstacles,
    )


def read_engine_plan(bundle: Path) -> EnginePlan:
    """Read a bundle's `engine_plan.json`.

    Raises:
        BundleError: the file is missing, damaged or of another version.
    """
    path = bundle / ENGINE_PLAN_FILE
    if not path.is_file():
        raise BundleError(
            f"{path} is missing; it specifies the plan to build. Export the checkpoint again."
        )
    try:
        return EnginePlan.model_validate(parse_json(path.read_text(encoding="utf-8")))
    except ValueError as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else error
        raise BundleError(
            f"{path} is not valid: {problem}. Export the checkpoint again with this version of "
            "FocalPath."
        ) from error


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
