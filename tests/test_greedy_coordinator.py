"""What a coordinator can make a site hold or do: never more than a few answers, whatever it asks and leaves unread."""

import asyncio
import json
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

pytest.importorskip("flwr")

import grpc
import grpc.aio
from federation import Setting
from stub import RUN, Attending, StubSite
from test_site import Server

from meerkat.errors import MeerkatError, RunFailed
from meerkat.federation import frames
from meerkat.federation.certificates import certify
from meerkat.federation.coordinator_settings import FederationConfig
from meerkat.federation.flower import client_app, stream
from meerkat.federation.flower.messages import offer_record, pack, unpack
from meerkat.federation.frames import BadFrame, Closed, Frame, Kind, Work
from meerkat.federation.offer import Offer
from meerkat.federation.site_client import SiteClient
from meerkat.federation.site_settings import Accepts, Refused, SiteConfig
from meerkat.problems.tasks import Task, encode

QUESTIONS = 300


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return certify(tmp_path_factory.mktemp("certificates") / "keys", ["127.0.0.1"], nodes=0)


class Repeating(StubSite):
    """Answers a question again each time that it comes; its replies are far longer than the questions."""

    answers = 0

    def answer(self, data: bytes) -> bytes | None:
        if Frame.decode(data).kind is not Kind.WORK:
            return super().answer(data)
        self.answers += 1
        return self.reply(np.zeros((200, 100), np.float32))


@contextmanager
def asking_without_reading(keys: dict[str, Path], question: bytes) -> Iterator[int]:
    """A coordinator that welcomes a site, asks one question over and over, and reads no answer. Yields its port."""

    async def attend(_: AsyncIterator[bytes], context: Any) -> None:
        hello = Frame.decode(await context.read())
        await context.write(Frame(Kind.WELCOME, hello.run, 0, 0, body=frames.encode_json({}, bytes(32))).encode())
        for _ in range(QUESTIONS):
            await context.write(question)
        await asyncio.Event().wait()  # the answers stay unread

    async def serve() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(options=stream._OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(attend)
        methods = {stream._METHOD: handler}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(stream._SERVICE, methods),))
        pair = keys["server key"].read_bytes(), keys["server"].read_bytes()
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
        await server.start()
        return server, port

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server, port = asyncio.run_coroutine_threadsafe(serve(), loop).result(30)
    try:
        yield port
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


def test_a_site_whose_answers_stay_unread_ends_its_session(keys: dict[str, Path]) -> None:
    site = Repeating(0, "00" * 32)
    question = Frame(Kind.WORK, bytes.fromhex(RUN), 0, 0, bytes.fromhex(site.digest), Work(steps=1).encode()).encode()
    with asking_without_reading(keys, question) as port:
        ended = Attending(site, port, keys["authority"].read_bytes(), 1.0).end().error
    assert isinstance(ended, BadFrame), f"{site.answers} answers were made of {QUESTIONS} that were asked for: {ended}"
    assert "answers wait unread" in str(ended)
    assert site.answers < QUESTIONS // 10


@dataclass
class Messages:
    """A site that takes part over Flower's messages, as its ClientApp sees them."""

    context: Any

    @classmethod
    def of(cls, setting: Setting, file: Path) -> "Messages":
        file.write_text(
            f'client = 0\ndata = "{setting.folder / "0"}"\nmodel = "{setting.root / "model"}"\ndevice = "cpu"\n'
            "[accepts]\nmask_minimum = 1\n"
        )
        made = cls(SimpleNamespace(node_config={"site": str(file)}, node_id=1, state={}))
        invitation: Any = SimpleNamespace(content={"offer": offer_record(setting.offer(), "00" * 32)})
        client_app._take_part(invitation, made.context)
        return made

    def answers(self, *frames: bytes) -> list[Frame]:
        """What one message of frames is answered with."""
        message: Any = SimpleNamespace(content=pack(frames))
        return [Frame.decode(data) for data in unpack(client_app._answer_frames(message, self.context))]


@pytest.fixture
def setting(federation: Path, tmp_path: Path) -> Setting:
    return Setting.make(federation, tmp_path / "sites", clients=2)


def test_a_message_of_many_questions_is_refused_after_the_first(setting: Setting, tmp_path: Path) -> None:
    site = Messages.of(setting, tmp_path / "site.toml")
    (refusal,) = site.answers(*[Server(setting).ask()] * 1000)
    assert refusal.kind is Kind.REFUSAL
    assert "more than one question" in str(frames.decode_json(refusal.body)[1]["why"])


