"""A replica follows rounds as the server does, and is the same after it was packed and unpacked."""

import numpy as np
import pytest
import torch
from bowl import KEY, live, rules_of, same_bits
from test_server import config

from meerkat.algorithm import path
from meerkat.algorithm.directions import Directions
from meerkat.algorithm.replica import Replica, Rules
from meerkat.algorithm.rounds import Update
from meerkat.algorithm.server import share_of
from meerkat.algorithm.update_rules import FedAdam, FedAvg, FedAvgM, FedDyn

RULES = {
    "fedavg": rules_of(FedAvg()),
    "fedavgm": rules_of(FedAvgM(0.5)),
    "fedadam": rules_of(FedAdam(0.05, tau=1e-3)),
    "feddyn": rules_of(FedDyn(0.4)),
}


@pytest.mark.parametrize("packed", [False, True], ids=["followed", "packed in between"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_a_clients_replica_is_the_servers_of_it(rules: Rules, packed: bool) -> None:
    settings = config(rules=rules, rounds=5, clients_per_round=2, lr=0.05)
    lived = live(settings)
    z = Directions(KEY, len(lived.mask))
    replica = Replica(0, live(config(rounds=0)).engine.model.read())
    for record, state in zip(lived.rounds, lived.states, strict=True):
        update = Update(record.plan, record.aggregate, share_of(settings, record.made))
        replica = replica.follow(update, rules, z, record.scalars.get(1))
        assert replica.digest == state.replica.digest == path.digest(state.theta)
        assert replica.round == state.round
        ours, theirs = replica.pack(rules), state.replica_of(1).pack(rules)
        assert ours.tobytes() == theirs.tobytes()
        assert len(ours) == rules.vectors * len(lived.mask)
        if packed:
            replica = Replica.unpack(ours, replica.round, rules, torch.device("cpu"))
    carried = lived.states[-1].carried.get(1)
    assert (replica.h is None) == (carried is None)
    assert carried is None or same_bits(replica.h, carried)


def test_values_of_other_rules_are_refused() -> None:
    values = Replica(3, torch.ones(5)).pack(RULES["fedavgm"])
    with pytest.raises(RuntimeError, match="invalid for input"):
        Replica.unpack(values[:-1], 3, RULES["fedavgm"], torch.device("cpu"))


def test_following_writes_into_nothing() -> None:
    start = Replica(0, torch.ones(4), (torch.full((4,), 2.0),))
    record = live(config(rounds=1, clients_per_round=3)).rounds[0]
    update = Update(record.plan, record.aggregate)
    after = start.follow(update, RULES["fedavgm"], Directions(KEY, 4), np.ones((3, 2), np.float32))
    assert start.theta.tolist() == [1] * 4
    assert start.moments[0].tolist() == [2] * 4
    assert not same_bits(after.theta, start.theta)
