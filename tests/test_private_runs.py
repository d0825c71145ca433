"""Whole simulated runs under differential privacy: their settings, budgets and record, cut short and tampered with."""

import base64
import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_card import facts
from test_experiment import logged, rewrite, simulate

from meerkat.algorithm.rounds import RoundRecord, pack
from meerkat.cli import main
from meerkat.errors import MeerkatError
from meerkat.federation.coordinator_settings import read_federation
from meerkat.privacy import mechanism as mechanisms
from meerkat.privacy.accounting import Charge, epsilon, noise_for
from meerkat.problems.data import load_rows
from meerkat.problems.partition import partition
from meerkat.record import verification
from meerkat.record.run_folder import RunFolder
from meerkat.run.local_engine import LocalEngine

EXAMPLE = ("--dp", "example", "--eval-every", "0")
CLIENT = (
    *("--dp", "client", "--weights", "equal", "--clients-per-round", "2", "--local-steps", "2", "--eval-every", "0"),
    *("--dp-noise-multiplier", "2", "--directions", "2"),
)
ROUNDS = 6


@pytest.fixture(scope="module")
def arguments(federation: Path) -> list[str]:
    return [
        *("simulate", "--model", str(federation / "model"), "--task", "sst2", "--data", str(federation / "data")),
        *("--text", str(federation / "text.jsonl"), "--density", "0.01", "--clients", "3", "--partition", "iid"),
        *("--rounds", str(ROUNDS), "--batch-size", "4", "--lr", "0.01", "--eps", "1e-3", "--threads", "1"),
    ]


Sent = list[np.ndarray]


@pytest.fixture(scope="module")
def hidden(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sent]:
    """A client-level run, and all scalars that its clients sent. Look, don't write."""
    folder, sent, run = tmp_path_factory.mktemp("hidden") / "run", [], LocalEngine.run

    def listening(*given: Any) -> Any:
        replies = run(*given)
        sent.extend(reply.scalars for reply in replies)
        return replies

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalEngine, "run", listening)
        simulate(arguments, folder, *CLIENT)
    return folder, sent


