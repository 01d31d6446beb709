from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.gate.report import _counted, _share, draw_worst_tiles, picture_name, write_report
from export.gate.schema import ArtefactParity, BlockPeak, ParityReport, Runtime
from tests.support.toy_gate import CLASS_NAMES, painted_gate, relabelled
from train.settings import LabelClass

CLASSES = tuple(
    LabelClass(name=name, color=color)
    for name, color in zip(CLASS_NAMES, ("#d55e00", "#009e73", "#0072b2"), strict=True)
)
RED = (0xD6, 0x00, 0x1C)


def test_a_picture_shows_the_differing_pixels_in_red(tmp_path: Path) -> None:
    gate = painted_gate()
    answers = relabelled(gate, tile=1, num_pixels=60, label=1)
    found = gate.judge(answers, "model.fp16.onnx", "fp16")
    name = draw_worst_tiles(found, answers, gate, CLASSES, tmp_path)
    assert name == picture_name(found) == "parity_fp16.png"
    pixels = np.asarray(Image.open(tmp_path / name).convert("RGB"))
    right_edge = pixels[:, -pixels.shape[1] // 5 :]
    assert (right_edge == RED).all(axis=2).sum() > 500


def test_no_picture_is_drawn_where_no_label_differs(tmp_path: Path) -> None:
    gate = painted_gate()
    found = gate.judge(gate.expected, "model.onnx", "fp32")
    assert draw_worst_tiles(found, gate.expected, gate, CLASSES, tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def _report(*artefacts: ArtefactParity, has_masks: bool = True) -> ParityReport:
    return ParityReport(
        tiles="painted tiles",
        num_tiles=3,
        has_masks=has_masks,
        tolerances={"half_agreement": 0.995},
        activation_limit=6550.4,
        peaks=(BlockPeak(block="neck", magnitude=12.0, tile="tile_0", computed_in="half"),),
        artefacts=artefacts,
    )


def _written(report: ParityReport, folder: Path) -> str:
    write_report(report, ["parity_fp16.png"], folder)
    return (folder / "parity_report.md").read_text(encoding="utf-8")


def test_a_share_of_pixels_never_reads_as_none_and_one_pixel_is_no_plural() -> None:
    assert (_counted(1, "pixel"), _share(1 / 2**20)) == ("1 pixel", "below 0.001%")
    assert (_counted(1500, "pixel"), _share(0.25)) == ("1,500 pixels", "25.000%")


def test_the_report_says_what_the_scores_are_against_and_what_was_not_measured(
    tmp_path: Path,
) -> None:
    gate = painted_gate(masks=False)
    without_necrosis = np.where(gate.expected.labels == 3, 1, gate.expected.labels)
    expected = replace(gate.expected, labels=without_necrosis.astype(np.uint8))
    gate = replace(gate, expected=expected)
    found = gate.judge(expected, "model.onnx", "fp32")
    text = _written(_report(found, has_masks=False), tmp_path)
    assert "against torch's labels, as there are no masks" in text
    assert "Not measured, as torch finds none of it on these tiles: Necrosis." in text


@pytest.mark.parametrize(
    ("runtime", "sentence"),
    [
        ("emulation", "it is measured by the emulation alone."),
        ("OpenVINO", "it is measured by the emulation, and in OpenVINO."),
    ],
)
def test_the_report_says_how_its_own_bf16_was_measured(
    tmp_path: Path, runtime: Runtime, sentence: str
) -> None:
    gate = painted_gate()
    found = gate.judge(gate.expected, "model.bf16.onnx", "bf16", measured_with=runtime)
    text = _written(_report(found), tmp_path)
    assert sentence in text
    assert ("OpenVINO" in text) == (runtime == "OpenVINO")


def test_the_report_does_not_speak_of_forms_that_were_not_tried(tmp_path: Path) -> None:
    gate = painted_gate()
    text = _written(_report(gate.judge(gate.expected, "model.fp16.onnx", "fp16")), tmp_path)
    assert "bf16" not in text
    assert "OpenVINO" not in text


def test_the_report_says_what_failed_and_shows_it(tmp_path: Path) -> None:
    gate = painted_gate()
    answers = relabelled(gate, tile=2, num_pixels=3, label=2)
    found = gate.judge(answers, "model.fp16.onnx", "fp16")
    text = _written(_report(found), tmp_path)
    assert "- class Necrosis loses 0.50 Dice points" in text
    words = [line.split() for line in text.splitlines()]
    assert ["|", "model.fp16.onnx", "|", "**no**", "|"] in [row[:5] for row in words]
    assert ["|", "Necrosis", "(rarest)", "|", "300", "|"] in [row[:6] for row in words]
    assert "![Tiles that differ most](parity_fp16.png)" in text
    assert ["|", "neck", "|", "12.0", "|", "tile_0", "|", "yes", "|"] in words
