"""Tables and verdicts against numbers worked out by hand."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from meerkat.comparison.results import Line, table, write_results
from meerkat.comparison.studies import Check, Comparison, Study
from meerkat.problems.problem import Better
from meerkat.report.facts import value_in_words

BETTER: dict[str, Better] = {"accuracy": "higher", "loss": "lower"}
Outcomes = Sequence[float | None]
"""One setting's accuracies, seed by seed; None where it diverged."""


def summary(accuracy: float, loss: float = 0.5) -> dict[str, Any]:
    return {
        **{"model": "/some/where/tiny", "task": "sst2", "accuracy": accuracy, "loss": loss, "accuracy_before": 0.25},
        **{"scores": {"accuracy": accuracy, "loss": loss}, "scores_before": {"accuracy": 0.25, "loss": 2.0}},
        "per_class": {"bad": accuracy / 2, "good": 1.0},
        **{"params_masked": 7, "payload_bytes_up": 120, "payload_bytes_down": 240, "client_steps": 30},
        "accuracy_worst_class": accuracy / 2,
        **{"calibration_steps": 0, "wall_s": 2.0, "theta_digest": "ab", "early_stopped_clients": [1]},
    }


ABSENT = 2
"""Runs of later seeds have no folder: they stand in evidence alone."""


def written(
    root: Path, outcomes: dict[Any, Outcomes], check: dict[str, Any] | None = None, axis: str = "local_steps"
) -> dict[str, Any]:
    """What is written of a study with one axis, whose values' outcomes are given. Losses are 1 - accuracy."""
    checks = [Check(claim="c", axis=axis, **check)] if check else []
    study = Study(name="s", axes={axis: list(outcomes)}, shared={"clients": 3, "rounds": 4}, check=checks)
    seeds = list(range(len(next(iter(outcomes.values())))))
    comparison = Comparison(seeds=seeds, studies=[study])
    study = comparison.studies[0]
    lines = [
        Line(
            study=study,
            setting={axis: value},
            rates=((0.1, 0.7), (0.2, math.nan)),
            lrs=(0.1,) * len(seeds),
            better=BETTER,
            runs=tuple(root / "cells" / f"{Path(str(value)).name}-{seed}" for seed in seeds),
            summaries=tuple(None if a is None else summary(a, 1 - a) for a in accuracies),
        )
        for value, accuracies in outcomes.items()
    ]
    for line in lines:
        for run in line.runs[:ABSENT]:
            run.mkdir(parents=True, exist_ok=True)
    results = write_results(comparison, lines, root)
    assert json.loads((root / "compare.json").read_text(), parse_constant=pytest.fail) == json.loads(
        json.dumps(results)
    )
    return results


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_means_deviations_and_bytes(tmp_path: Path) -> None:
    written(tmp_path, {1: [0.6, 0.7, 0.8], 2: [0.5, 0.5, 0.8]})
    first, second = read_csv(tmp_path / "table.csv")
    assert float(first["accuracy_mean"]) == pytest.approx(0.7)
    assert float(first["accuracy_worst_class"]) == pytest.approx(0.35)
    assert float(first["accuracy_sd"]) == pytest.approx(math.sqrt((0.1**2 + 0 + 0.1**2) / 2))
    assert float(second["accuracy_mean"]) == pytest.approx(0.6)
    assert float(second["accuracy_sd"]) == pytest.approx(math.sqrt((0.1**2 + 0.1**2 + 0.2**2) / 2))
    assert float(second["loss_mean"]) == pytest.approx(0.4)
    assert float(first["payload_bytes_up_per_client"]) == 40
    assert float(first["payload_bytes_down_per_client"]) == 80
    assert (first["best"], second["best"]) == ("True", "False")
    assert (first["local_steps"], first["seeds"], first["diverged"], first["rounds"]) == ("1", "3", "0", "4")


def test_every_run_is_a_line_that_can_be_read_back(tmp_path: Path) -> None:
    written(tmp_path, {1: [0.6, None], 2: [0.5, 0.9]})
    rows = read_csv(tmp_path / "results.csv")
    assert [(row["local_steps"], row["seed"], row["accuracy"], row["outcome"]) for row in rows] == [
        ("1", "0", "0.6", "finished"),
        ("1", "1", "", "diverged"),
        ("2", "0", "0.5", "finished"),
        ("2", "1", "0.9", "finished"),
    ]
    assert [row["run"] for row in rows] == ["cells/1-0", "cells/1-1", "cells/2-0", "cells/2-1"]
    assert {row["lr"] for row in rows} == {"0.1"}


