"""Meerkat's ClientApp: a site's session inside one Flower message, or, without a stream, over many.

Node config: `site`, the path of the site's own site.toml.
"""

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from meerkat.errors import MeerkatError, RunFailed
from meerkat.federation.flower.messages import offer_in, pack, unpack
from meerkat.federation.flower.stream import StreamLost, attend
from meerkat.federation.frames import BadFrame
from meerkat.federation.offer import Offer
from meerkat.federation.site import Site
from meerkat.federation.site_settings import SiteConfig, details_in_own_log
from meerkat.progress import say

app = ClientApp()


@app.train("session")
def session(message: Message, context: Context) -> Message:
    """Take part in a run until it is over. The answer says how the session ended, and whether to invite again.

    Where frames travel in messages, the answer is the site's first frame, and `frames` continues.
    """
    return _answer(message, lambda: _take_part(message, context))


@app.train("frames")
def frames(message: Message, context: Context) -> Message:
    """Answer the frames of one message, as the site that `session` stored."""
    return _answer(message, lambda: _answer_frames(message, context))


def _answer(message: Message, act: Callable[[], RecordDict]) -> Message:
    """The answer to a message. An error becomes one line, in the site's own log and in the answer."""
    try:
        content = act()
    except StreamLost as error:
        content = _session_end(str(error), again=True, logged=True)
    except RunFailed as error:  # such as a machine out of memory or disk: another attempt may succeed
        content = _session_end(str(error), again=True)
    except MeerkatError as error:
        content = _session_end(str(error), again=False)
    except (KeyboardInterrupt, SystemExit):  # without an answer Flower would wait for one forever
        content = _session_end("the site was interrupted", again=True)
    except Exception as error:  # Flower would send its text, which may quote a row
        for line in traceback.format_exc().splitlines():
            say(line)
        content = _session_end(f"the site failed ({type(error).__name__}); its own log says more", again=True)
    return Message(content, reply_to=message)


def _session_end(why: str, again: bool, logged: bool = False) -> RecordDict:
    if not logged:
        say(f"meerkat: {why}")
    return RecordDict({"session": ConfigRecord({"why": why, "again": again})})


def _take_part(message: Message, context: Context) -> RecordDict:
    offer, settings = offer_in(message.content), _settings(context)
    address, authority = _stream(offer, settings) if offer.stream else ("", b"")
    with closing(Site(offer, settings, str(context.node_id))) as site:
        if offer.stream:
            say(f"client {site.client}: in federation {offer.run}, at {address}")
            attend(site, address, authority, offer.patience_s)
            return _session_end(f"{site.ended}, after round {site.round}", again=True)
        # without a stream: answer with the site's first frame, and store what the next message needs
        if "site" in context.state and context.state["offer"]["run"] == offer.run:
            site.restore(context.state["site"])
        say(f"client {site.client}: in federation {offer.run}, over Flower's messages")
        context.state["offer"] = ConfigRecord({**message.content["offer"], "run": offer.run})
        context.state["site"] = ConfigRecord(site.snapshot())
        return RecordDict({"hello": ConfigRecord({"frame": site.hello()})})


def _answer_frames(message: Message, context: Context) -> RecordDict:
    if "site" not in context.state:
        raise RunFailed("no session goes on here; the next invitation begins anew")
    with closing(Site(offer_in(context.state), _settings(context), str(context.node_id), goes_on=True)) as site:
        if context.state["site"]["joined"] != site.joined:
            raise RunFailed("the site's key or rows are not those that it joined with; the next invitation begins anew")
        site.restore(context.state["site"])
        try:
            answers = list(_answers(site, unpack(message.content)))
        except RunFailed:  # the next invitation continues
            raise
        except MeerkatError as error:
            say(f"meerkat: {error}")
            del context.state["site"]
            return pack([site.refusal(str(error))])
    if site.ended:
        say(f"meerkat: {site.ended}, after round {site.round}")
        del context.state["site"]
    else:
        context.state["site"] = ConfigRecord(site.snapshot())
    return pack(answers)


def _answers(site: Site, asked: Iterable[bytes]) -> Iterator[bytes]:
    """The answer to the one question among a message's frames, if there is one.

    Raises:
        BadFrame: there are more, whose answers would be far longer than they; or what `Site.answer` raises.
    """
    answered = False
    for data in asked:
        if site.ended:
            return
        if answered:
            raise BadFrame("a message of more than one question")
        if (answer := site.answer(data)) is not None:
            answered = True
            yield answer


def _settings(context: Context) -> SiteConfig:
    file = str(context.node_config.get("site", ""))
    if not file:
        raise MeerkatError("node config 'site': missing; flower-supernode ... --node-config 'site=\"/path/site.toml\"'")
    with details_in_own_log("the site's settings cannot be used"):
        return SiteConfig.load(Path(file))


def _stream(offer: Offer, settings: SiteConfig) -> tuple[str, bytes]:
    """Where the site finds the stream, by its own settings alone, and the federation's CA certificate, PEM."""
    if not settings.coordinator:
        raise MeerkatError("site.toml: coordinator: missing; give host:port of the coordinator's stream")
    if settings.coordinator != offer.stream:
        say(f"note: the coordinator calls its stream {offer.stream}; site.toml has coordinator {settings.coordinator}")
    if not settings.certificate_authority:
        raise MeerkatError("site.toml: certificate_authority: missing; give the path of the federation's CA")
    try:
        return settings.coordinator, Path(settings.certificate_authority).read_bytes()
    except OSError as error:
        raise MeerkatError(f"certificate_authority '{settings.certificate_authority}': {error.strerror}") from None
