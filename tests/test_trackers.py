import sys
from pathlib import Path

import pytest

from meerkat.errors import MeerkatError
from meerkat.record.run_folder import RunFolder
from meerkat.run.simulation import simulate
from meerkat.run.trackers import tracking
from meerkat.settings.config import make_config

SETTINGS = {"rounds": 2, "clients": 2, "eval_every": 1, "text_sequences": 2, "threads": 1, "tracker": "tensorboard"}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_what_the_metrics_have(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    simulate(make_config(SETTINGS), tmp_path / "run")
    metrics, shown = RunFolder.open(tmp_path / "run").metrics(), scalars(tmp_path / "run")
    evaluated = [m for m in metrics if m["kind"] == "evaluation"]
    assert shown["evaluation/accuracy"] == [(m["round"], pytest.approx(m["accuracy"])) for m in evaluated]
    assert [m["round"] for m in evaluated] == [0, 1, 2]
    rounds = [m for m in metrics if m["kind"] == "round"]
    assert shown["round/loss"] == [(m["round"] + 1, pytest.approx(m["loss"])) for m in rounds]
    assert shown["bytes/up"] == [(1, 8.0), (2, 8.0)]
    assert [step for step, _ in shown["round/abs_g"]] == [1, 2]


def test_what_nobody_told_is_left_out(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with tracking("tensorboard", tmp_path, 0) as follow:
        follow({"kind": "evaluation", "round": 3, "scores": {"accuracy": 0.5, "loss": None}})
        follow({"kind": "split", "round": 0})
        hidden = {"clients": [], "abs_g": [], "loss": None, "lr": 0.5, "wall_s": 1.0, "bytes_up": 8, "bytes_down": 8}
        follow({"kind": "round", "round": 3, **hidden})
    shown = scalars(tmp_path)
    assert shown["evaluation/accuracy"] == [(3, 0.5)]
    assert shown.keys() == {"evaluation/accuracy", "round/lr", "round/seconds", "bytes/up", "bytes/down"}


def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with (
        pytest.raises(MeerkatError, match=r"pip install 'meerkat-fl\[tensorboard\]'"),
        tracking("tensorboard", tmp_path, 0),
    ):
        pass
    with pytest.raises(MeerkatError, match=r"pip install 'meerkat-fl\[tensorboard\]'"):
        simulate(make_config(SETTINGS), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.iterdir())


def test_none_writes_nothing(tmp_path: Path) -> None:
    with tracking("none", tmp_path, 0) as follow:
        follow({"kind": "evaluation", "round": 0, "scores": {"accuracy": 0.5, "loss": 1.0}})
    assert not list(tmp_path.iterdir())
