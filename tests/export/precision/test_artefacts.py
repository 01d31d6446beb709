from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from export.gate.answers import onnx_answers
from export.gate.gate import Gate
from export.gate.schema import ArtefactParity, Tolerances
from export.gate.tiles import ValidationTiles
from export.precision.artefacts import HalfMaker, PrecisionSettings
from export.precision.audit import Peak
from tests.support.half_graphs import FIRST, SECOND, two_blocks

PEAKS = {FIRST: Peak(10.0, "tile_0"), SECOND: Peak(9_000.0, "tile_1")}


@pytest.fixture
def said() -> list[str]:
    return []


def _maker(folder: Path, said: list[str], gain: float = 1.0, **settings: object) -> HalfMaker:
    source = folder / "with_logits.onnx"
    onnx.save(two_blocks(gain=gain), str(source))
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    gate = Gate(
        tiles=ValidationTiles(
            source="noise", names=("tile_0", "tile_1"), images=images, masks=None
        ),
        expected=onnx_answers(source, images),
        class_names=("A", "B", "C", "D"),
        class_shares=(0.25,) * 4,
        tolerances=Tolerances(half_agreement=0.9),
    )
    return HalfMaker(
        source,
        "fp16",
        gate,
        PrecisionSettings(**settings),  # type: ignore[arg-type]
        said.append,
    )


def _make(
    folder: Path, said: list[str], peaks: dict[str, Peak] | None = None, **settings: object
) -> ArtefactParity:
    maker = _maker(folder, said, **settings)  # type: ignore[arg-type]
    return maker.make(folder / "half.onnx", peaks or {})[0]


def test_a_harmless_model_is_all_in_half(tmp_path: Path, said: list[str]) -> None:
    found = _make(tmp_path, said)
    assert (found.passed, found.fp32_islands, said) == (True, (), [])


def test_a_block_beyond_the_limit_becomes_an_island_and_is_named(
    tmp_path: Path, said: list[str]
) -> None:
    found = _make(tmp_path, said, PEAKS)
    assert found.fp32_islands == (SECOND,)
    assert said == [f"Kept in float32: {SECOND} reaches 9,000 on tile tile_1, more than 6,550"]
    types = {
        info.name: info.type.tensor_type.elem_type
        for info in onnx.load(str(tmp_path / "half.onnx")).graph.value_info
    }
    assert (types["first"], types["second"]) == (TensorProto.FLOAT16, TensorProto.FLOAT)


def test_without_automatic_islands_such_a_block_is_refused_by_name(
    tmp_path: Path, said: list[str]
) -> None:
    found = _make(tmp_path, said, PEAKS, auto_islands=False)
    assert not found.passed
    refusal = found.failures[0]
    for value in (SECOND, "9,000", "tile_1", "6,550", "--fp32-islands", "--no-auto-islands"):
        assert value in refusal


def test_a_named_island_satisfies_the_audit(tmp_path: Path, said: list[str]) -> None:
    found = _make(tmp_path, said, PEAKS, auto_islands=False, fp32_islands=(SECOND,))
    assert (found.passed, found.fp32_islands) == (True, (SECOND,))


def test_a_constant_beyond_float16_becomes_an_island(tmp_path: Path, said: list[str]) -> None:
    found = _make(tmp_path, said, gain=1e6)
    assert (found.passed, found.fp32_islands) == (True, (FIRST,))
    (message,) = said
    for value in (FIRST, "gain", "1e+06", "65,504"):
        assert value in message


def test_without_automatic_islands_such_a_constant_is_a_refusal_and_no_end(
    tmp_path: Path, said: list[str]
) -> None:
    found = _make(tmp_path, said, gain=1e6, auto_islands=False)
    (refusal,) = found.failures
    for value in (FIRST, "gain", "1e+06", "65,504", "--fp32-islands", "--no-auto-islands"):
        assert value in refusal


def test_half_precision_of_which_nothing_is_left_is_refused(
    tmp_path: Path, said: list[str]
) -> None:
    found = _make(tmp_path, said, PEAKS, gain=1e6)
    assert not found.passed
    assert found.failures[0] == "every block would have to stay in float32"
    assert not (tmp_path / "half.onnx").exists()


def test_the_limit_is_a_setting(tmp_path: Path, said: list[str]) -> None:
    assert _make(tmp_path, said, PEAKS, fp16_range_share=0.5).fp32_islands == ()


def test_a_failing_gate_is_bisected_to_the_block_that_overflows(
    tmp_path: Path, said: list[str]
) -> None:
    # The audit was told nothing; the emulation sees the overflow.
    found = _make(tmp_path, said, gain=60_000.0)
    assert (found.passed, found.fp32_islands) == (True, (FIRST,))
    assert "looking for islands" in said[0]
    assert said[1] == f"{FIRST} stay in float32 so that model.fp16.onnx passes"


def test_without_automatic_islands_a_failing_gate_is_the_end(
    tmp_path: Path, said: list[str]
) -> None:
    found = _make(tmp_path, said, gain=60_000.0, auto_islands=False)
    assert not found.passed
    assert FIRST in found.failures[0]


def test_without_tiles_to_emulate_on_the_overflow_passes_unseen(
    tmp_path: Path, said: list[str]
) -> None:
    """Why the emulation is there."""
    found = _make(tmp_path, said, gain=60_000.0, num_emulated_tiles=0)
    assert (found.passed, found.emulation) == (True, None)
