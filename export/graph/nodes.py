"""The index of an ONNX graph: producers, consumers, types, and the block of each node."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property

from onnx import ModelProto, NodeProto, TensorProto

from export.errors import GraphError

PARITY_OUTPUT = "low_res_logits"
"""Output that the gate compares and that a bundle's graph does not have."""
NORMS = {"LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization"}
STANDARD_DOMAINS = ("", "ai.onnx")
_MODEL_ITSELF = "segmenter"
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_TOKEN_OUTPUT = "iou_scores"
_TAIL_BLOCKS = {
    "mask_decoder.output_upscaling",
    "mask_decoder.output_hypernetworks_mlps",
    "mask_decoder.iou_prediction_head",
}


class ModelGraph:
    """A model's nodes, with each tensor's producer, consumers, type and rank.

    Nodes are identified by their index in `nodes`, tensors by their names.
    """

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.nodes = list(graph.node)
        self.opset = max(
            (entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS),
            default=0,
        )
        self.initializers = {entry.name: entry for entry in graph.initializer}
        self.input_infos = [info for info in graph.input if info.name not in self.initializers]
        self.output_infos = list(graph.output)
        self.inputs = {info.name for info in self.input_infos}
        self.outputs = [info.name for info in self.output_infos]
        self.constants = self.initializers | _constant_nodes(self.nodes)
        self.producer = {
            name: i for i, node in enumerate(self.nodes) for name in node.output if name
        }
        self.consumers: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(self.nodes):
            for name in node.input:
                self.consumers[name].append(index)
        self.types = {name: entry.data_type for name, entry in self.constants.items()}
        """The declared element types, as in `TensorProto.DataType`."""
        self.ranks = {name: len(entry.dims) for name, entry in self.constants.items()}
        for info in (*graph.value_info, *graph.input, *graph.output):
            tensor = info.type.tensor_type
            if tensor.elem_type:
                self.types[info.name] = tensor.elem_type
            if tensor.HasField("shape"):
                self.ranks[info.name] = len(tensor.shape.dim)

    @cached_property
    def blocks(self) -> list[str]:
        """The block of each node. A node without a recorded module takes its first parent's."""
        return self._find_blocks()

    def parents(self, index: int) -> Iterator[int]:
        """The nodes that produce a node's inputs."""
        return (self.producer[name] for name in self.nodes[index].input if name in self.producer)

    def children(self, index: int) -> Iterator[int]:
        """The nodes that consume a node's outputs."""
        return (child for name in self.nodes[index].output for child in self.consumers[name])

    def descendants(self, sources: Iterable[int], through: set[str] | None = None) -> set[int]:
        """The sources and all nodes after them, limited to the operators `through` if given."""
        found, waiting = set(), list(sources)
        while waiting:
            index = waiting.pop()
            if index not in found:
                found.add(index)
                waiting += [
                    child
                    for child in self.children(index)
                    if through is None or self.nodes[child].op_type in through
                ]
        return found

    def after_pixels(self) -> set[int]:
        """The nodes whose values depend on the image, not only their shapes."""
        first = [
            index
            for name in self.inputs
            for index in self.consumers[name]
            if self.nodes[index].op_type != "Shape"
        ]
        without_shape = {node.op_type for node in self.nodes} - {"Shape"}
        return self.descendants(first, without_shape)

    def tail(self) -> set[int]:
        """The upscaling, and all nodes after the tokens' last norm: masks, logits, labels, IoU."""
        sources = [
            index
            for index, node in enumerate(self.nodes)
            if self.blocks[index] in _TAIL_BLOCKS or node.op_type == "ConvTranspose"
        ]
        return self.descendants([*sources, *self._last_norm_of_tokens()])

    def _last_norm_of_tokens(self) -> set[int]:
        if _TOKEN_OUTPUT not in self.producer:
            return set()
        norms, seen, waiting = set(), set(), [self.producer[_TOKEN_OUTPUT]]
        while waiting:
            index = waiting.pop()
            if index in seen:
                continue
            seen.add(index)
            if self.nodes[index].op_type in NORMS:
                norms.add(index)
            else:
                waiting += self.parents(index)
        return norms

    def _find_blocks(self) -> list[str]:
        blocks: list[str] = []
        for index, node in enumerate(self.nodes):
            scope = _scope(node)
            if scope is None:
                inherited = (blocks[parent] for parent in self.parents(index) if parent < index)
                blocks.append(next(inherited, _MODEL_ITSELF))
            else:
                blocks.append(block_of_module(scope))
        return blocks


def flat_graph(model: ModelProto) -> ModelGraph:
    """Index a model without functions and branches.

    Raises:
        GraphError: the model has functions or branches.
    """
    if model.functions or any(
        attribute.HasField("g") for node in model.graph.node for attribute in node.attribute
    ):
        raise GraphError(
            "the graph has functions or branches, expected one flat list of nodes. Export it "
            "without control flow, or skip half precision with --no-fp16."
        )
    return ModelGraph(model)


def _constant_nodes(nodes: Iterable[NodeProto]) -> dict[str, TensorProto]:
    return {
        node.output[0]: attribute.t
        for node in nodes
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }


def block_of_module(name: str) -> str:
    """The block of a module of the deployable model.

    `segmenter.image_encoder.blocks.3.attn.qkv` is in `image_encoder.blocks.3`, and the model itself
    is in `segmenter`.
    """
    name = name.removeprefix("segmenter").removeprefix(".")
    repeated = re.match(r".*?\b(?:blocks|transformer\.layers|mask_decoder\.layers)\.\d+", name)
    if repeated:
        return repeated.group()
    parts = name.split(".")
    return parts[0] if parts[0] == "neck" else ".".join(parts[:2]) or _MODEL_ITSELF


def _scope(node: NodeProto) -> str | None:
    """The module that the exporter recorded for a node."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES_KEY:
            scopes = ast.literal_eval(entry.value)
            # The last entry is the operation. The one before it is the innermost module.
            return str(scopes[-2]) if len(scopes) > 1 else ""
    return None
