"""What a Triton answers, by a server of gRPC that only pretends."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from serve.contract.errors import ModelChangedError
from serve.contract.manifest import Manifest, read_bundle
from serve.inference.triton import TritonBackend
from tests.support.errors import raises


class Pretending(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Says that it has the model of a manifest, and answers what it is told to."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self.outputs: list[tuple[str, str, list[int], int]] = []
        """Name, type, shape and number of bytes of each."""

    def ModelMetadata(self, _: Any, __: Any) -> service_pb2.ModelMetadataResponse:  # noqa: N802
        answer = service_pb2.ModelMetadataResponse(name=self._manifest.name, versions=["1"])
        for specs, tensors in (
            (self._manifest.inputs, answer.inputs),
            (self._manifest.outputs, answer.outputs),
        ):
            for spec in specs:
                kind = "UINT8" if spec.dtype == "uint8" else "FP32"
                tensors.add(name=spec.name, datatype=kind, shape=spec.shape)
        return answer

    def SystemSharedMemoryRegister(self, _: Any, __: Any) -> Any:  # noqa: N802
        return service_pb2.SystemSharedMemoryRegisterResponse()

    def SystemSharedMemoryUnregister(self, _: Any, __: Any) -> Any:  # noqa: N802
        return service_pb2.SystemSharedMemoryUnregisterResponse()

    def ModelInfer(self, request: Any, _: Any) -> service_pb2.ModelInferResponse:  # noqa: N802
        answer = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1")
        is_shared = bool(request.outputs[0].parameters)
        for name, kind, shape, num_bytes in self.outputs:
            answer.outputs.add(name=name, datatype=kind, shape=shape)
            answer.raw_output_contents.append(b"" if is_shared else bytes(num_bytes))
        return answer


@pytest.fixture
def pretending(toy_bundle: Path) -> Iterator[tuple[Pretending, str]]:
    servicer = Pretending(read_bundle(toy_bundle))
    server = grpc.server(ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None).wait()


RIGHT = ("labels", "UINT8", [2, 64, 64], 2 * 64 * 64)


@pytest.mark.parametrize("shared_memory", ["on", "off"])
@pytest.mark.parametrize(
    ("outputs", "told"),
    [
        ([], "labels is nothing"),
        ([("confidence", *RIGHT[1:])], "labels is nothing"),
        ([("labels", "UINT8", [0], 0)], "labels is UINT8 [0]"),
        ([("labels", "UINT8", [1, 64, 64], 64 * 64)], "labels is UINT8 [1, 64, 64]"),
        ([("labels", "INT64", [2, 64, 64], 8 * 2 * 64 * 64)], "labels is INT64 [2, 64, 64]"),
        ([RIGHT], None),
    ],
)
def test_an_answer_without_what_was_asked_for_is_refused(
    pretending: tuple[Pretending, str],
    toy_bundle: Path,
    shared_memory: Any,
    outputs: list[tuple[str, str, list[int], int]],
    told: str | None,
) -> None:
    servicer, url = pretending
    servicer.outputs = outputs
    backend = TritonBackend(url, read_bundle(toy_bundle), shared_memory=shared_memory)
    images = np.zeros((2, 64, 64, 3), np.uint8)
    if told is None:
        assert backend.infer(images, ("labels",))["labels"].shape == (2, 64, 64)
    else:
        with raises(ModelChangedError, told, "UINT8 [2, 64, 64]"):
            backend.infer(images, ("labels",))
    backend.close()


def test_an_output_with_too_few_values_is_refused(
    pretending: tuple[Pretending, str], toy_bundle: Path
) -> None:
    servicer, url = pretending
    servicer.outputs = [("labels", "UINT8", [2, 64, 64], 0)]
    backend = TritonBackend(url, read_bundle(toy_bundle), shared_memory="off")
    with raises(ModelChangedError, "whole outputs"):
        backend.infer(np.zeros((2, 64, 64, 3), np.uint8), ("labels",))
    backend.close()
