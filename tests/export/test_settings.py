import pytest
import tyro
from pydantic import ValidationError

from export.errors import SettingsError
from export.graph.attention import AttentionForm
from export.settings import BundleSettings
from serve.contract.manifest import Manifest
from serve.contract.refusal import as_flag
from tests.support.errors import raises


@pytest.mark.parametrize(
    "values",
    [
        {"opset": 19},
        {"opset": 25},
        {"max_batch_size": 0},
        {"num_parity_tiles": 0},
        {"max_queries": -1},
        {"model_version": ""},
        {"name": "My model"},
    ],
)
def test_what_would_fail_after_the_work_is_refused_before_it(
    values: dict[str, object],
) -> None:
    with raises(SettingsError, *map(as_flag, values), *values.values()):
        BundleSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a", "segmenter", "0-b_c", "-a", "_", "A", "a b", "a.b", ""])
def test_a_name_is_taken_where_the_manifest_takes_it(name: str, manifest: Manifest) -> None:
    def passes(make: object) -> bool:
        try:
            make()  # type: ignore[operator]
        except (SettingsError, ValidationError):
            return False
        return True

    values = manifest.model_dump() | {"name": name}
    assert passes(lambda: BundleSettings(name=name)) is passes(
        lambda: Manifest.model_validate(values)
    )


@pytest.fixture
def manifest(toy_bundle) -> Manifest:
    return Manifest.model_validate_json((toy_bundle / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "form"),
    [
        ([], AttentionForm()),
        (["--opset", "23"], AttentionForm(operator=True)),
        (
            ["--positions", "extended", "--max-queries", "None"],
            AttentionForm(positions="extended", max_queries=None),
        ),
    ],
)
def test_attention_is_written_as_asked_for(arguments: list[str], form: AttentionForm) -> None:
    assert tyro.cli(BundleSettings, args=arguments).attention == form
