"""OpenVINO inside ONNX Runtime, for CPUs: a plugin from the package onnxruntime-ep-openvino.

It runs the bundle's bfloat16 graph, which ONNX Runtime's own CPU provider cannot, and which CPUs
with AMX answer several times as fast as the float32 one. The gate of the export and the service
open sessions with the same options, those of this file, so that what was measured is what answers.
"""

import json
from importlib import import_module
from typing import Any, Literal

import onnxruntime

from serve.contract.errors import BackendUnavailableError

GraphPrecision = Literal["bf16", "fp32"]
"""Of the graphs that it is given."""

PACKAGE = "onnxruntime-ep-openvino"
_HINTS = {"bf16": "bf16", "fp32": "f32"}


def openvino_options(precision: GraphPrecision, threads: int = 0) -> onnxruntime.SessionOptions:
    """Options of a session that runs a graph of this precision on OpenVINO's CPU device.

    Args:
        precision: of the graph. Left to itself OpenVINO computes a float32 graph in bfloat16 too,
            down to the last norm, and changes labels.
        threads: CPU threads; 0 lets it take one a core.

    Raises:
        BackendUnavailableError: the plugin is not installed, or the CPU lacks what it takes.
    """
    device = _cpu_device()
    if precision == "bf16" and not _has_bfloat16(device):
        raise BackendUnavailableError(
            f"{device.ep_metadata['FULL_DEVICE_NAME']} has no instructions for bfloat16 (AMX or "
            "AVX512_BF16), so OpenVINO gains nothing by it. Set FOCALPATH_PRECISION=fp32."
        )
    settings: dict[str, str] = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",
    }
    if threads:
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    options = onnxruntime.SessionOptions()
    options.add_provider_for_devices([device], {"load_config": json.dumps({"CPU": settings})})
    return options


def computes_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for bfloat16.

    Raises:
        BackendUnavailableError: the plugin is not installed.
    """
    return _has_bfloat16(_cpu_device())


def _has_bfloat16(device: Any) -> bool:
    return "BF16" in device.ep_metadata["OPTIMIZATION_CAPABILITIES"].split()


def _cpu_device() -> Any:
    try:
        plugin = import_module("onnxruntime_ep_openvino")
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"OpenVINO's provider of ONNX Runtime is not installed. Run `pip install {PACKAGE}` "
            "in this environment, or leave it out: FOCALPATH_PROVIDER in a service, --openvino in "
            "an export."
        ) from error
    if not _cpu_devices(plugin):  # ONNX Runtime takes a library once only in a process
        onnxruntime.register_execution_provider_library(PACKAGE, plugin.get_library_path())
    devices = _cpu_devices(plugin)
    if not devices:
        raise BackendUnavailableError(
            f"{PACKAGE} finds no CPU that it can use on this machine; expected an x86-64 one. "
            "Choose another provider with FOCALPATH_PROVIDER."
        )
    return devices[0]


def _cpu_devices(plugin: Any) -> list[Any]:
    return [
        device
        for device in onnxruntime.get_ep_devices()
        if device.ep_name == plugin.get_ep_name() and device.ep_metadata.get("ov_device") == "CPU"
    ]
