"""Where a bundle may be written: only where nothing but an earlier bundle would be deleted."""

import os
from collections.abc import Mapping
from pathlib import Path

from export.errors import DestinationError
from serve.contract.json_text import parse_json
from serve.contract.manifest import MANIFEST_FILE

REFUSED_SUFFIX = "-refused"
"""Of the folder beside the bundle's that holds the report where no bundle came about."""
_OF_BUNDLE = (
    *(MANIFEST_FILE, "MODEL_CARD.md", "engine_*.json", "parity*", "warm_up.npz"),
    *("*.onnx", "*.onnx.data", "*.plan", "*.cache", ".*", "Thumbs.db", "desktop.ini"),
)
"""Patterns of the files of a bundle, of this version and others."""
_REPORT_PREFIX = "parity"
"""Of each file of that report."""


def bundle_destination(out: Path, needed: Mapping[str, Path | None]) -> Path:
    """The folder that an export to `out` writes, links followed.

    Args:
        out: where the user wants the bundle.
        needed: paths that the export must not delete, by what they are.

    Raises:
        DestinationError: something else than an earlier bundle is there or would be deleted.
    """
    folder = resolved(out)
    told = str(out) if folder == out.absolute() else f"{out} ({folder})"
    for what, path in {**needed, "the current directory": Path.cwd()}.items():
        if path is not None and resolved(path).is_relative_to(folder):
            raise DestinationError(
                f"--out is {told}, which is or contains {what}, {path}: the export would delete "
                "it. Nothing was changed; give --out a folder of its own."
            )
    if folder.is_dir():
        found = sorted(path.name for path in folder.iterdir())
        if found and not _is_bundle(folder):
            raise DestinationError(
                f"--out is {told}, a folder with {_listed(found)}, but without a bundle's "
                f"{MANIFEST_FILE}; an export replaces only an earlier bundle or an empty folder. "
                "Nothing was changed; give --out another folder, or empty this one yourself."
            )
        if foreign := [name for name in found if not _is_of_bundle(folder / name)]:
            raise DestinationError(
                f"--out is {told}, an earlier bundle with files of your own, {_listed(foreign)}, "
                "which an export would delete. Nothing was changed; move them away, or give --out "
                "another folder."
            )
    elif os.path.lexists(folder):
        raise DestinationError(
            f"--out is {told}, which is a file; expected a folder. Nothing was changed; give "
            "--out another name."
        )
    refused = refused_folder(folder)
    if os.path.lexists(refused) and not is_report(refused):
        raise DestinationError(
            f"{refused} is where the report would be if the model did not pass, and is something "
            "else. Nothing was changed; give --out another name, or move that away."
        )
    return folder


def check_repository(repository: Path, out: Path) -> None:
    """Check where a bundle, exported to `out`, is to be published.

    Raises:
        DestinationError: the repository is not a folder, or the bundle would be inside it.
    """
    if repository.exists() and not repository.is_dir():
        raise DestinationError(
            f"--model-repository is {repository}, which is a file; expected a folder"
        )
    if resolved(out).is_relative_to(resolved(repository)):
        raise DestinationError(
            f"the bundle {out} is inside the model repository {repository}, where Triton would "
            "take it for another model. Give it, or the repository, a folder elsewhere."
        )


def refused_folder(bundle: Path) -> Path:
    """Where the report goes if there is no bundle."""
    return bundle.with_name(f"{bundle.name}{REFUSED_SUFFIX}")


def is_report(folder: Path) -> bool:
    """Whether the folder is what a failed export leaves: a report and nothing else."""
    return (
        folder.is_dir()
        and not folder.is_symlink()
        and all(path.name.startswith(_REPORT_PREFIX) for path in folder.iterdir())
    )


def resolved(path: Path) -> Path:
    """Follow all links, without an error where they lead in a circle (as Path.resolve has)."""
    return Path(os.path.realpath(path))


def _is_bundle(folder: Path) -> bool:
    """Whether the folder has a bundle's manifest, of this version of FocalPath or another."""
    try:
        content = parse_json((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"schema_version", "artefacts"} <= content.keys()


def _is_of_bundle(path: Path) -> bool:
    """Whether a name is one that an export or an engine's build gives, or what systems leave."""
    is_ours = any(path.match(pattern) for pattern in _OF_BUNDLE)
    return is_ours and not (path.is_dir() and not path.is_symlink())


def _listed(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
