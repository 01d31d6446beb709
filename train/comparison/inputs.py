"""What the result of a row depends on, and what has changed since it was trained."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.model.checkpoint import CARD_FILE, read_card, weights_file
from train.model.weight_files import weights_sha256
from train.presets import PRESETS
from train.settings import Settings, upgrade_settings

Inputs = dict[str, Any]
"""As JSON: contents, not paths."""


def inputs_of(settings: Settings, fingerprint: str, baseline: Path | None) -> Inputs:
    """Everything that a result depends on.

    Args:
        settings: Of the run.
        fingerprint: SHA-256 of the data set.
        baseline: The run whose Dice the bias starts from, if it needs one.
    """
    fields = asdict(settings)
    del fields["augmentation"]["num_workers"]
    fields["runtime"] = {"patience": settings.runtime.patience}
    weights = fields["weights"]
    for name in ("sam_weights", "pathology_weights"):
        weights[name] = weights[name] and weights_sha256(Path(weights[name]))
    if weights["from_run"] is not None:
        weights["from_run"] = weights_sha256(weights_file(Path(weights["from_run"])))
    inputs: Inputs = {"settings": fields, "data_sha256": fingerprint}
    if baseline is not None and (baseline / CARD_FILE).is_file():
        card = read_card(baseline)
        inputs["baseline_dice"] = [card.metrics[f"dice/{c.name}"] for c in card.classes]
    read_back: Inputs = json.loads(json.dumps(inputs, default=str))
    return read_back


def changes(before: Inputs, now: Inputs, preset: str) -> list[str]:
    """Name what differs between two inputs, such as `epochs 2 -> 3`.

    Settings that only an earlier version had are ignored; those that it did not have count as the
    preset's.
    """
    defaults = {"settings": asdict(PRESETS[preset]())}
    before = {**before, "settings": upgrade_settings(before.get("settings"))}
    return list(_differences(before, now, defaults))


def _differences(old: Any, new: Any, defaults: Any, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in new:
            default = defaults.get(key)
            yield from _differences(old.get(key, default), new[key], default, key)
    elif json.dumps(old) != json.dumps(new):  # as text, a Dice that is NaN equals itself
        yield name if name.endswith("sha256") else f"{name} {old} -> {new}"
