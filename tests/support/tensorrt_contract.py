"""Run the builder's code against TensorRT's real classes; a script for a process of its own.

Without its libraries TensorRT makes no builder, so each object is a proxy of the real class: it has
the members of that class and no others, checks every call against the signature in the bindings'
docstring, and answers with a proxy of the class that the signature returns, or with what a scenario
sets. Prints JSON: the version, what was touched, and each scenario's outcome.
"""

import ast
import inspect
import json
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_bindings as trt

from export.errors import EngineError
from export.tensorrt.build import _progress, build_plan
from export.tensorrt.plan import BatchProfile, EnginePlan, plan_for
from export.tensorrt.session import PlanSession, count_fused_attention
from serve.contract.manifest import Manifest, read_bundle
from tests.support.fake_tensorrt import FakeGpu

TOUCHED: set[str] = set()
_CONSTRUCTED = ("Builder", "OnnxParser", "Runtime")  # each needs TensorRT's libraries
_PLAIN = {"str": str, "bool": bool, "typing.SupportsInt": int, "typing_extensions.Buffer": bytes}
# What pybind11 could not name in a docstring.
_RETURNED = {"nvonnxparser::IParserError": "ParserError"}

Answers = dict[str, Any]


class ContractError(AssertionError):
    """The code uses TensorRT in a way that its bindings do not offer."""


class Proxy:
    """An object of a real class: its members, its signatures, no behaviour."""

    def __init__(self, real: type, answers: Answers) -> None:
        object.__setattr__(self, "_real", real)
        object.__setattr__(self, "_answers", answers)

    def __getattr__(self, name: str) -> Any:
        key = f"{self._real.__name__}.{name}"
        member = inspect.getattr_static(self._real, name)  # AttributeError: the contract is broken
        TOUCHED.add(key)
        if isinstance(member, property):
            return self._answers[key]

        def call(*args: Any, **kwargs: Any) -> Any:
            returned = _check_call(key, getattr(self._real, name).__doc__, (self, *args), kwargs)
            return _answer(key, returned, args, self._answers)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        key = f"{self._real.__name__}.{name}"
        member = inspect.getattr_static(self._real, name)
        TOUCHED.add(key)
        if not isinstance(member, property) or member.fset is None:
            raise ContractError(f"{key} cannot be set")
        _check_call(key, f"set{str(member.fset.__doc__).strip()}", (self, value), {})


class Module:
    """The `tensorrt` module with proxies for what cannot be constructed here."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        real = getattr(trt, name)
        TOUCHED.add(name)
        if name not in _CONSTRUCTED:
            return real

        def construct(*args: Any) -> Proxy:
            proxy = Proxy(real, self._answers)
            _check_call(name, real.__init__.__doc__, (proxy, *args), {})
            return proxy

        return construct


def _answer(key: str, returned: str, args: tuple[Any, ...], answers: Answers) -> Any:
    if key in answers:
        answer = answers[key]
        return answer(*args) if callable(answer) else answer
    name = _RETURNED.get(returned, returned.rpartition(".")[2])
    if returned == "None":
        return None
    if not isinstance(getattr(trt, name, None), type):
        raise ContractError(f"{key} returns {returned}: the scenario has to set an answer")
    return Proxy(getattr(trt, name), answers)


def _check_call(key: str, doc: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Bind a call to one of the docstring's signatures; return what that one returns."""
    problems = []
    for line in _signatures(doc):
        head, _, returned = line.rpartition(" -> ")
        try:
            bound = _signature(head).bind(*args, **kwargs)
            for name, value in bound.arguments.items():
                _check_type(_signature(head).parameters[name].annotation, value)
        except TypeError as error:
            problems.append(f"{line}: {error}")
        else:
            return returned.strip()
    raise ContractError(f"{key}{args[1:]}{kwargs or ''} fits no signature: {problems}")


def _signatures(doc: str) -> list[str]:
    lines = [line.strip() for line in doc.splitlines()]
    numbered = [line.partition(" ")[2] for line in lines if re.match(r"\d+\. \w+\(self", line)]
    plain = [line for line in lines if re.match(r"\w+\((self|arg0)", line)]
    if not numbered + plain:
        raise ContractError(f"no signature in {doc!r}")
    return numbered or plain[:1]


