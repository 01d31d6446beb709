"""The commands that write and check data sets: `prepare` and `check`."""

from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from train.data.check import report
from train.data.convert.registry import CONVERTERS, Converter
from train.errors import DatasetError


class Prepare:
    """Write a data set in SAM-Path's layout."""

    converter: Converter
    out: Path
    settings: Any

    def run(self) -> None:
        """Write the data set and print what looks wrong."""
        inputs = [getattr(self, name) for name in self.converter.inputs]
        self.converter.convert(*inputs, self.out, self.settings)


def prepare_command() -> Any:
    """Build the `prepare` command from the registered converters."""
    sources = tuple(
        Annotated[_converter_command(c), tyro.conf.subcommand(c.name, description=c.help)]
        for c in CONVERTERS.values()
    )
    return Union[sources]  # noqa: UP007


def _converter_command(converter: Converter) -> type[Prepare]:
    paths = {**converter.inputs, "out": "The folder to write."}
    fields: list[tuple[str, Any]] = [
        (
            name,
            Annotated[Path, tyro.conf.arg(help=text, metavar=name.upper()), tyro.conf.Positional],
        )
        for name, text in paths.items()
    ]
    return make_dataclass(
        f"Prepare{converter.name.capitalize()}",
        [*fields, ("settings", converter.settings)],
        bases=(Prepare,),
        namespace={"converter": converter, "__doc__": converter.help},
        frozen=True,
        kw_only=True,
    )


@dataclass(frozen=True, kw_only=True)
class Check:
    """Check a data set: pixel shares of its classes, and whatever looks wrong."""

    data: tyro.conf.Positional[Path]
    """The data set: img/, mask/, folds.csv, dataset.json."""
    strict: bool = False
    """Exit with status 1 if there is a warning."""

    def run(self) -> None:
        """Print the table and the warnings.

        Raises:
            FocalPathError: `fit` would refuse the data set.
        """
        warnings = report(self.data, must_train=True)
        if warnings and self.strict:
            raise DatasetError(f"{self.data} has {len(warnings)} warnings, and --strict is set")
