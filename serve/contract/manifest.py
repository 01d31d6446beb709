"""The bundle's contract: what `export` writes and `serve` reads.

A bundle is a folder with `manifest.json` and the files that it names. The manifest says what the
model is called, which classes it knows, what goes in and comes out, and the SHA-256 of every file.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, ValidationError, model_validator

from serve.contract.certificate import ScaleCertificate
from serve.contract.errors import BundleError
from serve.contract.json_text import parse_json
from serve.contract.refusal import first_problem
from serve.contract.strict import Strict
from serve.contract.unchanged import while_unchanged

SCHEMA_VERSION: Final = 1
MANIFEST_FILE = "manifest.json"
MAX_BATCH_SIZE = 1024
"""Most tiles of one batch: Triton's configuration has warm-up samples up to it."""
LOW_RES_STRIDE = 4
"""Pixels of the tile for one pixel of `low_res_probabilities`, along each axis."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
HexColor = Annotated[str, Field(pattern=r"^#[0-9a-f]{6}$")]


class TissueClass(Strict):
    """A class: its name, and the colour that it is painted in."""

    name: str = Field(min_length=1)
    color: HexColor

    @property
    def rgb(self) -> tuple[int, ...]:
        """Red, green and blue of the colour, 0 to 255."""
        return tuple(bytes.fromhex(self.color[1:]))


class TensorSpec(Strict):
    """One input or output of the model; the batch is -1 in `shape`."""

    name: str
    dtype: Literal["uint8", "float32"]
    shape: tuple[int, ...]


class Parity(Strict):
    """How far an artefact's answers are from torch in float32, as measured at export."""

    num_tiles: int = Field(gt=0)
    label_agreement: float = Field(ge=0, le=1)
    """Share of pixels with the same label."""
    max_logit_difference: float | None = Field(default=None, ge=0)
    """None where the artefact gives no logits, as a TensorRT plan."""


class TensorRTBuild(Strict):
    """Where a TensorRT plan was built: it runs only on the same version and compute capability."""

    version: str
    compute_capability: str
    container_image: str | None = None


class Proof(Strict):
    """A runtime that passed the export's gate with one file, and the processor that it ran on.

    Runtimes choose their kernels by the processor, so what passed on one kind may differ on
    another: serving checks itself on a kind without a proof (see `serve.inference.providers`).
    """

    provider: Literal["cpu", "openvino"]
    """ONNX Runtime's CPU provider, or OpenVINO."""
    processor: str | None = None
    """`serve.contract.machine.Processor.kind`; None in bundles from before it was recorded."""
    runtime: str | None = None
    """Name and version, such as `OpenVINO 2026.4.1`; None in bundles from before."""
    parity: Parity


class Artefact(Strict):
    """One form of the model in the bundle."""

    file: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    format: Literal["onnx", "tensorrt_plan"]
    precision: Literal["fp32", "fp16", "bf16", "int8"]
    sha256: Sha256
    parity: Parity
    min_agreement: float | None = Field(default=None, ge=0, le=1)
    """Share of torch's labels that the gate required of this precision."""
    proofs: tuple[Proof, ...] = ()
    """Runtimes that may serve an ONNX file, since they passed the gate with it."""
    tensorrt: TensorRTBuild | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_older(cls, content: Any) -> Any:
        """Read a bundle from before `proofs`, in which `openvino` held OpenVINO's parity."""
        if not isinstance(content, dict) or "proofs" in content or content.get("format") != "onnx":
            return content
        content = dict(content)
        measured = {"openvino": content.pop("openvino", None)}
        if content.get("precision") != "bf16":  # ONNX Runtime's CPU provider does not run it
            measured["cpu"] = content.get("parity")
        content["proofs"] = tuple(
            {"provider": provider, "processor": None, "runtime": None, "parity": parity}
            for provider, parity in measured.items()
            if parity is not None
        )
        return content

    def passed_with(self, provider: str) -> bool:
        """Whether this provider passed the gate with this file, on any processor."""
        return any(proof.provider == provider for proof in self.proofs)

    def is_proven(self, provider: str, processor: str) -> bool:
        """Whether this provider passed the gate with this file on this kind of processor."""
        return any((p.provider, p.processor) == (provider, processor) for p in self.proofs)


class WarmUp(Strict):
    """An image and the labels that the model gave it at export; a server compares them."""

    file: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """npz with `image` (T, T, 3) uint8 RGB and `labels` (T, T) uint8."""
    sha256: Sha256
    min_agreement: float = Field(ge=0, le=1)
    """Share of the labels that must be the same; below 1, since runtimes round differently."""