@pytest.fixture(scope="module")
def uneven(arguments: list[str], federation: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """An example-level run whose clients have other numbers of rows, and a budget that lasts the largest to the end."""
    rows = load_rows(str(federation / "data"), "train")
    sizes = [len(part) for part in partition("dirichlet:0.5", rows, 3, 0).rows]
    assert len({*sizes}) == 3
    target = epsilon([Charge(min(1.0, 4 / max(sizes)), 8.0, 2 * ROUNDS)], 1e-5, "add-or-remove") * 1.001
    folder = tmp_path_factory.mktemp("uneven") / "run"
    given = ("--partition", "dirichlet:0.5", "--dp-noise-multiplier", "8", "--dp-epsilon", str(target))
    simulate(arguments, folder, *EXAMPLE, *given)
    return folder, sizes


def copied(whole: Path, to: Path) -> Path:
    shutil.copytree(whole, to)
    return to


def cut(folder: Path, records: int) -> bytes:
    """Leave so many records, and the next one torn, as a killed run does. Returns what is whole."""
    lines = (folder / "rounds.log").read_bytes().splitlines(keepends=True)
    whole = b"".join(lines[:records])
    (folder / "rounds.log").write_bytes(whole + lines[records][:50])
    (folder / "summary.json").unlink()
    return whole


# --- settings ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--dp-epsilon", "3"), "dp_epsilon 3: does nothing with dp none"),
        (("--dp-noise-multiplier", "3"), "dp_noise_multiplier 3: does nothing with dp none"),
        (("--dp", "example"), "dp example: needs a budget, dp_epsilon, or a noise"),
        (("--dp", "everything", "--dp-epsilon", "3"), "--dp everything: must be"),
        (("--dp", "example", "--dp-epsilon", "nan"), "--dp-epsilon nan: must be"),
        (("--dp", "example", "--dp-epsilon", "-1"), "--dp-epsilon -1: must be"),
        (("--dp", "example", "--dp-epsilon", "3", "--dp-delta", "1"), "--dp-delta 1: must be"),
        (("--dp", "example", "--dp-epsilon", "3", "--dp-clip", "0"), "--dp-clip 0: must be"),
        (("--dp", "example", "--dp-epsilon", "3", "--dp-relation", "zero-out"), "--dp-relation zero-out: must be"),
        (("--dp", "example", "--dp-epsilon", "3", "--method", "fo-fedavg"), "method fo-fedavg sends gradients"),
        (("--dp", "example", "--dp-epsilon", "3", "--method", "task-mask"), "makes its mask from clients' rows"),
        (("--dp", "client", "--dp-epsilon", "3"), "weights examples: dp client sums"),
        (
            ("--dp", "client", "--dp-epsilon", "3", "--weights", "equal", "--method", "meerkat-vp"),
            "early_stop vp: needs",
        ),
        (("--dp", "client", "--dp-epsilon", "3", "--weights", "equal", "--method", "feddyn"), "method feddyn: needs"),
        (("--dp", "example", "--dp-epsilon", "1e-5", "--dp-delta", "1e-9"), "dp_epsilon 1e-05: no noise multiplier"),
        (
            ("--dp", "example", "--dp-epsilon", "1", "--dp-noise-multiplier", "1"),
            "dp_noise_multiplier 1: dp_epsilon 1 lasts no client for more than 0 of 6 local steps",
        ),
        (
            ("--dp", "client", "--weights", "equal", "--dp-epsilon", "1", "--dp-noise-multiplier", "5"),
            "dp_noise_multiplier 5: dp_epsilon 1 lasts no client for more than 1 of 6 rounds",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str
) -> None:
    assert main([*arguments, *options, "--out", str(tmp_path / "run")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("meerkat")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dp", ["example", "client"])
def test_sites_do_not_evaluate_a_private_federation(tmp_path: Path, dp: str) -> None:
    file = tmp_path / "federation.toml"
    run = f'[run]\ndp = "{dp}"\ndp_noise_multiplier = 2.0\nweights = "equal"\n'
    file.write_text(run + '[federation]\nevaluate = "sites"\n')
    with pytest.raises(MeerkatError, match=f"evaluate sites: scores .* with dp {dp} use evaluate coordinator"):
        read_federation(file)
    file.write_text(run)
    read_federation(file)


# --- example level ---


def test_the_noise_is_found_from_the_budget_and_the_smallest_client(arguments: list[str], tmp_path: Path) -> None:
    given = ("--partition", "dirichlet:0.5", "--dp-epsilon", "4", "--rounds", "2", "--local-steps", "2")
    simulate(arguments, tmp_path / "run", *EXAMPLE, *given)
    config, (opening, *_) = RunFolder(tmp_path / "run").config(), logged(tmp_path / "run")
    rate = min(1.0, 4 / min(opening["examples"]))
    assert config.dp_noise_multiplier == math.ceil(1e4 * noise_for(4.0, 1e-5, rate, 4, "add-or-remove")) / 1e4
    assert epsilon([Charge(rate, config.dp_noise_multiplier, 4)], 1e-5, "add-or-remove") <= 4
    assert opening["allowance"] == [4, 4, 4]


def test_calibrations_are_part_of_the_budget(arguments: list[str], tmp_path: Path) -> None:
    given = (
        *("--dp-epsilon", "8", "--rounds", "2", "--local-steps", "2", "--method", "meerkat-vp"),
        *("--calibration-steps", "4", "--initial-steps", "2", "--later-steps", "2", "--recalibrate-every", "1"),
    )
    simulate(arguments, tmp_path / "run", *EXAMPLE, *given)
    opening, *records = logged(tmp_path / "run")
    assert opening["allowance"] == [2 * 2 + 2 * 4] * 3
    assert [r["kind"] for r in records] == ["calibration", "round"] * 2 + ["close"]
    assert verification.verify(tmp_path / "run").finished


def test_a_client_leaves_when_its_budget_is_spent_and_the_others_go_on(uneven: tuple[Path, list[int]]) -> None:
    folder, sizes = uneven
    opening, *records, _ = logged(folder)
    assert opening["examples"] == sizes
    assert opening["allowance"][int(np.argmax(sizes))] == ROUNDS > min(opening["allowance"]) > 0
    for record in records:
        assert record["clients"] == [k for k in range(3) if record["round"] < opening["allowance"][k]]
    assert verification.verify(folder).finished


@pytest.mark.parametrize("records", [1, 4, ROUNDS + 1])
def test_a_run_that_goes_on_keeps_its_allowance(uneven: tuple[Path, list[int]], tmp_path: Path, records: int) -> None:
    """What is run again is noised anew; what was logged, and whom budgets last for, stay."""
    folder = copied(uneven[0], tmp_path / "run")
    whole = cut(folder, records)
    assert main(["resume", str(folder)]) == 0
    assert (folder / "rounds.log").read_bytes().startswith(whole)
    before, after = logged(uneven[0]), logged(folder)
    assert [r.get("clients") for r in after] == [r.get("clients") for r in before]
    assert (after[-1]["theta"] == before[-1]["theta"]) == (records == ROUNDS + 1)
    assert verification.verify(folder).finished


@pytest.mark.parametrize("more", [1, -1, 100])
def test_an_allowance_that_was_changed_is_found(
    uneven: tuple[Path, list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: int
) -> None:
    folder = copied(uneven[0], tmp_path / "run")

    def change(records: list[dict[str, Any]]) -> None:
        allowance = records[0]["allowance"]
        allowance[int(np.argmin(allowance))] += more
        del records[2:]

    rewrite(folder, change)
    (folder / "summary.json").unlink()
    assert main(["verify", str(folder)]) == 1
    assert main(["resume", str(folder)]) == 2
    assert "privacy budgets do not last as long any more" in capsys.readouterr().err


def test_metrics_of_an_example_level_run_hold_noisy_scalars_and_no_loss(uneven: tuple[Path, list[int]]) -> None:
    rounds = [m for m in RunFolder(uneven[0]).metrics() if m["kind"] == "round"]
    records = [RoundRecord.from_json(r) for r in logged(uneven[0]) if r["kind"] == "round"]
    for metric, record in zip(rounds, records, strict=True):
        assert metric["loss"] is None
        assert metric["clients"] == [*record.scalars]
        assert np.allclose(np.ravel(metric["abs_g"]), [abs(g[0, 0]) for g in record.scalars.values()], rtol=1e-4)


# --- client level ---


def numbers_in(value: Any) -> Iterator[float]:
    """All fractions in a JSON value."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(inner)


def test_no_client_s_scalars_are_anywhere_in_the_folder(hidden: tuple[Path, Sent]) -> None:
    folder, sent = hidden
    assert sent
    forms = {form for g in sent for form in (g.tobytes(), base64.b64encode(g.tobytes()).rstrip(b"="))}
    sizes = [abs(float(x)) for g in sent for x in g.ravel()]
    numbers = {*sizes, *(float(f"{size:.5g}") for size in sizes)}
    for file in folder.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert not [form for form in forms if form in data], file
    noted = {abs(x) for metric in (*RunFolder(folder).metrics(), *logged(folder)) for x in numbers_in(metric)}
    assert not noted & numbers
    opening, *records, _ = logged(folder)
    assert opening["allowance"] == []
    for record in records:
        assert (record["scalars"] is None) == bool(record["clients"])
        assert record["inner"] == ""


def test_metrics_of_a_client_level_run_hold_no_traces_and_no_loss(hidden: tuple[Path, Sent]) -> None:
    rounds = [m for m in RunFolder(hidden[0]).metrics() if m["kind"] == "round"]
    assert len(rounds) == ROUNDS
    for metric in rounds:
        assert metric["loss"] is None
        assert (metric["clients"], metric["abs_g"]) == ([], [])
        assert "gradip" not in metric


@pytest.mark.parametrize("records", [1, 4])
def test_a_client_level_run_goes_on_with_its_pointers(hidden: tuple[Path, Sent], tmp_path: Path, records: int) -> None:
    folder = copied(hidden[0], tmp_path / "run")
    whole = cut(folder, records)
    asked: list[tuple[int, int]] = []
    run = LocalEngine.run

    def listening(engine: Any, state: Any, plan: Any) -> Any:
        asked.extend((k, state.steps_made.get(k, 0)) for k in plan.steps)
        return run(engine, state, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalEngine, "run", listening)
        assert main(["resume", str(folder)]) == 0
    assert (folder / "rounds.log").read_bytes().startswith(whole)
    made, expected = dict.fromkeys(range(3), 0), []
    for record in logged(folder)[1:-1]:
        for client in record["clients"]:
            if record["round"] >= records - 1:
                expected.append((client, made[client]))
            made[client] += 2
    assert asked == expected
    assert verification.verify(folder).finished


def test_a_sample_that_comes_out_empty_moves_theta_by_noise_alone(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mechanisms.os, "urandom", lambda count: b"\xff" * count)
    monkeypatch.setattr(LocalEngine, "run", lambda *_: pytest.fail("nobody was sampled"))
    simulate(arguments, tmp_path / "run", *CLIENT, "--rounds", "2")
    opening, *records, _ = logged(tmp_path / "run")
    assert len({opening["theta"], *(r["theta"] for r in records)}) == 3
    for record in records:
        assert (record["clients"], record["made"], record["weights"]) == ([], [], [])
        assert RoundRecord.from_json(record).aggregate.shape == (2, 2)
    assert [m["loss"] for m in RunFolder(tmp_path / "run").metrics() if m["kind"] == "round"] == [None, None]
    monkeypatch.undo()
    assert verification.verify(tmp_path / "run").finished
    whole = cut(tmp_path / "run", 2)
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "rounds.log").read_bytes().startswith(whole)


def _asked(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The first round that asked anybody."""
    return next(r for r in records if r.get("clients"))


def _another_aggregate(records: list[dict[str, Any]]) -> None:
    _asked(records)["aggregate"] = pack(RoundRecord.from_json(_asked(records)).aggregate * np.float32(2))


def _fewer_steps_in_it(records: list[dict[str, Any]]) -> None:
    _asked(records)["aggregate"] = pack(RoundRecord.from_json(_asked(records)).aggregate[:1])


def _scalars_after_all(records: list[dict[str, Any]]) -> None:
    _asked(records)["scalars"] = pack(np.zeros((sum(_asked(records)["made"]), 2), np.float32))


def _a_stranger(records: list[dict[str, Any]]) -> None:
    _asked(records)["clients"][-1] = 99


def _more_steps_made(records: list[dict[str, Any]]) -> None:
    _asked(records)["made"][0] += 3


def _other_weights(records: list[dict[str, Any]]) -> None:
    _asked(records)["weights"][0] = 0.9


def _another_rate(records: list[dict[str, Any]]) -> None:
    _asked(records)["lr"] *= 2


def _inner_products(records: list[dict[str, Any]]) -> None:
    _asked(records)["inner"] = pack(np.ones(4), "<f8")


@pytest.mark.parametrize(
    "forge",
    [
        *(_another_aggregate, _fewer_steps_in_it, _scalars_after_all, _a_stranger, _more_steps_made, _other_weights),
        *(_another_rate, _inner_products),
    ],
)
def test_a_client_level_log_that_was_changed_is_found(
    hidden: tuple[Path, Sent], tmp_path: Path, forge: Callable[[list[dict[str, Any]]], None]
) -> None:
    folder = copied(hidden[0], tmp_path / "run")
    before = copy.deepcopy(logged(folder))
    rewrite(folder, forge)
    assert logged(folder) != before
    assert main(["verify", str(folder)]) == 1
    (folder / "summary.json").unlink()
    assert main(["resume", str(folder)]) in (1, 2)


# --- afterwards ---


@pytest.mark.parametrize("which", ["hidden", "uneven"])
def test_report_export_and_evaluation_of_private_runs(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(request.getfixturevalue(which)[0], tmp_path / "run")
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 0
    assert main(["report", str(folder)]) == 0
    assert main(["export", str(folder), "--to", str(tmp_path / "model")]) == 0
    assert main(["evaluate", str(folder)]) == 0
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert json.loads((folder / "summary.json").read_text())["rounds"] == ROUNDS


def card_of(folder: Path, to: Path) -> str:
    assert main(["export", str(folder), "--to", str(to), "--form", "delta"]) == 0
    return (to / "README.md").read_text(encoding="utf-8")


def test_the_card_of_hidden_clients_tells_nothing_of_one(hidden: tuple[Path, Sent], tmp_path: Path) -> None:
    text, opening = card_of(hidden[0], tmp_path / "delta"), logged(hidden[0])[0]
    assert opening["data"] not in text
    assert (hidden[0] / "rounds.log").read_text().splitlines()[-1][:64] not in text
    data, clients = facts(text, "Data"), facts(text, "Clients")
    assert data["SHA-256 of the rows and their split"] == "not given: it is a function of private rows"
    assert data["training rows"] == "not given: clients are private"
    assert clients.keys() == {"flagged as extremely skewed", "stopped early", "removed by the coordinator"}
    assert {*clients.values()} == {"not known: there was no calibration", "none"}
    assert not [k for k in range(3) if f"client {k}" in text]


def test_the_card_of_hidden_examples_tells_how_many_there_are_and_no_more(
    uneven: tuple[Path, list[int]], tmp_path: Path
) -> None:
    text, opening = card_of(uneven[0], tmp_path / "delta"), logged(uneven[0])[0]
    assert opening["data"] not in text
    assert (uneven[0] / "rounds.log").read_text().splitlines()[-1][:64] not in text
    data = facts(text, "Data")
    assert data["SHA-256 of the rows and their split"] == "not given: it is a function of private rows"
    assert data["training rows"].startswith(f"{sum(uneven[1])}: client 0 {uneven[1][0]}, ")


def test_clients_whose_budget_does_not_last_are_named_wherever_privacy_is_told(
    uneven: tuple[Path, list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(uneven[0], tmp_path / "run")
    early = [k for k, steps in enumerate(logged(folder)[0]["allowance"]) if steps < ROUNDS]
    assert len(early) == 2
    named = f"clients {early[0]}, {early[1]}"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["clients_without_budget"] == early
    assert facts(card_of(folder, tmp_path / "delta"), "Privacy")["budget does not last to the end"] == named
    cut(folder, 3)
    assert main(["report", str(folder)]) == 0
    said = f"rivacy budgets that do not last to the end of the run: {named} (2 of 3)"
    assert said in (folder / "report.html").read_text()
    capsys.readouterr()
    assert main(["resume", str(folder)]) == 0
    assert f"note: p{said}; 0 never take part".replace(" do ", " may ") in capsys.readouterr().err


def test_a_budget_that_lasts_for_the_rounds_that_ask_is_not_said_to_end(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    lasts = epsilon([Charge(4 / 21, 2.0, 8)], 1e-5, "add-or-remove") * 1.001  # the client of 21 rows to the end
    split = ("--partition", "dirichlet:5", "--clients-per-round", "1", "--rounds", "8")
    simulate(arguments, run, *EXAMPLE, *split, "--dp-epsilon", str(lasts), "--dp-noise-multiplier", "2")
    opening, *rounds = logged(run)
    asked = [client for record in rounds if record["kind"] == "round" for client in record["clients"]]
    early = [client for client, steps in enumerate(opening["allowance"]) if steps < 8]
    spent = [client for client in early if asked.count(client) == opening["allowance"][client]]
    assert spent != early
    assert "note: privacy budgets that may not last to the end of the run" in capsys.readouterr().err
    assert json.loads((run / "summary.json").read_text())["clients_without_budget"] == spent
    assert main(["verify", str(run)]) == 0


def test_a_budget_that_is_no_protection_is_said_to_be_none(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    simulate(arguments, run, *EXAMPLE, "--dp-noise-multiplier", "0.001", "--rounds", "1")
    weak = "; too weak to protect anybody: no bound could be computed"
    assert capsys.readouterr().out.count(weak) == 1
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count(weak) == 1
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_text().count(weak) == 1
    assert card_of(run, tmp_path / "delta").count(weak) == 1
    simulate(arguments, tmp_path / "many", *EXAMPLE, "--dp-epsilon", "5", "--dp-delta", "0.1", "--rounds", "1")
    assert "; too weak to protect anybody: delta is not below 1 / 48, one over the rows" in capsys.readouterr().out
