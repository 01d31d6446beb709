import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread

import onnx
import onnxruntime
import pytest
import torch

from export import bundle as bundle_module
from export import destination
from export.bundle import write_bundle
from export.errors import DestinationError, GateError, GraphError, InputError, SettingsError
from export.files import one_at_a_time
from export.gate.answers import Answers, onnx_answers, torch_answers
from export.gate.schema import ParityReport, Tolerances
from export.gate.tiles import Images
from export.precision.artefacts import PrecisionSettings
from export.precision.half import half_blocks
from export.settings import BundleSettings
from export.tensorrt.lint import engine_obstacles
from export.tensorrt.plan import read_engine_plan
from export.tensorrt.rules import load_rules
from serve.contract.machine import this_processor
from serve.contract.manifest import read_bundle
from tests.support import ROOT
from tests.support.errors import raises
from tests.support.meanwhile import before_call
from tests.support.openvino import needs_openvino
from train.model.checkpoint import CheckpointCard, load_checkpoint, read_card, save_checkpoint

FILES = {
    "MODEL_CARD.md",
    "engine_plan.json",
    "manifest.json",
    "model.fp16.onnx",
    "model.onnx",
    "parity.json",
    "parity_report.md",
    "warm_up.npz",
}
Export = Callable[..., Path]
QUICK = BundleSettings(num_parity_tiles=2, precision=PrecisionSettings(fp16=False))


@pytest.fixture
def asked() -> list[object]:
    """What torch's exporter was asked for."""
    return []


@pytest.fixture
def export(
    toy_run: Path,
    toy_graph: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[object],
) -> Export:
    """Exports the toy run, by default to `bundle`; torch's exporter would take its time."""

    def copy(deployable: object, path: Path, **settings: object) -> None:
        shutil.copyfile(toy_graph, path)
        asked.append(settings)

    def export_run(
        settings: BundleSettings, out: Path = tmp_path / "bundle", run: Path = toy_run
    ) -> Path:
        write_bundle(run, out, settings)
        return out

    monkeypatch.setattr("export.bundle.export_onnx", copy)
    return export_run


@pytest.fixture
def run_copy(toy_run: Path, tmp_path: Path) -> Path:
    """A copy of the toy run that a test may change."""
    return Path(shutil.copytree(toy_run, tmp_path / "run"))


def _halves(precision: PrecisionSettings, **tolerances: float) -> BundleSettings:
    """A quick export whose half precision passes, where `tolerances` do not forbid it."""
    loose = Tolerances(
        half_agreement=0.5,
        half_dice_loss=1.0,
        agreement_dice_loss=1.0,
        int8_agreement=0.5,
        int8_dice_loss=1.0,
    )
    return BundleSettings(
        num_parity_tiles=2, precision=precision, tolerances=replace(loose, **tolerances)
    )


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _report(bundle: Path) -> ParityReport:
    return ParityReport.model_validate_json((bundle / "parity.json").read_text(encoding="utf-8"))


def test_a_bundle_has_both_precisions_the_plan_the_card_and_the_reports(
    exported_bundle: Path,
) -> None:
    pictures = {name for name in _names(exported_bundle) if name.endswith(".png")}
    assert _names(exported_bundle) - pictures == FILES
    artefacts = read_bundle(exported_bundle).artefacts
    assert [artefact.precision for artefact in artefacts] == ["fp32", "fp16"]
    plan = read_engine_plan(exported_bundle)
    assert (plan.onnx_file, plan.onnx_sha256) == ("model.fp16.onnx", artefacts[1].sha256)


