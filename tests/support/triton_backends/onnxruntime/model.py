"""A stand-in for Triton's ONNX Runtime backend, to serve an unmodified `onnxruntime_onnx` config.

The server of the tests has no C++ backend for ONNX Runtime. Triton takes a folder with this file
under `backends/onnxruntime` for a backend of that name. It shows that the config, names, types,
shapes, batching and clients are right; it says nothing of the C++ backend's speed.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

NUM_THREADS = 2


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        version = Path(args["model_repository"]) / args["model_version"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = NUM_THREADS
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(version / (config["default_model_filename"] or "model.onnx")),
            options,
            providers=["CPUExecutionProvider"],
        )
        # The C++ backend compares these at load as well, and so finds a config of another model.
        self.input_names = _agreed_names("input", config["input"], self.session.get_inputs())
        _agreed_names("output", config["output"], self.session.get_outputs())

    def execute(self, requests):
        """Answer every request of the batch from one run of the model.

        The server has checked names, types and shapes. What is raised here, it sends to each of
        the requests as its error.
        """
        wanted = [request.requested_output_names() for request in requests]
        inputs = {
            name: [pb_utils.get_input_tensor_by_name(r, name).as_numpy() for r in requests]
            for name in self.input_names
        }
        feed = {name: np.concatenate(arrays) for name, arrays in inputs.items()}
        names = sorted(set().union(*wanted))
        outputs = dict(zip(names, self.session.run(names, feed), strict=True))
        responses = []
        start = 0
        for array, request_names in zip(inputs[self.input_names[0]], wanted, strict=True):
            stop = start + len(array)
            tensors = [pb_utils.Tensor(name, outputs[name][start:stop]) for name in request_names]
            responses.append(pb_utils.InferenceResponse(tensors))
            start = stop
        return responses


def _agreed_names(kind, configured, in_model):
    names = [tensor["name"] for tensor in configured]
    known = [tensor.name for tensor in in_model]
    if not set(names) <= set(known):
        raise pb_utils.TritonModelException(
            f"the config names the {kind}s {names}, the model has {known}"
        )
    return names
