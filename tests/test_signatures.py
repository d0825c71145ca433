"""Keys and signatures: what is signed, byte by byte, and which files are keys."""

import hashlib
import shutil
import stat
import struct
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cryptography")

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from meerkat.algorithm.rounds import RoundPlan
from meerkat.cli import main
from meerkat.errors import MeerkatError
from meerkat.federation.certificates import make_node_key, make_signing_key
from meerkat.record.opening import MEANING, meaning
from meerkat.record.signatures import (
    BadSignature,
    RunIdentity,
    Signer,
    SigningKey,
    fingerprint,
    is_signed,
    read_keys,
    read_revoked,
    reply_message,
)
from meerkat.settings.config import make_config

IDENTITY = RunIdentity("00112233445566ff", True, "01" * 16, "02" * 32, "03" * 32, "04" * 32, "05" * 32)
PLAN = RoundPlan(7, 0.25, 1e-3, 2, {1: 3, 4: 1})
THETA, SCALARS = bytes(range(32)), np.arange(6, dtype="f4").reshape(3, 2)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> SigningKey:
    return SigningKey.load(str(make_signing_key(tmp_path_factory.mktemp("keys") / "site.key").private))


def test_what_is_signed_is_what_the_format_says(key: SigningKey) -> None:
    """By hand, from docs/formats.md; whoever changes a byte here changes what old signatures mean."""
    identity = b"meerkat charter1" + bytes.fromhex(IDENTITY.run) + b"\1" + b"\1" * 16
    identity += b"".join(bytes([n]) * 32 for n in (2, 3, 4, 5))
    joining = (
        b"meerkat joining1" + hashlib.sha256(identity).digest() + struct.pack("<IQ", 1, 300) + key.public + b"n\xc3\xb6"
    )
    reply = b"meerkat replies1" + hashlib.sha256(joining).digest() + struct.pack("<BI", 0, 7) + THETA
    reply += struct.pack("<ddQIH", 0.25, 1e-3, 41, 3, 2) + struct.pack("<6f", *range(6))
    signer = Signer(IDENTITY, 1, 300, "nö", key, None)
    public = Ed25519PublicKey.from_public_bytes(key.public)
    public.verify(bytes.fromhex(signer.credentials["signature"]), joining)
    made = signer.sign(PLAN, THETA, 41, SCALARS)
    public.verify(made, reply)
    assert len(made) == 64
    assert made == signer.sign(PLAN, THETA, 41, SCALARS)  # the same reply has the same bytes


def test_every_fact_of_a_reply_is_in_its_signature() -> None:
    def message(joined: bytes = b"j" * 32, plan: RoundPlan = PLAN, **given: Any) -> bytes:
        return reply_message(
            **{
                "joining_digest": joined,
                "client": 1,
                "plan": plan,
                "theta": THETA,
                "pointer": 0,
                "scalars": SCALARS,
                **given,
            }
        )

    others = [
        message(joined=b"k" * 32),
        message(theta=bytes(32)),
        message(pointer=1),
        message(scalars=np.nextafter(SCALARS, np.float32(9))),
        *(message(plan=replace(PLAN, **changed)) for changed in ({"round": 8}, {"lr": 0.5}, {"eps": 2e-3})),
        message(plan=replace(PLAN, phase="calibration")),
        message(plan=replace(PLAN, directions=3, steps={1: 2}), scalars=SCALARS.reshape(2, 3)),
    ]
    assert len({*others, message()}) == len(others) + 1
    with pytest.raises(BadSignature, match="3 steps, where 1 were asked"):
        message(client=4)


def test_every_fact_of_a_run_is_in_its_identity() -> None:
    others = [replace(IDENTITY, run="00" * 8), replace(IDENTITY, signed=False), replace(IDENTITY, run_key="00" * 16)]
    others += [replace(IDENTITY, **{name: "00" * 32}) for name in ("model", "mask", "theta", "settings")]
    assert len({identity.digest() for identity in (IDENTITY, *others)}) == 8
    for name in ("run", "run_key", "model", "mask", "theta", "settings"):
        with pytest.raises(ValueError, match="of the wrong length"):
            replace(IDENTITY, **{name: getattr(IDENTITY, name) + "00"}).digest()


def test_a_joining_is_one_client_s_on_one_node_with_so_many_rows() -> None:
    made = [
        IDENTITY.joining(*each, key=bytes(32)) for each in ((1, 300, "n"), (2, 300, "n"), (1, 301, "n"), (1, 300, "m"))
    ]
    assert len({*made, IDENTITY.joining(1, 300, "n", b"k" * 32)}) == 5


def test_the_meaning_of_a_scalar_is_in_the_settings_digest() -> None:
    settings = make_config({"task": "sst2", "eps": 1e-3})
    changed: dict[str, Any] = {
        "method": "full-fedzo",
        "task": "rte",
        "objective": "language-modelling",
        "chat_template": "on",
        "estimator": "another",
        "dtype": "bfloat16",
        "quantize": "nf4",
        "eps": 2e-3,
        "dp": "example",
        "dp_noise_multiplier": 1.5,
        "dp_relation": "replace",
    }
    changed |= {name: getattr(settings, name) + 1 for name in MEANING if name not in changed}
    assert changed.keys() == {*MEANING}
    digests = {meaning(settings.model_copy(update={name: value})) for name, value in changed.items()}
    assert len({*digests, meaning(settings)}) == len(MEANING) + 1
    feddyn = settings.model_copy(update={"method": "feddyn"})  # whose scalars depend on alpha
    alpha = {"feddyn_alpha": 0.25}
    assert meaning(settings.model_copy(update=alpha)) == meaning(settings)
    assert meaning(feddyn.model_copy(update=alpha)) != meaning(feddyn)
    assert meaning(settings.model_copy(update={"task": "/here/my.toml", "data": "x"})) == meaning(
        settings.model_copy(update={"task": "my.toml", "model": "y", "threads": 3})
    )