def test_a_run_without_a_folder_names_none(tmp_path: Path) -> None:
    (row,) = written(tmp_path, {1: [0.6, 0.7, 0.8]})["studies"][0]["rows"]
    assert row["runs"] == ["cells/1-0", "cells/1-1"]
    assert [row["run"] for row in read_csv(tmp_path / "results.csv")] == ["cells/1-0", "cells/1-1", ""]


def test_what_was_excluded_and_masks_are_spelled_shortly(tmp_path: Path) -> None:
    written(tmp_path, {(): [0.5], ("norms", "embeddings"): [0.6]}, axis="exclude")
    assert [row["exclude"] for row in read_csv(tmp_path / "table.csv")] == ["none", "norms,embeddings"]
    written(tmp_path, {"/a/b/mine.safetensors": [0.5]}, axis="mask")
    assert [row["mask"] for row in read_csv(tmp_path / "results.csv")] == ["mine.safetensors"]


def test_a_setting_with_a_diverged_run_is_told_and_never_the_best(tmp_path: Path) -> None:
    results = written(tmp_path, {1: [0.99, None], 2: [0.5, 0.6], 4: [None, None]})
    rows = results["studies"][0]["rows"]
    assert [row["best"] for row in rows] == [False, True, False]
    assert [(row["seeds"], row["diverged"]) for row in rows] == [([0], [1]), ([0, 1], []), ([], [0, 1])]
    assert rows[0]["rates"] == [[0.1, 0.7], [0.2, None]]
    _, _, first, second, third = table(results).splitlines()
    assert "0.990 (1 of 2 diverged)" in first
    assert second.startswith("* 2")
    assert "0.550 +- 0.071" in second
    assert third.split()[:2] == ["4", "diverged"]


def test_the_best_is_bold_on_a_terminal_and_starred_elsewhere(tmp_path: Path) -> None:
    results = written(tmp_path, {1: [0.6], 2: [0.5]})
    assert [line[:2] for line in table(results).splitlines()[2:]] == ["* ", "  "]
    assert "\033" not in table(results)
    bold = [line for line in table(results, bold=True).splitlines() if "\033[1m" in line]
    assert len(bold) == 1
    assert bold[0].startswith("\033[1m* 1")


def verdict(root: Path, differences: Outcomes, **more: Any) -> dict[str, Any]:
    """The check that T = 1 beats T = 2, given its differences by seed, over seeds that differ by far more."""
    theirs = [0.1 + 0.2 * seed for seed in range(len(differences))]
    ours = [None if d is None else base + d for base, d in zip(theirs, differences, strict=True)]
    check = {"better": 1, "than": [2], **more}
    return dict(written(root, {1: ours, 2: theirs}, check)["studies"][0]["checks"][0])


T95_OF_3_SEEDS = 0.9 / math.sqrt(2 * 0.95 * 0.05)
"""Student's t with two degrees of freedom has its quantiles in closed form: (2p - 1) / sqrt(2p (1 - p))."""


def test_a_claim_holds_fails_or_is_undecided_by_its_paired_differences(tmp_path: Path) -> None:
    claim = verdict(tmp_path, [0.1, 0.2, 0.3])
    assert claim["mean"] == pytest.approx(0.2)
    assert claim["se"] == pytest.approx(0.1 / math.sqrt(3))
    assert claim["limit"] == pytest.approx(2.920 * claim["se"], rel=1e-3)  # Student's t, two degrees of freedom
    assert claim["verdict"] == "holds"  # 0.2 > 2.92 * 0.0577
    assert verdict(tmp_path, [-0.1, -0.2, -0.3])["verdict"] == "fails"
    assert verdict(tmp_path, [0.1, 0.1, 0.4])["verdict"] == "undecided"  # 0.2 < 2.92 * 0.1
    assert verdict(tmp_path, [0.0, 0.0, 0.0])["verdict"] == "undecided"


@pytest.mark.parametrize(("times", "expected"), [(0.999, "undecided"), (1.001, "holds")])
def test_the_limit_is_students_quantile(tmp_path: Path, times: float, expected: str) -> None:
    mean = times * T95_OF_3_SEEDS * 0.02 / math.sqrt(3)
    assert verdict(tmp_path, [mean - 0.02, mean, mean + 0.02])["verdict"] == expected


def test_two_seeds_ask_for_more_than_three(tmp_path: Path) -> None:
    limit = math.tan(0.45 * math.pi) * 0.01  # the quantile with one degree of freedom, times the standard error
    assert verdict(tmp_path, [limit * 0.999 - 0.01, limit * 0.999 + 0.01])["verdict"] == "undecided"
    assert verdict(tmp_path, [limit * 1.001 - 0.01, limit * 1.001 + 0.01])["verdict"] == "holds"


