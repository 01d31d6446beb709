"""The commands of `python -m export`: their options and what they print."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from export.bundle import write_bundle
from export.destination import check_repository
from export.errors import FocalPathError, SettingsError, errors_translated
from export.settings import BundleSettings
from export.tensorrt.command import Engine
from export.tensorrt.plan import read_engine_plan
from export.triton import Target, check_folder, check_keep, publish
from serve.contract.interrupts import safe_interrupts
from serve.contract.manifest import Manifest, read_bundle
from serve.contract.printing import printing


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a checkpoint to a bundle and, with --model-repository, publish it for Triton.

    Two other commands work on a finished bundle: `python -m export engine BUNDLE` builds its
    TensorRT engine, `python -m export publish BUNDLE` publishes it. Each has its own --help.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A run's folder or its model.safetensors."""
    out: Path
    """Folder of the bundle. An earlier bundle there is replaced once the new one has passed the
    gate. A folder with other files is refused."""
    model_repository: Path | None = None
    """Triton's model repository. The bundle becomes its newest version."""
    target: Target = "onnxruntime"
    """What runs the model inside Triton. tensorrt-a100 takes three commands, see publish --help."""
    keep: int | None = None
    """Versions to keep in the model repository; older ones are deleted. By default all are kept."""
    bundle: Annotated[BundleSettings, tyro.conf.arg(name="")]

    def run(self) -> None:
        """Export, publish, and print where the bundle is."""
        self._check()
        _print_artefacts(self.out, write_bundle(self.checkpoint, self.out, self.bundle))
        if self.model_repository is None:
            return
        publication = Publish(
            bundle=self.out,
            model_repository=self.model_repository,
            target=self.target,
            keep=self.keep,
        )
        try:
            publication.run()
        except KeyboardInterrupt as interrupt:
            outcome = str(interrupt) or f"it is not published: {publication.command()}"
            raise KeyboardInterrupt(f"{self.out} is the new bundle; {outcome}") from None

    def _check(self) -> None:
        check_keep(self.keep)
        if self.target == "tensorrt-a100":
            publication = Publish(
                bundle=self.out,
                model_repository=self.model_repository or Path("model_repository"),
                target=self.target,
                keep=self.keep,
            )
            export = ["python", "-m", "export", str(self.checkpoint), "--out", str(self.out)]
            raise SettingsError(
                f"--target {self.target} needs a TensorRT plan, which is built after the export. "
                "Leave --target out, with your other options as they are; build on the GPU that "
                f"will serve, then publish:\n{shlex.join(export)}\n"
                f"{shlex.join(['python', '-m', 'export', 'engine', str(self.out)])}\n"
                f"{publication.command()}"
            )
        if self.model_repository is not None:
            check_repository(self.model_repository, self.out)
            check_folder(self.model_repository, self.bundle.name)


@dataclass(frozen=True, kw_only=True)
class Publish:
    """Put a bundle into Triton's model repository as the newest version.

    A new version appears whole or not at all. A bundle that Triton already serves adds no version.
    For tensorrt-a100 build the engine first: `python -m export engine BUNDLE`.
    """

    bundle: tyro.conf.Positional[Path]
    """The bundle's folder; its files are checked against their SHA-256."""
    model_repository: Path
    """Triton's model repository."""
    target: Target = "onnxruntime"
    """What runs the model inside Triton."""
    keep: int | None = None
    """Versions to keep in the model repository; older ones are deleted. By default all are kept."""

    def run(self) -> None:
        """Publish, and print where the version is."""
        check_repository(self.model_repository, self.bundle)
        warnings = self._warnings()
        version = publish(self.bundle, self.model_repository, self.target, keep=self.keep)
        console = Console(highlight=False, markup=False, soft_wrap=True)
        console.print(f"{version}: published for Triton, target {self.target}")
        for warning in warnings:
            console.print(warning)

    def _warnings(self) -> list[str]:
        """Reasons why the planned image cannot serve the bundle's engine."""
        if self.target != "tensorrt-a100":
            return []
        builds = [artefact.tensorrt for artefact in read_bundle(self.bundle).artefacts]
        plan = read_engine_plan(self.bundle)
        return [reason for build in builds if build and (reason := plan.serving_mismatch(build))]

    def command(self) -> str:
        """The command line that publishes the bundle."""
        words = ["python", "-m", "export", "publish", str(self.bundle)]
        words += ["--model-repository", str(self.model_repository), "--target", self.target]
        return shlex.join(words if self.keep is None else [*words, "--keep", str(self.keep)])


_COMMANDS = {"engine": Engine, "publish": Publish}


@safe_interrupts()
def run(arguments: Sequence[str]) -> None:
    """Run a command. An error that the user can fix ends with one line and its exit status."""
    try:
        with errors_translated(), printing():
            _parsed(arguments).run()
    except FocalPathError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt as interrupt:
        outcome = str(interrupt) or "nothing was changed"
        print(f"error: interrupted; {outcome}", file=sys.stderr)
        sys.exit(130)


def _parsed(arguments: Sequence[str]) -> Export | Engine | Publish:
    if arguments and arguments[0] in _COMMANDS:
        name = arguments[0]
        command: Engine | Publish = tyro.cli(
            _COMMANDS[name], prog=f"python -m export {name}", args=list(arguments[1:])
        )
        return command
    return tyro.cli(
        Export, prog="python -m export", args=arguments, config=(tyro.conf.OmitArgPrefixes,)
    )


def _print_artefacts(out: Path, manifest: Manifest) -> None:
    for artefact in manifest.artefacts:
        parity = artefact.parity
        Console().print(
            f"{out / artefact.file}: same label as torch on "
            f"{parity.label_agreement:.4%} of the pixels of {parity.num_tiles} tiles, "
            f"largest logit difference {parity.max_logit_difference or 0:.1e}",
            markup=False,
            soft_wrap=True,
        )
