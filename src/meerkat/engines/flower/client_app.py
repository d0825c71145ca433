"""Meerkat's ClientApp: a site's session, inside one Flower message.

Node config: `site`, the path of the site's own site.toml.
"""

from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from meerkat.agreement import SiteConfig
from meerkat.engines.flower.stream import attend
from meerkat.engines.offer import Offer
from meerkat.engines.site import Site
from meerkat.errors import MeerkatError, RunFailed
from meerkat.progress import say

app = ClientApp()


@app.train("session")
def session(message: Message, context: Context) -> Message:
    """Take part in a run until it is over. The answer tells how the session ended, and whether to invite again."""
    try:
        why, again = _take_part(message, context), True
    except RunFailed as error:  # a stream that broke, a machine that ran full: another try may do
        why, again = str(error), True
    except MeerkatError as error:
        why, again = str(error), False
    say(f"meerkat: {why}")
    return Message(RecordDict({"session": ConfigRecord({"why": why, "again": again})}), reply_to=message)


def _take_part(message: Message, context: Context) -> str:
    file = str(context.node_config.get("site", ""))
    if not file:
        raise MeerkatError("node config 'site': missing; flower-supernode ... --node-config 'site=\"/path/site.toml\"'")
    own = SiteConfig.load(Path(file))
    held = message.content["offer"]
    offer = Offer.decode(str(held["offer"]), bytes(held["mask"]))
    if not own.certificate_authority:
        raise MeerkatError(f"{file}: certificate_authority: missing; the path of the federation's CA certificate")
    try:
        authority = Path(own.certificate_authority).read_bytes()
    except OSError as error:
        raise MeerkatError(f"{file}: certificate_authority '{own.certificate_authority}': {error.strerror}") from None
    site = Site(offer, own)
    say(f"client {own.client}: in federation {offer.run}, at {offer.stream}")
    attend(site, offer.stream, authority, offer.patience_s)
    return f"{site.ended}, after round {site.round}"
