"""scripts/evidence.py: the page of runs, their verdicts, and what is left out where runs are missing."""

import csv
import importlib.util
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_compare import InThisProcess

from meerkat.cli import main
from meerkat.comparison import processes
from meerkat.comparison.evidence import Origin
from meerkat.comparison.studies import Check, read_comparison

SCRIPT = Path(__file__).parents[1] / "scripts" / "evidence.py"

STUDY = """
title = "What moves"
seeds = [0, 1]
search = { trials = 3 }
dtype = "float32"

[[study]]
name = "masks"
title = "Equally many"
note = "The paper: it does."
local_steps = [1, 2]
method = ["meerkat", "random-mask"]
check = [{ claim = "it wins", axis = "method", better = "meerkat", than = ["random-mask"], measure = "loss" }]
"""


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("evidence_page", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = _load()


@pytest.fixture(scope="module")
def folder(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with claims/masks.toml and evidence/runs.csv, complete."""
    root = tmp_path_factory.mktemp("page")
    (root / "claims").mkdir()
    (root / "evidence").mkdir()
    of_rows = {"task": "sst2", "density": 0.01, "clients": 3, "partition": "iid", "batch_size": 4, "total_steps": 4}
    of_rows["eps"] = 1e-3
    toml = root / "claims" / "masks.toml"
    toml.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in of_rows.items()) + STUDY)
    paths = [f"--{name}={federation / place}" for name, place in (("model", "model"), ("data", "data"))]
    paths += [f"--text={federation / 'text.jsonl'}", f"--evidence={root / 'evidence' / 'runs.csv'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "ProcessPoolExecutor", InThisProcess)
        assert main(["compare", str(toml), *paths, "--out", str(root / "out")]) == 0
    return root


def _page(folder: Path) -> str:
    text: str = script.page(folder / "claims", folder / "evidence")
    return text


def test_it_says_what_the_comparison_says(folder: Path) -> None:
    page = _page(folder)
    content = json.loads((folder / "out" / "compare.json").read_text())
    (study,) = content["studies"]
    assert "## What moves" in page
    assert "The paper: it does." in page
    for row in study["rows"]:
        loss = sum(row["loss"]) / 2
        accuracy = sum(row["accuracy"]) / 2
        line = next(
            line
            for line in page.splitlines()
            if line.startswith(f"| T = {row['setting']['local_steps']}, {row['setting']['method']} ")
        )
        assert f" {accuracy:.3f} ± " in line
        assert f"; {loss:.3f} ± " in line
        assert f"; {row['lr']:g}" in line
    for pair in study["checks"][0]["differences"]:
        assert f"| T = {pair['setting']['local_steps']} | **" in page
        assert f"{pair['mean']:+.3f} (" in page
    assert "meerkat compare examples/claims/real/masks.toml --model model --data DATA --text TEXT --evidence" in page
    assert "--dtype" not in page


def test_the_measured_rate_stands_beside_the_best_of_its_search(folder: Path) -> None:
    with (folder / "evidence" / "runs.csv").open(newline="") as rows:
        trials = [row for row in csv.DictReader(rows) if float(row["held_back"])]
    for method, steps in itertools.product(("meerkat", "random-mask"), ("1", "2")):
        search = [row for row in trials if (row["method"], row["local_steps"]) == (method, steps)]
        (measured,) = (row for row in search if "lr" not in json.loads(row["settings"]))
        best = min(search, key=lambda row: float(row["loss"]))
        more = float(measured["loss"]) / float(best["loss"]) - 1
        cell = f"{float(best['lr']) / float(measured['lr']):.2g}; {more:+.0%}"
        assert f"| {method}, T = {steps}, rounds {4 // int(steps)}, u = 0.01, iid | {cell} |" in _page(folder)


def test_what_has_not_been_run_is_left_out(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "evidence" / "runs.csv"
    lines = file.read_text().splitlines(keepends=True)
    with file.open(newline="") as rows:
        kept = [row["method"] != "random-mask" or row["local_steps"] != "1" for row in csv.DictReader(rows)]
    file.write_text("".join([lines[0], *itertools.compress(lines[1:], kept)]))
    page = _page(tmp_path)
    assert "| T = 1, meerkat |" in page
    assert "| T = 1, random-mask |" not in page
    assert "| T = 2 |" in page
    assert "| T = 1 |" not in page
    file.unlink()
    assert "## What moves" not in _page(tmp_path)


def _more_accurate(row: dict[str, str], by: float) -> dict[str, str]:
    summary = json.loads(row["summary"])
    summary["scores"]["accuracy"] += by
    return row | {"summary": json.dumps(summary)}


@pytest.mark.parametrize(
    ("more", "said"),
    [((0.0, 0.0), "the same runs"), ((0.01, 0.02), "**holds** +0.015 (-0.049 to +0.079); 2 seeds")],
)
def test_types_are_compared_in_one_table(folder: Path, tmp_path: Path, more: tuple[float, float], said: str) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "evidence" / "runs.csv"
    with file.open(newline="") as rows:
        runs = list(csv.DictReader(rows))
    ours = [r for r in runs if (r["method"], r["local_steps"], float(r["held_back"])) == ("meerkat", "1", 0)]
    both = [
        _more_accurate(row, by)
        | {"dtype": "bfloat16", "settings": row["settings"].replace('"dtype": "float32"', '"dtype": "bfloat16"')}
        for row, by in zip(ours, more, strict=True)
    ]
    with file.open("a", newline="") as out:
        csv.DictWriter(out, runs[0], lineterminator="\n").writerows(both)
    shared = (tmp_path / "claims" / "masks.toml").read_text().partition("search =")[0].replace("What moves", "Types")
    both_types = '["bfloat16", "float32"]'
    study = f'dtype = {both_types}\ncheck = [{{ claim = "as well", axis = "dtype", equal = {both_types} }}]\n'
    text = f'{shared}lr = {ours[0]["lr"]}\n[[study]]\nname = "types"\n{study}'
    (tmp_path / "claims" / "types.toml").write_text(text)
    page = _page(tmp_path)
    assert "meerkat compare examples/claims/real/types.toml --model model --data DATA --text TEXT --evidence" in page
    assert f"| as well | dtype bfloat16 against float32 | {said} |" in page
    (of_types,) = re.findall(r"## Types\n.*?(?=\n## )", page, re.DOTALL)
    for dtype in ("bfloat16", "float32"):
        assert f"| dtype {dtype} |" in of_types


def test_further_seeds_count_where_both_sides_have_them(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "evidence" / "runs.csv"
    with file.open(newline="") as rows:
        runs = list(csv.DictReader(rows))
    second = [row for row in runs if row["seed"] == "1"]
    third = [row | {"seed": "2", "settings": row["settings"].replace('"seed": 1', '"seed": 2')} for row in second]
    third = [row for row in third if row["local_steps"] == "1" or row["method"] == "meerkat"]
    with file.open("a", newline="") as out:
        csv.DictWriter(out, runs[0], lineterminator="\n").writerows(third)
    before, page = _page(folder), _page(tmp_path)

    def line(page: str, start: str) -> str:
        return next(line for line in page.splitlines() if start in line)

    assert line(page, "| T = 2, meerkat |") != line(before, "| T = 2, meerkat |")
    assert line(page, "| T = 2, random-mask |") == line(before, "| T = 2, random-mask |")
    assert "; 2 seeds" in line(page, "| T = 2, random-mask |")
    assert line(page, "| T = 2 | **") == line(before, "| T = 2 | **")
    assert "; 2 seeds" in line(before, "| T = 1 | **")
    assert "; 2 seeds" not in line(page, "| T = 1 | **")


def _summary(method: str, before: float, accuracy: float, sent: int) -> dict[str, Any]:
    scores = {"scores_before": {"accuracy": before, "loss": 1.0}, "scores": {"accuracy": accuracy, "loss": 0.5}}
    payload = {"payload_bytes_up": sent, "payload_bytes_down": sent, "dense_bytes_per_client_round": 4000}
    return {"method": method, "clients": 2, "params_total": 1000, "params_masked": 10, **scores, **payload}


def test_bytes_are_counted_to_the_end_of_the_shortest_runs_that_gain_enough() -> None:
    """Means over seeds: one of two that gains enough is not enough."""
    axes = {
        "method": ["lora-fedzo", "meerkat", "full-fedzo"],
        "rounds": [30, 5, 15],
        "local_steps": 1,
        "batch_size": 4,
        "clients": 8,
    }
    (study,) = read_comparison(None, axes).studies
    accuracies = {"meerkat": {5: (0.5, 0.56), 15: (0.54, 0.57), 30: (0.6, 0.62)}, "full-fedzo": {5: (0.5, 0.4)}}
    accuracies["lora-fedzo"] = {5: (193 / 300, 193 / 300)}  # from 163 of 300: a gain of .1, but for rounding
    before = {"lora-fedzo": 163 / 300}
    lines = [
        script.Line(
            study=study,
            setting={"method": method, "rounds": rounds},
            rates=(),
            lrs=(1.0, 1.0),
            better={},
            runs=(Path("0"), Path("1")),
            summaries=tuple(_summary(method, before.get(method, 0.5), accuracy, 8 * rounds) for accuracy in of_seeds),
        )
        for method, of_method in accuracies.items()
        for rounds, of_seeds in of_method.items()
    ]
    group = script.Group(Origin("m", "r", ""), "reviews", "float32", "embedded")
    page = "\n".join(script._bytes(study, [script.Block(group, lines, {})]))
    assert "| meerkat | +0.05 | 120 (15 rounds) |" in page
    assert "| meerkat | +0.1 | 240 (30 rounds) |" in page
    assert "| full-fedzo | +0.05 | not reached |" in page
    assert "| all parameters | 8,000 |" in page
    assert "| the mask's entries | 80 |" in page
    assert "| LoRA's adapters | 80 |" in page
    assert "| lora-fedzo | +0.1 | 40 (5 rounds, the only length tried) |" in page
    one_length = [line for line in lines if line.setting["rounds"] == 5]
    assert not script._is_compared(study, one_length)
    assert script._is_compared(study, lines)


def test_the_map_shows_where_stopping_early_helps(tmp_path: Path) -> None:
    claim = {"claim": "it helps", "axis": "method", "better": "meerkat-vp", "than": ["meerkat"], "measure": "loss"}
    axes = {"partition": ["mixed:2", "mixed:4"], "local_steps": [10], "method": ["meerkat", "meerkat-vp"]}
    comparison = read_comparison(None, {**axes, "batch_size": 4, "clients": 8})
    (study,) = comparison.studies
    study = study.model_copy(update={"check": [Check.model_validate(claim)]})
    comparison = comparison.model_copy(update={"studies": [study]})
    group = script.Group(Origin("m", "r", ""), "topics", "float32", "embedded")

    def verdict(partition: str, difference: float) -> Any:
        at = {"partition": partition, "local_steps": 10}
        return script.Verdict("it helps", at, "", "meerkat", "loss", difference, 0.1, 3)

    def shown(*verdicts: Any) -> list[str]:
        block = script.Block(group, [], {study.name: verdicts})
        return list(script.draw_map(comparison, [block], tmp_path / "map.png"))

    diverged = verdict("mixed:4", math.nan)
    assert not shown(diverged)
    assert not (tmp_path / "map.png").exists()
    assert shown(verdict("mixed:2", 0.2), diverged)[0] == "![Where stopping early helps](evidence/map.png)"
    assert (tmp_path / "map.png").exists()


def test_a_mask_says_how_concentrated_sensitivity_is(tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    curve = [[1e-4, 0.1], [1e-3, 0.5], [1e-2, 0.59], [1.0, 1.0]]
    tensors = {"model.layers.0.mlp.up.weight": 3, "model.layers.1.mlp.up.weight": 1, "model.layers.2.a.q.weight": 4}
    about = {"concentration": json.dumps(curve), "by_tensor": tensors, "params_masked": 8, "params_total": 8000}
    (tmp_path / "mask-m.json").write_text(json.dumps(about))
    page = script.page(tmp_path / "claims", tmp_path)
    assert "| m | 50 | 0.50 | up 0.50, q 0.50 | 0.88 | 0.67 |" in page


def test_a_peer_is_shown_at_the_rate_of_its_lowest_held_back_loss(tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    same = {
        "program": "DeComFL",
        "model": "m",
        "partition": "iid",
        "clients": 2,
        "batch_size": 16,
        "rounds": 60,
        "rows_forwarded": 3840,
    }
    runs = [
        {**same, "lr": lr, "held_back": 0.1, "seed": 0, "scores": {"accuracy": 0.5, "loss": lr}} for lr in (2, 1, 3)
    ]
    runs.append({**runs[0], "program": "HiSo", "lr": 5, "scores": {"accuracy": 0.5, "loss": 0.0}})
    runs += [{**runs[0], "lr": 4, "scores": {"accuracy": 0.5, "loss": math.nan}}, {**runs[0], "model": "trials alone"}]
    final = {**same, "held_back": 0.0, "scores": {"accuracy": 0.6, "loss": 0.5}}
    runs += [{**final, "lr": lr, "seed": seed} for lr, seed in ((1, 0), (1, 1), (1, 1), (2, 0))]
    (tmp_path / "programs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    page = script.page(tmp_path / "claims", tmp_path)
    assert "| DeComFL | m | iid | 2 of 16 rows, 60 | 1 | 4 | 0.600 ± 0.000 | 0.500 ± 0.000 |  |  |" in page
    assert "trials alone" not in page


MEERKAT = ("meerkat", "1", 0.0)
"""Method, T and share of held-back rows of Meerkat's own runs at T = 1."""


def _is(row: dict[str, str]) -> tuple[str, str, float]:
    return row["method"], row["local_steps"], float(row["held_back"])


def test_a_peer_s_runs_are_paired_with_meerkat_s_in_the_same_form(folder: Path, tmp_path: Path) -> None:
    """Its losses are .1 and .3 higher."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with (folder / "evidence" / "runs.csv").open(newline="") as rows:
        ours = [row for row in csv.DictReader(rows) if _is(row) == MEERKAT]
    same = {"program": "Peer", "model": ours[0]["model"], "partition": "iid", "lr": 1.0, "rows_forwarded": 96}
    same |= {"clients": 3, "batch_size": 4, "rounds": 4}
    runs = [
        same | {"seed": i, "held_back": held_back, "scores": {"accuracy": 0.5, "loss": float(row["loss"]) + more}}
        for i, (row, more) in enumerate(zip(ours, (0.1, 0.3), strict=True))
        for held_back in (0.0, 0.1)
    ]
    (tmp_path / "evidence" / "programs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    (line,) = (line for line in _page(tmp_path).splitlines() if line.startswith("| Peer | "))
    assert "| **undecided** +0.200 (-1.071 to +1.471); 2 seeds; needs 5 seeds |" in line


def _at_rate(row: dict[str, str], lr: float, more: float) -> dict[str, str]:
    summary = json.loads(row["summary"])
    summary["lr"] = lr
    summary["loss"] += more
    summary["scores"]["loss"] += more
    settings = json.dumps({**json.loads(row["settings"]), "lr": lr})
    return row | {"lr": str(lr), "settings": settings, "loss": str(summary["loss"]), "summary": json.dumps(summary)}


def test_what_another_search_s_better_rate_would_change_is_told(folder: Path, tmp_path: Path) -> None:
    """A second file has the same settings, but a finer search, whose rate is better on held-back rows."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    toml, file = tmp_path / "claims" / "masks.toml", tmp_path / "evidence" / "runs.csv"
    finer = toml.read_text().replace("trials = 3", "trials = 3, factor = 1.5").replace("What moves", "Finer")
    (tmp_path / "claims" / "finer.toml").write_text(finer)
    assert "; at best rates" not in _page(tmp_path)
    with file.open(newline="") as rows:
        runs = list(csv.DictReader(rows))
    (measured,) = (r for r in runs if _is(r)[:2] == MEERKAT[:2] and _is(r)[2] and "lr" not in json.loads(r["settings"]))
    lower, lowest = (float(f"{float(measured['lr']) / 1.5**places:.3g}") for places in (1, 2))
    made = [_at_rate(measured, lower, -0.5), _at_rate(measured, lowest, 1.0)]
    made += [
        _at_rate(row, lower, more) for row, more in zip([r for r in runs if _is(r) == MEERKAT], (-9, -9), strict=True)
    ]
    with file.open("a", newline="") as out:
        csv.DictWriter(out, runs[0], lineterminator="\n").writerows(made)
    page = _page(tmp_path)
    of_masks = page.split("## What moves")[1].split("\n## ")[0]
    (line,) = (line for line in of_masks.splitlines() if line.startswith("| it wins | T = 1 | "))
    before, after = line.split("; at best rates ")
    assert before.split("**")[1] == "undecided"
    assert after.split("**")[1] == "holds"
    assert r"| it wins | undecided (1), undecided\* (1) |" in page


@given(st.floats(-2, 2), st.floats(1e-3, 2), st.integers(2, 9))
def test_verdicts_follow_from_their_interval(difference: float, half: float, seeds: int) -> None:
    verdict = script.Verdict("c", {}, "", "b", "loss", difference, half, seeds)
    low, high = difference - half, difference + half
    assert verdict.word == ("holds" if low > 0 else "fails" if high < 0 else "undecided")
    assert verdict.words.startswith(f"**{verdict.word}** {difference:+.3f} ({low:+.3f} to {high:+.3f})")
    assert ("; needs " in verdict.words) == (verdict.word == "undecided")


@given(st.floats(-0.2, 0.2), st.floats(1e-3, 0.2))
def test_as_well_means_not_much_worse(difference: float, half: float) -> None:
    verdict = script.Verdict("c", {}, "", "b", "loss", difference, half, 3, as_well=True)
    low, high = difference - half, difference + half
    assert verdict.word == ("holds" if low > -0.05 else "fails" if high < -0.05 else "undecided")


@pytest.mark.parametrize(("seeds", "t"), [(2, 12.706), (10, 2.262), (11, 2.228), (31, 2.042), (101, 1.984)])
def test_quantiles_are_those_of_tables(seeds: int, t: float) -> None:
    assert script.quantile(seeds) == pytest.approx(t, abs=0.004)


def test_how_many_seeds_would_settle_it() -> None:
    """At a standard deviation of 1 and a mean of 1, seven seeds would: t is 2.447, over the root of 7."""
    verdict = script.Verdict("c", {}, "", "b", "loss", 1.0, 4.303 / math.sqrt(3), 3)
    assert verdict.words.endswith("; needs 7 seeds")
    assert script.Verdict("c", {}, "", "b", "loss", 0.001, 5.0, 3).words.endswith("; needs more than 100 seeds")
    assert script.Verdict("c", {}, "", "b", "loss", math.nan, math.nan, 3).words == "a run diverged"
    assert script.Verdict("c", {}, "", "b", "loss", math.nan, math.nan, 3).word == "a run diverged"
    as_well = script.Verdict("c", {}, "", "b", "loss", 0.95, 4.303 / math.sqrt(3), 3, as_well=True)
    assert as_well.words.endswith("; needs 7 seeds")


def test_the_page_is_that_of_its_files(tmp_path: Path) -> None:
    """What is committed was made from what is committed."""
    shutil.copytree(script.ROOT / "docs" / "evidence", tmp_path / "evidence")
    page = script.page(script.ROOT / "examples" / "claims" / "real", tmp_path / "evidence")
    assert page == (script.ROOT / "docs" / "evidence.md").read_text()


IN_EVIDENCE = {
    "one label per client does as well as IID data": "at T = 1 single labels do as well as IID data | T = 1, ",
    "the mask beats LoRA": "the sensitivity mask ends at a lower loss than LoRA | T = 1 ",
    "the mask beats the largest weights": "the sensitivity mask ends at a lower loss than the largest weights | T = 1 ",
    "the mask beats a random mask": "the sensitivity mask ends at a lower loss than a random mask | T = 1 ",
    "the mask beats moving all parameters": "the sensitivity mask ends at a lower loss than all parameters | T = 1 ",
    ".01% of the parameters are as accurate as .1%": "1e-4 is as accurate as 1e-3 | ",
    ".1% of the parameters are as accurate as 1%": "1e-3 is as accurate as 1e-2 | ",
    "a mask from public text does as well as the task's own": "the mask from public text ends at as low a loss as ",
    "at the measured rate": "at the measured rate single labels do as well as IID data | ",
}
"""The README's claims, and how the page's lines about them begin."""


def test_the_readme_s_verdicts_are_the_page_s() -> None:
    root = SCRIPT.parents[1]
    page = (root / "docs" / "evidence.md").read_text()

    def word(cell: str) -> str:
        return cell.split("**")[1] if "**" in cell else cell

    def all_of(claim: str) -> list[tuple[str, str]]:
        """At the section's rates, and at best ones."""
        *_, line = (line for line in page.splitlines() if line.startswith(f"| {IN_EVIDENCE[claim]}"))
        cells = [cell.strip().split("; at best rates ") for cell in line.strip("| ").split("|")][2:]
        return [(word(cell[0]), word(cell[-1])) for cell in cells]

    def verdicts(claim: str) -> list[str]:
        return [first for first, _ in all_of(claim)]

    table = (root / "README.md").read_text().split("| claim |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    rows = [[cell.strip().replace("**", "") for cell in line.strip("| ").split("|")] for line in table]
    assert {claim for claim, *_ in rows} == IN_EVIDENCE.keys() - {"at the measured rate"}
    changed = sum(first != at_best for claim, *_ in rows for first, at_best in all_of(claim))
    numbers = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    assert f"With them {numbers[changed]} of these verdicts change" in (root / "README.md").read_text()
    for claim, *cells in rows:
        tried = [cell for cell in cells if not cell.endswith("at the measured rate") and cell != "not tried"]
        assert tried == verdicts(claim)[: len(tried)]
        if len(tried) < len(cells):
            assert cells[-1] == "not tried" or cells[-1].split()[0] == verdicts("at the measured rate")[-1]
            assert cells[:-1] == tried
