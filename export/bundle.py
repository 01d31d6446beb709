"""The bundle's folder: everything that serving needs, whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
from rich.console import Console

from export.deployable import Deployable
from export.onnx_graph import PARITY_OUTPUT, drop_output, export_onnx
from export.parity import Images, Tolerance, check_parity, measure_parity, parity_images
from serve.manifest import Artefact, Manifest, TissueClass, WarmUp, interface, sha256_of
from train.checkpoint import WEIGHTS_FILE, CheckpointCard, load_checkpoint

MODEL_FILE = "model.onnx"
WARM_UP_FILE = "warm_up.npz"
MIN_WARM_UP_AGREEMENT = 0.98
"""Share of labels that a server has to agree on: other hardware and precisions round otherwise."""
_DIGITS_OF_VERSION = 12


@dataclass(frozen=True, kw_only=True)
class BundleSettings:
    """What a bundle is called and how it is checked."""

    name: str = "segmenter"
    """The model's name, also in Triton."""
    model_version: str | None = None
    """The model's version; by default the first digits of the checkpoint's SHA-256."""
    opset: int = 20
    """ONNX opset of the graph."""
    max_batch_size: int = 8
    """Largest batch that a server may send."""
    validate: Path | None = None
    """Data set to compare with torch on; by default drawn tissue."""
    num_parity_tiles: int = 8
    """Tiles to compare on."""
    tolerance: Tolerance = field(default_factory=Tolerance)


def write_bundle(checkpoint: Path, bundle: Path, settings: BundleSettings) -> Manifest:
    """Export a checkpoint and prove that it answers as torch does.

    Raises:
        FocalPathError: the checkpoint cannot be used, or parity is out of tolerance. A bundle
            that was there before stays as it was.
    """
    console = Console()
    segmenter, card = load_checkpoint(checkpoint)
    weights = checkpoint / WEIGHTS_FILE if checkpoint.is_dir() else checkpoint
    tile_size_px = card.settings.model.tile_size_px
    images = parity_images(settings.validate, tile_size_px, settings.num_parity_tiles)
    deployable = Deployable(segmenter).eval()
    with _replaced_whole(bundle) as staging:
        whole = staging / "with_logits.onnx"
        console.print(f"Exporting {weights} to ONNX, opset {settings.opset}")
        export_onnx(deployable, whole, opset=settings.opset)
        console.print(f"Comparing with torch on {len(images)} tiles")
        parity = measure_parity(deployable, whole, images)
        check_parity(parity, settings.tolerance, MODEL_FILE)
        drop_output(whole, staging / MODEL_FILE, PARITY_OUTPUT)
        whole.unlink()
        artefact = Artefact(
            file=MODEL_FILE,
            format="onnx",
            precision="fp32",
            sha256=sha256_of(staging / MODEL_FILE),
            parity=parity,
        )
        warm_up = _write_warm_up(staging, images[:1])
        manifest = _manifest(settings, card, sha256_of(weights), (artefact,), warm_up)
        manifest.write(staging)
    return manifest


def _manifest(
    settings: BundleSettings,
    card: CheckpointCard,
    checkpoint_sha256: str,
    artefacts: tuple[Artefact, ...],
    warm_up: WarmUp,
) -> Manifest:
    tile_size_px = card.settings.model.tile_size_px
    inputs, outputs = interface(tile_size_px, len(card.classes))
    return Manifest(
        name=settings.name,
        version=settings.model_version or checkpoint_sha256[:_DIGITS_OF_VERSION],
        classes=tuple(TissueClass(name=c.name, color=c.color.lower()) for c in card.classes),
        mpp=card.mpp,
        tile_size_px=tile_size_px,
        max_batch_size=settings.max_batch_size,
        opset=settings.opset,
        inputs=inputs,
        outputs=outputs,
        class_attention_bias=card.class_attention_bias,
        checkpoint_sha256=checkpoint_sha256,
        artefacts=artefacts,
        warm_up=warm_up,
    )


def _write_warm_up(folder: Path, images: Images) -> WarmUp:
    """Write the first of `images` with its labels, for a server to compare with its own."""
    session = onnxruntime.InferenceSession(folder / MODEL_FILE, providers=["CPUExecutionProvider"])
    (labels,) = session.run(["labels"], {"image": images})
    np.savez_compressed(folder / WARM_UP_FILE, image=images[0], labels=labels[0])
    return WarmUp(
        file=WARM_UP_FILE,
        sha256=sha256_of(folder / WARM_UP_FILE),
        min_agreement=MIN_WARM_UP_AGREEMENT,
    )


@contextmanager
def _replaced_whole(folder: Path) -> Iterator[Path]:
    """Give a folder to fill that takes the place of `folder` at the end, or vanishes on failure."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    staging.chmod(0o755)
    try:
        yield staging
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, old)
            os.replace(staging, folder)
            shutil.rmtree(old)
        else:
            os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
