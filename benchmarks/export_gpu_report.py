"""The report of `benchmarks.export_gpu`, as JSON and as a table."""

from benchmarks.export_gpu_worker import Measured
from benchmarks.harness import packages_text
from serve.contract.markdown import markdown_table
from serve.contract.strict import Strict

GOAL = 0.5
"""Share of the peak to reach. SAM's ViT-B alone has been measured at 0.29 on an A100."""


class GpuMeasurement(Measured):
    """One variant at one batch size."""

    variant: str
    batch_size: int
    tiles_per_second: float
    """Rate of the computation alone."""
    peak_share: float | None
    """Share of the measured peak in bfloat16; only for the model of real size."""


class GpuReport(Strict):
    """The content of `benchmark_gpu.json`."""

    device: str
    versions: dict[str, str]
    model: str
    tile_size_px: int
    num_runs: int
    peak_tflops: float
    """Measured rate of a large matrix product in bfloat16."""
    skipped: dict[str, str]
    """Variants that could not run here, and why."""
    measurements: tuple[GpuMeasurement, ...]


def markdown(report: GpuReport) -> str:
    """Write the report as a table."""
    skipped = "\n".join(f"- {name} did not run: {why}" for name, why in report.skipped.items())
    text = f"""# The model on a GPU

{report.device}, {report.peak_tflops:.0f} TFLOP/s measured in bfloat16; \
{packages_text(report.versions)}.
{report.model}; tiles of {report.tile_size_px} pixels; medians of {report.num_runs} runs, \
milliseconds per batch; `first` is the first run of a batch size. Goal: {GOAL:.0%} of the peak. \
Labels and logits are compared with the first variant's. Written by `make benchmark-gpu`.

{_table(report)}

{skipped}"""
    return text.rstrip() + "\n"


def _table(report: GpuReport) -> str:
    headers = ("variant", "batch", "first", "decode", "copy", "compute", "encode", "tiles/s")
    more = ("of peak", "GPU memory", "labels", "logits", "not finite")
    rows = [
        (
            row.variant,
            row.batch_size,
            f"{row.stages.first_run_ms:.0f}",
            *(
                f"{value:.1f}"
                for value in (
                    row.stages.decode_ms,
                    row.stages.copy_ms,
                    row.stages.compute_ms,
                    row.stages.encode_ms,
                )
            ),
            f"{row.tiles_per_second:.1f}",
            "" if row.peak_share is None else f"{row.peak_share:.1%}",
            "" if row.memory_gib is None else f"{row.memory_gib:.1f} GiB",
            f"{row.label_agreement:.3%}",
            "" if row.max_logit_difference is None else f"{row.max_logit_difference:.2g}",
            "" if row.num_not_finite is None else row.num_not_finite,
        )
        for row in report.measurements
    ]
    return markdown_table((*headers, *more), rows, align="lrrrrrrrrrrrr")