def test_a_signature_of_something_else_is_none(key: SigningKey) -> None:
    made = key.sign(b"message")
    assert is_signed(key.public, made, b"message")
    assert not is_signed(key.public, made, b"massage")
    assert not is_signed(bytes(reversed(key.public)), made, b"message")
    for wrong in (b"", made[:-1], made + b"\0", bytes(64)):
        assert not is_signed(key.public, wrong, b"message")
    for at in range(64):
        assert not is_signed(key.public, made[:at] + bytes([made[at] ^ 1]) + made[at + 1 :], b"message")


# files


def test_a_key_is_made_for_its_owner_alone_and_never_over_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "site.key"
    assert main(["keygen", "--out", str(file)]) == 0
    said = capsys.readouterr().out
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    name = fingerprint(SigningKey.load(str(file)).public)
    assert name in said
    assert read_keys(str(file.with_suffix(".pub")), "signers") == {name}
    before = file.read_bytes()
    assert main(["keygen", "--out", str(file)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert file.read_bytes() == before


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_keys_and_fingerprints_are_openssh_s(tmp_path: Path) -> None:
    file = tmp_path / "theirs"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "site 1", "-f", str(file)], check=True)
    ours = make_signing_key(tmp_path / "ours.key")
    for private, public in ((file, tmp_path / "theirs.pub"), (ours.private, ours.public)):
        shown = subprocess.run(
            ["ssh-keygen", "-l", "-f", str(public)], check=True, capture_output=True, text=True
        ).stdout
        name = fingerprint(SigningKey.load(str(private)).public)
        assert name in shown.split()
        assert read_keys(str(public), "signers") == {name}


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_what_is_no_signing_key_is_told(tmp_path: Path) -> None:
    ecdsa = make_node_key(tmp_path / "node.key")
    for file, kind, password in (("locked", "ed25519", "secret"), ("rsa", "rsa", "")):
        made = ["ssh-keygen", "-q", "-t", kind, "-N", password, "-f", str(tmp_path / file)]
        subprocess.run(made, check=True)
    for file, said in (
        (tmp_path / "none", "No such file"),
        (tmp_path / "locked", "not an OpenSSH key without a password"),
        (ecdsa.public, "not an OpenSSH key without a password"),
        (ecdsa.private, "is not an Ed25519 key"),
        (tmp_path / "rsa", "is not an Ed25519 key"),
    ):
        with pytest.raises(MeerkatError, match=f"signing_key_before '.*': .*{said}") as told:
            SigningKey.load(str(file), "signing_key_before")
        assert "meerkat keygen" in str(told.value)
        assert len(str(told.value).splitlines()) == 1


def test_keys_are_listed_a_line_each(tmp_path: Path, key: SigningKey) -> None:
    pair, name = make_signing_key(tmp_path / "a.key"), fingerprint(key.public)
    file = tmp_path / "signers"
    file.write_text(f"# two sites\n\n{pair.public.read_text().strip()} of site 0\n  {name}\n")
    assert read_keys(str(file), "signers") == {name, fingerprint(SigningKey.load(str(pair.private)).public)}
    node = make_node_key(tmp_path / "node.key").public.read_text()
    for line in (node, "ssh-ed25519 AAAA", "ssh-ed25519", "ssh-ed25519 !", "SHA256:short", name + "x"):
        file.write_text(f"# comment\n{line}\n")
        with pytest.raises(MeerkatError, match=r"signers '.*', line 2"):
            read_keys(str(file), "signers")
    for given, said in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file")):
        with pytest.raises(MeerkatError, match=said):
            read_keys(str(given), "signers")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(MeerkatError, match="is not text"):
        read_keys(str(file), "signers")


def test_revocations_are_keys_with_rounds_or_files_of_them(tmp_path: Path, key: SigningKey) -> None:
    name, other = fingerprint(key.public), "SHA256:" + "a" * 43
    (tmp_path / "revoked").write_text(f"{other}@12\n")
    assert read_revoked([name, str(tmp_path / "revoked")], "--revoked") == {name: 0, other: 12}
    pair = make_signing_key(tmp_path / "a.key")
    third = fingerprint(SigningKey.load(str(pair.private)).public)
    assert read_revoked([str(pair.public), f"{third}@5"], "--revoked") == {third: 0}
    assert read_revoked([f"{third}@5", str(pair.public)], "--revoked") == {third: 0}
    assert read_revoked([str(pair.public)], "--revoked") == {third: 0}
    lines = f"# lost\n{other}@12 # on Monday\n{name}# at once\n{pair.public.read_text().strip()} site@host # too\n"
    (tmp_path / "revoked").write_text(lines)
    assert read_revoked([str(tmp_path / "revoked")], "--revoked") == {other: 12, name: 0, third: 0}
    assert read_keys(str(pair.public), "signers") == {third}
    with pytest.raises(MeerkatError, match=r"line 1 '-----BEGIN OPENSSH PRIVATE KEY-----': must be a key's finger"):
        read_revoked([str(pair.private)], "--revoked")
    for text, said in (
        ("# none yet\n", "has no key in it"),
        ("ssh-rsa AAAA me@host\n", "line 1 'ssh-rsa AAAA me@host': must be"),
    ):
        (tmp_path / "revoked").write_text(text)
        with pytest.raises(MeerkatError, match=said):
            read_revoked([str(tmp_path / "revoked")], "--revoked")
    for bad in (f"{name}@", f"{name}@-1", f"{name}@1.5", "SHA256:x", f"{name} 3"):
        with pytest.raises(MeerkatError, match="--revoked"):
            read_revoked([bad], "--revoked")
