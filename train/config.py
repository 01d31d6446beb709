"""Settings as a YAML file: every run writes its own, and a run can start from one."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from serve.contract.refusal import first_problem
from train.errors import SettingsError
from train.files import whole_file
from train.presets import PRESETS
from train.settings import Settings, upgrade_settings

SETTINGS_FILE = "run.yaml"


def write_settings(path: Path, settings: Settings) -> None:
    """Write all settings, whole or not at all.

    Raises:
        StorageError: the disk is full, or cannot be written.
    """
    with whole_file(path) as partial:
        plain = json.loads(json.dumps(asdict(settings)))  # YAML has no tuples
        text = yaml.safe_dump(plain, sort_keys=False)
        partial.write_text(text, encoding="utf-8")


def read_settings(path: Path) -> Settings:
    """Read settings that a run, a report or a user wrote; the preset has what the file leaves out.

    Raises:
        SettingsError: the file is missing, not YAML, or has a setting that is unknown, there twice
            or out of its range.
    """
    try:
        stored = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
        current = _completed(upgrade_settings(stored))
        settings: Settings = TypeAdapter(Settings).validate_python(current)
    except ValidationError as error:
        raise SettingsError(
            f"{path}: {first_problem(error, 'the file')}. Correct the file."
        ) from error
    except SettingsError as error:  # settings that do not fit each other
        raise SettingsError(f"{path}: {error}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())  # YAML's own has many lines
        raise SettingsError(
            f"{path} cannot be read as settings ({problem}). Expected a run.yaml as every run "
            "writes."
        ) from error
    if unknown := list(_unknown(current, asdict(settings))):
        meant = _place_of(unknown[0].rpartition(".")[2], asdict(settings))
        hint = f" Is {meant} meant?" if meant else ""
        raise SettingsError(
            f"{path}: there is no setting {unknown[0]}. Remove or correct it.{hint}"
        )
    if settings.preset not in PRESETS:
        raise SettingsError(
            f"{path}: preset is {settings.preset}, expected one of {', '.join(PRESETS)}."
        )
    return settings


class _Loader(yaml.SafeLoader):
    """Refuses a name that is there twice: YAML would take the later and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See `yaml.SafeLoader`."""
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for (key, _), name in zip(node.value, names, strict=True):
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name!r} is there twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


def _completed(stored: Any) -> Any:
    """Settings with those of their preset where they say nothing."""
    preset = PRESETS.get(str(stored.get("preset"))) if isinstance(stored, dict) else None
    if preset is None:
        return stored
    completed = {**asdict(preset()), **stored}
    for group, settings in asdict(preset()).items():
        if isinstance(settings, dict) and isinstance(completed[group], dict):
            completed[group] = {**settings, **completed[group]}
    return completed


def _place_of(name: str, known: Mapping[str, Any]) -> str | None:
    """Where a setting is that a file has elsewhere, such as optimization.epochs for epochs."""
    groups = ((group, inner) for group, inner in known.items() if isinstance(inner, dict))
    return next((f"{group}.{name}" for group, inner in groups if name in inner), None)


def _unknown(stored: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    for name, value in stored.items():
        if name not in known:
            yield name
        elif isinstance(value, dict) and isinstance(known[name], dict) and known[name]:
            yield from (f"{name}.{inner}" for inner in _unknown(value, known[name]))
