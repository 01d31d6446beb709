import pytest
import tyro

from export.graph.attention import AttentionForm
from export.settings import BundleSettings
from serve.contract.manifest import Manifest
from train.errors import FocalPathError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"opset": 19}, "opset is 19; give 20 to 24"),
        ({"opset": 25}, "opset is 25; give 20 to 24"),
        ({"max_batch_size": 0}, "max_batch_size is 0; give 1 or more"),
        ({"num_parity_tiles": 0}, "num_parity_tiles is 0; give 1 or more"),
        ({"max_queries": -1}, "max_queries is -1; give 1 or more"),
        ({"model_version": ""}, "model_version is empty"),
        ({"name": "My model"}, "name is 'My model'; give lowercase letters"),
        ({"name": "model\n"}, "give lowercase letters"),
    ],
)
def test_what_would_fail_after_the_work_is_refused_before_it(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(FocalPathError, match=message):
        BundleSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a", "segmenter", "0-b_c", "-a", "_", "A", "a b", "a.b", ""])
def test_a_name_is_taken_where_the_manifest_takes_it(name: str, manifest: Manifest) -> None:
    def passes(make: object) -> bool:
        try:
            make()  # type: ignore[operator]
        except ValueError:
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
            AttentionForm(
                global_positions="extended", window_positions="extended", max_queries=None
            ),
        ),
    ],
)
def test_attention_is_written_as_asked_for(arguments: list[str], form: AttentionForm) -> None:
    assert tyro.cli(BundleSettings, args=arguments).attention == form
