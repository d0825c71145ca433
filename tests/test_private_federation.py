"""Differential privacy where sites are at the other end of a wire: samples, failures, rows that change."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import Federation, Setting, write_rows

from meerkat.algorithm import server
from meerkat.algorithm.rounds import RoundRecord
from meerkat.errors import RunFailed
from meerkat.federation import remote_engine
from meerkat.federation.frames import Work
from meerkat.federation.ledger import Budget, Ledger
from meerkat.federation.site import Site
from meerkat.privacy import mechanism as mechanisms
from meerkat.privacy.accounting import epsilon
from meerkat.settings import budget

HIDDEN: dict[str, Any] = {"dp": "client", "weights": "equal", "dp_noise_multiplier": 1.0, "clients_per_round": 1}


@pytest.fixture(scope="module")
def base(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting.make(federation, tmp_path_factory.mktemp("rows"))


def hidden_round(fed: Federation) -> RoundRecord:
    """A round as `loop.run_rounds` goes through it where clients are hidden."""
    fed.gather()
    plan = server.open_round(
        fed.state, fed.settings, fed.settings.aggregation.invited(fed.settings.clients, fed.engine.available())
    )
    replies = fed.engine.run(fed.state, plan) if plan.steps else []
    fed.state, record = server.close_round(fed.state, plan, replies, fed.settings, fed.z, None)
    fed.records.append(record.to_json())
    fed.engine.closed(fed.state, record)
    return record


@pytest.mark.parametrize("trouble", ["fails", "hangs", "leaves", "none"])
def test_a_sample_is_drawn_once_and_the_round_closes_with_who_answers(
    base: Setting, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    fed = Federation.of(base.but(**HIDDEN), monkeypatch)
    drawn: list[int] = []

    def only_one(_: mechanisms.Mechanism, members: Sequence[int]) -> np.ndarray:
        drawn.append(len(members))
        return np.array([1])

    monkeypatch.setattr(mechanisms.Mechanism, "sample", only_one)
    if trouble == "fails":
        works = Site._work

        def work(site: Site, asked: Work) -> bytes:
            if site.client == 1:
                raise MemoryError
            return works(site, asked)

        monkeypatch.setattr(Site, "_work", work)
    elif trouble != "none":
        answer = [] if trouble == "hangs" else None
        fed.wire.meddle = lambda client, data, up: answer if up and client == 1 else [(0.0, data)]
    before = fed.state.theta.clone()
    record = hidden_round(fed)
    assert drawn == [3]
    assert dict(record.made) == ({1: 1} if trouble == "none" else {})
    assert (fed.state.theta != before).any(), "noise moves it"
    assert fed.replayed().state.round == 1


def test_an_aggregate_that_noise_does_not_make_is_refused(base: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in (np.nan, 1e30):
        fed = Federation.of(base.but(**HIDDEN), monkeypatch)
        with monkeypatch.context() as patched:
            patched.setattr(server, "aggregate", lambda *_, bad=bad: np.full((1, 1), bad, np.float32))
            hidden_round(fed)
        with pytest.raises(RunFailed, match="longer than a step may be"):
            fed.replayed()


def test_a_site_that_comes_back_with_more_rows_is_charged_for_those_it_had(
    base: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    setting = base.but(dp="example", dp_noise_multiplier=1.0, rounds=4, batch_size=4)
    fed = Federation(setting)
    monkeypatch.setattr(remote_engine, "time", fed.wire)
    rows = [{"sentence": f"a film {i}", "label": i % 2} for i in range(400)]
    for folder, part in (("few", rows[:4]), ("many", rows)):
        write_rows(tmp_path / folder, part)
    for client in (1, 2):
        fed.enter(client, ledger=str(tmp_path / f"ledger-{client}"))
    made: dict[tuple[int, int], int] = {}
    for folder, rounds in (("few", 3), ("many", 1)):
        site = fed.enter(0, node="node 0", data=str(tmp_path / folder), ledger=str(tmp_path / "ledger"))
        for _ in range(rounds):
            fed.round()
        made[0, 4 if folder == "few" else 400] = rounds
        fed.wire.disconnect(0)
        site.close()
    ledger = Ledger(tmp_path / "ledger")
    budget_of_all = Budget(1.0, setting.config.dp_delta, "add-or-remove")
    own = epsilon([*ledger.charges_against(budget_of_all)], budget_of_all.delta, budget_of_all.relation)
    ledger.close()
    told = budget.spent(setting.config, made, 4, "add-or-remove")
    assert told == [own]
    assert own > 5 > budget.spent(setting.config, {(0, 400): 4}, 4, "add-or-remove")[0]
