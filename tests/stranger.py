"""Somebody at the stream's port who speaks TCP, TLS and HTTP/2 by hand, each as far as they like, and then stalls."""

import contextlib
import socket
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path

_DATA, _HEADERS, _RESET, _SETTINGS, _PING = 0x0, 0x1, 0x3, 0x4, 0x6
_ACK, _END_STREAM, _END_HEADERS = 0x1, 0x1, 0x4
_INITIAL_WINDOW_SIZE = 0x4


class Stranger:
    """One connection. Whatever the coordinator sends is read by `answer` alone."""

    def __init__(self, port: int) -> None:
        """Connect over TCP, and send nothing."""
        self.messages: list[bytes] = []
        """What came, on whichever stream."""
        self.ended = 0
        """How many calls the coordinator ended."""
        self._socket: socket.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self._answers = False
        self._received = self._data = b""

    def shake_hands(self, authority: Path) -> "Stranger":
        """Do the TLS handshake."""
        context = ssl.create_default_context(cafile=str(authority))
        context.set_alpn_protocols(["h2"])
        self._socket = context.wrap_socket(self._socket, server_hostname="127.0.0.1")
        return self

    def send(self, data: bytes) -> "Stranger":
        """Send bytes as they are."""
        self._socket.settimeout(10)
        self._socket.sendall(data)
        return self

    def begin(self, window: int = 65535) -> "Stranger":
        """Send the preface of HTTP/2, and settings; `window` bytes of an answer are taken before it is blocked."""
        self._answers = True
        settings = struct.pack(">HI", _INITIAL_WINDOW_SIZE, window)
        return self.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, 0, 0, settings))

    def call(self, stream: int = 1, ended: bool = True) -> "Stranger":
        """Send a call's headers; where they have not `ended`, more of them would have to follow."""
        self._answers = ended  # nothing else may come between a call's headers
        return self.send(_frame(_HEADERS, _END_HEADERS if ended else 0, stream, _headers()))

    def say(self, data: bytes, size: int | None = None, stream: int = 1) -> "Stranger":
        """Send a message, or the beginning of one of `size` bytes."""
        message = struct.pack(">BI", 0, len(data) if size is None else size) + data
        return self.send(_frame(_DATA, 0, stream, message))

    def answer(self) -> bool:
        """Acknowledge all settings and pings that came, so as to look alive. Returns whether it is still connected."""
        self._socket.settimeout(0)
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
            while data := self._socket.recv(65536):
                self._received += data
            return False
        for kind, flags, body in self._frames():
            if kind in (_SETTINGS, _PING) and not flags & _ACK and self._answers:
                self.send(_frame(kind, _ACK, 0, body if kind == _PING else b""))
            self.ended += kind == _RESET or (kind == _HEADERS and bool(flags & _END_STREAM))
            self._data += body if kind == _DATA else b""
        while len(self._data) >= 5 and len(self._data) >= (end := 5 + int.from_bytes(self._data[1:5])):
            self.messages.append(self._data[5:end])
            self._data = self._data[end:]
        return True

    @property
    def connected(self) -> bool:
        """Whether it is still connected, after an answer."""
        try:
            return self.answer()
        except OSError:
            return False

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _frames(self) -> Iterator[tuple[int, int, bytes]]:
        """Kind, flags and payload of the frames that came."""
        while len(self._received) >= 9 and len(self._received) >= 9 + (size := int.from_bytes(self._received[:3])):
            yield self._received[3], self._received[4], self._received[9 : 9 + size]
            self._received = self._received[9 + size :]


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + struct.pack(">BBI", kind, flags, stream) + payload


def _header(name: str, value: str) -> bytes:
    """A header, literally: HPACK without its table, and with integers of up to two bytes more."""
    return b"\0" + _length(name) + name.encode() + _length(value) + value.encode()


def _length(text: str) -> bytes:
    size = len(text)
    if size < 127:
        return bytes([size])
    size -= 127
    return bytes([127, size % 128 + 128, size // 128])


def _headers() -> bytes:
    named = {
        ":method": "POST",
        ":scheme": "https",
        ":path": "/meerkat.Session/Frames",
        ":authority": "127.0.0.1",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    return b"".join(_header(name, value) for name, value in named.items())
