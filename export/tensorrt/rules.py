"""The rules of TensorRT's parser, as `rules.json` holds them with their sources."""

import functools
from pathlib import Path
from typing import Literal

from serve.contract.strict import Strict

RULES_FILE = Path(__file__).with_name("rules.json")


class InputBelow(Strict):
    """A constant input whose values must be below a limit."""

    input: int
    limit: int


class OperatorRule(Strict):
    """What TensorRT supports of one operator. Inputs are identified by position."""

    types: str
    """Name of the set of types that the first input may have."""
    same_type: Literal["all"] | tuple[int, ...] = ()
    attributes: dict[str, tuple[str | int | float, ...]] = {}
    """Allowed values of an attribute. For a list, every item must be allowed."""
    absent_attributes: tuple[str, ...] = ()
    constant_inputs: tuple[int, ...] = ()
    absent_inputs: tuple[int, ...] = ()
    zero_inputs: tuple[int, ...] = ()
    below: InputBelow | None = None
    rank: int | None = None
    """Required rank of the first three inputs."""
    max_outputs: int | None = None


class Opsets(Strict):
    """The range of opsets that the parser reads."""

    min: int
    max: int


class Rules(Strict):
    """The content of `rules.json`. Types have their ONNX names."""

    tensorrt_version: str
    source: str
    uint8_source: str
    notes: tuple[str, ...]
    opset: Opsets
    tensor_types: tuple[str, ...]
    uint8_casts: tuple[str, ...]
    """The types that uint8 can be cast to and from."""
    type_sets: dict[str, tuple[str, ...]]
    operators: dict[str, OperatorRule]


@functools.cache
def load_rules() -> Rules:
    """Read the rules that ship with this package."""
    return Rules.model_validate_json(RULES_FILE.read_text(encoding="utf-8"))
