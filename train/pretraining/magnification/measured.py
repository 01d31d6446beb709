"""Stores measurements, so that a study continues where it stopped.

OUT/measured/NAME/seedN.json   what `Evaluation.measure` found of one encoder, with a key

The key identifies the encoder's weights, the tiles and the settings. A new key is measured again.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from torch import nn

from train.files import whole_file
from train.pretraining.magnification.evaluate import EncoderResult, Evaluation

_VERSION = 2
"""Increased when the same encoder and tiles start to give other numbers."""


def measured_once(evaluation: Evaluation, encoder: nn.Module, path: Path) -> EncoderResult:
    """Measure an encoder, or return the stored result for the same encoder and tiles.

    Args:
        evaluation: the tiles.
        encoder: a timm vision transformer.
        path: the file that keeps the result.
    """
    key = _key(evaluation, encoder)
    if (kept := _read(path, key)) is not None:
        return kept
    result = evaluation.measure(encoder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(
            json.dumps({"key": key, **asdict(result)}, default=_listed), encoding="utf-8"
        )
    return result


def _listed(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return np.round(value, 6).tolist()
    raise TypeError(f"{type(value)} cannot be kept")


def _key(evaluation: Evaluation, encoder: nn.Module) -> str:
    digest = hashlib.sha256(f"{_VERSION};{evaluation.fingerprint};".encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, key: str) -> EncoderResult | None:
    """The stored result; None where it is missing, damaged or of another encoder or tiles."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("key") == key:
            return TypeAdapter(EncoderResult).validate_python(content)
    except (OSError, ValueError, TypeError):
        pass
    return None
