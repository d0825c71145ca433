"""A registered node that wants more than its own place: another site's client number, or a weight that drowns all."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography")

from test_admission import IDENTITY, a_key, hello, joined, words

from meerkat.errors import MeerkatError
from meerkat.federation.admission import Admission, Binding
from meerkat.federation.certificates import make_signing_key
from meerkat.federation.coordinator_settings import read_federation
from meerkat.federation.site_settings import Refused
from meerkat.record.members import KeyRevocation, Members
from meerkat.record.signatures import SigningKey, fingerprint

A, B = "16935304075996645111", "7011111111111111111"
"""Two nodes."""


def bound(
    bindings: Sequence[dict[str, Any]], nodes: dict[int, str] | None = None, listed: Sequence[str] | None = None
) -> Admission:
    """An admission of three clients, each of which may be bound."""
    members = Members(replace(IDENTITY, signed=True), listed)
    members.nodes = nodes or {}
    return Admission(members, 3, [Binding(**binding) for binding in bindings])


def test_a_site_cannot_claim_so_many_rows_that_it_alone_counts() -> None:
    at = Admission(Members(IDENTITY), 3)
    with pytest.raises(Refused, match="client 0: more than 1,000,000 rows, the coordinator's 'rows_maximum' for it"):
        at.admit(hello(at.token(A), 0, examples=2**40 - 1))
    assert at.admit(hello(at.token(A), 0, examples=1_000_000)).member.examples == 1_000_000


def test_another_site_s_client_number_is_out_of_reach() -> None:
    """The node of site 1 comes first, with its own listed key, and says that it is client 0."""
    keys = [a_key(), a_key()]
    names = [fingerprint(key.public) for key in keys]
    by_node = [{"client": 0, "node": A}, {"client": 1, "node": B}]
    by_key = [{"client": 0, "key": names[0]}, {"client": 1, "key": names[1]}]
    refusal = f"the coordinator holds {names[0]} for it"
    for bindings, said in (
        (by_node, "client 0 is another node's"),
        (by_key, refusal),
    ):
        at = bound(bindings, listed=names)
        with pytest.raises(Refused, match=re.escape(said)):
            at.admit(hello(at.token(B), 0, **words(keys[1], 0, B)))
        assert joined(at, keys[0], 0, A).client == 0
        assert joined(at, keys[1], 1, B).client == 1


def test_a_place_that_was_taken_before_goes_back_to_its_site() -> None:
    """The log of a run has another node as client 0; the run is resumed with bindings."""
    key = a_key()
    at = bound([{"client": 0, "node": A}, {"client": 1, "node": B}], nodes={0: B})
    with pytest.raises(Refused, match="client 0 is another node's"):
        at.admit(hello(at.token(B), 0, **words(key, 0, B)))
    assert joined(at, a_key(), 0, A).client == 0
    assert joined(at, key, 1, B).client == 1


def test_who_is_not_listed_stays_out() -> None:
    at = bound([{"client": 0, "node": A}])
    with pytest.raises(Refused, match="client 1 is not among the coordinator's sites"):
        joined(at, a_key(), 1, B)
    with pytest.raises(Refused, match="this node is client 0 already"):
        joined(bound([{"client": 0, "node": A}, {"client": 1}]), a_key(), 1, A)


def test_a_bound_key_may_hand_over_and_others_may_not() -> None:
    first, second, third, stranger = (a_key() for _ in range(4))
    at = bound([{"client": 0, "key": fingerprint(first.public)}])
    with pytest.raises(Refused, match="which has not handed over; use that key, or 'signing_key_before'"):
        joined(at, stranger)
    with pytest.raises(Refused, match="which has not handed over"):
        joined(at, second, before=first)  # the first one has not joined yet
    joined(at, first)
    joined(at, second, before=first)
    joined(at, third, before=second)
    joined(at, third)
    with pytest.raises(Refused, match="has not handed over"):
        joined(at, stranger, before=stranger)


def test_a_bound_client_has_to_sign() -> None:
    name = fingerprint(a_key().public)
    at = Admission(Members(IDENTITY), 3, bindings=[Binding(client=0, key=name)])
    with pytest.raises(Refused, match=re.escape(f"client 0 must sign, with key {name}")):
        at.admit(hello(at.token(A)))


def test_a_key_that_another_run_s_log_has_is_not_enough() -> None:
    """A squatter signed first; then the run was resumed with the rightful key bound."""
    squatter, rightful = a_key(), a_key()
    before = bound([])
    joined(before, squatter)
    at = Admission(before.members, 3, bindings=[Binding(client=0, key=fingerprint(rightful.public))])
    with pytest.raises(Refused, match="the coordinator holds"):
        joined(at, squatter)
    with pytest.raises(Refused, match="nothing hands over"):
        joined(at, rightful)
    at.members.revoke(KeyRevocation(3, fingerprint(squatter.public)))
    assert joined(at, rightful).member.handover == ""


def test_a_site_s_own_bound_on_rows_comes_before_the_general_one() -> None:
    at = Admission(
        Members(IDENTITY), 3, bindings=[Binding(client=0, rows_maximum=9), Binding(client=1)], rows_maximum=11
    )
    with pytest.raises(Refused, match="client 0: more than 9 rows"):
        at.admit(hello(at.token(A), 0))
    assert at.admit(hello(at.token(B), 1)).member.examples == 10
    with pytest.raises(Refused, match="client 1: more than 11 rows"):
        at.admit(hello(at.token(B), 1, examples=12))


# --- federation.toml ---


@pytest.fixture
def pair(tmp_path: Path) -> str:
    made = make_signing_key(tmp_path / "site-0.key")
    return fingerprint(SigningKey.load(str(made.private)).public)


def written(folder: Path, sites: str, more: str = "") -> Path:
    file = folder / "federation.toml"
    file.write_text(f"[run]\nclients = 2\n[federation]\n{more}{sites}")
    return file


def test_sites_are_read_from_the_file(tmp_path: Path, pair: str) -> None:
    sites = f'[[federation.sites]]\nclient = 0\nnode = "{A}"\nkey = "site-0.pub"\nrows_maximum = 1000\n'
    sites += f'[[federation.sites]]\nclient = 1\nnode = "{B}"\n'
    _, federation = read_federation(written(tmp_path, sites))
    assert federation.sites == (Binding(client=0, node=A, key=pair, rows_maximum=1000), Binding(client=1, node=B))
    assert federation.rows_maximum == 1_000_000


@pytest.mark.parametrize(
    ("sites", "said"),
    [
        ([{"client": 0}, {"client": 0}], "sites: client 0 is there twice"),
        ([{"client": 0, "node": A}, {"client": 1, "node": A}], f"sites: node {A} is there twice"),
        ([{"client": 2}], "sites: client 2: must be below"),
        ([{"client": 0, "key": "SHA256:short"}], "sites: key 'SHA256:short': must be a key's fingerprint"),
        ([{"client": 0, "node": "a"}], "sites.0.node a: string should match pattern"),
        ([{"node": A}], "sites.0.client: missing"),
        ([{"client": 0, "name": "x"}], "sites.0.name: unknown; must be one of client, node, key, rows_maximum"),
    ],
)
def test_what_is_wrong_with_sites_is_one_line(tmp_path: Path, sites: list[dict[str, Any]], said: str) -> None:
    values = "".join(
        "[[federation.sites]]\n" + "".join(f"{name} = {value!r}\n" for name, value in site.items()) for site in sites
    )
    with pytest.raises(MeerkatError) as told:
        read_federation(written(tmp_path, values))
    assert said in str(told.value)
    assert len(str(told.value).splitlines()) == 1


def test_a_bound_key_must_be_among_the_signers(tmp_path: Path, pair: str) -> None:
    (tmp_path / "signers").write_text(f"{fingerprint(a_key().public)}\n")
    sites = f'[[federation.sites]]\nclient = 0\nkey = "{pair}"\n'
    with pytest.raises(MeerkatError, match=re.escape(f"sites: key {pair} is not in signers")):
        read_federation(written(tmp_path, sites, 'sign = true\nsigners = "signers"\n'))
