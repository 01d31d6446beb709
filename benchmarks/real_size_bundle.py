"""Writes a bundle of the real-size model with random weights, for the benchmarks of serving.

It has the float32 and the float16 graph and no gate behind them: random weights have no accuracy
to lose. Serve it with a named precision and provider.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import tyro

from benchmarks.export_gpu_variants import FORMS
from benchmarks.export_gpu_worker import Failed, opset_of, write_graphs
from benchmarks.real_size_model import NUM_CLASSES, draw_tiles
from export.errors import GraphError
from export.manifest import MIN_WARM_UP_AGREEMENT, MODEL_FILE, WARM_UP_FILE
from serve.contract import cuda
from serve.contract.errors import BackendUnavailableError
from serve.contract.manifest import (
    Artefact,
    Manifest,
    Parity,
    Proof,
    TissueClass,
    WarmUp,
    interface,
    sha256_of,
)
from train.settings import ModelSettings

_FILES = {"fp32": MODEL_FILE, "fp16": "model.fp16.onnx"}
_MPP = 0.5


@dataclass(frozen=True, kw_only=True)
class RealSizeBundle:
    """Write the bundle."""

    out: Path
    """Folder of the bundle."""
    graphs: Path
    """Folder of the graphs, which `benchmarks.export_gpu --graphs` takes too."""
    form: str = "chunked"
    """How attention is written: chunked, as in every bundle by default, or another of FORMS."""
    max_batch_size: int = 8
    model: ModelSettings = field(default_factory=ModelSettings)

    def write(self) -> Manifest:
        """Export what is missing, and write the bundle.

        Raises:
            GraphError: the form is unknown, or the model cannot be exported.
        """
        if self.form not in FORMS:
            raise GraphError(f"unknown form {self.form!r}; expected one of {', '.join(FORMS)}")
        self.graphs.mkdir(parents=True, exist_ok=True)
        written = write_graphs(self.model, self.graphs, self.form)
        if isinstance(written, Failed):
            raise GraphError(f"the model cannot be exported: {written.why}")
        self.out.mkdir(parents=True, exist_ok=True)
        for precision, name in _FILES.items():
            shutil.copyfile(self.graphs / f"{self.form}.{precision}.onnx", self.out / name)
        tile = self.model.tile_size_px
        inputs, outputs = interface(tile, NUM_CLASSES)
        manifest = Manifest(
            name="segmenter",
            version="random",
            classes=tuple(
                TissueClass(name=f"Class {index}", color=f"#{index:02x}4080")
                for index in range(1, NUM_CLASSES + 1)
            ),
            mpp=self.model.mpp or _MPP,
            tile_size_px=tile,
            max_batch_size=self.max_batch_size,
            opset=opset_of(self.form),
            inputs=inputs,
            outputs=outputs,
            class_attention_bias=(0.0,) * NUM_CLASSES,
            checkpoint_sha256="0" * 64,
            artefacts=tuple(self._artefact(precision) for precision in _FILES),
            warm_up=self._warm_up(tile),
        )
        manifest.write(self.out)
        return manifest

    def _artefact(self, precision: str) -> Artefact:
        file = self.out / _FILES[precision]
        parity = Parity(num_tiles=1, label_agreement=1.0)
        return Artefact(
            file=file.name,
            format="onnx",
            precision=precision,
            sha256=sha256_of(file),
            parity=parity,
            proofs=(Proof(provider="cpu", parity=parity),),
        )

    def _warm_up(self, tile: int) -> WarmUp:
        """A tile and the labels that the float32 graph gives it, here on the GPU or the CPU."""
        model = self.out / MODEL_FILE
        try:
            session = cuda.open_session(model, settings={"use_tf32": "0"})
        except BackendUnavailableError:
            session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        image = draw_tiles(1, tile)
        (labels,) = session.run(["labels"], {"image": image})
        np.savez_compressed(self.out / WARM_UP_FILE, image=image[0], labels=labels[0])
        return WarmUp(
            file=WARM_UP_FILE,
            sha256=sha256_of(self.out / WARM_UP_FILE),
            # Where random weights nearly tie, rounding decides the label.
            min_agreement=MIN_WARM_UP_AGREEMENT - 0.08,
        )


if __name__ == "__main__":
    bundle = tyro.cli(RealSizeBundle, config=(tyro.conf.OmitArgPrefixes,))
    bundle.write()
    print(f"wrote {bundle.out}")
