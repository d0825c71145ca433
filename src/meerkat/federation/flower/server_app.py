"""Meerkat's ServerApp: invites nodes over Flower, and runs the federation that federation.toml describes.

Run config: `config`, the path of federation.toml, and `out`, the run folder, both on the coordinator.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from meerkat.errors import MeerkatError
from meerkat.federation.admission import Admission
from meerkat.federation.coordinator import coordinate
from meerkat.federation.coordinator_settings import FederationConfig, most_scalars, read_federation
from meerkat.federation.flower.messages import MALFORMED, MessageLink, answered, hello_in, offer_record, session_end
from meerkat.federation.flower.stream import StreamLink
from meerkat.federation.frames import longest_of_a_site
from meerkat.federation.link import Link
from meerkat.federation.offer import Offer
from meerkat.progress import number_of, say
from meerkat.run.sentences import scores_in_words
from meerkat.settings.config import RunConfig

SESSION = "train.session"
"""The message type that invites a node."""
_POLL_S = 1.0
_INVITE_AGAIN_S = 5.0
"""Seconds before a node whose session ended early is invited again."""
_TTL_S = 7 * 86_400.0
"""Seconds for which Flower keeps an invitation: a stream's session answers it when it ends."""
_DRAIN_S = 15.0
"""Seconds that nodes have to end their sessions when the run is over."""
_NEVER = float("inf")

app = ServerApp()


class FlowerControl:
    """Invites every node that Flower knows, whenever it has no session. See `coordinator.Control`."""

    def __init__(self, grid: Grid, config: RunConfig, federation: FederationConfig) -> None:
        self._grid = grid
        self._longest_frame = longest_of_a_site(most_scalars(config))
        self._federation = federation
        self._invited: dict[str, int] = {}
        """The node of each invitation that was not answered yet."""
        self._not_before: dict[int, float] = {}
        """When each node may be invited again, on the monotonic clock."""
        self._messages: MessageLink | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def link(self, admission: Admission) -> Link:
        """The session stream or, without one, Flower's messages."""
        settings = self._federation
        if settings.stream:
            listen = settings.listen or settings.stream
            pair = Path(settings.certificate), Path(settings.private_key)
            return StreamLink(admission, listen, *pair, self._longest_frame)
        self._messages = MessageLink(self._grid, admission)
        return self._messages

    def open(self, admission: Admission, offer: Offer, stop: Callable[[str], None]) -> None:
        """Invite nodes from a separate thread. If Flower stops the run, that thread is where it shows."""

        def invite() -> None:
            try:
                while not self._closing.is_set():
                    self._invite_free_nodes(admission, offer)
                    self._closing.wait(_POLL_S)
            except BaseException as error:  # SystemExit is Flower's way to stop an app
                stop("the run was stopped" if isinstance(error, SystemExit) else f"Flower failed ({error})")

        self._thread = threading.Thread(target=invite, name="invitations", daemon=True)
        self._thread.start()

    def stop_inviting(self) -> None:
        """Send no more invitations."""
        self._closing.set()

    def close(self) -> None:
        """Wait a while for the nodes' sessions to end."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(_POLL_S)  # no longer: when Flower stops an app, it blocks this thread in a call
        end = time.monotonic() + _DRAIN_S
        while self._invited and time.monotonic() < end:
            self._collect()
            time.sleep(_POLL_S / 4)

    def _invite_free_nodes(self, admission: Admission, offer: Offer) -> None:
        self._collect()
        busy, now = set(self._invited.values()), time.monotonic()
        busy |= self._messages.nodes() if self._messages is not None else set()
        free = [n for n in self._grid.get_node_ids() if n not in busy and self._not_before.get(n, 0.0) <= now]
        if not free:
            return
        offers = [RecordDict({"offer": offer_record(offer, admission.token(str(node)))}) for node in free]
        invitations = [Message(content, node, SESSION, ttl=_TTL_S) for node, content in zip(free, offers, strict=True)]
        for node, message_id in zip(free, self._grid.push_messages(invitations), strict=True):
            if message_id is not None:
                self._invited[message_id] = node

    def _collect(self) -> None:
        """Collect the answers to invitations: of sessions that ended, or that continue in messages."""
        for answer, node in answered(self._grid, self._invited):
            self._not_before[node] = time.monotonic() + _INVITE_AGAIN_S
            if answer is None:
                self._session_ended(node, MALFORMED, again=False)
            elif (end := session_end(answer)) is not None:
                self._session_ended(node, *end)
            elif self._messages is not None and (hello := hello_in(answer)) is not None:
                # without a stream a node stays in its session as long as it answers messages
                if why := self._messages.admit(node, hello):
                    self._not_before[node] = _NEVER
                    say(f"node {node}: is refused: {why}")
            else:
                self._session_ended(node, MALFORMED, again=False)

    def _session_ended(self, node: int, why: str, again: bool) -> None:
        if not again:
            self._not_before[node] = _NEVER
            say(f"node {node}: takes no part: {why}")
        elif not self._closing.is_set():
            say(f"node {node}: its session ended: {why}")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation from beginning to end, or resume it."""
    given = {name: str(context.run_config.get(name, "")) for name in ("config", "out")}
    for name, value in given.items():
        if not value:
            raise MeerkatError(f"run config '{name}': missing; flwr run ... --run-config '{name}=\"/path\"'")
    config, federation = read_federation(Path(given["config"]))
    summary = coordinate(config, federation, Path(given["out"]), FlowerControl(grid, config, federation))
    scores = scores_in_words(summary["scores"])
    say(f"finished after {number_of(summary['rounds'], 'round')}: {scores}, theta {summary['theta_digest']}")
