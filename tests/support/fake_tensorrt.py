"""Stands in for TensorRT and for CUDA, so that the whole build runs on any machine.

Its "plan" is the ONNX file, its engine is ONNX Runtime, and its device is the CPU. What the real
bindings offer is proved by `test_tensorrt_contract`, not here.
"""

import contextlib
import ctypes
import enum
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import torch

from tests.support.interrupts import send_from_here

MAGIC = b"plan:"
Outputs = dict[str, np.ndarray]


class FakeGpu:
    """Torch's CPU in place of a CUDA device."""

    name = "Fake A100"
    stream_handle = 7

    def __init__(self, compute_capability: str = "8.0") -> None:
        self.compute_capability = compute_capability

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def synchronize(self) -> None:
        pass

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        return run


class FakeTensorRT:
    """A `tensorrt` module; what a test breaks is set on the instance."""

    DataType = enum.Enum("DataType", "FLOAT HALF UINT8")
    TensorIOMode = enum.Enum("TensorIOMode", "INPUT OUTPUT")
    BuilderFlag = enum.Enum("BuilderFlag", "TF32")
    MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE")
    ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "DETAILED")
    HardwareCompatibilityLevel = enum.Enum("HardwareCompatibilityLevel", "NONE")
    LayerInformationFormat = enum.Enum("LayerInformationFormat", "JSON")

    class NetworkDefinitionCreationFlag(enum.IntEnum):
        STRONGLY_TYPED = 1

    class IProgressMonitor:
        pass

    class Logger:
        WARNING: ClassVar[int] = 2

        def __init__(self, severity: int) -> None:
            pass

    def __init__(self, version: str = "11.0.0.114") -> None:
        self.__version__ = version
        self.parser_errors: list[tuple[str, str]] = []
        self.builds = True
        self.distort: Callable[[Outputs], Outputs] = lambda outputs: outputs
        self.layers = ["_gemm_mha_v2_myl0_1", "/mha/proj/MatMul_myl0_2"]
        self.output_type = self.DataType.UINT8
        self.signal: int | None = None
        """Comes to the process in the middle of a build."""
        self.stopped = False
        self.network_flags = 0
        self.config: FakeConfig | None = None

    def Builder(self, logger: object) -> "FakeBuilder":
        return FakeBuilder(self)

    def OnnxParser(self, network: "FakeNetwork", logger: object) -> "FakeParser":
        return FakeParser(self, network)

    def Runtime(self, logger: object) -> "FakeRuntime":
        return FakeRuntime(self)


class FakeNetwork:
    onnx = b""


class FakeParser:
    def __init__(self, trt: FakeTensorRT, network: FakeNetwork) -> None:
        self._trt, self._network = trt, network
        self.num_errors = len(trt.parser_errors)

    def parse_from_file(self, path: str) -> bool:
        self._network.onnx = Path(path).read_bytes()
        return not self._trt.parser_errors

    def get_error(self, index: int) -> Any:
        node, description = self._trt.parser_errors[index]

        class Error:
            def node_name(self) -> str:
                return node

            def desc(self) -> str:
                return description

        return Error()


class FakeTimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"+"


class FakeConfig:
    """Remembers what it was told; a timing cache that starts with `other` is of another GPU."""

    progress_monitor: Any = None

    def __init__(self) -> None:
        self.flags: dict[object, bool] = {}
        self.pools: dict[object, int] = {}
        self.profiles: list[dict[str, tuple[tuple[int, ...], ...]]] = []
        self.timing_cache: FakeTimingCache | None = None

    def set_flag(self, flag: object) -> None:
        self.flags[flag] = True

    def clear_flag(self, flag: object) -> None:
        self.flags[flag] = False

    def set_memory_pool_limit(self, pool: object, size: int) -> None:
        self.pools[pool] = size

    def add_optimization_profile(self, profile: "FakeProfile") -> int:
        self.profiles.append(profile.shapes)
        return 0

    def create_timing_cache(self, content: bytes) -> FakeTimingCache:
        return FakeTimingCache(content)

    def set_timing_cache(self, cache: FakeTimingCache, ignore_mismatch: bool) -> bool:
        if cache.content.startswith(b"other") and not ignore_mismatch:
            return False
        self.timing_cache = cache
        return True

    def get_timing_cache(self) -> FakeTimingCache | None:
        return self.timing_cache


class FakeProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.shapes[name] = shapes


@contextlib.contextmanager
def _nothing_passes() -> Iterator[None]:
    """What TensorRT does with an exception of a callback."""
    try:
        yield
    except BaseException as error:
        raise AssertionError(
            f"TensorRT ends the process: {error!r} came out of a callback"
        ) from None


class FakeBuilder:
    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt

    def create_network(self, flags: int) -> FakeNetwork:
        self._trt.network_flags = flags
        return FakeNetwork()

    def create_builder_config(self) -> FakeConfig:
        self._trt.config = FakeConfig()
        return self._trt.config

    def create_optimization_profile(self) -> FakeProfile:
        return FakeProfile()

    def build_serialized_network(self, network: FakeNetwork, config: FakeConfig) -> bytes | None:
        monitor = config.progress_monitor
        with _nothing_passes():
            monitor.phase_start("Building", None, 3)
            for step in range(1000 if self._trt.signal else 3):
                if self._trt.signal and step == 1:
                    send_from_here(self._trt.signal)
                if step > 2:
                    time.sleep(0.01)  # until the signal has arrived
                if not monitor.step_complete("Building", step):
                    self._trt.stopped = True
                    return None
            monitor.phase_finish("Building")
        return MAGIC + network.onnx if self._trt.builds else None


class FakeRuntime:
    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt

    def deserialize_cuda_engine(self, serialized: bytes) -> "FakeEngine":
        assert serialized.startswith(MAGIC)
        return FakeEngine(self._trt, serialized.removeprefix(MAGIC))


class FakeEngine:
    def __init__(self, trt: FakeTensorRT, onnx: bytes) -> None:
        self._trt = trt
        self.session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        self.specs = {t.name: t for t in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.num_io_tensors = len(self.specs)
        self.num_layers = len(trt.layers)

    def get_tensor_name(self, index: int) -> str:
        return list(self.specs)[index]

    def get_tensor_mode(self, name: str) -> object:
        modes = self._trt.TensorIOMode
        return modes.INPUT if name == "image" else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> object:
        if name == "labels":
            return self._trt.output_type
        types = {"tensor(uint8)": "UINT8", "tensor(float)": "FLOAT"}
        return self._trt.DataType[types[self.specs[name].type]]

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        assert self._trt.config is not None
        return list(self._trt.config.profiles[index][name])

    def create_execution_context(self) -> "FakeContext":
        return FakeContext(self._trt, self)

    def create_engine_inspector(self) -> "FakeEngine":
        return self

    def get_layer_information(self, index: int, layout: object) -> str:
        layer = {"Name": self._trt.layers[index], "Metadata": "[ONNX Layer: fmha]"}
        return json.dumps(layer)


class FakeContext:
    def __init__(self, trt: FakeTensorRT, engine: FakeEngine) -> None:
        self._trt, self._engine = trt, engine
        self._addresses: dict[str, int] = {}
        self._image_shape: tuple[int, ...] = ()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._image_shape = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self._image_shape[0], *self._engine.specs[name].shape[1:])

    def execute_async_v3(self, stream_handle: int) -> bool:
        size = int(np.prod(self._image_shape))
        image = np.frombuffer(ctypes.string_at(self._addresses["image"], size), np.uint8)
        names = [output.name for output in self._engine.session.get_outputs()]
        answers = self._engine.session.run(names, {"image": image.reshape(self._image_shape)})
        outputs = self._trt.distort(dict(zip(names, answers, strict=True)))
        for name, output in outputs.items():
            data = np.ascontiguousarray(output).tobytes()
            ctypes.memmove(self._addresses[name], data, len(data))
        return True
