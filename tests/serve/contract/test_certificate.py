import json
import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError

from serve.contract.certificate import ScaleCertificate, ScalePoint
from serve.contract.errors import BundleError
from serve.contract.manifest import MANIFEST_FILE, read_bundle
from tests.support.errors import raises
from tests.support.toy_bundle import CLASSES

NAMES = ("Tumor", "Necrosis")


def certificate(
    *points: tuple[float, float, float], has_masks: bool = True, num_classes: int = 2
) -> ScaleCertificate:
    """One of (factor, label agreement, Dice of the last class)."""
    others = (1.0,) * (num_classes - 1)
    return ScaleCertificate(
        num_tiles=4,
        has_masks=has_masks,
        real_detail_from=1.0,
        min_agreement=0.95,
        max_dice_loss=0.05,
        points=tuple(
            ScalePoint(factor=factor, label_agreement=agreement, dice=(*others, dice))
            for factor, agreement, dice in points
        ),
    )


CURVE = certificate((0.8, 0.99, 0.9), (1.0, 1.0, 0.9), (1.25, 0.93, 0.8))


@pytest.mark.parametrize("mpp", [0.25, 0.4, 0.45, 0.5, 0.53])
def test_nothing_is_told_where_the_certificate_holds(mpp: float) -> None:
    assert CURVE.warning(mpp, 0.5, NAMES) is None


def test_between_two_points_the_curve_is_linear() -> None:
    point = CURVE.at(1.125)
    assert point.label_agreement == pytest.approx(0.965)
    assert point.dice == (1.0, pytest.approx(0.85))


def test_labels_that_change_and_a_class_that_loses_are_both_told_with_their_numbers() -> None:
    warning = CURVE.warning(0.625, 0.5, NAMES)
    assert warning is not None
    for value in (
        "0.625",
        "1.25 times",
        "0.5",
        "93.0%",
        "95%",
        "Necrosis",
        "10.0 Dice",
        "at most 5",
    ):
        assert value in warning


def test_a_class_that_is_lost_is_told_though_nearly_all_labels_stay() -> None:
    rare = certificate((1.0, 1.0, 0.9), (1.25, 0.99, 0.7))
    warning = rare.warning(0.6, 0.5, NAMES)
    assert warning is not None
    assert "Necrosis" in warning
    assert "labels" not in warning


def test_an_image_that_is_coarser_than_all_that_was_measured_is_always_told_of() -> None:
    good = certificate((1.0, 1.0, 0.9), (1.25, 0.99, 0.9))
    assert "1.25 times" in (good.warning(1.0, 0.5, NAMES) or "")
    assert good.warning(0.625, 0.5, NAMES) is None


def test_a_class_that_was_not_measured_loses_nothing() -> None:
    points = (
        ScalePoint(factor=1.0, label_agreement=1.0, dice=(0.9, None)),
        ScalePoint(factor=1.25, label_agreement=0.97, dice=(0.9, 0.0)),
    )
    assert CURVE.model_copy(update={"points": points}).warning(0.6, 0.5, NAMES) is None


@pytest.mark.parametrize(
    "factors", [(0.8, 1.25), (1.25, 1.0), (1.0, 1.0)], ids=["no 1", "falling", "twice"]
)
def test_a_curve_without_its_own_scale_or_out_of_order_is_refused(
    factors: tuple[float, ...],
) -> None:
    with pytest.raises(ValidationError):
        certificate(*((factor, 1.0, 1.0) for factor in factors))


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))


def test_a_bundle_from_before_certificates_loads_and_warns_of_nothing(bundle: Path) -> None:
    content = json.loads((bundle / MANIFEST_FILE).read_text())
    del content["scale_certificate"]
    (bundle / MANIFEST_FILE).write_text(json.dumps(content))
    manifest = read_bundle(bundle)
    assert manifest.scale_certificate is None
    assert manifest.scale_warning(5.0) is None


def test_a_certificate_of_another_number_of_classes_is_refused(bundle: Path) -> None:
    certified = read_bundle(bundle).model_copy(update={"scale_certificate": CURVE})
    certified.write(bundle)
    with raises(BundleError, "scale_certificate", len(CLASSES)):
        read_bundle(bundle)
