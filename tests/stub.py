"""A federation without a model: sites that answer from a formula, and a coordinator of a thousand numbers."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from meerkat.algorithm import path
from meerkat.algorithm.directions import Directions, Place
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.rounds import RoundPlan, RoundRecord
from meerkat.algorithm.server import ServerConfig, ServerState, close_round, open_round
from meerkat.federation import frames
from meerkat.federation.admission import Admission
from meerkat.federation.coordinator_settings import FederationConfig
from meerkat.federation.flower.stream import StreamLink, attend
from meerkat.federation.frames import BadFrame, Frame, Kind, StateParts, Work
from meerkat.federation.remote_engine import RemoteEngine
from meerkat.problems.problem import Better
from meerkat.record.members import Members
from meerkat.record.signatures import RunIdentity

LENGTH, EPS = 1000, 1e-3
MODEL, MASK = (hashlib.sha256(text).hexdigest() for text in (b"model", b"mask"))
RUN = "00112233445566ff"
SCORES: dict[str, Better] = {"accuracy": "higher", "loss": "lower"}
IDENTITY = RunIdentity(RUN, False, "00" * 16, MODEL, MASK, path.digest(torch.zeros(LENGTH)), "00" * 32)


def scalars_of(client: int, round: int) -> np.ndarray:
    """What a stub answers in a round: float32 [1, 1]."""
    return np.array([[(client + 1) / (round + 1)]], np.float32)


class StubSite:
    """Has the methods of `federation.site.Site`; follows the run truly, and takes its scalars from `scalars_of`."""

    def __init__(self, client: int, token: str, z: Directions | None = None, compute_s: float = 0.0) -> None:
        self.client = client
        self.round = 0
        self.ended, self.refused, self.welcomed = "", False, False
        self.theta = torch.zeros(LENGTH)
        self.states = 0
        """How often it was given the whole of theta."""
        self.compute_s = compute_s
        self._digest = bytes.fromhex(path.digest(self.theta))
        self._secret = bytes.fromhex(token)
        self._z = z or Directions(1, LENGTH)
        self._parts = StateParts(LENGTH)

    @property
    def digest(self) -> str:
        return self._digest.hex()

    def hello(self) -> bytes:
        said = {"examples": 10 + self.client, "model": MODEL, "mask": MASK, "evaluates": False}
        return self.frame(Kind.HELLO, frames.encode_json(said, self._secret))

    def answer(self, data: bytes) -> bytes | None:
        frame = Frame.decode(data)
        if frame.client != self.client:
            raise BadFrame("a frame for another client")
        match frame.kind:
            case Kind.WELCOME:
                self._secret, _ = frames.decode_json(frame.body, 32)
                self.welcomed = True
            case Kind.STATE:
                if (values := self._parts.add(frame.body)) is not None:
                    self.states += 1
                    self._settle(torch.from_numpy(values), frame.round)
            case Kind.WORK | Kind.CLOSED:
                return self._follow_and_work(frame, Work.decode(frame.body))
            case Kind.END | Kind.REFUSAL:
                _, said = frames.decode_json(frame.body)
                self.ended, self.refused = str(said["why"]), frame.kind is Kind.REFUSAL
        return None

    def refusal(self, why: str) -> bytes:
        return self.frame(Kind.REFUSAL, frames.encode_json({"why": why}))

    def frame(self, kind: Kind, body: bytes = b"") -> bytes:
        """A frame from this site, of the round and theta that it stands at."""
        return Frame(kind, bytes.fromhex(RUN), self.client, self.round, self._digest, body).encode()

    def reply(self, scalars: np.ndarray) -> bytes:
        """The frame that answers with scalars."""
        return self.frame(Kind.REPLY, frames.Answer("training", 0, scalars).encode())

    def _follow_and_work(self, frame: Frame, work: Work) -> bytes | None:
        for number, closed in enumerate(work.closed, frame.round - len(work.closed)):
            if number == self.round:
                plan = RoundPlan(number, closed.lr, EPS, 1, {self.client: len(closed.aggregate)})
                *_, theta = path.walk(self.theta, plan, closed.aggregate, self._z)
                self._settle(theta, number + 1)
        if (self.round, self._digest) != (frame.round, frame.digest):
            return self.frame(Kind.BEHIND)
        if frame.kind is Kind.CLOSED:
            return None
        if self.compute_s:
            time.sleep(self.compute_s)
        return self.reply(scalars_of(self.client, self.round))

    def prepare_next(self) -> None:
        self._z.prepare(Place("training", self.round, 0, 0))  # to follow this round when it is closed

    def _settle(self, theta: torch.Tensor, round: int) -> None:
        self.theta, self.round = theta, round
        self._digest = bytes.fromhex(path.digest(theta))


class Attending:
    """A stub that attends from a thread; `error` is what its session ended with, if it did not end well."""

    def __init__(self, site: StubSite, port: int, authority: bytes, patience_s: float = 20.0, **more: float) -> None:
        self.site = site
        self.error: Exception | None = None
        self._thread = threading.Thread(
            target=self._attend, args=(f"127.0.0.1:{port}", authority, patience_s), kwargs=more, daemon=True
        )
        self._thread.start()

    def _attend(self, *arguments: object, **more: float) -> None:
        try:
            attend(self.site, *arguments, **more)
        except Exception as error:
            self.error = error

    def end(self, timeout_s: float = 30.0) -> "Attending":
        """Wait until the session is over."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive()
        return self


