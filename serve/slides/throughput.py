"""Settings of the model for whole slides, where tiles per second count and not the first answer.

On CPUs, one inference per core does more than one inference on all cores: ONNX Runtime's threads
wait for each other after every layer. Measured with the demonstration's model: half of the CPU time
per tile (docs/slides.md).
"""

import re
from pathlib import Path

from serve.contract import cuda
from serve.contract.machine import usable_cpus
from serve.contract.manifest import Manifest
from serve.settings import InferenceSettings

_BYTES_PER_PIXEL = 1536
"""Of a tile at work. SAM's ViT-B at float32 takes about half of it at 1024 px."""
_SHARE_OF_MEMORY = 0.5
_BATCH_PX = 512 * 512
"""Pixels of a batch: enough that handing it over costs nothing beside computing it."""
_MOST_PARALLEL = 256
_CGROUP = Path("/sys/fs/cgroup")


def for_throughput(
    settings: InferenceSettings, manifest: Manifest, *, cores: int = 0
) -> InferenceSettings:
    """One inference per core, where the model runs on the CPU and the user leaves the choice.

    Args:
        settings: of the user; `threads`, `parallel_batches` or `max_batch_size` that differ from
            their defaults are kept, and then nothing is changed.
        manifest: of the model.
        cores: that may be used; 0: all.
    """
    chosen = ("threads", "parallel_batches", "max_batch_size")
    fields = InferenceSettings.model_fields
    on_gpu = settings.provider == "cuda" or (settings.provider == "auto" and cuda.is_built_in())
    if (
        settings.backend != "onnxruntime"
        or on_gpu
        or any(getattr(settings, name) != fields[name].default for name in chosen)
    ):
        return settings.model_copy(update={"threads": settings.threads or cores})
    cores = cores or usable_cpus()
    pixels = manifest.tile_size_px**2
    batch = min(max(_BATCH_PX // pixels, 1), manifest.max_batch_size)
    fits = int(free_memory() * _SHARE_OF_MEMORY / (batch * pixels * _BYTES_PER_PIXEL))
    parallel = max(min(cores, fits, _MOST_PARALLEL), 1)
    return settings.model_copy(
        update={
            "threads": cores // parallel,
            "parallel_batches": parallel,
            "max_batch_size": batch,
        }
    )


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its container."""
    free = []
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) * 1024)
    limit, used = _read(_CGROUP / "memory.max"), _read(_CGROUP / "memory.current")
    if limit.isdecimal() and used.isdecimal():
        cached = re.search(r"^inactive_file (\d+)$", _read(_CGROUP / "memory.stat"), re.MULTILINE)
        free.append(int(limit) - int(used) + (int(cached[1]) if cached else 0))
    return max(min(free, default=0), 0)


def _read(path: Path) -> str:
    """A file's text; empty where there is none, as on other systems."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
