"""`engine_report.json`: measurements of a TensorRT plan on the machine that built it."""

from collections.abc import Iterator

from export.gate.schema import ArtefactParity
from serve.contract.markdown import markdown_table
from serve.contract.strict import Strict

CARD_HEADING = "## TensorRT engine"


class Latency(Strict):
    """Latency of one call in milliseconds, with its data already on the GPU."""

    p50_ms: float
    p99_ms: float


class BatchReport(Strict):
    """Measurements at one batch size of the profile."""

    batch_size: int
    parity: ArtefactParity
    """Comparison with ONNX Runtime on the reference file."""
    latency: Latency
    cuda_graph_latency: Latency


class EngineReport(Strict):
    """Measurements of the plan on the machine that built it."""

    gpu: str
    compute_capability: str
    tensorrt_version: str
    container_image: str | None
    """NVIDIA's image of the build, or None outside a container."""
    plan_bytes: int
    reference_file: str
    """The ONNX file that ONNX Runtime ran."""
    tiles: str
    num_tiles: int
    has_masks: bool
    """Whether scores per class compare with masks; otherwise, with ONNX Runtime's labels."""
    num_layers: int
    num_attention: int
    """Number of attentions in the ONNX graph."""
    num_fused_attention: int
    """Number of the plan's layers that compute a whole attention in one kernel."""
    batches: tuple[BatchReport, ...]

    @property
    def label_agreement(self) -> float:
        """The lowest agreement of all batch sizes."""
        return min(batch.parity.label_agreement for batch in self.batches)

    def summary(self) -> Iterator[str]:
        """The main results, one line each."""
        yield (
            f"TensorRT {self.tensorrt_version} on {self.gpu}: agrees with ONNX Runtime on "
            f"{self.label_agreement:.4%} of the pixels of {self.tiles}"
        )
        for batch in self.batches:
            plain, graph = batch.latency, batch.cuda_graph_latency
            yield (
                f"batch {batch.batch_size}: p50 {plain.p50_ms:.2f} ms, p99 {plain.p99_ms:.2f} ms; "
                f"as a CUDA graph {graph.p50_ms:.2f} and {graph.p99_ms:.2f} ms"
            )
        yield f"fused attentions: {self.num_fused_attention} of {self.num_attention}"
        if self.num_attention and not self.num_fused_attention:
            yield (
                "warning: TensorRT fused no attention, so the plan is slower than possible. Export "
                "with --opset 23 to give it the Attention operator."
            )

    def card(self) -> Iterator[str]:
        """The section of `MODEL_CARD.md`."""
        lost = max(
            (entry for batch in self.batches for entry in batch.parity.classes),
            key=lambda entry: entry.dice_loss,
        )
        against = "the masks" if self.has_masks else "ONNX Runtime's labels"
        yield CARD_HEADING
        place = self.container_image or "outside a container"
        yield (
            f"Built with TensorRT {self.tensorrt_version} on {self.gpu} (compute capability "
            f"{self.compute_capability}), {place}. It loads only in that version of TensorRT. On "
            f"{self.tiles}, against `{self.reference_file}` in ONNX Runtime, the worst batch size "
            f"gives the same label on {self.label_agreement:.4%} of the pixels and loses at most "
            f"{100 * max(lost.dice_loss, 0.0):.3f} Dice points per class ({lost.name}, against "
            f"{against}). {self.num_fused_attention} of {self.num_attention} attentions are fused."
        )
        times = [(batch.latency, batch.cuda_graph_latency) for batch in self.batches]
        yield markdown_table(
            ("Batch", "p50", "p99", "p50 as a CUDA graph", "p99 as a CUDA graph"),
            [
                (
                    batch.batch_size,
                    *(f"{ms:.2f} ms" for time in pair for ms in (time.p50_ms, time.p99_ms)),
                )
                for batch, pair in zip(self.batches, times, strict=True)
            ],
            align="rrrrr",
        )
