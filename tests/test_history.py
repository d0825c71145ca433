"""A run after the fact: trajectories, virtual paths and alignments against what happened while it ran."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_experiment import logged, rewrite, simulate
from torch import Tensor

from meerkat.algorithm import path
from meerkat.algorithm.alignment import alignments
from meerkat.algorithm.directions import Directions, run_key
from meerkat.algorithm.replies import Reply
from meerkat.algorithm.rounds import RoundPlan, RoundRecord
from meerkat.algorithm.server import ServerState
from meerkat.cli import main
from meerkat.errors import MeerkatError, RunFailed
from meerkat.masks.sparse_mask import SparseMask
from meerkat.record import history, verification
from meerkat.record.run_folder import RunFolder
from meerkat.run import local_engine

STEPS, ROUNDS = 3, 3
RUNS: dict[str, tuple[str, ...]] = {
    "plain": ("--directions", "2"),
    "momentum": ("--server-optimizer", "momentum", "--clients-per-round", "2"),
    "feddyn": ("--method", "feddyn", "--feddyn-alpha", "0.1"),
    "vp": (
        *("--method", "meerkat-vp", "--vpcs-rule", "thresholds", "--rho-later", "0.62", "--rho-quie", "0"),
        *("--calibration-steps", "12", "--initial-steps", "4", "--later-steps", "4"),
    ),
    "all stopped": (
        *("--method", "meerkat-vp", "--vpcs-rule", "thresholds", "--rho-later", "0.001", "--rho-quie", "0"),
        *("--calibration-steps", "12", "--initial-steps", "4", "--later-steps", "4"),
    ),
    "fo-fedavg": ("--method", "fo-fedavg"),
}

Had = dict[tuple[str, int, int], Tensor]
"""(phase, round, client) -> theta that the client ended on."""


@pytest.fixture(scope="session")
def run_of(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Had]]:
    """The folder of a finished run, made once, and what its clients had while it ran."""
    made: dict[str, tuple[Path, Had]] = {}
    arguments = [
        *("simulate", "--model", str(federation / "model"), "--task", "sst2", "--data", str(federation / "data")),
        *("--text", str(federation / "text.jsonl"), "--density", "0.01", "--clients", "3", "--partition", "iid"),
        *("--batch-size", "4", "--lr", "0.01", "--eps", "1e-3", "--threads", "1"),
        *("--text-sequences", "3", "--eval-every", "0"),
        *("--rounds", str(ROUNDS), "--local-steps", str(STEPS)),
    ]

    def run(name: str) -> tuple[Path, Had]:
        if name not in made:
            had: Had = {}

            def noted(*given: Any, **named: Any) -> tuple[Reply, Tensor]:
                reply, end = original(*given, **named)
                plan: RoundPlan = given[2]
                had[plan.phase, plan.round, reply.client] = end.clone()
                return reply, end

            original = local_engine.local_steps
            folder = tmp_path_factory.mktemp("history") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(local_engine, "local_steps", noted)
                simulate(arguments, folder, *RUNS[name])
            made[name] = folder, had
        return made[name]

    return run


Run = Callable[[str], tuple[Path, Had]]


# --- trajectories ---


@pytest.mark.parametrize("name", ["plain", "momentum", "vp"])
def test_trajectories_are_the_scalars_and_the_gradient_multiplied_by_hand(run_of: Run, name: str) -> None:
    folder, _ = run_of(name)
    mask = SparseMask.load(folder / "mask.safetensors")
    assert mask.pretraining_gradient is not None
    grad_p, z = mask.pretraining_gradient.double(), Directions(run_key(0), len(mask))
    expected: dict[int, list[tuple[int, float, float]]] = {}
    for record in (RoundRecord.from_json(r) for r in logged(folder) if r["kind"] == "round"):
        for client, g in record.scalars.items():
            for t, row in enumerate(g):
                moved = sum(float(g_p) * z(record.plan.place(t, p)).double() for p, g_p in enumerate(row)) / len(row)
                size = sum(abs(float(g_p)) for g_p in row) / len(row)
                at = record.plan.round * STEPS + t
                expected.setdefault(client, []).append((at, float(grad_p @ moved), size))
    trajectories = history.read(folder).trajectories()
    assert list(trajectories) == sorted(expected)
    assert len(trajectories) >= 2
    for client, steps in expected.items():
        at, gradip, abs_g = (np.array(column) for column in zip(*steps, strict=True))
        assert trajectories[client].steps.tolist() == at.tolist()
        np.testing.assert_allclose(trajectories[client].gradip, gradip, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(trajectories[client].abs_g, abs_g, rtol=1e-12)


@pytest.mark.parametrize("name", ["plain", "momentum", "vp"])
def test_trajectories_are_what_the_metrics_say(run_of: Run, name: str) -> None:
    folder, _ = run_of(name)
    noted: dict[int, dict[str, list[float]]] = {}
    for metric in RunFolder(folder).metrics():
        if metric["kind"] == "round":
            for i, client in enumerate(metric["clients"]):
                columns = noted.setdefault(client, {"abs_g": [], "gradip": []})
                columns["abs_g"] += metric["abs_g"][i]
                columns["gradip"] += metric["gradip"][i]
    for client, trajectory in history.read(folder).trajectories().items():
        np.testing.assert_allclose(trajectory.abs_g, noted[client]["abs_g"], rtol=1e-4)
        np.testing.assert_allclose(trajectory.gradip, noted[client]["gradip"], rtol=1e-4)


def test_an_early_stopped_client_has_one_step_where_each_round_begins(run_of: Run) -> None:
    folder, _ = run_of("vp")
    records = history.read(folder)
    (calibration,) = records.calibrations
    assert 0 < len(calibration.early_stopped) < 3
    for client, trajectory in records.trajectories().items():
        stopped = client in calibration.early_stopped
        expected = [r * STEPS for r in range(ROUNDS)] if stopped else list(range(ROUNDS * STEPS))
        assert trajectory.steps.tolist() == expected


def test_rounds_of_early_stopped_clients_alone_begin_where_others_do(run_of: Run) -> None:
    folder, _ = run_of("all stopped")
    for trajectory in history.read(folder).trajectories().values():
        assert trajectory.steps.tolist() == [r * STEPS for r in range(ROUNDS)]


def test_without_a_gradient_gradip_is_nan_and_the_size_of_g_is_there(run_of: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(run_of("plain")[0], tmp_path / "run")

    def forget(records: list[dict[str, Any]]) -> None:
        for record in records[1:-1]:
            record["inner"] = ""

    rewrite(folder, forget)
    for trajectory in history.read(folder).trajectories().values():
        assert np.isnan(trajectory.gradip).all()
        assert (trajectory.abs_g > 0).all()


def test_a_first_order_run_has_records_but_no_trajectories(run_of: Run) -> None:
    records = history.read(run_of("fo-fedavg")[0])
    assert len(records.rounds) == ROUNDS
    assert records.trajectories() == {}


# --- paths ---


@pytest.mark.parametrize("name", ["plain", "momentum", "feddyn", "vp"])
def test_a_virtual_path_ends_on_the_bits_that_the_client_had(run_of: Run, name: str) -> None:
    folder, had = run_of(name)
    lived = {place: end for place, end in had.items() if place[0] == "training"}
    assert len(lived) == sum(len(r["clients"]) for r in logged(folder) if r["kind"] == "round")
    for (_, number, client), end in lived.items():
        steps = [theta.clone() for theta in history.client_path(folder, client, number)]
        assert path.digest(steps[-1]) == path.digest(end)
        assert len(steps) == len(RoundRecord.from_json(rounds(folder)[number]).scalars[client])
        assert len({path.digest(theta) for theta in steps}) == len(steps)


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [r for r in logged(folder) if r["kind"] == "round"]


def test_a_path_begins_at_the_rounds_own_theta(run_of: Run) -> None:
    folder, _ = run_of("momentum")
    before: dict[int, ServerState] = {
        record.plan.round: state
        for state, record in verification.StoredRun.open(folder).replay
        if isinstance(record, RoundRecord)
    }
    record = RoundRecord.from_json(rounds(folder)[2])
    client = next(iter(record.scalars))
    first = next(iter(history.client_path(folder, client, 2)))
    z = Directions(run_key(0), len(before[2].theta))(record.plan.place(0, 0))
    torch.testing.assert_close(
        first, before[2].theta - record.plan.lr * float(record.scalars[client][0, 0]) * z, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(("client", "round"), [(0, 3), (0, -1), (0, 99), (7, 0), (-1, 0)])
def test_a_round_or_client_that_is_not_there_is_one_line(run_of: Run, client: int, round: int) -> None:
    folder, _ = run_of("plain")
    with pytest.raises(MeerkatError) as caught:
        history.client_path(folder, client, round)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert ("no round" in str(caught.value)) == (client == 0)


def test_a_client_that_was_not_asked_in_a_round_is_one_line(run_of: Run) -> None:
    folder, _ = run_of("momentum")
    (absent,) = {0, 1, 2} - set(rounds(folder)[0]["clients"])
    with pytest.raises(MeerkatError, match=f"client {absent} sent no scalars in round 0"):
        history.client_path(folder, absent, 0)


def test_steps_by_backpropagation_leave_no_path(run_of: Run) -> None:
    with pytest.raises(MeerkatError, match="sent no scalars"):
        history.client_path(run_of("fo-fedavg")[0], 0, 0)


# --- alignment ---


@pytest.mark.parametrize("name", ["plain", "feddyn", "vp"])
def test_updates_are_each_rounds_alignments_and_norms_are_how_far_clients_went(run_of: Run, name: str) -> None:
    folder, had = run_of(name)
    starts = {
        record.plan.round: state.theta
        for state, record in verification.StoredRun.open(folder).replay
        if isinstance(record, RoundRecord)
    }
    updates = dict(history.updates(folder))
    assert list(updates) == list(range(ROUNDS))
    for number, aligned in updates.items():
        record = RoundRecord.from_json(rounds(folder)[number])
        assert aligned == alignments(record, Directions(run_key(0), len(starts[0])))
        for client, alignment in aligned.items():
            went = had["training", number, client] - starts[number]
            assert alignment.norm == pytest.approx(went.norm().item(), rel=1e-3)
            assert -1 <= alignment.cosine <= 1


def test_first_order_rounds_have_no_alignment(run_of: Run) -> None:
    assert dict(history.updates(run_of("fo-fedavg")[0])) == {number: {} for number in range(ROUNDS)}


# --- damage ---


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    for ask in (history.read, lambda root: list(history.updates(root)), lambda root: history.client_path(root, 0, 0)):
        with pytest.raises(MeerkatError, match="no run in it"):
            ask(tmp_path)


def test_a_log_damaged_in_the_middle_is_not_read_in_part(run_of: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(run_of("plain")[0], tmp_path / "run")
    lines = [bytearray(line) for line in (folder / "rounds.log").read_bytes().splitlines(keepends=True)]
    lines[2][-9] ^= 1
    (folder / "rounds.log").write_bytes(b"".join(lines))
    for ask in (history.read, lambda root: list(history.updates(root)), lambda root: history.client_path(root, 0, 2)):
        with pytest.raises(RunFailed, match="line 3 is damaged"):
            ask(folder)


def test_a_record_without_its_parts_is_one_line(run_of: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(run_of("plain")[0], tmp_path / "run")

    def forge(records: list[dict[str, Any]]) -> None:
        del records[2]["weights"]

    rewrite(folder, forge)
    with pytest.raises(RunFailed, match="a record is damaged"):
        history.read(folder)


@pytest.mark.parametrize("change", [{"clients": [0, None, 2]}, {"made": [1.0, 1, 1]}, {"round": "1"}, {"round": 2**63}])
def test_a_record_that_counts_in_no_numbers_is_one_line(run_of: Run, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = shutil.copytree(run_of("plain")[0], tmp_path / "run")
    rewrite(folder, lambda records: records[2].update(change))
    with pytest.raises(RunFailed, match="a record is damaged"):
        history.read(folder)


@pytest.mark.parametrize(
    "change", [{"examples": 5}, {"examples": [-3]}, {"run_key": None}, {"config": 7}, {"theta": []}]
)
def test_an_opening_of_another_kind_is_one_line(run_of: Run, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = shutil.copytree(run_of("plain")[0], tmp_path / "run")
    rewrite(folder, lambda records: records[0].update(change))
    for ask in (lambda root: list(history.updates(root)), verification.verify):
        with pytest.raises(RunFailed, match=f"{next(iter(change))} in the opening"):
            ask(folder)


def test_a_forged_record_ends_a_path_that_rests_on_it(run_of: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(run_of("plain")[0], tmp_path / "run")

    def forge(records: list[dict[str, Any]]) -> None:
        records[2]["scalars"] = records[3]["scalars"]

    rewrite(folder, forge)
    assert list(history.client_path(folder, 0, 0))
    with pytest.raises(RunFailed, match="round 1"):
        history.client_path(folder, 0, 2)


def test_a_killed_runs_torn_line_is_no_damage(run_of: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(run_of("plain")[0], tmp_path / "run")
    log = (folder / "rounds.log").read_bytes().splitlines(keepends=True)
    (folder / "rounds.log").write_bytes(b"".join(log[:3]) + log[3][:50])
    assert len(history.read(folder).rounds) == 2
    assert [number for number, _ in history.updates(folder)] == [0, 1]
    assert json.dumps(sorted(history.read(folder).trajectories())) == "[0, 1, 2]"


@pytest.mark.parametrize("done", [True, False])
def test_a_log_of_another_format_is_named_with_ours(
    run_of: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], done: bool
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_of("plain")[0], folder)

    def age(records: list[dict[str, Any]]) -> None:
        """As an older version wrote it: with a header of its own, and rounds without what was added since."""
        records[0]["format"] = 3
        for name in ("signed", "allowance"):
            del records[0][name]
        for record in records[1:]:
            record.pop("signatures", None)
        if not done:
            del records[2:]

    rewrite(folder, age)
    if not done:
        (folder / "summary.json").unlink()
    said = f"{folder / 'rounds.log'}: format 3 is not known, only 7; use the version that wrote it"
    capsys.readouterr()
    for command in (["verify"], ["report"], ["resume"], ["evaluate"], ["export", "--to", str(tmp_path / "to")]):
        assert main([command[0], str(folder), *command[1:]]) == 1
        assert [line for line in capsys.readouterr().err.splitlines() if "meerkat:" in line] == [f"meerkat: {said}"]
    for read in (history.read, lambda root: history.client_path(root, 0, 0), lambda root: [*history.updates(root)]):
        with pytest.raises(RunFailed) as told:
            read(folder)
        assert str(told.value) == said
