"""Settings on the command line: a subcommand per preset, or the YAML file that --config names."""

import argparse
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

from train.config import read_settings
from train.model.class_bias import STRATEGIES
from train.presets import PRESETS
from train.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Trains:
    """A command that takes all settings: of a preset, or of the file that --config names."""

    settings: Settings
    config: Path | None = None
    """Settings as a YAML file, such as a run's run.yaml, in place of a preset. Options change
    single values."""

    @classmethod
    def command(cls, config: Settings | None) -> type:
        """The class with a subcommand per preset, or with the settings of --config as defaults."""
        if config is not None:
            settings: tuple[Any, ...] = ("settings", Settings, field(default=config))
        else:
            kind = preset_subcommands(PRESETS)
            settings = ("settings", kind)
        name = cls.__name__
        return make_dataclass(name, [settings], bases=(cls,), frozen=True, kw_only=True)


def preset_subcommands(presets: Mapping[str, Callable[[], Any]]) -> Any:
    """A type that tyro shows as one subcommand per preset, described by its docstring."""
    defaults = {name: preset() for name, preset in presets.items()}
    about = {name: (preset.__doc__ or "").partition("\n")[0] for name, preset in presets.items()}
    return tyro.extras.subcommand_type_from_defaults(defaults, about)


def with_biases(command: type) -> str:
    """A command's description, and what each value of `--bias` means."""
    lines = [f"  {strategy.name}: {strategy.help}" for strategy in STRATEGIES.values()]
    return "\n".join([inspect.getdoc(command) or "", "", "Biases:", *lines])


def read_config(arguments: Sequence[str]) -> tuple[Settings | None, list[str]]:
    """The settings of `--config FILE`, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    found, others = parser.parse_known_args(arguments)
    return None if found.config is None else read_settings(found.config), others


def choices(names: Mapping[object, Sequence[str]]) -> ConstructorRegistry:
    """Offer registered names as the choices of options.

    `names` has the values of each type of option.
    """
    registry = ConstructorRegistry()

    def add(kind: object, names: Sequence[str]) -> None:
        spec = PrimitiveConstructorSpec(
            nargs=1,
            metavar="{" + ",".join(names) + "}",
            instance_from_str=lambda values: values[0],
            is_instance=lambda value: isinstance(value, str),
            str_from_instance=lambda value: [value],
            choices=tuple(names),
        )
        registry.primitive_rule(lambda info: spec if info.type is kind else None)

    for kind, choices_of_kind in names.items():
        add(kind, choices_of_kind)
    return registry