class Coordinator:
    """The real engine, admission and link over a theta of zeros."""

    def __init__(
        self,
        keys: dict[str, Path],
        clients: int,
        waiting: FederationConfig | None = None,
        rounds: int = 10_000,
        port: int = 0,
        longest_frame: int = frames.LIMIT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.authority = keys["authority"].read_bytes()
        self.admission = Admission(Members(IDENTITY), clients, clock=clock)
        pair = keys["server"], keys["server key"]
        self.link = StreamLink(self.admission, f"127.0.0.1:{port}", *pair, longest_frame)
        self.port = self.link.port
        self._closed = False
        self.settings = ServerConfig(rounds, 1, 1, 0.1, EPS, clients, clients, {})
        self.state = ServerState(Replica(0, torch.zeros(LENGTH)))
        self.z = Directions(1, LENGTH)
        waiting = waiting or FederationConfig(clients_minimum=clients, deadline_s=20.0, patience_s=20.0)
        self.engine = RemoteEngine(self.link, self.admission, self.settings, waiting, self.state, self.z, SCORES)

    def site(self, client: int, compute_s: float = 0.0) -> StubSite:
        """A stub with a token of this coordinator's."""
        return StubSite(client, self.admission.token(f"node {client}"), compute_s=compute_s)

    def attending(self, client: int, port: int = 0, compute_s: float = 0.0, **more: float) -> Attending:
        """A stub that attends, perhaps through another port."""
        return Attending(self.site(client, compute_s), port or self.port, self.authority, **more)

    def rounds(self, count: int) -> Iterator[RoundRecord]:
        """Run rounds, one each time the next is asked for, as `loop.run_rounds` does."""
        for _ in range(count):
            replies = None
            while replies is None:  # fewer than the quorum were left: the round opens again
                for join in self.engine.arrivals(self.state.round):
                    self.settings = join.added_to(self.settings)
                plan = open_round(self.state, self.settings, self.engine.available())
                replies = self.engine.run(self.state, plan)
            self.state, record = close_round(self.state, plan, replies, self.settings, self.z)
            self.engine.closed(self.state, record)
            yield record

    @property
    def digest(self) -> str:
        return path.digest(self.state.theta)

    def close(self, why: str = "finished") -> None:
        if not self._closed:
            self._closed = True
            self.engine.end(why)
            self.link.close()
