"""Meerkat's ClientApp: a site's session inside one Flower message, or, without a stream, over many.

Node config: `site`, the path of the site's own site.toml.
"""

import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from meerkat.errors import MeerkatError, RunFailed
from meerkat.federation.flower.messages import pack, unpack
from meerkat.federation.flower.stream import attend
from meerkat.federation.offer import Offer
from meerkat.federation.site import Site
from meerkat.federation.site_settings import SiteConfig
from meerkat.progress import say

app = ClientApp()


@app.train("session")
def session(message: Message, context: Context) -> Message:
    """Take part in a run until it is over. The answer tells how the session ended, and whether to invite again.

    Where frames travel in messages, the answer is the site's first frame, and `frames` goes on.
    """
    return _told(message, lambda: _take_part(message, context))


@app.train("frames")
def frames(message: Message, context: Context) -> Message:
    """Answer the frames of one message, as the site that `session` kept."""
    return _told(message, lambda: _answer(message, context))


def _told(message: Message, act: Callable[[], RecordDict]) -> Message:
    """The answer to a message; what went wrong is told in one line, here and there."""
    try:
        content = act()
    except RunFailed as error:  # a stream that broke, a machine that ran full: another try may do
        content = _ended(str(error), again=True)
    except MeerkatError as error:
        content = _ended(str(error), again=False)
    except (KeyboardInterrupt, SystemExit):  # without an answer Flower would wait for one without end
        content = _ended("the site was interrupted", again=True)
    except Exception as error:  # Flower would send its words, and they may quote a row
        traceback.print_exc()
        content = _ended(f"the site failed ({type(error).__name__}); its own log says more", again=True)
    return Message(content, reply_to=message)


def _ended(why: str, again: bool) -> RecordDict:
    say(f"meerkat: {why}")
    return RecordDict({"session": ConfigRecord({"why": why, "again": again})})


def _take_part(message: Message, context: Context) -> RecordDict:
    held = message.content["offer"]
    offer, own = Offer.decode(str(held["offer"]), bytes(held["mask"])), _own(context)
    authority = _authority(own) if offer.stream else b""
    with closing(Site(offer, own, str(context.node_id))) as site:
        if offer.stream:
            say(f"client {own.client}: in federation {offer.run}, at {offer.stream}")
            attend(site, offer.stream, authority, offer.patience_s)
            return _ended(f"{site.ended}, after round {site.round}", again=True)
        return _begin(site, offer, own, message, context)


def _begin(site: Site, offer: Offer, own: SiteConfig, message: Message, context: Context) -> RecordDict:
    """A session that goes on in messages: the site's first frame, and all that the next message needs."""
    held = message.content["offer"]
    if "site" in context.state and context.state["offer"]["run"] == offer.run:
        site.take_up(context.state["site"])
    say(f"client {own.client}: in federation {offer.run}, over Flower's messages")
    context.state["offer"] = ConfigRecord({"run": offer.run, "offer": held["offer"], "mask": held["mask"]})
    context.state["site"] = ConfigRecord(site.keep())
    return RecordDict({"hello": ConfigRecord({"frame": site.hello()})})


def _answer(message: Message, context: Context) -> RecordDict:
    if "site" not in context.state:
        raise RunFailed("the site's state is gone; the next invitation begins anew")
    held = context.state["offer"]
    offer = Offer.decode(str(held["offer"]), bytes(held["mask"]))
    with closing(Site(offer, _own(context), str(context.node_id))) as site:
        if context.state["site"]["joined"] != site.joined:
            raise RunFailed(
                "the site's key or rows are not those that it came in with; the next invitation begins anew"
            )
        site.take_up(context.state["site"])
        try:
            answers = [site.answer(frame) for frame in unpack(message.content)]
        except MeerkatError as error:
            answers = [site.refusal(str(error))]
            say(f"meerkat: {error}")
    context.state["site"] = ConfigRecord(site.keep())
    if site.ended:
        say(f"meerkat: {site.ended}, after round {site.round}")
    return pack([answer for answer in answers if answer is not None])


def _own(context: Context) -> SiteConfig:
    file = str(context.node_config.get("site", ""))
    if not file:
        raise MeerkatError("node config 'site': missing; flower-supernode ... --node-config 'site=\"/path/site.toml\"'")
    return SiteConfig.load(Path(file))


def _authority(own: SiteConfig) -> bytes:
    """The federation's CA certificate, PEM."""
    if not own.certificate_authority:
        raise MeerkatError("site.toml: certificate_authority: missing; give the path of the federation's CA")
    try:
        return Path(own.certificate_authority).read_bytes()
    except OSError as error:
        raise MeerkatError(f"certificate_authority '{own.certificate_authority}': {error.strerror}") from None
