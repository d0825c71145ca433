"""What Flower's SecAgg+ would cost a round of scalars, and what it makes of their mean: its own code, in one process.

    python benchmarks/secure_aggregation.py [--json] [--clients 3,10,30] [--steps 1,100] [--shares N]

`SecAggPlusWorkflow` and `secaggplus_mod` carry each client's T scalars in place of a model. Counted are the messages'
serialised bytes, without what their transport adds, and CPU time; there is no network in it. The headline is what a
client sends in a round of one step over the 4 bytes of its scalar. The mean is held against the float32 of the float64
mean, which is what a round's G is. And: how many bits of a pairwise mask's seed ever differ, and how long it takes to
try them all.
"""

import argparse
import base64
import json
import logging
import os
import time
from typing import Any

import flwr.compat.common.recorddict_compat as compat
import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.server import LegacyContext, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.supercore.task_identity import TaskIdentity


class Nodes:
    """Stands in for Flower's grid: every message is answered here, at once."""

    def __init__(self, scalars: np.ndarray) -> None:
        """Of each client: float32 [K, T]. Node k + 1 is client k."""
        self.scalars = scalars
        self.contexts = {k + 1: Context(0, k + 1, {}, RecordDict(), {}) for k in range(len(scalars))}
        self.stages = self.down = self.up = 0
        self.client_s = 0.0

    def send_and_receive(self, messages: list[Message], **_: Any) -> list[Message]:
        """One stage of the protocol."""
        self.stages += 1
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        sent = message_to_proto(message)
        self.down += sent.ByteSize()
        began = time.process_time()
        node = message.metadata.dst_node_id
        answer = secaggplus_mod(message_from_proto(sent), self.contexts[node], self._steps)
        self.client_s += time.process_time() - began
        back = message_to_proto(answer)
        self.up += back.ByteSize()
        return message_from_proto(back)

    def _steps(self, message: Message, context: Context) -> Message:
        values = ndarrays_to_parameters([self.scalars[context.node_id - 1]])
        result = FitRes(Status(Code.OK, ""), values, 1, {})
        return Message(compat.fitres_to_recorddict(result, True), reply_to=message)


def a_round(scalars: np.ndarray, shares: int) -> tuple[np.ndarray, Nodes, float]:
    """The clients' mean as SecAgg+ gives it, float64 [T]; what it took; CPU seconds."""
    nodes = Nodes(scalars)
    manager = SimpleClientManager()
    for node in nodes.contexts:
        manager.register(GridClientProxy(node, nodes, 0))
    strategy = FedAvg(min_fit_clients=len(scalars), min_available_clients=len(scalars))
    context = LegacyContext(Context(0, 0, {}, RecordDict(), {}), strategy=strategy, client_manager=manager)
    context.state[MAIN_CONFIGS_RECORD] = ConfigRecord({"current_round": 1})
    nothing = ndarrays_to_parameters([np.zeros_like(scalars[0])])
    context.state[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(nothing, True)
    began = time.process_time()
    SecAggPlusWorkflow(shares or 1.0, 0.6 if not shares else round(0.6 * shares), max_weight=1.0)(nodes, context)
    seconds = time.process_time() - began
    parameters = compat.arrayrecord_to_parameters(context.state.array_records[MAIN_PARAMS_RECORD], True)
    return parameters_to_ndarrays(parameters)[0], nodes, seconds


def measured(clients: int, steps: int, shares: int) -> dict[str, Any]:
    """A round, twice with the same scalars."""
    scalars = np.random.default_rng(clients).normal(scale=0.5, size=(clients, steps)).astype("f4")
    first, nodes, seconds = a_round(scalars, shares)
    again, *_ = a_round(scalars, shares)
    exact = scalars.astype("f8").mean(0)
    return {
        "clients": clients,
        "steps": steps,
        "shares": shares or clients,
        "stages": nodes.stages,
        "up": nodes.up / clients,
        "down": nodes.down / clients,
        "client_ms": 1e3 * nodes.client_s / clients,
        "round_ms": 1e3 * seconds,
        "error": float(np.abs(first - exact).max()),
        "float32_error": float(np.abs(exact.astype("f4") - exact).max()),
        "as_exact": float((first.astype("f4") == exact.astype("f4")).mean()),
        "as_again": float((first.astype("f4") == again.astype("f4")).mean()),
    }


def seeds() -> dict[str, float]:
    """Bits of a pairwise mask's seed that differ among 10,000 keys, and CPU time of a guess and of 2^28."""
    keys = [base64.urlsafe_b64encode(os.urandom(32)) for _ in range(10_000)]  # as generate_shared_key makes them
    key_seeds = [np.bitwise_xor.reduce(np.frombuffer(key, "<u4")) for key in keys]  # as pseudo_rand_gen takes them
    assert all(
        pseudo_rand_gen(key, 1 << 32, [(4,)])[0].tolist()
        == np.random.RandomState(seed).randint(0, (1 << 32) - 1, (4,), dtype=np.int64).tolist()
        for key, seed in zip(keys[:100], key_seeds[:100], strict=True)
    )
    differing = np.bitwise_or.reduce(key_seeds) & ~np.bitwise_and.reduce(key_seeds)
    generator, began = np.random.RandomState(), time.process_time()
    for seed in key_seeds:
        generator.seed(seed)
        generator.randint(0, (1 << 32) - 1, 2, dtype=np.int64)
    guess_s = (time.process_time() - began) / len(key_seeds)
    return {"bits": int(differing).bit_count(), "guess_us": guess_s * 1e6, "all_guesses_s": guess_s * 2**28}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--clients", default="3,10,30")
    parser.add_argument("--steps", default="1,100")
    parser.add_argument("--shares", type=int, default=0, help="neighbours that each key is shared with; 0 for all")
    given = parser.parse_args()
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 0
    logging.getLogger("flwr").setLevel(logging.ERROR)
    rows = [measured(int(k), int(t), given.shares) for k in given.clients.split(",") for t in given.steps.split(",")]
    figures = seeds()
    result = {
        "name": "secure_aggregation",
        "ratio": rows[0]["up"] / (4 * rows[0]["steps"]),
        "rounds": rows,
        "seed": figures,
        "measured_on": "Flower's SecAgg+, its defaults but max_weight 1, scalars N(0, .5^2), in one process",
    }
    if given.json:
        print(json.dumps(result))
        return
    for row in rows:
        print(
            f"{row['clients']:>3} clients, T = {row['steps']:>3}, {row['shares']} shares: {row['stages']} stages, "
            f"{row['up']:,.0f} bytes up and {row['down']:,.0f} down a client, {row['client_ms']:.0f} ms a client, "
            f"{row['round_ms']:.0f} ms in all; off by up to {row['error']:.1e} (float32: {row['float32_error']:.1e}); "
            f"{row['as_exact']:.2f} of the means are G's bits, {row['as_again']:.2f} the same when done again"
        )
    print(
        f"of a pairwise mask's seed {figures['bits']} bits differ; a guess takes {figures['guess_us']:.1f} us, "
        f"2^28 of them {figures['all_guesses_s'] / 60:.0f} minutes"
    )
    print(result["measured_on"])


if __name__ == "__main__":
    main()