def test_one_seed_or_a_diverged_run_decides_nothing(tmp_path: Path) -> None:
    one = verdict(tmp_path, [0.5])
    assert (one["mean"], one["se"], one["verdict"]) == (pytest.approx(0.5), None, "undecided")
    for differences in ([0.5, None, 0.5], [None]):
        lost = verdict(tmp_path, differences)
        assert (lost["mean"], lost["se"], lost["verdict"]) == (None, None, "undecided")


def test_a_lower_loss_is_better(tmp_path: Path) -> None:
    claim = verdict(tmp_path, [0.1, 0.11, 0.12], measure="loss")  # losses are 1 - accuracy
    assert claim["mean"] == pytest.approx(0.11)
    assert claim["verdict"] == "holds"


def test_a_claim_over_several_holds_where_each_does(tmp_path: Path) -> None:
    outcomes = {1: [0.5, 0.6, 0.7], 2: [0.4, 0.5, 0.6], 4: [0.51, 0.61, 0.71]}
    claim = written(tmp_path, outcomes, {"better": 1, "than": [2, 4]})["studies"][0]["checks"][0]
    assert [d["mean"] for d in claim["differences"]] == pytest.approx([0.1, -0.01])
    assert [d["verdict"] for d in claim["differences"]] == ["holds", "fails"]
    assert claim["mean"] == pytest.approx(0.045)
    assert "fails: c (+0.045" in table(written(tmp_path, outcomes, {"better": 1, "than": [2, 4]}))


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ([0.52, 0.61, 0.69], "holds"),  # on average within the reference's own spread, 0.2
        ([0.1, 0.2, 0.31], "fails"),  # 0.4 below it at every seed
        ([0.9, 0.9, 0.65], "undecided"),  # outside the spread, but 0.22 is no clear difference
    ],
)
def test_two_are_the_same_within_the_references_spread(tmp_path: Path, ours: list[float], expected: str) -> None:
    outcomes = {1: ours, 2: [0.5, 0.6, 0.7]}
    claim = written(tmp_path, outcomes, {"equal": [1, 2]})["studies"][0]["checks"][0]
    assert claim["verdict"] == expected


def test_values_are_spelled_in_claims_as_in_tables(tmp_path: Path) -> None:
    masks = ["/a/public.safetensors", "/b/random.safetensors"]
    both = [(mask, []) for mask in masks] + [(masks[0], ["embeddings", "norms"])]
    for axis, value, other, said in (
        ("mask", *masks, "public.safetensors against random.safetensors"),
        ("exclude", [], ["embeddings", "norms"], "none against embeddings,norms"),
    ):
        check = Check(claim="c", axis=axis, better=value, than=[other])
        study = Study(
            name="s", axes={"mask": masks, "exclude": [[], ["embeddings", "norms"]]}, shared={}, check=[check]
        )
        comparison = Comparison(seeds=[0, 1], studies=[study])
        lines = [
            Line(
                study, {"mask": mask, "exclude": exclude}, (), (0.1,) * 2, BETTER, (tmp_path,) * 2, (summary(0.5),) * 2
            )
            for mask, exclude in both
        ]
        (claim,) = write_results(comparison, lines, tmp_path)["studies"][0]["checks"]
        assert claim["differences"][0]["setting"][axis] == said
        assert value_in_words(axis, said) == said
    assert value_in_words("mask", masks[0]) == "public.safetensors"
    assert (value_in_words("exclude", []), value_in_words("exclude", ["norms"])) == ("none", "norms")


def test_a_claim_speaks_of_the_settings_it_names_alone(tmp_path: Path) -> None:
    check = Check(claim="c", axis="method", better="meerkat", than=["full-fedzo"], where={"local_steps": 1})
    study = Study(name="s", axes={"method": ["meerkat", "full-fedzo"], "local_steps": [1, 2]}, shared={}, check=[check])
    comparison = Comparison(seeds=[0, 1], studies=[study])
    accuracies = {("meerkat", 1): 0.9, ("full-fedzo", 1): 0.6, ("meerkat", 2): 0.1, ("full-fedzo", 2): 0.8}
    lines = [
        Line(
            comparison.studies[0], setting, (), (0.1,) * 2, BETTER, (tmp_path,) * 2, (summary(a), summary(a + 0.01 * a))
        )
        for setting in study.settings()
        for a in [accuracies[setting["method"], setting["local_steps"]]]
    ]
    (claim,) = write_results(comparison, lines, tmp_path)["studies"][0]["checks"]
    (difference,) = claim["differences"]
    assert difference["setting"] == {"local_steps": 1, "method": "meerkat against full-fedzo"}
    assert difference["mean"] == pytest.approx(0.3 * 1.005)