class Manifest(Strict):
    """Everything that a reader of the bundle needs to know about the model.

    Labels are uint8: 0 is unlabelled and never predicted, 1..C are `classes` in their order.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    version: str = Field(min_length=1)
    classes: tuple[TissueClass, ...] = Field(min_length=2, max_length=254)
    mpp: float | None = Field(
        gt=0, allow_inf_nan=False, description="um per pixel that the model was trained at"
    )
    tile_size_px: int = Field(gt=0, multiple_of=LOW_RES_STRIDE)
    max_batch_size: int = Field(gt=0, le=MAX_BATCH_SIZE)
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    class_attention_bias: tuple[float, ...] = Field(description="the folded bias, one per class")
    predicts_iou: bool = Field(
        default=True, description="whether the head of `iou_scores` was trained; else it is noise"
    )
    label_note: str = Field(
        default="",
        description="how the labels of resampled images differ from those of the software that "
        "trained the model; empty where they do not",
    )
    checkpoint_sha256: Sha256
    artefacts: tuple[Artefact, ...] = Field(min_length=1)
    warm_up: WarmUp | None = None
    scale_certificate: ScaleCertificate | None = Field(
        default=None,
        description="what other um per pixel than the model's cost; null where not measured",
    )

    @model_validator(mode="after")
    def _check_agreement(self) -> Self:
        inputs, outputs = interface(self.tile_size_px, len(self.classes))
        if (self.inputs, self.outputs) != (inputs, outputs):
            raise ValueError(
                f"inputs and outputs are {self.inputs} and {self.outputs}, expected for "
                f"{len(self.classes)} classes and {self.tile_size_px} px: {inputs} and {outputs}"
            )
        names = [entry.name for entry in self.classes]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"classes has {twice[0]!r} twice, expected each name once")
        if len(self.class_attention_bias) != len(self.classes):
            raise ValueError(
                f"class_attention_bias has {len(self.class_attention_bias)} values, "
                f"expected one for each of the {len(self.classes)} classes"
            )
        certificate = self.scale_certificate
        if certificate is not None and len(certificate.points[0].dice) != len(self.classes):
            raise ValueError(
                f"scale_certificate has Dice of {len(certificate.points[0].dice)} classes, "
                f"expected {len(self.classes)}"
            )
        return self

    def scale_warning(self, image_mpp: float | None) -> str | None:
        """What to tell of an image of that um per pixel; None where there is nothing to tell."""
        if self.scale_certificate is None or self.mpp is None or image_mpp is None:
            return None
        names = [entry.name for entry in self.classes]
        return self.scale_certificate.warning(image_mpp, self.mpp, names)

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`."""
        (folder / MANIFEST_FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def interface(
    tile_size_px: int, num_classes: int
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The model's inputs and outputs, the same in ONNX Runtime, TensorRT and Triton.

    `image`: RGB in [0, 255]. `labels`: 1..C. `confidence`: softmax probability of that label,
    255 = 1.0. `low_res_probabilities`: softmax at the decoder's resolution, 255 = 1.0.
    `iou_scores`: the IoU that the model predicts for each class's mask.
    """
    side, low = tile_size_px, tile_size_px // LOW_RES_STRIDE
    inputs = (TensorSpec(name="image", dtype="uint8", shape=(-1, side, side, 3)),)
    outputs = (
        TensorSpec(name="labels", dtype="uint8", shape=(-1, side, side)),
        TensorSpec(name="confidence", dtype="uint8", shape=(-1, side, side)),
        TensorSpec(name="low_res_probabilities", dtype="uint8", shape=(-1, num_classes, low, low)),
        TensorSpec(name="iou_scores", dtype="float32", shape=(-1, num_classes)),
    )
    return inputs, outputs


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bundle(folder: Path) -> Manifest:
    """Read a bundle's manifest and check every file that it names.

    A bundle that is replaced meanwhile is read again.

    Raises:
        BundleError: the folder, the manifest or a file is missing, unknown or damaged.
        BackendUnavailableError: the files change again and again.
    """
    return while_unchanged(folder, lambda: _read_bundle(folder))


def _read_bundle(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise BundleError(
            f"no bundle at {folder}: {MANIFEST_FILE} is missing. Write one with `make export`.",
            code="bundle_missing",
        )
    try:
        manifest = Manifest.model_validate(parse_json(path.read_text(encoding="utf-8")))
    except ValueError as error:
        problem = (
            first_problem(error, "manifest")
            if isinstance(error, ValidationError)
            else str(error).splitlines()[0]
        )
        raise BundleError(
            f"{path} does not follow schema version {SCHEMA_VERSION}: {problem}. "
            "Export the checkpoint again with this version of FocalPath."
        ) from error
    named_files: list[Artefact | WarmUp] = [*manifest.artefacts]
    if manifest.warm_up is not None:
        named_files.append(manifest.warm_up)
    for named in named_files:
        file = folder / named.file
        if not file.is_file():
            raise BundleError(
                f"{file} is named in the manifest but missing. Copy the whole bundle.",
                code="bundle_incomplete",
            )
        found = sha256_of(file)
        if found != named.sha256:
            raise BundleError(
                f"{file} is damaged: its SHA-256 is {found}, the manifest expects "
                f"{named.sha256}. Copy the bundle again.",
                code="bundle_damaged",
            )
    return manifest
