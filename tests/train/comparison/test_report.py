import csv
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.toy_comparison import CLASSES, NUM_TILES, confusion, toy_comparison, with_panels
from tests.support.toy_data import toy_settings
from train.cli import Compare, Prepare, main
from train.comparison.bootstrap import Bootstrap, seed_scores
from train.comparison.figures import correlate
from train.comparison.methods import RowName, paper_rows
from train.comparison.report import findings, write_report
from train.comparison.reproduce import commands
from train.comparison.tables import Table1, difference_table, latex_text, markdown_table
from train.data.synthetic.dataset import SyntheticSettings
from train.metrics import class_scores
from train.model.class_bias import STRATEGIES, BiasStrategy, no_bias
from train.settings import (
    AugmentationSettings,
    OptimizationSettings,
    RuntimeSettings,
    TissueClass,
    WeightsSettings,
)

BASE: RowName = "base_with_focal"
ALL_ROWS = list(paper_rows())


@pytest.fixture(scope="module")
def report(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of all rows, each a little better than the one before, two seeds."""
    folder = tmp_path_factory.mktemp("report")
    accuracies = {name: (0.7 + 0.02 * i, 0.71 + 0.02 * i) for i, name in enumerate(ALL_ROWS)}
    minutes = {name: 2.0 for name in ALL_ROWS} | {"hcfa": 3.0}
    comparison = toy_comparison(accuracies, minutes=minutes)
    comparison = with_panels(comparison, toy_data, folder / "panels")
    write_report(comparison, folder / "report")
    return folder / "report"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Bootstrap


def test_a_rows_dice_is_that_of_its_pooled_tiles():
    bootstrap = Bootstrap(toy_comparison({BASE: (0.8,)}))
    pooled = class_scores(torch.from_numpy(confusion(0.8).sum(axis=0)))
    estimates = [interval.estimate for interval in bootstrap.dice(BASE)]
    assert estimates == pytest.approx([pooled.mean_dice, *pooled.dice.tolist()])


def test_an_interval_is_that_of_pooled_resamples_drawn_one_by_one():
    tiles = confusion(0.8)
    rng = np.random.default_rng(7)
    means = [
        class_scores(torch.from_numpy(tiles[rng.integers(0, NUM_TILES, NUM_TILES)].sum(axis=0)))
        .dice.mean()
        .item()
        for _ in range(3000)
    ]
    interval = Bootstrap(toy_comparison({BASE: (0.8,)})).dice(BASE)[0]
    width = interval.high - interval.low
    expected = np.quantile(means, [0.025, 0.975])
    assert [interval.low, interval.high] == pytest.approx(expected, abs=0.05 * width)


def test_differences_are_paired_so_that_equal_rows_differ_by_nothing():
    bootstrap = Bootstrap(toy_comparison({BASE: (0.8, 0.82), "dfa": (0.8, 0.82)}))
    assert bootstrap.dice("dfa")[0].high > bootstrap.dice("dfa")[0].low
    assert bootstrap.differences("dfa")[0].interval == (0, 0, 0)


def test_seeds_are_averaged():
    bootstrap = Bootstrap(toy_comparison({BASE: (0.7, 0.8), "dfa": (0.8, 0.8)}))
    difference = bootstrap.differences("dfa")[0]
    assert difference.per_seed[1] == 0
    assert difference.interval.estimate == pytest.approx(difference.per_seed[0] / 2)


def test_a_class_that_is_neither_there_nor_predicted_is_in_no_mean():
    comparison = toy_comparison({BASE: (0.8,)})
    result = comparison.results[BASE, 0]
    tiles = result.confusion.copy()
    tiles[:, 4, :] = tiles[:, :, 4] = 0
    comparison.results[BASE, 0] = replace(result, confusion=tiles)
    mean, *classes = Bootstrap(comparison).dice(BASE)
    assert np.isnan(classes[4]).all()
    assert mean.estimate == pytest.approx(np.mean([interval.estimate for interval in classes[:4]]))
    assert mean.low < mean.estimate < mean.high


@pytest.mark.parametrize(
    ("dfa", "verdict"),
    [
        ((0.80, 0.80), "higher"),
        ((0.60, 0.60), "lower"),
        ((0.70, 0.70), "undecided"),
        ((0.69, 0.80), "undecided"),
    ],
)
def test_a_difference_is_told_only_if_the_interval_and_every_seed_agree(
    dfa: tuple[float, float], verdict: str
):
    difference = Bootstrap(toy_comparison({BASE: (0.7, 0.7), "dfa": dfa})).differences("dfa")[0]
    assert difference.verdict == verdict


# Sentences


def sentences(**accuracies: tuple[float, ...]) -> str:
    return "\n".join(findings(Bootstrap(toy_comparison({BASE: (0.7, 0.72), **accuracies}))))


@pytest.mark.parametrize(
    ("dfa", "sentence"),
    [
        ((0.8, 0.8), "DFA beats the baseline here."),
        ((0.6, 0.6), "DFA is worse than the baseline here."),
        ((0.7, 0.72), "DFA is not shown to beat the baseline here."),
    ],
)
def test_the_report_says_whether_dfa_beats_the_baseline(dfa: tuple[float, float], sentence: str):
    assert sentence in sentences(dfa=dfa)


@pytest.mark.parametrize(
    ("frozen", "sentence"),
    [
        ((0.75, 0.75), "Learning the bias adds to its frequency prior here."),
        ((0.85, 0.85), "Learning the bias is worse than keeping its frequency prior"),
        ((0.8, 0.8), "this run does not support the claim that delta learns more than frequency"),
    ],
)
def test_the_report_says_whether_learning_adds_to_the_prior(
    frozen: tuple[float, float], sentence: str
):
    assert sentence in sentences(dfa=(0.8, 0.8), dfa_frozen=frozen)


def test_seeds_that_disagree_are_told():
    text = sentences(dfa=(0.69, 0.9))
    assert "which leaves out 0; positive in 1 of 2 seeds, so the seeds disagree" in text


def test_one_seed_is_told_to_be_one():
    comparison = toy_comparison({BASE: (0.7,), "dfa": (0.8,)})
    assert "one seed was trained" in findings(Bootstrap(comparison))[0]
    assert "±" not in Table1(comparison).markdown()


def test_rows_that_did_not_take_part_are_not_spoken_of():
    text = sentences(cffa=(0.8, 0.8))
    assert "better: CFFA" in text
    assert "DFA" not in text


@pytest.mark.parametrize(
    ("cffa", "dfa", "sentence"),
    [
        ((0.71, 0.75), (0.70, 0.76), "**The seeds differ more than the methods do.**"),
        ((0.71, 0.75), (0.90, 0.96), "**The seeds differ more than some methods do.**"),
        ((0.90, 0.94), (0.90, 0.96), None),
    ],
)
def test_seeds_that_differ_more_than_methods_are_told_first(
    cffa: tuple[float, float], dfa: tuple[float, float], sentence: str | None
):
    comparison = toy_comparison({BASE: (0.70, 0.74), "cffa": cffa, "dfa": dfa})
    first = findings(Bootstrap(comparison))[0]
    if sentence is None:
        assert "seeds differ more" not in first
    else:
        assert first.startswith(sentence)
        assert "CFFA +0." in first


# Tables


def test_table_1_has_mean_and_sample_deviation_over_seeds(report: Path):
    expected = seed_scores(toy_comparison({BASE: (0.72, 0.73)}), BASE, "dice")
    line = next(row for row in read(report / "table1.csv") if row["class"] == "Necrosis")
    assert float(line[f"{BASE}_dice_mean"]) == pytest.approx(expected[:, 4].mean(), abs=1e-5)
    assert float(line[f"{BASE}_dice_std"]) == pytest.approx(expected[:, 4].std(ddof=1), abs=1e-5)


def test_table_1_has_a_line_a_class_and_no_published_numbers_for_other_data(report: Path):
    rows = read(report / "table1.csv")
    assert [row["class"] for row in rows] == ["Mean", *(entry.name for entry in CLASSES)]
    assert not [column for column in rows[0] if "published" in column]


def test_the_published_numbers_stand_beside_ours():
    settings = replace(toy_settings(), preset="bcss")
    table = Table1(toy_comparison({BASE: (0.7,), "dfa": (0.8,)}, settings=settings))
    lines = table.markdown().splitlines()
    inflammatory = next(i for i, line in enumerate(lines) if line.startswith("| Inflammatory"))
    assert lines[inflammatory + 1] == "| *published* | *0.5537* | *0.6493* |"
    assert r"\quad\textit{published} & \textit{0.7336} & \textit{0.5882}" in table.latex("")


def test_the_published_numbers_are_of_the_same_classes_only():
    settings = replace(toy_settings(), preset="bcss")
    classes = (*CLASSES[:4], TissueClass(name="Fat", color="#000000"))
    assert not Table1(toy_comparison({BASE: (0.7,)}, settings=settings, classes=classes)).published


def test_the_highest_mean_is_bold_and_ties_are_not():
    better = Table1(toy_comparison({BASE: (0.7,), "dfa": (0.8,)})).markdown()
    assert "| Mean | 0." in better
    assert all(line.count("**") == 2 for line in better.splitlines() if "| 0." in line)
    assert "**" not in Table1(toy_comparison({BASE: (0.7,), "dfa": (0.7,)})).markdown()


def test_latex_lines_all_have_the_same_columns(report: Path):
    lines = (report / "table1.tex").read_text(encoding="utf-8").splitlines()
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert [line.count("&") for line in body] == [10] * (1 + len(CLASSES))
    assert all(line.endswith(r"\\") for line in body)


def test_markup_in_class_names_is_escaped():
    assert latex_text("H&E_50%") == r"H\&E\_50\%"
    assert r"a\|b" in markdown_table(["Class"], [["a|b"]])


def test_the_ablation_is_told_against_dfa():
    comparison = toy_comparison({BASE: (0.7,), "dfa": (0.8,), "dfa_frozen": (0.8,)})
    table = difference_table(Bootstrap(comparison), comparison.rows, "dfa")
    frozen = table.splitlines()[-1]
    assert frozen.startswith("| DFA, frozen at its prior |")
    assert "+0.0000 [+0.0000, +0.0000]" in frozen
    assert frozen.endswith("undecided |")


# The whole report


def test_the_report_has_every_file_it_links_to(report: Path):
    text = (report / "README.md").read_text(encoding="utf-8")
    for name in ("table1.csv", "table1.md", "table1.tex", "intervals.csv", "bias.csv"):
        assert f"({name})" in text
        assert (report / name).stat().st_size > 0


def test_figures_are_vectors_and_pictures(report: Path):
    for number in (2, 3, 4):
        assert (report / f"figure{number}.pdf").read_bytes().startswith(b"%PDF")
        with Image.open(report / f"figure{number}.png") as picture:
            colors = picture.convert("RGB").getcolors(1 << 20)
            assert picture.width > 500
            assert colors is not None
            assert len(colors) > 10


def test_hcfas_time_is_that_of_both_stages(report: Path):
    text = (report / "README.md").read_text(encoding="utf-8")
    assert "3.00 min for the baseline whose Dice it needs, 4.50 min for itself, 7.50 min" in text
    assert "DFA in one: 3.00 min, 60% less." in text
    assert "CPU time of a training" in text
    assert "| HCFA | 4.50 ± 0.00 | 3.00 ± 0.00 |" in text


@pytest.mark.parametrize(("threads", "told"), [(1, False), (4, True)])
def test_trainings_that_waited_for_their_cores_are_told_to_have(
    threads: int, told: bool, toy_data: Path, tmp_path: Path
):
    device = f"CPU (x86_64, threads: {threads})"  # 1.5 CPU minutes in one
    comparison = toy_comparison({BASE: (0.7,)}, device=device)
    write_report(with_panels(comparison, toy_data, tmp_path / "panels"), tmp_path / "r")
    text = (tmp_path / "r" / "README.md").read_text(encoding="utf-8")
    assert ("had 38% of the cores they asked for" in text) == told


def test_on_a_gpu_wall_clock_counts(toy_data: Path, tmp_path: Path):
    accuracies = {name: (0.7,) for name in (BASE, "hcfa", "dfa")}
    minutes = {name: 2.0 for name in accuracies}
    comparison = toy_comparison(accuracies, minutes=minutes, device="NVIDIA A100")
    write_report(with_panels(comparison, toy_data, tmp_path / "panels"), tmp_path / "r")
    text = (tmp_path / "r" / "README.md").read_text(encoding="utf-8")
    assert "DFA in one: 2.00 min, 50% less." in text
    assert "Wall-clock of a training, validation included, on NVIDIA A100" in text


def test_intervals_are_written_for_every_row_and_class(report: Path):
    rows = read(report / "intervals.csv")
    assert len(rows) == len(ALL_ROWS) * (1 + len(CLASSES))
    for row in rows:
        low, high = float(row["difference_low"]), float(row["difference_high"])
        assert low <= float(row["difference"]) <= high


def test_synthetic_tissue_is_said_not_to_be_tissue(report: Path):
    assert "say nothing about real tissue" in (report / "README.md").read_text(encoding="utf-8")


def test_254_classes_have_a_report(toy_data: Path, tmp_path: Path):
    """That the figures keep their axes is a warning, and so an error, of matplotlib."""
    classes = tuple(
        TissueClass(name=f"class {i}", color=f"#{i:02x}{255 - i:02x}40") for i in range(254)
    )
    comparison = toy_comparison({BASE: (0.7, 0.71), "dfa": (0.8, 0.81)}, classes=classes)
    write_report(with_panels(comparison, toy_data, tmp_path / "panels"), tmp_path / "r")
    text = (tmp_path / "r" / "README.md").read_text(encoding="utf-8")
    assert "With 254 classes the figures name none" in text


def test_the_commands_of_the_report_make_the_same_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = SyntheticSettings(num_train=96, mpp=0.25)
    data = tmp_path / "data"
    data.mkdir()
    (data / "settings.json").write_text(json.dumps({"generator_version": 1, **asdict(recipe)}))
    toy = toy_settings()
    settings = toy_settings(
        model=replace(toy.model, encoders_frozen=True, pathology_mean=(0.5, 0.25, 0.125)),
        weights=WeightsSettings(sam_weights="sam.pth", random_encoders=True),
        runtime=RuntimeSettings(embedding_cache="CACHE"),
        augmentation=AugmentationSettings(augment="dihedral", num_workers=0),
        optimization=OptimizationSettings(seed=3),
    )
    comparison = toy_comparison({BASE: (0.7, 0.7), "dfa": (0.8, 0.8)}, settings=settings)
    comparison = replace(comparison, data=replace(comparison.data, root=data))
    found: list[Any] = []
    for command in (Prepare, Compare):
        monkeypatch.setattr(command, "run", lambda self: found.append(self))
    for line in commands(comparison):
        monkeypatch.setattr(sys, "argv", line.split()[2:])
        main()
    prepare, compare = found
    assert prepare.settings == recipe
    assert (compare.settings, compare.seeds, compare.rows) == (settings, 2, (BASE, "dfa"))


def test_the_report_tells_how_to_make_it_again_without_this_machines_folders(
    toy_data: Path, tmp_path: Path
):
    weights = WeightsSettings(sam_weights="/home/me/sam.pth")
    comparison = toy_comparison({BASE: (0.7,)}, settings=toy_settings(weights=weights))
    write_report(with_panels(comparison, toy_data, tmp_path / "panels"), tmp_path / "r")
    text = (tmp_path / "r" / "README.md").read_text(encoding="utf-8")
    assert "python -m train compare synthetic --data DATA --out OUT --seeds 1 --rows" in text
    assert "--sam-weights sam.pth" in text
    assert "/home" not in text + (tmp_path / "r" / "settings.json").read_text()


@pytest.mark.parametrize("preset", ["synthetic", "bcss"])
def test_a_registered_strategy_is_in_every_table(
    preset: str, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a data set of the paper, too, which has no number for it."""
    strategy = BiasStrategy(
        name="toy", title="Toy bias", help="Half.", initial=no_bias, learned=True
    )
    monkeypatch.setitem(STRATEGIES, "toy", strategy)
    settings = replace(toy_settings(), preset=preset)
    comparison = toy_comparison({BASE: (0.7, 0.71), "toy": (0.8, 0.81)}, settings=settings)
    write_report(with_panels(comparison, toy_data, tmp_path / "panels"), tmp_path / "r")
    for name in ("README.md", "table1.md", "table1.tex"):
        assert "Toy bias" in (tmp_path / "r" / name).read_text(encoding="utf-8")
    for name in ("intervals.csv", "times.csv"):
        assert "toy" in {row["row"] for row in read(tmp_path / "r" / name)}
    assert "toy_mean" in read(tmp_path / "r" / "bias.csv")[0]
    published = [
        row["toy_dice_published"] for row in read(tmp_path / "r" / "table1.csv") if preset == "bcss"
    ]
    assert not any(published)


# Correlations


def test_a_correlation_is_that_of_numpy_and_of_ranks():
    x, y = np.array([0.1, 0.4, 0.5, 0.9]), np.array([2.0, 1.5, 0.2, 0.4])
    found = correlate(x, y)
    assert found is not None
    assert found.pearson == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks = np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1]
    assert found.spearman == pytest.approx(ranks)
    assert [found.slope, found.intercept] == pytest.approx(np.polyfit(x, y, 1))


@pytest.mark.parametrize("y", [[1.0, 2.0], [1.0, 1.0, 1.0]])
def test_two_classes_or_equal_values_have_no_correlation(y: list[float]):
    assert correlate(np.linspace(0, 1, len(y)), np.array(y)) is None
