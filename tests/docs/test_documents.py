"""What the documents name exists: files, headings, options, variables, metrics and targets."""

import csv
import re
from functools import cache
from pathlib import Path

import pytest

from serve.service.telemetry import Telemetry
from serve.settings import _NOT_SETTINGS, ENVIRONMENT_PREFIX, ServeSettings
from tests.support import ROOT
from tests.support.deployed import metrics_in, metrics_of

DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "deploy/**/*.md") for path in ROOT.glob(pattern)
)
FOREIGN = {  # options of docker, pip, Ray, sbatch, Triton and others
    *("--address", "--array", "--build-arg", "--constraint", "--env", "--exclude-editable"),
    *("--find-links", "--head", "--model-control-mode", "--no-index", "--publish", "--tag"),
    *("--target", "--trace-config", "--volume", "--wheel-dir"),
}
WRITTEN_BY_USERS = {"deploy/api-keys"}
names = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.S)


def code_of(text: str) -> str:
    """Blocks of code and what stands in backticks."""
    blocks = re.findall(r"```.*?```", text, flags=re.S)
    return "\n".join([*blocks, *re.findall(r"`([^`]+)`", without_code(text))])


@cache
def anchors_of(document: Path) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(document.read_text(encoding="utf-8")), re.M)
    plain = [re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", text).lower() for text in headings]
    return {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in plain}


@cache
def sources() -> str:
    folders = ("train", "export", "serve", "benchmarks")
    files = [path for name in folders for path in sorted((ROOT / name).rglob("*.py"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


@names
def test_links_lead_to_files_and_headings(document: Path) -> None:
    text = without_code(document.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


@names
def test_code_that_is_named_by_its_path_exists(document: Path) -> None:
    folders = "train|export|serve|benchmarks|tests|docs|deploy"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", document.read_text(encoding="utf-8")):
        assert (ROOT / path).exists() or path in WRITTEN_BY_USERS, path


@pytest.mark.slow
@names
def test_options_are_those_of_a_command(document: Path) -> None:
    found = re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", code_of(document.read_text(encoding="utf-8")))
    for option in sorted({*found} - FOREIGN):
        name = option[2:].rpartition(".")[2].removeprefix("no-").replace("-", "_")
        field = re.search(rf'\b{name}: |{option}"|"{name.replace("_", "-")}"', sources())
        assert field, f"{option} is no option of FocalPath"


@names
def test_variables_are_settings(document: Path) -> None:
    found = re.findall(rf"{ENVIRONMENT_PREFIX}([A-Z_]+)\b", document.read_text(encoding="utf-8"))
    assert {name.lower() for name in found} <= {*ServeSettings.model_fields, *_NOT_SETTINGS}


@names
def test_metrics_are_those_of_the_service(document: Path) -> None:
    named = metrics_in([document.read_text(encoding="utf-8")], "focalpath_")
    assert named <= metrics_of(Telemetry().render().decode())


@pytest.mark.parametrize("data", ["glas", "glas_two_classes", "ocelot"])
def test_make_repeats_every_row_of_the_comparisons_of_real_tissue(data: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (trained,) = re.findall(r"--rows ([\w ]+)\n", re.sub(r"[ \t]+", " ", makefile))
    with (ROOT / "docs/results" / data / "intervals.csv").open(encoding="utf-8") as table:
        assert {line["row"] for line in csv.DictReader(table)} <= {*trained.split()}


@names
def test_targets_of_make_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = makefile.partition(".PHONY:")[2].partition("\n\n")[0].split()
    code = code_of(document.read_text(encoding="utf-8"))
    for target in re.findall(r"(?:^|[\s(])make ([a-z][\w-]*)", code):
        assert target in phony, f"make {target}"
