"""A TCP proxy on this machine that delays, counts, holds back and cuts what passes through it; and free ports."""

import asyncio
import contextlib
import random
import socket
import threading
from collections.abc import Coroutine
from typing import Any


def free_port() -> int:
    """A port that nobody listens on, and that the system gives to nobody who asks for just any."""
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Proxy:
    """Listens on a free port and forwards to another, from a thread of its own."""

    def __init__(self, to: int, delay_s: float = 0.0, jitter_s: float = 0.0) -> None:
        """Every chunk takes delay_s, more or less by up to jitter_s, each way; the order is kept."""
        self.up = self.down = 0
        """Bytes of TCP payload from callers, and to them."""
        self.connections = 0
        """How many were accepted."""
        self._to, self._delay_s, self._jitter_s = to, delay_s, jitter_s
        self._random = random.Random(0)
        self._shut = self._held = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port: int = self._call(self._listen())

    def cut(self) -> None:
        """Break all connections, and accept none until `mend`."""
        self._shut = True
        self._call(self._break())

    def hold(self) -> None:
        """Let nothing through until `mend`; nobody is told."""
        self._held = True

    def mend(self) -> None:
        """Be a network again."""
        self._shut = self._held = False

    def close(self) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self._server.sockets[0].getsockname()[1]

    async def _break(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()
        await self._break()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._shut:
            writer.transport.abort()
            return
        self.connections += 1
        try:
            reader_on, writer_on = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, writer_on}
        for way in (self._forward(reader, writer_on, "up"), self._forward(reader_on, writer, "down")):
            task = asyncio.ensure_future(way)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        passing: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        leaving = asyncio.ensure_future(self._let_go(passing, writer))
        due = 0.0
        try:
            while data := await reader.read(1 << 16):
                setattr(self, way, getattr(self, way) + len(data))
                late = self._delay_s + self._random.uniform(-self._jitter_s, self._jitter_s)
                due = max(due, self._loop.time() + late)
                passing.put_nowait((due, data))
        except OSError:
            pass
        finally:
            passing.put_nowait((due, b""))
            await leaving
            self._writers.discard(writer)

    async def _let_go(self, passing: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        while True:
            due, data = await passing.get()
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            while self._held and not writer.is_closing():
                await asyncio.sleep(0.01)
            if not data or writer.is_closing():
                writer.close()
                return
            writer.write(data)