def test_all_files_have_the_mode_that_the_umask_gives(
    exported_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in exported_bundle.iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


@pytest.fixture
def other_card(run_copy: Path) -> CheckpointCard:
    """The card of a later epoch of the run."""
    return replace(read_card(run_copy), class_attention_bias=(7.0,) * 5)


def test_a_bundle_has_what_the_card_of_its_own_weights_says(
    export: Export, run_copy: Path, other_card: CheckpointCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter, _ = load_checkpoint(run_copy)
    later = partial(save_checkpoint, run_copy, segmenter, other_card)
    before_call(monkeypatch, bundle_module, "load_checkpoint", later)
    found = read_bundle(export(QUICK, run=run_copy))
    assert found.class_attention_bias == other_card.class_attention_bias


@pytest.mark.parametrize("place", ["validation_tiles", "write_warm_up"])
def test_a_bundle_names_its_own_weights_also_where_the_training_goes_on(
    export: Export,
    run_copy: Path,
    other_card: CheckpointCard,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    segmenter, card = load_checkpoint(run_copy)
    next(segmenter.parameters()).data += 1
    later = partial(save_checkpoint, run_copy, segmenter, other_card)
    before_call(monkeypatch, bundle_module, place, later)
    found = read_bundle(export(QUICK, run=run_copy))
    assert found.checkpoint_sha256 == card.weights_sha256 != read_card(run_copy).weights_sha256
    assert found.version == found.checkpoint_sha256[:12]
    assert found.class_attention_bias == card.class_attention_bias


def test_another_export_that_ends_just_now_is_no_folder_of_the_users(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = export(QUICK)
    away = bundle.with_name("away")

    def change() -> None:
        """As the other export does."""
        with one_at_a_time(bundle.parent):
            bundle.replace(away)
            time.sleep(0.3)
            away.replace(bundle)

    other = Thread(target=change)

    def begin() -> None:
        other.start()
        other.join(0.1)  # as far as it gets

    before_call(monkeypatch, destination, "_is_bundle", begin, at=1)
    export(QUICK)
    other.join()
    assert read_bundle(bundle)


def test_the_float32_graph_answers_as_torch(exported_bundle: Path) -> None:
    parity = read_bundle(exported_bundle).artefacts[0].parity
    assert parity.num_tiles == 8
    assert parity.label_agreement >= 0.9999
    assert parity.max_logit_difference is not None
    assert 0 < parity.max_logit_difference < 1e-3


def test_the_scale_certificate_is_in_the_manifest_the_report_and_the_card(
    exported_bundle: Path,
) -> None:
    found = read_bundle(exported_bundle).scale_certificate
    assert found is not None
    assert [point.factor for point in found.points] == [0.8, 0.9, 1.0, 1.1, 1.25]
    assert _report(exported_bundle).scale_certificate == found
    for name in ("parity_report.md", "MODEL_CARD.md"):
        text = (exported_bundle / name).read_text(encoding="utf-8")
        assert "parity_scale.png" in text
        assert f"{found.points[-1].label_agreement:.2%}" in text
    assert (exported_bundle / "parity_scale.png").is_file()


def test_both_graphs_have_the_same_interface_and_tensorrts_parser_would_take_them(
    exported_bundle: Path,
) -> None:
    graphs = [exported_bundle / name for name in ("model.onnx", "model.fp16.onnx")]
    assert [engine_obstacles(path) for path in graphs] == [(), ()]
    sessions = [onnxruntime.InferenceSession(path) for path in graphs]
    described = [
        [
            (entry.name, entry.type, entry.shape[1:])
            for entry in (*session.get_inputs(), *session.get_outputs())
        ]
        for session in sessions
    ]
    assert described[0] == described[1]


def test_a_graph_that_only_tensorrt_refuses_is_exported_and_the_plan_says_why_there_is_no_engine(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = load_rules()
    operators = {name: rule for name, rule in rules.operators.items() if name != "Softmax"}
    changed = rules.model_copy(update={"operators": operators})
    monkeypatch.setattr("export.tensorrt.lint.load_rules", lambda: changed)
    plan = read_engine_plan(export(QUICK))
    assert plan.onnx_file == "model.onnx"
    assert "operator Softmax" in plan.obstacles[0]


def test_parity_json_has_each_block_and_the_limit(exported_bundle: Path) -> None:
    report = _report(exported_bundle)
    blocks = {peak.block: peak for peak in report.peaks}
    assert report.activation_limit == pytest.approx(6_550.4)
    assert blocks["image_encoder.blocks.0"].computed_in == "half"
    assert blocks["mask_decoder.output_upscaling"].computed_in == "float32"
    assert 0 < blocks["image_encoder.blocks.0"].magnitude < report.activation_limit


def test_every_block_that_is_computed_in_half_was_audited(
    exported_bundle: Path, toy_graph: Path
) -> None:
    audited = {peak.block for peak in _report(exported_bundle).peaks}
    in_half = set(half_blocks(onnx.load(str(toy_graph))))
    assert len(in_half) >= 8
    assert in_half <= audited


def test_parity_json_has_the_emulation_of_half_precision(exported_bundle: Path) -> None:
    (half,) = [entry for entry in _report(exported_bundle).artefacts if entry.precision == "fp16"]
    assert half.emulation is not None
    assert half.emulation.num_tiles == 2
    assert half.emulation.nonfinite == {}


@pytest.mark.slow
def test_a_half_precision_graph_that_fails_is_left_out_and_the_report_says_why(
    export: Export, toy_data: Path
) -> None:
    settings = BundleSettings(
        validate=toy_data,
        precision=PrecisionSettings(auto_islands=False, num_emulated_tiles=0),
        tolerances=Tolerances(half_iou_score_difference=0.0),
    )
    bundle = export(settings)
    assert "model.fp16.onnx" not in _names(bundle)
    assert [artefact.file for artefact in read_bundle(bundle).artefacts] == ["model.onnx"]
    assert read_engine_plan(bundle).onnx_file == "model.onnx"
    assert not _report(bundle).artefacts[1].passed
    for name in ("parity_report.md", "MODEL_CARD.md"):
        assert "an IoU score differs by" in (bundle / name).read_text()


@pytest.mark.slow
def test_where_fp16_is_refused_the_engine_is_planned_from_bf16_which_is_emulated(
    export: Export, capsys: pytest.CaptureFixture[str]
) -> None:
    precision = PrecisionSettings(bf16=True, auto_islands=False, fp16_range_share=1e-9)
    limits = {"half_iou_score_difference": 1.0, "half_confidence_difference": 1.0}
    bundle = export(_halves(precision, **limits))
    assert read_engine_plan(bundle).onnx_file == "model.bf16.onnx"
    assert _report(bundle).artefacts[-1].measured_with == "emulation"
    said = " ".join(capsys.readouterr().out.split())
    assert "would be built from model.bf16.onnx: fp16 did not pass the gate" in said


@pytest.mark.slow
@pytest.mark.parametrize(("largest", "kept"), [(1.0, True), (0.0, False)])
def test_int8_is_kept_only_if_it_passes(export: Export, largest: float, kept: bool) -> None:
    precision = PrecisionSettings(fp16=False, int8=True)
    bundle = export(_halves(precision, int8_iou_score_difference=largest))
    assert ("model.int8.onnx" in _names(bundle)) is kept
    assert _report(bundle).artefacts[1].passed is kept


@pytest.mark.slow
@pytest.mark.parametrize("num_labels", [1, 2])
def test_agreement_in_one_label_alone_is_told(
    export: Export,
    num_labels: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found: list[Answers] = []

    def few(_: object, images: Images) -> Answers:
        if not found:
            answers = torch_answers(_, images)  # type: ignore[arg-type]
            found.append(replace(answers, labels=3 + answers.labels % num_labels))
        return found[0]

    monkeypatch.setattr("export.bundle.torch_answers", few)
    monkeypatch.setattr("export.bundle.onnx_answers", few)
    export(QUICK)
    said = "every pixel the label Inflammatory" in capsys.readouterr().out
    assert said == (num_labels == 1)


@pytest.mark.slow
def test_a_float32_graph_that_fails_leaves_the_earlier_bundle_and_a_report_until_one_passes(
    exported_bundle: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer_wrongly(*arguments: object) -> Answers:
        answers = onnx_answers(*arguments)  # type: ignore[arg-type]
        answers.labels[1] = 1 + answers.labels[1] % 5
        return answers

    bundle = Path(shutil.copytree(exported_bundle, tmp_path / "bundle"))
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    refused = tmp_path / "bundle-refused"
    monkeypatch.setattr("export.bundle.onnx_answers", answer_wrongly)
    with raises(GateError, "model.onnx", "tile drawn_1", refused / "parity_report.md"):
        export(QUICK)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    assert _names(tmp_path) == {"bundle", "bundle-refused"}
    assert _names(refused) == {"parity.json", "parity_report.md", "parity_fp32.png"}
    (found,) = _report(refused).artefacts
    assert not found.passed
    assert "drawn_1 (0.0000%)" in (refused / "parity_report.md").read_text(encoding="utf-8")
    monkeypatch.setattr("export.bundle.onnx_answers", onnx_answers)
    export(QUICK)
    assert _names(tmp_path) == {"bundle"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("largest", "in_openvino"),
    [(1.0, {"model.onnx": True, "model.bf16.onnx": True}), (0.0, {"model.onnx": True})],
)
def test_openvino_may_serve_what_passed_the_gate_there(
    export: Export, largest: float, in_openvino: dict[str, bool]
) -> None:
    needs_openvino("bf16")
    precision = PrecisionSettings(fp16=False, openvino=True, auto_islands=False)
    bundle = export(_halves(precision, half_iou_score_difference=largest))
    artefacts = read_bundle(bundle).artefacts
    assert {entry.file: entry.passed_with("openvino") for entry in artefacts} == in_openvino
    proofs = {(p.provider, p.processor) for entry in artefacts for p in entry.proofs}
    assert proofs == {(name, this_processor().kind) for name in ("cpu", "openvino")}
    titles = [found.title for found in _report(bundle).artefacts]
    assert titles == ["model.onnx", "model.onnx in OpenVINO", "model.bf16.onnx in OpenVINO"]


@pytest.mark.slow
def test_on_a_processor_without_bfloat16_only_float32_is_tried_in_openvino(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_openvino()
    monkeypatch.setattr(
        "serve.contract.openvino.problem",
        lambda precision: "no bfloat16" if precision == "bf16" else None,
    )
    bundle = export(replace(QUICK, precision=PrecisionSettings(fp16=False, openvino=True)))
    (artefact,) = read_bundle(bundle).artefacts
    assert (artefact.file, artefact.passed_with("openvino")) == ("model.onnx", True)


def test_without_openvino_nothing_may_be_served_there(exported_bundle: Path) -> None:
    assert not any(a.passed_with("openvino") for a in read_bundle(exported_bundle).artefacts)


@pytest.mark.slow
def test_an_unknown_island_leaves_nothing_behind(export: Export, tmp_path: Path) -> None:
    settings = BundleSettings(precision=PrecisionSettings(fp32_islands=("block_7",)))
    with raises(SettingsError, "block_7", "image_encoder.blocks.0"):
        export(settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_new_export_replaces_the_bundle_behind_a_link_whole_but_for_an_engines_timings(
    exported_bundle: Path, export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(exported_bundle, tmp_path / "bundle"))
    (bundle / "timing.cache").write_text("timings")
    (bundle / "model.plan").write_text("plan")
    link = tmp_path / "current"
    link.symlink_to(bundle)
    export(replace(QUICK, model_version="2"), link)
    assert link.readlink() == bundle
    assert read_bundle(bundle).version == "2"
    assert not {"model.fp16.onnx", "model.plan"} & _names(bundle)
    assert (bundle / "timing.cache").read_text() == "timings"
    assert f"{bundle / 'model.plan'} is of the earlier bundle" in capsys.readouterr().out
    assert _names(tmp_path) == {"bundle", "current"}


@pytest.mark.slow
def test_what_came_to_the_bundles_place_during_the_work_stays(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle"

    def answer(*arguments: object) -> Answers:
        bundle.mkdir()
        (bundle / "notes.txt").write_text("mine")
        return onnx_answers(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("export.bundle.onnx_answers", answer)
    with raises(DestinationError, bundle, "notes.txt"):
        export(QUICK)
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "notes.txt"]


@pytest.mark.slow
def test_attention_is_exported_as_asked_for_and_the_manifest_has_the_graphs_own_opset(
    export: Export, asked: list[object]
) -> None:
    settings = replace(QUICK, opset=24, positions="extended")
    assert read_bundle(export(settings)).opset == 20
    assert asked == [{"opset": 24, "form": settings.attention}]


def test_a_model_beyond_two_gibibytes_is_refused_before_any_work(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.graph.to_onnx.MAX_WEIGHTS_BYTES", 1000)
    with raises(GraphError, "tiny", "vit_tiny_patch16_224", "2 GiB"):
        write_bundle(toy_run, tmp_path / "bundle", BundleSettings())
    assert list(tmp_path.iterdir()) == []


def _flip_a_bit(run: Path) -> str:
    path = run / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    return "SHA-256"


def _spoil_a_weight(run: Path) -> str:
    segmenter, card = load_checkpoint(run)
    name, weight = next(iter(segmenter.named_parameters()))
    with torch.no_grad():
        weight.view(-1)[0] = torch.nan
    save_checkpoint(run, segmenter, card)
    return name


@pytest.mark.parametrize("spoil", [_flip_a_bit, _spoil_a_weight])
def test_weights_that_are_damaged_or_not_finite_are_refused_before_any_work(
    toy_run: Path, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    run = Path(shutil.copytree(toy_run, tmp_path / "run"))
    named = spoil(run)
    with raises(InputError, run / "model.safetensors", named):
        write_bundle(run, tmp_path / "bundle", BundleSettings())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_model_card_has_classes_biases_numbers_and_limits(exported_bundle: Path) -> None:
    card = (exported_bundle / "MODEL_CARD.md").read_text(encoding="utf-8")
    manifest = read_bundle(exported_bundle)
    for entry, bias in zip(manifest.classes, manifest.class_attention_bias, strict=True):
        cells = [line.split() for line in card.splitlines()]
        assert any({f"`{entry.color}`", f"{bias:+.3f}"} <= set(row) for row in cells), entry.name
    assert "**Research use only.**" in card
    (row,) = (line for line in card.splitlines() if line.startswith("| model.fp16.onnx"))
    assert f" {manifest.artefacts[1].parity.label_agreement:.4%} " in row
    assert "no published weights" in card


def test_no_file_of_the_bundle_names_a_path_of_this_machine(exported_bundle: Path) -> None:
    source = str(ROOT).encode()
    for path in exported_bundle.iterdir():
        assert source not in path.read_bytes(), path.name


def test_the_reports_are_plain_json_and_markdown(exported_bundle: Path) -> None:
    assert json.loads((exported_bundle / "parity.json").read_text())["schema_version"] == 2
    report = (exported_bundle / "parity_report.md").read_text(encoding="utf-8")
    assert "## Activations" in report
    assert all(line.endswith("|") for line in report.splitlines() if line.startswith("|"))