@pytest.mark.parametrize("last", ["the end", "a forbidden question"])
def test_a_session_that_is_over_answers_no_more(setting: Setting, tmp_path: Path, last: str) -> None:
    site, server = Messages.of(setting, tmp_path / "site.toml"), Server(setting)
    question = server.ask()
    assert [frame.kind for frame in site.answers(question)] == [Kind.REPLY]
    over = server.frame(Kind.END, frames.encode_json({"why": "over"})) if last == "the end" else server.ask(lr=9.0)
    said = [frame.kind for frame in site.answers(over, question)]  # what stands behind it is not answered either
    assert said == ([] if last == "the end" else [Kind.REFUSAL])
    with pytest.raises(RunFailed, match="no session goes on here"):
        site.answers(question)


@pytest.mark.parametrize("seconds", [1e300, 86_401])
def test_no_coordinator_keeps_a_site_calling_for_longer_than_a_day(setting: Setting, seconds: float) -> None:
    text, mask = setting.offer().encode("00" * 32)
    with pytest.raises(MeerkatError, match="the coordinator's offer cannot be read"):
        Offer.decode(json.dumps({**json.loads(text), "patience_s": seconds}), mask)
    with pytest.raises(ValidationError, match="site_patience_s"):
        FederationConfig.model_validate({"site_patience_s": seconds})


@pytest.mark.parametrize("kind", [Kind.CLOSED, Kind.STATE])
def test_a_site_follows_no_round_beyond_the_run_s_last(setting: Setting, kind: Kind) -> None:
    site, beyond = setting.site(0), setting.config.rounds + 1
    closed = [Closed(1e-6, 1.0, np.ones((1, 1), np.float32), counted=False)] * beyond
    body = Work(closed=closed).encode() if kind is Kind.CLOSED else frames.encode_state(setting.theta_0.numpy())[0]
    with pytest.raises(BadFrame, match=f"round {beyond} of a run of {setting.config.rounds}"):
        site.answer(Frame(kind, bytes.fromhex(setting.run), 0, beyond, body=body).encode())
    assert site.round == 0


def test_a_site_uses_no_more_threads_than_its_machine_has_cpus(setting: Setting) -> None:
    before, offer = torch.get_num_threads(), setting.but(threads=1024).offer()
    try:
        settings = SiteConfig(client=0, data=str(setting.folder / "0"), model=str(setting.root / "model"), device="cpu")
        SiteClient(offer, settings.model_copy(update={"accepts": Accepts(mask_minimum=1)}))
        assert torch.get_num_threads() <= (os.cpu_count() or 1)
    finally:
        torch.set_num_threads(before)


def test_a_site_takes_no_larger_batches_than_it_agreed_to(setting: Setting) -> None:
    with pytest.raises(Refused, match="batch_size: the run asks for 20000, the site accepts at most 10000"):
        setting.but(batch_size=20_000).site(0)
    setting.but(batch_size=20_000).site(0, accepts={"batch_maximum": 20_000}).close()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('template = "{sentence} {label}"\nlabels = [' + ",".join(f'"{i}"' for i in range(1000)) + "]", "256 labels"),
        (f'template = "{"x" * 10_000} {{sentence}} {{label}}"\nlabels = ["a", "b"]', "4,000 characters"),
        (f'template = "{{sentence}} {{label}}"\nlabels = ["a", "{"x" * 1000}"]', "200 characters"),
        (f'template = "{"{sentence}" * 300} {{label}}"\nlabels = ["a", "b"]', "16 fields"),
    ],
    ids=["labels", "template", "label", "fields"],
)
def test_an_offered_task_makes_few_and_short_texts_of_a_row(setting: Setting, text: str, said: str) -> None:
    offer = replace(setting.offer(), task="mine.toml", task_text=text)
    with pytest.raises(MeerkatError, match=f"task file 'mine.toml': .*at most {said}"):
        offer.load_task()


def test_rows_of_many_labels_are_tokenised_a_few_at_a_time(tokenizer: Any) -> None:
    task = Task("many", "{text} {label}", tuple(f"{i:x}" for i in range(256)))
    together: list[int] = []

    class Counted:
        is_fast = True

        def __call__(self, texts: list[str], **more: Any) -> Any:
            together.append(len(texts))
            return tokenizer(texts, **more)

    examples = encode(task, [{"text": f"row {i}", "label": i} for i in range(20)], Counted(), 64)
    assert len(examples) == 20
    assert max(together) <= 2000
