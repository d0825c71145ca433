"""What a coordinator can make a site hold or do: never more than a few answers, whatever it asks and leaves unread."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

import grpc
import grpc.aio
from stub import RUN, Attending, StubSite

from meerkat.federation import frames
from meerkat.federation.certificates import certify
from meerkat.federation.flower import stream
from meerkat.federation.frames import BadFrame, Frame, Kind, Work

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
