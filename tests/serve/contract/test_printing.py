"""Every command prints in every locale."""

import io
import sys
from collections.abc import Callable
from contextlib import suppress

import pytest

from export.cli import run as export
from serve.cli import main as serve
from serve.client.segment_files import main as segment
from train.cli import main as train


@pytest.mark.parametrize(
    "command",
    [
        lambda: serve(["segment", "gone.png"]),
        lambda: segment(["gone.png"]),
        lambda: export(["gone"]),
        train,
    ],
    ids=["serve", "focalpath-segment", "export", "train"],
)
def test_a_letter_that_a_terminal_lacks_ends_no_command(
    command: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    monkeypatch.setattr(sys, "argv", ["train", "check", "gone"])
    with suppress(SystemExit):
        command()
    print("Drüse ■", flush=True)
    assert written.getvalue().endswith(b"Dr?se ?\n")
