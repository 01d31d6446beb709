import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve.contract.errors import BundleError
from serve.contract.manifest import MANIFEST_FILE, Manifest, interface, read_bundle
from tests.support.errors import raises


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))


def _edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / MANIFEST_FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_written_manifest_reads_back_the_same(bundle: Path, tmp_path: Path) -> None:
    manifest = read_bundle(bundle)
    manifest.write(tmp_path)
    assert Manifest.model_validate_json((tmp_path / MANIFEST_FILE).read_text()) == manifest


def test_a_missing_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with raises(BundleError, "manifest.json", "make export", code="bundle_missing"):
        read_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tile_size_px": "large"}, "tile_size_px is 'large'; expected a whole number"),
        ({"classes": [{"name": "Tumor"}]}, "classes.0.color is missing"),
        ({"mpp": [0.5]}, "mpp is [0.5]; expected a number"),
        ({"mpp": float("inf")}, "mpp is inf; expected a finite number"),
        ({"version": ""}, "version is ''"),
        ({"max_batch_size": 2**31}, "max_batch_size is 2147483648; expected at most 1024"),
        ({"colour_space": "sRGB"}, "colour_space"),
        ({"schema_version": 2}, "schema_version"),
    ],
)
def test_a_wrong_value_is_told_in_plain_words(
    bundle: Path, change: dict[str, object], problem: str
) -> None:
    _edit(bundle, lambda content: content.update(change))
    with raises(BundleError, problem, "Export the checkpoint again"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: content["classes"][1].update(name="Tumor"), "'Tumor' twice"),
        (lambda content: content["artefacts"][0].update(file="../model.onnx"), "artefacts.0.file"),
        (lambda content: content["classes"].pop(), "inputs and outputs"),
        (lambda content: content["class_attention_bias"].pop(), "class_attention_bias has 4"),
    ],
    ids=["one name twice", "a file outside", "another interface", "a bias of another length"],
)
def test_parts_that_do_not_fit_are_refused(
    bundle: Path, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    _edit(bundle, change)
    with raises(BundleError, problem):
        read_bundle(bundle)


@pytest.mark.parametrize(
    "content", [b"{", b"", b"[" * 100_000, b"\xff\xfe{\0}\0", b'{"opset": ' + b"9" * 5000 + b"}"]
)
def test_a_manifest_that_is_no_json_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST_FILE).write_bytes(content)
    with raises(BundleError, "schema version 1"):
        read_bundle(bundle)


def test_a_changed_byte_in_a_file_is_found_by_its_checksum(bundle: Path) -> None:
    model = bytearray((bundle / "model.onnx").read_bytes())
    model[100] ^= 1
    (bundle / "model.onnx").write_bytes(model)
    with raises(BundleError, "model.onnx", code="bundle_damaged"):
        read_bundle(bundle)


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    with raises(BundleError, "model.onnx", code="bundle_incomplete"):
        read_bundle(bundle)


def test_the_interface_has_probabilities_at_a_quarter_of_the_resolution() -> None:
    _, outputs = interface(256, 5)
    assert {spec.name: spec.shape for spec in outputs}["low_res_probabilities"] == (-1, 5, 64, 64)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"openvino": {"num_tiles": 4, "label_agreement": 0.99995}},
            {"cpu": 1.0, "openvino": 0.99995},
        ),
        ({"precision": "bf16", "openvino": None}, {}),
    ],
    ids=["passed in both", "not tried"],
)
def test_an_older_bundle_keeps_what_it_had_passed_in(
    bundle: Path, changes: dict[str, object], expected: dict[str, float]
) -> None:
    def make_older(content: dict[str, Any]) -> None:
        (artefact,) = content["artefacts"]
        for name in ("proofs", "min_agreement"):
            del artefact[name]
        artefact |= changes

    _edit(bundle, make_older)
    (artefact,) = read_bundle(bundle).artefacts
    assert {p.provider: p.parity.label_agreement for p in artefact.proofs} == expected
    assert {proof.processor for proof in artefact.proofs} <= {None}
    assert artefact.passed_with("openvino") == ("openvino" in expected)
    assert not artefact.is_proven("openvino", "x86_64 AMD avx2")
