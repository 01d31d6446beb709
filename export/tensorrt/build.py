"""Runs TensorRT's builder with the settings of an `EnginePlan`.

TensorRT 10 and 11 share one path, a strongly typed network, because 11 has no precision flags.
Callers pass in the `tensorrt` module.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from export.errors import EngineError
from export.tensorrt.plan import EnginePlan
from train.files import whole_file

INPUT = "image"


def build_plan(trt: ModuleType, plan: EnginePlan, bundle: Path) -> bytes:
    """Parse the graph, configure the builder and build the plan.

    Raises:
        EngineError: the parser refuses the graph, or the build fails.
    """
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # The parser owns the weights, so it must live until the plan is built.
    network, parser = _parse(trt, logger, builder, plan, bundle / plan.onnx_file)
    config = _configure(trt, builder, plan)
    cache = bundle / plan.timing_cache_file
    _load_timing_cache(config, cache)
    with _progress(trt) as monitor:
        config.progress_monitor = monitor
        serialized = _build(builder, network, config, monitor)
    del parser
    if serialized is None:
        raise EngineError(
            f"TensorRT {trt.__version__} built no plan from {plan.onnx_file}; its log above says "
            "why. If memory ran out, lower workspace_bytes, which is "
            f"{plan.workspace_bytes} now."
        )
    _save_timing_cache(config, cache)
    return bytes(serialized)


def _build(builder: Any, network: Any, config: Any, monitor: Any) -> Any:
    # Builds in a thread: Ctrl-C and SIGTERM raise in the main thread, and an exception out of a
    # callback would abort the process.
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(int).result()  # a signal could kill a thread at its start
        try:
            return pool.submit(builder.build_serialized_network, network, config).result()
        except (KeyboardInterrupt, SystemExit):
            monitor.interrupted = True
            raise  # after TensorRT has stopped


def _parse(
    trt: ModuleType, logger: Any, builder: Any, plan: EnginePlan, onnx_file: Path
) -> tuple[Any, Any]:
    # The flag's bit differs between 10 and 11, so use its name.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_file)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        listing = "\n".join(f"  {error.node_name()}: {error.desc()}" for error in errors)
        raise EngineError(
            f"TensorRT {trt.__version__} cannot read {onnx_file.name}:\n{listing}\n"
            "It passed the export's lint, so this TensorRT is stricter than the lint's rules. "
            f"Build with TensorRT {plan.tensorrt_version}, or export again with another --opset."
        )
    return network, parser


def _configure(trt: ModuleType, builder: Any, plan: EnginePlan) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan.workspace_bytes)
    config.builder_optimization_level = plan.builder_optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.hardware_compatibility_level = getattr(
        trt.HardwareCompatibilityLevel, plan.hardware_compatibility_level.upper()
    )
    if plan.allow_tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    side, batch = plan.image_size_px, plan.batch
    shapes = [(size, side, side, 3) for size in (batch.min, batch.opt, batch.max)]
    profile.set_shape(INPUT, *shapes)
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"TensorRT refuses the optimization profile {shapes} of {INPUT}")
    return config


def _load_timing_cache(config: Any, path: Path) -> None:
    """Reuse the timings of an earlier build if this TensorRT and GPU accept them."""
    stored = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(stored)
    if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
        return
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _save_timing_cache(config: Any, path: Path) -> None:
    with whole_file(path) as partial:
        partial.write_bytes(bytes(config.get_timing_cache().serialize()))


@contextlib.contextmanager
def _progress(trt: ModuleType) -> Iterator[Any]:
    """Show the builder's phases. They nest, and TensorRT calls back from its own threads."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        yield _monitor(trt, progress)


def _monitor(trt: ModuleType, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._tasks: dict[str, Any] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._tasks[phase_name] = progress.add_task(phase_name, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Return False to stop the build."""
            if phase_name in self._tasks:
                progress.update(self._tasks[phase_name], completed=step + 1)
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self._tasks:
                progress.remove_task(self._tasks.pop(phase_name))

    return Monitor()
