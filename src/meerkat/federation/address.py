"""Addresses: host:port, and nothing else that a network library would take for one."""

import re
from ipaddress import IPv6Address

from meerkat.errors import MeerkatError

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?\.?")
"""A host's name, or its IPv4 address."""


def host_and_port(text: str, name: str) -> tuple[str, int]:
    """Host and port of an address such as coordinator.example.org:9001, or [2001:db8::1]:9001.

    Args:
        name: what the address is for; it stands in the message.

    Raises:
        MeerkatError: it is malformed; `unix:` and other schemes are.
    """
    host, _, port = text.rpartition(":")
    is_port = re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536
    if not is_port or not (_NAME.fullmatch(host) or _is_in_brackets(host)):
        raise MeerkatError(f"{name} '{text}': must be host:port, such as coordinator.example.org:9001")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _is_in_brackets(host: str) -> bool:
    """Whether a host is an IPv6 address in brackets."""
    try:
        return host.startswith("[") and host.endswith("]") and bool(IPv6Address(host[1:-1]))
    except ValueError:
        return False
