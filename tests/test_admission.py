"""Admission: a token admits one site once, a session secret admits it again, and no site takes another's place."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest

pytest.importorskip("cryptography")

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meerkat.federation import frames
from meerkat.federation.admission import Admission, AdmittedSite, TooSoon
from meerkat.federation.frames import BadFrame, Frame, Kind
from meerkat.federation.site_settings import Refused
from meerkat.record.members import KeyRevocation, Members
from meerkat.record.signatures import RunIdentity, Signer, SigningKey, fingerprint

RUN = "00112233445566ff"
MODEL, MASK = "a" * 64, "b" * 64
DIGEST = bytes(range(32))
IDENTITY = RunIdentity(RUN, False, "00" * 16, MODEL, MASK, "d" * 64, "e" * 64)


def admission(nodes: dict[int, str] | None = None) -> Admission:
    members = Members(IDENTITY)
    members.nodes = nodes or {}
    return Admission(members, 3)


def signing_admission(**given: Any) -> Admission:
    return Admission(Members(replace(IDENTITY, signed=True), **given), 3)


def a_key() -> SigningKey:
    return SigningKey(Ed25519PrivateKey.generate())


def words(key: SigningKey, client: int = 0, node: str = "n", before: SigningKey | None = None, **identity: Any) -> Any:
    """What a hello says of a key, signed for a client of ten rows."""
    return Signer(replace(IDENTITY, **{"signed": True, **identity}), client, 10, node, key, before).credentials


def hello(secret: str | bytes, client: int = 0, run: str = RUN, round: int = 0, **said: Any) -> bytes:
    secret = bytes.fromhex(secret) if isinstance(secret, str) else secret
    words = {"examples": 10, "model": MODEL, "mask": MASK, "evaluates": False, **said}
    body = frames.encode_json(words, secret)
    return Frame(Kind.HELLO, bytes.fromhex(run), client, round, DIGEST, body).encode()


def secret_of(site: AdmittedSite) -> bytes:
    welcome = Frame.decode(site.welcome)
    assert welcome.kind is Kind.WELCOME
    secret, _ = frames.decode_json(welcome.body, 32)
    return secret


def test_a_token_lets_a_site_in_as_what_it_says() -> None:
    at = admission()
    site = at.admit(hello(at.token("n"), 2, round=7, examples=12, evaluates=True))
    assert (site.client, site.member.node, site.member.examples, site.evaluates) == (2, "n", 12, True)
    assert (site.round, site.digest) == (7, DIGEST)
    welcome = Frame.decode(site.welcome)
    assert (welcome.run.hex(), welcome.client) == (RUN, 2)
    assert len(secret_of(site)) == 32


def test_a_token_serves_once() -> None:
    at = admission()
    token = at.token("n")
    at.admit(hello(token))
    for client in (0, 1):
        with pytest.raises(Refused, match="used before"):
            at.admit(hello(token, client))


def test_a_token_is_spent_by_a_hello_that_is_refused() -> None:
    at = admission()
    token = at.token("n")
    with pytest.raises(Refused, match="client 3"):
        at.admit(hello(token, 3))
    with pytest.raises(Refused, match="used before"):
        at.admit(hello(token, 0))


def test_a_secret_lets_one_back_in_again_and_again() -> None:
    at = admission()
    secret = secret_of(at.admit(hello(at.token("n"), 1)))
    for rounds in (3, 4):
        site = at.admit(hello(secret, 1, round=rounds))
        assert (site.client, site.member.node, site.round) == (1, "n", rounds)
        assert secret_of(site) == secret
    with pytest.raises(Refused, match="client 1's"):
        at.admit(hello(secret, 0))


def test_a_new_session_voids_the_secret_of_the_old_one() -> None:
    at = admission()
    old = secret_of(at.admit(hello(at.token("n"))))
    new = secret_of(at.admit(hello(at.token("n"))))
    assert old != new
    with pytest.raises(Refused, match="no token"):
        at.admit(hello(old))
    assert at.admit(hello(new)).client == 0


def test_no_other_node_takes_a_client_s_place() -> None:
    at = admission({1: "first"})
    with pytest.raises(Refused, match="client 1 is another node's"):
        at.admit(hello(at.token("second"), 1))
    assert at.admit(hello(at.token("first"), 1)).member.node == "first"


def test_a_node_is_one_client() -> None:
    at = admission()
    assert at.admit(hello(at.token("first"), 1)).client == 1
    with pytest.raises(Refused, match="client 0: this node is client 1 already"):
        at.admit(hello(at.token("first"), 0))
    assert at.admit(hello(at.token("second"), 0)).member.node == "second"


def test_whoever_is_refused_takes_no_place() -> None:
    at = admission()
    with pytest.raises(Refused, match="mask"):
        at.admit(hello(at.token("first"), 0, mask="c" * 64))
    assert at.admit(hello(at.token("second"), 0)).member.node == "second"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"run": "ff" * 8}, "another run"),
        ({"client": 3}, "must be 0 to 2"),
        ({"client": 2**32 - 1}, "must be 0 to 2"),
        ({"model": "c" * 64}, "the model is not this run's"),
        ({"model": None}, "the model is not this run's"),
        ({"mask": "c" * 64}, "the mask is not this run's"),
        ({"examples": 0}, "without a number of rows"),
        ({"examples": -1}, "without a number of rows"),
        ({"examples": True}, "without a number of rows"),
        ({"examples": "10"}, "without a number of rows"),
        ({"examples": 2.5}, "without a number of rows"),
        ({"examples": 10**100}, "without a number of rows"),
    ],
)
def test_what_does_not_match_stays_out(change: dict[str, Any], said: str) -> None:
    at = admission()
    with pytest.raises(Refused, match=said) as told:
        at.admit(hello(at.token("n"), **change))
    assert len(str(told.value).splitlines()) == 1
    assert "c" * 64 not in str(told.value)  # what a stranger sends is not said again


def test_a_site_evaluates_only_where_it_says_so_plainly() -> None:
    at = admission()
    assert not at.admit(hello(at.token("n"), evaluates=1)).evaluates
    assert not at.admit(hello(at.token("n"), evaluates="yes")).evaluates


@pytest.mark.parametrize("secret", [bytes(32), b"short", b""])
def test_neither_token_nor_secret_stays_out(secret: bytes) -> None:
    at = admission()
    at.token("n")
    with pytest.raises((Refused, BadFrame)):
        at.admit(hello(secret))


def test_a_long_hello_is_not_taken_apart() -> None:
    at = admission()
    token = at.token("n")
    with pytest.raises(BadFrame, match="at most 4,096 are accepted"):
        at.admit(hello(token, versions="v" * 4096))
    assert at.admit(hello(token)).member.node == "n"


def test_a_hello_of_another_run_does_not_spend_a_token() -> None:
    at = admission()
    token = at.token("n")
    with pytest.raises(Refused, match="another run"):
        at.admit(hello(token, run="ff" * 8))
    assert at.admit(hello(token)).client == 0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET / HTTP/1.1\r\n" * 10,
        Frame(Kind.REPLY, bytes.fromhex(RUN), 0, 0).encode(),
        Frame(Kind.HELLO, bytes.fromhex(RUN), 0, 0, body=b"").encode(),
        Frame(Kind.HELLO, bytes.fromhex(RUN), 0, 0, body=bytes(32) + b"[1]").encode(),
    ],
)
def test_what_is_no_hello_is_a_bad_frame(data: bytes) -> None:
    with pytest.raises(BadFrame):
        admission().admit(data)


def test_a_client_whose_session_is_void_does_not_come_back_with_its_secret() -> None:
    at = admission()
    secret, other = (secret_of(at.admit(hello(at.token(f"n{k}"), k))) for k in (0, 1))
    at.void_session(0)
    with pytest.raises(Refused, match="no token"):
        at.admit(hello(secret))
    assert at.admit(hello(other, 1)).client == 1
    at.admit(hello(at.token("n0"), 0))  # a token from the control plane still lets it in


def test_a_node_s_second_token_voids_its_first() -> None:
    at = admission()
    first, other, second = at.token("n"), at.token("m"), at.token("n")
    with pytest.raises(Refused, match="used before"):
        at.admit(hello(first))
    assert at.admit(hello(second)).member.node == "n"
    assert at.admit(hello(other, 1)).member.node == "m"


def test_of_many_that_race_with_one_token_one_gets_in() -> None:
    threads = 8
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(20):
            at, start = admission(), Barrier(threads)
            first = hello(at.token("n"))

            def enter(at: Admission = at, start: Barrier = start, first: bytes = first) -> bool:
                start.wait()
                try:
                    at.admit(first)
                except Refused:
                    return False
                return True

            assert sum(pool.map(lambda _, enter=enter: enter(), range(threads))) == 1


def test_a_refusal_says_why_in_words() -> None:
    frame = Frame.decode(admission().refusal("not you", 2))
    assert (frame.kind, frame.run.hex(), frame.client) == (Kind.REFUSAL, RUN, 2)
    assert json.loads(frame.body) == {"why": "not you"}


# keys


def test_a_key_comes_in_with_what_it_signed() -> None:
    at, key = signing_admission(), a_key()
    said = words(key, 1)
    site = at.admit(hello(at.token("n"), 1, **said))
    assert (site.member.key, site.member.signature) == (said["key"], said["signature"])
    assert at.members.keys == {}  # it is the log that it has to stand in
    with pytest.raises(Refused, match="client 1 has no key, where every reply must be signed"):
        at.admit(hello(at.token("n"), 1))
    open_to_all = admission()
    assert open_to_all.admit(hello(open_to_all.token("n"))).member.key == ""


@pytest.mark.parametrize(
    "about",
    [{"client": 2}, {"node": "m"}, {"run": "ff" * 8}, {"signed": False}, {"mask": "c" * 64}, {"settings": "c" * 64}],
    ids=str,
)
def test_what_was_signed_for_another_place_stays_out(about: dict[str, Any]) -> None:
    at = signing_admission()
    said = words(a_key(), **{"client": 1, **about})
    with pytest.raises(Refused, match="client 1 has not signed its joining with key SHA256:"):
        at.admit(hello(at.token("n"), 1, **said))


def test_what_was_signed_for_other_rows_stays_out() -> None:
    at = signing_admission()
    with pytest.raises(Refused, match="has not signed its joining"):
        at.admit(hello(at.token("n"), examples=11, **words(a_key())))


@pytest.mark.parametrize(
    "change",
    [
        *({"key": ""}, {"key": None}, {"key": "zz" * 32}, {"key": "AB" * 32}, {"signature": ""}, {"signature": 7}),
        *({"signature": "00" * 63}, {"handover": "00"}, {"handover": ["00" * 64]}),
    ],
    ids=str,
)
def test_a_malformed_key_is_refused(change: dict[str, Any]) -> None:
    at = signing_admission()
    with pytest.raises(Refused, match="malformed key or signature"):
        at.admit(hello(at.token("n"), **{**words(a_key()), **change}))


def joined(at: Admission, key: SigningKey, client: int = 0, node: str = "n", **more: Any) -> AdmittedSite:
    """A site comes in, and its joining is logged."""
    site = at.admit(hello(at.token(node), client, **words(key, client, node, **more)))
    at.members.admit(site.member)
    return site


def test_a_key_is_one_client_s() -> None:
    at, key = signing_admission(), a_key()
    joined(at, key, 0)
    with pytest.raises(Refused, match="of client 1 is client 0's"):
        joined(at, key, 1, "m")
    joined(at, a_key(), 1, "m")


def test_who_has_signed_goes_on_signing() -> None:
    at, key = Admission(Members(IDENTITY), 3), a_key()
    joined(at, key, signed=False)
    with pytest.raises(Refused, match=r"has signed with key SHA256:.*, and now has none"):
        at.admit(hello(at.token("n")))


def test_a_new_key_comes_in_by_the_one_before() -> None:
    at, old, new = signing_admission(), a_key(), a_key()
    assert joined(at, old, before=a_key()).member.handover == ""  # there is nothing to hand over yet
    with pytest.raises(Refused, match=r"signed with key SHA256:.*, and nothing hands over"):
        joined(at, new)
    with pytest.raises(Refused, match="has not handed over"):
        joined(at, new, before=a_key())
    assert joined(at, new, before=old).member.handover
    assert joined(at, new, before=old).member.handover == ""  # as its site.toml may still say
    with pytest.raises(Refused, match="nothing hands over"):
        joined(at, old)


def test_only_listed_keys_come_in_and_those_that_they_hand_over_to() -> None:
    old, new = a_key(), a_key()
    at = signing_admission(listed=[fingerprint(old.public)])
    with pytest.raises(Refused, match="is not among the listed ones"):
        joined(at, new)
    joined(at, old)
    joined(at, new, before=old)
    joined(at, new)


def test_a_revoked_key_stays_out_and_hands_over_to_nobody() -> None:
    old, new = a_key(), a_key()
    at = signing_admission()
    joined(at, old)
    at.members.revoke(KeyRevocation(3, fingerprint(old.public)))
    with pytest.raises(Refused, match="is revoked from round 3 on"):
        joined(at, old)
    with pytest.raises(Refused, match="was revoked: its successor must be in the coordinator's 'signers'"):
        joined(at, new, before=old)
    at.members.listed = [fingerprint(new.public)]
    assert joined(at, new, before=old).member.handover == ""


def test_a_hello_with_keys_is_short_enough_to_be_read() -> None:
    at = signing_admission()
    versions = {"meerkat": "0.1.0", "torch": "2.11.0+cu130", "transformers": "5.23.0"}
    first = hello(at.token("n"), versions=versions, **words(a_key(), before=a_key()))
    assert len(first) < 1024
    at.admit(first)


def test_a_node_that_comes_back_all_the_time_must_wait_and_loses_nothing() -> None:
    now = 0.0
    at = Admission(Members(IDENTITY), 3, clock=lambda: now)
    secret = secret_of(at.admit(hello(at.token("restless"))))
    for _ in range(9):
        at.admit(hello(secret))
    with pytest.raises(TooSoon, match="node restless comes back too often"):
        at.admit(hello(secret))
    token = at.token("restless")
    with pytest.raises(TooSoon):
        at.admit(hello(token))
    assert at.admit(hello(at.token("calm"), client=1)).client == 1  # another node does not wait
    now = 1.0
    secret = secret_of(at.admit(hello(token)))  # the token was not spent
    with pytest.raises(TooSoon):
        at.admit(hello(secret))
    now = 100.0
    for _ in range(10):  # what was not used does not add up
        at.admit(hello(secret))
    with pytest.raises(TooSoon):
        at.admit(hello(secret))


def test_who_is_not_known_uses_up_nobody_s_turns() -> None:
    at = Admission(Members(IDENTITY), 3, clock=lambda: 0.0)
    secret = secret_of(at.admit(hello(at.token("n"))))
    for _ in range(50):
        with pytest.raises(Refused, match="no token"):
            at.admit(hello("77" * 32))
        with pytest.raises(Refused, match="the session is client 0's"):
            at.admit(hello(secret, client=1))
    assert at.admit(hello(secret)).client == 0
