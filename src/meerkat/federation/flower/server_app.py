"""Meerkat's ServerApp: invites nodes over Flower, and runs the federation that federation.toml describes.

Run config: `config`, the path of federation.toml, and `out`, the run folder, both on the coordinator.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from meerkat.errors import MeerkatError
from meerkat.federation.admission import Door
from meerkat.federation.coordinator import FederationConfig, coordinate, read_federation
from meerkat.federation.flower.messages import MessageLink, hello_in, session_end
from meerkat.federation.flower.stream import StreamLink
from meerkat.federation.link import Link
from meerkat.federation.offer import Offer
from meerkat.progress import say
from meerkat.run.sentences import scores_in_words

SESSION = "train.session"
"""The message type that invites a node."""
_POLL_S = 1.0
_AGAIN_S = 5.0
"""Seconds before a node whose session ended early is invited again."""
_DRAIN_S = 15.0
"""Seconds that nodes have to end their sessions when the run is over."""

app = ServerApp()


class FlowerControl:
    """Invites every node that Flower knows, whenever it has no session. See `coordinator.Control`."""

    def __init__(self, grid: Grid, federation: FederationConfig) -> None:
        self._grid = grid
        self._federation = federation
        self._out: dict[str, int] = {}
        """Messages that were not answered, and their nodes."""
        self._not_before: dict[int, float] = {}
        self._messages: MessageLink | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def link(self, door: Door) -> Link:
        """The session stream, or where there is none, Flower's messages."""
        own = self._federation
        if own.stream:
            return StreamLink(door, own.listen or own.stream, Path(own.certificate), Path(own.private_key))
        self._messages = MessageLink(self._grid, door)
        return self._messages

    def open(self, door: Door, offer: Offer, stop: Callable[[str], None]) -> None:
        """Invite nodes from a thread of its own. Flower's word that the run was stopped comes up in there."""

        def invite() -> None:
            try:
                while not self._closing.is_set():
                    self._look(door, offer)
                    self._closing.wait(_POLL_S)
            except BaseException as error:  # SystemExit is Flower's way to stop an app
                stop("the run was stopped" if isinstance(error, SystemExit) else f"Flower failed ({error})")

        self._thread = threading.Thread(target=invite, name="invitations", daemon=True)
        self._thread.start()

    def stop_inviting(self) -> None:
        """Invite nobody any more."""
        self._closing.set()

    def close(self) -> None:
        """Wait a while until the nodes' sessions have ended."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(_POLL_S)  # no longer: Flower holds it in a call when it stops an app
        end = time.monotonic() + _DRAIN_S
        while self._out and time.monotonic() < end:
            self._collect()
            time.sleep(_POLL_S / 4)

    def _look(self, door: Door, offer: Offer) -> None:
        self._collect()
        busy, now = set(self._out.values()), time.monotonic()
        busy |= self._messages.nodes() if self._messages is not None else set()
        free = [n for n in self._grid.get_node_ids() if n not in busy and self._not_before.get(n, 0.0) <= now]
        if not free:
            return
        messages = [_invitation(offer, door.token(str(node)), node) for node in free]
        for node, sent in zip(free, self._grid.push_messages(messages), strict=True):
            if sent is not None:
                self._out[sent] = node

    def _collect(self) -> None:
        """Take the answers of sessions that ended."""
        if not self._out:
            return
        for answer in self._grid.pull_messages(list(self._out)):
            node = self._out.pop(answer.metadata.reply_to_message_id, None)
            if node is None:
                continue
            self._not_before[node] = time.monotonic() + _AGAIN_S
            if (ended := session_end(answer)) is not None:
                self._part(node, *ended)
            elif self._messages is not None and (hello := hello_in(answer)) is not None:
                # without a stream a node stays invited for as long as its messages are answered
                if why := self._messages.admit(node, hello):
                    self._not_before[node] = float("inf")
                    say(f"node {node}: is refused: {why}")
            else:
                self._part(node, "its answer is none of this version's", again=False)

    def _part(self, node: int, why: str, again: bool) -> None:
        if not again:
            self._not_before[node] = float("inf")
            say(f"node {node}: takes no part: {why}")
        elif not self._closing.is_set():
            say(f"node {node}: its session ended: {why}")


def _invitation(offer: Offer, token: str, node: int) -> Message:
    text, mask = offer.encode(token)
    content = RecordDict({"offer": ConfigRecord({"offer": text, "mask": mask})})
    return Message(content, dst_node_id=node, message_type=SESSION)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation from beginning to end, or go on with it."""
    given = {name: str(context.run_config.get(name, "")) for name in ("config", "out")}
    for name, value in given.items():
        if not value:
            raise MeerkatError(f"run config '{name}': missing; flwr run ... --run-config '{name}=\"/path\"'")
    config, federation = read_federation(Path(given["config"]))
    summary = coordinate(config, federation, Path(given["out"]), FlowerControl(grid, federation))
    scores = scores_in_words(summary["scores"])
    say(f"finished after {summary['rounds']} rounds: {scores}, theta {summary['theta_digest']}")
