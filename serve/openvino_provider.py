"""OpenVINO inside ONNX Runtime, for CPUs: a plugin from the package onnxruntime-ep-openvino.

It can compute a float32 graph in bfloat16, which CPUs with AMX do several times as fast. The gate
of the export and the service open sessions with the same options, those of this file, so that what
was measured is what answers.
"""

import json
from importlib import import_module
from typing import Any, Literal

import onnxruntime

from serve.errors import BackendUnavailableError

ComputeType = Literal["bf16", "fp32"]
"""What the products are computed in; inputs, outputs and the file stay as they are."""

PACKAGE = "onnxruntime-ep-openvino"
_HINTS = {"bf16": "bf16", "fp32": "f32"}


def openvino_options(compute_type: ComputeType, threads: int = 0) -> onnxruntime.SessionOptions:
    """Options of a session that runs on OpenVINO's CPU device.

    Args:
        compute_type: what it computes in.
        threads: CPU threads; 0 lets it take one a core.

    Raises:
        BackendUnavailableError: the plugin is not installed or does not run on this machine.
    """
    settings: dict[str, str] = {
        "INFERENCE_PRECISION_HINT": _HINTS[compute_type],
        "PERFORMANCE_HINT": "LATENCY",
    }
    if threads:
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    options = onnxruntime.SessionOptions()
    options.add_provider_for_devices(
        [_cpu_device()], {"load_config": json.dumps({"CPU": settings})}
    )
    return options


def computes_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for bfloat16; else a hint at it means nothing.

    Raises:
        BackendUnavailableError: as `openvino_options`.
    """
    return "BF16" in _cpu_device().ep_metadata["OPTIMIZATION_CAPABILITIES"].split()


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