def _signature(head: str) -> inspect.Signature:
    """Read `name(self: a.B, flag: bool = False)`; a default that is no Python counts as one."""
    source = re.sub(r"= <[^>]*>", "= None", head)
    function = ast.parse(f"def {source}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args.args
    num_required = len(arguments) - len(function.args.defaults)
    parameters = [
        inspect.Parameter(
            argument.arg,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if place < num_required else None,
            annotation=ast.unparse(argument.annotation) if argument.annotation else "",
        )
        for place, argument in enumerate(arguments)
    ]
    return inspect.Signature(parameters)


def _check_type(annotation: str, value: Any) -> None:
    name = annotation.rpartition(".")[2]
    if annotation in _PLAIN:
        expected: Any = _PLAIN[annotation]
    elif name == "Dims":
        expected = (tuple, list, trt.Dims)
    else:
        expected = getattr(trt, name, {"tuple": tuple, "list": list}.get(name))
    if expected is None:
        raise ContractError(f"the type {annotation} is not known to this check")
    if isinstance(value, Proxy):
        fits = issubclass(value._real, expected)
    else:
        fits = isinstance(value, expected)
    if not fits:
        raise TypeError(f"{value!r} is not {annotation}")


class _Buffer:
    """Serialised bytes: what pybind11's buffer protocol gives of an IHostMemory."""

    def __bytes__(self) -> bytes:
        return b"content"


def _building() -> Answers:
    return {
        "OnnxParser.parse_from_file": True,
        "IBuilderConfig.add_optimization_profile": 0,
        "IBuilderConfig.set_timing_cache": True,
        "Builder.build_serialized_network": _Buffer(),
        "ITimingCache.serialize": _Buffer(),
    }


def _running(plan: EnginePlan, manifest: Manifest) -> Answers:
    tensors = {tensor.name: tensor for tensor in (*manifest.inputs, *manifest.outputs)}
    types = {"uint8": trt.DataType.UINT8, "float32": trt.DataType.FLOAT}
    modes = trt.TensorIOMode
    batch = plan.batch
    sides = manifest.inputs[0].shape[1:]
    return {
        "ICudaEngine.num_io_tensors": len(tensors),
        "ICudaEngine.num_layers": 1,
        "ICudaEngine.get_tensor_name": lambda index: list(tensors)[index],
        "ICudaEngine.get_tensor_mode": lambda n: modes.INPUT if n == "image" else modes.OUTPUT,
        "ICudaEngine.get_tensor_dtype": lambda name: types[tensors[name].dtype],
        "ICudaEngine.get_tensor_profile_shape": [
            trt.Dims((size, *sides)) for size in (batch.min, batch.opt, batch.max)
        ],
        "IExecutionContext.set_input_shape": True,
        "IExecutionContext.set_tensor_address": True,
        "IExecutionContext.execute_async_v3": True,
        "IExecutionContext.get_tensor_shape": lambda n: trt.Dims((1, *tensors[n].shape[1:])),
        "EngineInspector.get_layer_information": '{"Name": "_gemm_mha_v2_myl0_1"}',
    }


def build(plan: EnginePlan, manifest: Manifest, bundle: Path) -> None:
    """Build in full, then again with the timing cache of the first time."""
    for changed in (plan, plan.model_copy(update={"allow_tf32": not plan.allow_tf32})):
        assert build_plan(Module(_building()), changed, bundle) == b"content"


def report_parser_errors(plan: EnginePlan, manifest: Manifest, bundle: Path) -> None:
    """Read each error of a graph that the parser refuses."""
    answers = _building() | {
        "OnnxParser.parse_from_file": False,
        "OnnxParser.num_errors": 2,
        "ParserError.node_name": "node_a",
        "ParserError.desc": "no such operator",
    }
    with pytest.raises(EngineError) as caught:
        build_plan(Module(answers), plan, bundle)
    assert str(caught.value).count("node_a: no such operator") == 2


def run(plan: EnginePlan, manifest: Manifest, bundle: Path) -> None:
    """Check a plan's interface and run it."""
    module: Any = Module(_running(plan, manifest))
    logger = module.Logger(module.Logger.WARNING)
    session = PlanSession(module, FakeGpu(), b"plan", logger, manifest.inputs, manifest.outputs)
    session.check_interface(plan)
    session.set_batch(1)
    side = manifest.tile_size_px
    assert session.answer(np.zeros((2, side, side, 3), np.uint8)).labels.shape == (2, side, side)


def inspect_layers(plan: EnginePlan, manifest: Manifest, bundle: Path) -> None:
    """Count the fused attentions."""
    answers = _running(plan, manifest)
    engine = Proxy(trt.ICudaEngine, answers)
    assert count_fused_attention(Module(answers), engine) == 1


def watch_progress(plan: EnginePlan, manifest: Manifest, bundle: Path) -> None:
    """Make the monitor, a subclass of the real class, and call it as TensorRT does."""
    with _progress(trt) as monitor:
        assert isinstance(monitor, trt.IProgressMonitor)
        for name in ("phase_start", "step_complete", "phase_finish"):
            doc = getattr(trt.IProgressMonitor, name).__doc__
            parameters = list(_signature(_signatures(doc)[0].rpartition(" -> ")[0]).parameters)
            ours = list(inspect.signature(getattr(monitor, name)).parameters)
            assert parameters[1:] == ours, f"{name} takes {parameters[1:]}, ours {ours}"
        monitor.phase_start("Building", None, 2)
        assert monitor.step_complete("Building", 0) is True
        monitor.interrupted = True
        assert monitor.step_complete("Building", 1) is False
        monitor.phase_finish("Building")


def read_every_compatibility_level(plan: EnginePlan, manifest: Manifest, bundle: Path) -> None:
    """Each level that a plan can ask for has its name in the bindings."""
    field = EnginePlan.model_fields["hardware_compatibility_level"].annotation
    for level in field.__args__:
        changed = plan.model_copy(update={"hardware_compatibility_level": level})
        build_plan(Module(_building()), changed, bundle)


def use_what_version_11_removed(plan: EnginePlan, manifest: Manifest, bundle: Path) -> None:
    """Not our code: shows that this check notices."""
    module: Any = Module({})
    module.Builder(module.Logger(module.Logger.WARNING))
    module.BuilderFlag.FP16  # noqa: B018


def call_with_a_wrong_type(plan: EnginePlan, manifest: Manifest, bundle: Path) -> None:
    """Not our code: shows that this check notices."""
    Proxy(trt.IBuilderConfig, {}).set_memory_pool_limit("WORKSPACE", 1)


def set_a_wrong_type(plan: EnginePlan, manifest: Manifest, bundle: Path) -> None:
    """Not our code: shows that this check notices."""
    Proxy(trt.IBuilderConfig, {}).profiling_verbosity = "DETAILED"


SCENARIOS: tuple[Callable[[EnginePlan, Manifest, Path], None], ...] = (
    build,
    report_parser_errors,
    run,
    inspect_layers,
    watch_progress,
    read_every_compatibility_level,
    use_what_version_11_removed,
    call_with_a_wrong_type,
    set_a_wrong_type,
)


def main(source: Path) -> None:
    """Run all scenarios on copies of a bundle and print what came of them."""
    manifest = read_bundle(source)
    plan = plan_for(manifest, manifest.artefacts[0])
    plan = plan.model_copy(update={"batch": BatchProfile(opt=2, max=3)})
    outcomes = {}
    for scenario in SCENARIOS:
        with tempfile.TemporaryDirectory() as scratch:
            bundle = Path(shutil.copytree(source, Path(scratch) / "bundle"))
            try:
                scenario(plan, manifest, bundle)
            except (AssertionError, AttributeError, KeyError, TypeError):
                outcomes[scenario.__name__] = traceback.format_exc()
            else:
                outcomes[scenario.__name__] = "ok"
    result = {"version": trt.__version__, "touched": sorted(TOUCHED), "outcomes": outcomes}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
