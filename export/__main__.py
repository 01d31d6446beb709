"""Export a checkpoint to a bundle: ONNX with the learned bias folded in, and proof of parity."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from export.bundle import BundleSettings, write_bundle
from export.triton_repository import Target, publish
from serve.errors import FocalPathError as ServeError
from train.errors import FocalPathError


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a checkpoint to a bundle and, when asked, publish it in Triton's repository."""

    checkpoint: tyro.conf.Positional[Path]
    """A run's folder or its model.safetensors."""
    out: Path
    """The bundle's folder; an earlier bundle there is replaced once the new one has passed."""
    model_repository: Path | None = None
    """Triton's model repository; the bundle becomes its newest version."""
    target: Target = "onnxruntime"
    """What runs the model inside Triton."""
    bundle: Annotated[BundleSettings, tyro.conf.arg(name="")]

    def run(self) -> None:
        """Export, publish, say where it is."""
        console = Console()
        manifest = write_bundle(self.checkpoint, self.out, self.bundle)
        for artefact in manifest.artefacts:
            parity = artefact.parity
            console.print(
                f"{self.out / artefact.file}: same label as torch on "
                f"{parity.label_agreement:.4%} of the pixels of {parity.num_tiles} tiles, "
                f"largest logit difference {parity.max_logit_difference:.1e}"
            )
        if self.model_repository is not None:
            version = publish(self.out, self.model_repository, self.target)
            console.print(f"{version}: published for Triton, target {self.target}")


def main() -> None:
    """Run the export; a user's mistake ends with one line and exit status 1."""
    command = tyro.cli(
        Export, prog="python -m export", description=__doc__, config=(tyro.conf.OmitArgPrefixes,)
    )
    try:
        command.run()
    except (FocalPathError, ServeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
