"""All that reads what others write, with valid files to begin from and ways to change them: see test_fuzz.py."""

import hashlib
import json
import struct
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from federation import RUN, Federation, Setting, Wire, write_rows
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from mutations import as_json, as_toml, edited_bytes, edited_safetensors, edited_values, lines_of
from safetensors.torch import load_file
from tiny import federation_model

from meerkat.algorithm import path
from meerkat.algorithm.directions import run_key
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.server import ServerState, close_round, open_round
from meerkat.comparison.studies import read_comparison
from meerkat.errors import MeerkatError
from meerkat.export.model import apply_delta, export
from meerkat.federation import frames, remote_engine
from meerkat.federation.certificates import make_signing_key
from meerkat.federation.coordinator_settings import FederationConfig, read_federation
from meerkat.federation.frames import Frame, Kind, StateParts, Work
from meerkat.federation.ledger import Ledger
from meerkat.federation.offer import Offer
from meerkat.federation.private_rows import read_alone
from meerkat.federation.remote_engine import RemoteEngine
from meerkat.federation.site import Site
from meerkat.federation.site_settings import SiteConfig
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.classification import Classification
from meerkat.problems.data import load_rows
from meerkat.problems.partition import partition
from meerkat.problems.tasks import TASKS, check_rows, encode, load_task
from meerkat.record import history, verification
from meerkat.record.run_log import RunLog
from meerkat.record.signatures import SigningKey, fingerprint, read_keys, read_revoked
from meerkat.run import setup, simulation
from meerkat.settings.algorithm import rules
from meerkat.settings.config import make_config, read_toml

Check = Callable[[Any], object]


@dataclass
class Reader:
    """Something that reads, and strategies for what it is given."""

    inputs: SearchStrategy[Any]
    check: Check
    sound: Any = None
    """An input that is as it should be: a reader that refuses everything proves nothing."""


def chained(records: Sequence[bytes]) -> bytes:
    """A log whose chain is whole, whatever its records are."""
    link, lines = "0" * 64, []
    for text in records:
        link = hashlib.sha256(link.encode() + text).hexdigest()
        lines.append(link.encode() + b" " + text + b"\n")
    return b"".join(lines)


def other_forms(text: bytes) -> SearchStrategy[bytes]:
    """A JSON object's text in other forms: most say the same to a reader that is not strict."""
    record = json.loads(text)
    names, word = st.sampled_from(sorted(record)), st.text(max_size=3)
    place = st.integers(1, len(text) - 1)
    letter = place.filter(lambda at: text[at : at + 1].isalpha() and text[at - 1 : at] != b"\\")
    return st.one_of(
        st.permutations(list(record)).map(lambda order: as_json({name: record[name] for name in order})),
        st.sampled_from([(", ", ":"), (",", ": "), (" ,", ":")]).map(
            lambda by: json.dumps(record, separators=by).encode()
        ),
        st.tuples(names, word).map(lambda shadow: as_json(dict([shadow]))[:-1] + b"," + text[1:]),
        st.tuples(names, word).map(lambda shadow: text[:-1] + b"," + as_json(dict([shadow]))[1:]),
        word.map(lambda note: text[:-1] + as_json({"note": note}).replace(b"{", b",", 1)),
        st.tuples(place, st.sampled_from([b" ", b"\t", b"\r"])).map(lambda at: text[: at[0]] + at[1] + text[at[0] :]),
        letter.map(lambda at: text[:at] + b"\\u%04x" % text[at] + text[at + 1 :]),
        names.filter(lambda name: type(record[name]) is int).map(
            lambda name: as_json({**record, name: float(record[name])})
        ),
    )


def replays(root: Path) -> None:
    """All that is ever done with a run's record without its model; the first refusal is kept for the end."""
    refusals: list[MeerkatError] = []

    def trying(act: Callable[[], object]) -> None:
        try:
            act()
        except MeerkatError as error:
            refusals.append(error)

    trying(lambda: verification.verify(root))
    trying(lambda: history.read(root).trajectories())
    trying(lambda: list(history.updates(root)))
    trying(lambda: RunLog(root / "rounds.log").close())
    if refusals:
        raise refusals[0]


class World:
    """Valid files of all kinds, made once each, and what reads them."""

    def __init__(self, root: Path, here: Path, tokenizer: Any, patch: pytest.MonkeyPatch) -> None:
        self.root, self.here, self.tokenizer, self.patch = root, here, tokenizer, patch

    @cached_property
    def setting(self) -> Setting:
        """A federation with calibration and moments, whose sites evaluate."""
        more = {"local_steps": 2, "directions": 2, "update_rule": "adam", "server_lr": 0.01}
        more |= {"method": "meerkat-vp"}
        short = {"calibration_steps": 4, "initial_steps": 2, "later_steps": 2, "rounds": 5, "clients": 3}
        return Setting.make(self.root, self.here / "sites", **more, **short)

    @cached_property
    def runs(self) -> list[Path]:
        """Run folders: a signed federation's, with joins and a calibration; simulations' of other kinds."""
        federation = Federation.of(self.setting, self.patch, join=0)
        for client in range(2):
            _, key = make_signing_key(self.here / f"site-{client}.key")
            federation.enter(client, signing_key=str(key))
        federation.lived(self.here / "lived")
        given = {"model": str(self.root / "model"), "task": "sst2", "data": str(self.root / "data"), "density": 0.01}
        small = {"rounds": 3, "clients": 2, "batch_size": 4, "eval_every": 0, "threads": 1, "lr": 0.1}
        kinds: dict[str, dict[str, Any]] = {
            "first-order": {"method": "fo-fedavg"},
            "robust": {"clients": 4, "aggregation": "trimmed-mean", "byzantine": 1, "clipping": "median"},
            "private": {"dp": "example", "dp_noise_multiplier": 1.0},
        }
        for name, more in kinds.items():
            text = str(self.root / "text.jsonl")
            simulation.simulate(make_config({**given, **small, "text": text, **more}), self.here / name)
        return [self.here / name for name in ("lived", *kinds)]

    def written(self, name: str, data: bytes) -> Path:
        """A file of its own with these bytes."""
        file = self.here / "input" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return file

    def run_folder(self, files: dict[str, bytes]) -> Path:
        """A run's folder with these files alone."""
        names = ("config.toml", "mask.safetensors", "rounds.log", "summary.json")
        for name in names:
            file = self.written(f"run/{name}", files.get(name, b""))
            if name not in files:
                file.unlink()
        return self.here / "input" / "run"

    def a_log(self) -> Reader:
        """A run's log with damage in its bytes, or in its records under a whole chain."""
        folders = [{file.name: file.read_bytes() for file in run.iterdir() if file.is_file()} for run in self.runs]
        records = [[json.loads(line[65:]) for line in files["rounds.log"].splitlines()] for files in folders]

        def damaged(number: int) -> SearchStrategy[tuple[int, bytes]]:
            raw = edited_bytes([folders[number]["rounds.log"]])
            edited = edited_values(records[number]).map(lambda values: chained(list(lines_of(_listed(values)))))
            texts = edited_bytes([as_json(record) for record in records[number]], 2)
            replaced = st.tuples(st.integers(0, len(records[number]) - 1), texts).map(
                lambda at: chained(
                    [*lines_of(records[number][: at[0]]), at[1], *lines_of(records[number][at[0] + 1 :])]
                )
            )
            return st.tuples(st.just(number), st.one_of(edited, edited, raw, replaced))

        def check(given_input: tuple[int, bytes]) -> None:
            number, log = given_input
            replays(self.run_folder({**folders[number], "rounds.log": log}))

        return Reader(st.one_of(*map(damaged, range(len(folders)))), check, (0, folders[0]["rounds.log"]))

    def a_form(self) -> Reader:
        """A run's log with a record in another form, under a whole chain: whatever it says, it is refused."""
        run = self.runs[0]
        contents = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
        texts = [line[65:] for line in contents["rounds.log"].splitlines()]

        def check(changed: tuple[int, bytes]) -> None:
            at, text = changed
            verification.verify(
                self.run_folder({**contents, "rounds.log": chained([*texts[:at], text, *texts[at + 1 :]])})
            )
            assert text == texts[at], "a record in another form is taken"

        def changed(at: int) -> SearchStrategy[tuple[int, bytes]]:
            forms = other_forms(texts[at]).filter(lambda text: b"\n" not in text)
            return st.tuples(st.just(at), forms)

        return Reader(st.one_of(*map(changed, range(len(texts)))), check, (0, texts[0]))

    def a_folder(self) -> Reader:
        """A run's folder with other settings, mask or summary, and an opening that agrees with them."""
        run = self.runs[-1]
        contents = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
        records = [json.loads(line[65:]) for line in contents["rounds.log"].splitlines()]
        tensors, metadata = _parts(run / "mask.safetensors")
        set_to = read_toml(run / "config.toml")

        def agreeing(config: bytes, mask: bytes, summary: bytes) -> dict[str, bytes]:
            opening = {**records[0], "config": hashlib.sha256(config).hexdigest()}
            try:
                loaded = SparseMask.load(self.written("mask.safetensors", mask))
                opening |= {"mask": loaded.digest(), "model": loaded.fingerprint}
                opening["about_mask"] = loaded.description_digest()
                opening["theta"] = path.digest(cast(torch.Tensor, loaded.theta_0))
                opening["run_key"] = f"{run_key(make_config(read_toml(self.written('c.toml', config))).seed):032x}"
            except Exception:  # whatever it is, reading the folder will say so
                pass
            log = chained(list(lines_of([opening, *records[1:]])))
            return {"config.toml": config, "mask.safetensors": mask, "summary.json": summary, "rounds.log": log}

        config, mask, summary = (contents[name] for name in ("config.toml", "mask.safetensors", "summary.json"))
        inputs = st.one_of(
            st.tuples(edited_values(set_to).map(as_toml), st.just(mask), st.just(summary)),
            st.tuples(st.just(config), edited_safetensors(tensors, metadata), st.just(summary)),
            st.tuples(st.just(config), st.just(mask), edited_values(json.loads(summary)).map(as_json)),
            st.tuples(st.just(config), st.just(mask), edited_bytes([summary])),
        )
        return Reader(inputs, lambda files: replays(self.run_folder(agreeing(*files))), (config, mask, summary))

    def a_ledger(self) -> Reader:
        """What a site keeps of its rows' charges, damaged in its bytes or in its records under a whole chain."""
        file = self.here / "ledger"
        ledger = Ledger(file)
        price = {"rate": 0.25, "noise_multiplier": 1.5}
        ledger.append(RUN, 1, "run", {"charter": "ab" * 32})
        ledger.append(RUN, 1, "reserve", {"from": 0, "steps": 64, "directions": 2, "boot": "monday", **price})
        for at in range(2):
            asked = {"phase": "training", "round": at}
            ledger.append(
                RUN, 1, "question", {**asked, "question": "cd" * 32, "theta": "ef" * 32, "pointer": 2 * at, "steps": 2}
            )
            ledger.append(RUN, 1, "answer", {**asked, "scalars": 4, **price, "reply": "AAAA"})
        ledger.append(RUN, 1, "release", {})
        ledger.close()
        records = [json.loads(line[65:]) for line in file.read_bytes().splitlines()]

        def check(data: bytes) -> None:
            opened = Ledger(self.written("ledger", data))
            try:
                record = opened.of(RUN, 1)
                assert record.pointer >= 0
                assert all(charge.steps > 0 for charge in record.charges)
            finally:
                opened.close()

        edited = edited_values(records).map(lambda values: chained(list(lines_of(_listed(values)))))
        return Reader(st.one_of(edited, edited, edited_bytes([file.read_bytes()])), check, file.read_bytes())

    def a_keys(self) -> Reader:
        """Lists of signing keys and of revoked ones, and private keys."""
        public, private = make_signing_key(self.here / "mine.key")
        name = fingerprint(SigningKey.load(str(private)).public)
        text = public.read_bytes() + f"# the other one\n{name}\n".encode()
        revoked = f"{name}@3\n{name}\n".encode()

        def check(data: bytes) -> None:
            file, refusals = str(self.written("keys", data)), []
            for act in (read_keys, lambda file, named: read_revoked([file], named), SigningKey.load):
                try:
                    act(file, "--keys")
                except MeerkatError as error:
                    refusals.append(error)
            if len(refusals) == 3:
                raise refusals[0]

        return Reader(edited_bytes([text, revoked, private.read_bytes()]), check, text)

    def a_mask(self) -> Reader:
        """A mask's file, raw and behind the format's own checks, up to what is done with it."""
        file = self.runs[0] / "mask.safetensors"
        model, whole = federation_model(), SparseMask.load(file)

        def check(data: bytes) -> None:
            mask = SparseMask.load(self.written("mask.safetensors", data))
            assert len(mask.digest()) == 64
            assert 0 <= mask.overlap(whole) <= 1
            mask.check_fits(model)
            mask.save(self.here / "input" / "again.safetensors")

        return Reader(_safetensors(file), check, file.read_bytes())

    def a_delta(self) -> Reader:
        """An exported delta, put into its base model."""
        export(self.runs[0], self.here / "delta", "delta")
        file, model = self.here / "delta" / "delta.safetensors", federation_model()
        before = [p.clone() for p in model.parameters()]

        def check(data: bytes) -> None:
            with torch.no_grad():
                for parameter, values in zip(model.parameters(), before, strict=True):
                    parameter.copy_(values)
            apply_delta(model, self.written("delta.safetensors", data))

        return Reader(_safetensors(file), check, file.read_bytes())

    def a_config(self) -> Reader:
        """Settings of a run."""
        texts = [(run / "config.toml").read_bytes() for run in self.runs]

        def check(data: bytes) -> None:
            config = make_config(read_toml(self.written("config.toml", data)))
            config.check_resolved("")
            rules(config)
            assert len(f"{run_key(config.seed):032x}") == 32
            assert make_config(read_toml(self.written("again.toml", config.to_toml().encode()))) == config

        return Reader(_toml(texts), check, texts[0])

    def a_federation(self) -> Reader:
        """A coordinator's settings."""
        run = {"task": "sst2", "data": "rows", "clients": 4, "rounds": 10, "local_steps": 2, "method": "meerkat-vp"}
        table = {"stream": "coordinator.example.org:9001", "certificate": "c.pem", "private_key": "k.pem", "quorum": 2}
        texts = [as_toml({"run": run, "federation": {**table, "deadline_s": 5.0, "evaluate": "sites"}})]

        def check(data: bytes) -> None:
            read_federation(self.written("federation.toml", data))

        return Reader(_toml(texts), check, texts[0])

    def a_site(self) -> Reader:
        """A site's settings, held against a run's."""
        accepts = {"task": "sst2", "mask_minimum": 10, "eps_minimum": 1e-4, "rounds": 50, "embeddings": False}
        texts = [
            as_toml(
                {"client": 1, "data": "rows", "coordinator": "a.example.org:9001", "evaluate": True, "accepts": accepts}
            )
        ]

        def check(data: bytes) -> None:
            SiteConfig.load(self.written("site.toml", data)).check_settings(self.setting.config, "sst2")

        return Reader(_toml(texts), check, texts[0])

    def a_study(self) -> Reader:
        """A comparison's file, long and short form."""
        text = (Path(__file__).parents[1] / "examples" / "claims" / "embedded.toml").read_bytes()
        small = as_toml(
            {
                "title": "small",
                "seeds": [0, 1],
                "search": {"held_back": 0.3, "trials": 5},
                "total_steps": 100,
                "method": ["meerkat", "full-fedzo"],
                "quick": {"total_steps": 10},
                "study": [
                    {
                        "name": "one",
                        "local_steps": [1, 10],
                        "exclude": [["norms"], []],
                        "check": [{"claim": "c", "axis": "method", "better": "meerkat", "than": ["full-fedzo"]}],
                    }
                ],
            }
        )

        def check(data: bytes) -> None:
            file = self.written("study.toml", data)
            for quick in (False, "quick" in data.decode(errors="replace")):
                comparison = read_comparison(file, {}, quick)
                assert all(study.settings() for study in comparison.studies)

        return Reader(_toml([text, small]), check, small)

    def a_frames(self) -> Reader:
        """Frames and bodies, taken apart by whoever might get them, and first frames with a token that is good."""
        token = bytes(range(32))
        hello = self.setting.site(0, token.hex()).hello()
        seeds = [frame.encode() for frame in (*self.spoken[0], *(frame for _, frame in self.spoken[1]))]
        several = len({frame[3] for frame in seeds})
        assert several > 4, "a run in which little is said proves little"

        def check(data: bytes) -> None:
            admission = self.setting.admission()
            admission._tokens[token] = "a node"
            with suppress(MeerkatError):
                admission.admit(data)
            body = Frame.decode(data).body
            readers: list[Check] = [
                Work.decode,
                frames.Answer.decode,
                lambda body: frames.decode_score(body, "accuracy", 1000),
                frames.decode_json,
            ]
            for read in (*readers, lambda body: frames.decode_json(body, 32), StateParts(len(self.setting.mask)).add):
                with suppress(MeerkatError):
                    read(body)

        return Reader(edited_bytes([*seeds, hello, hello, hello]), check, hello)

    @cached_property
    def spoken(self) -> tuple[list[Frame], list[tuple[int, Frame]]]:
        """A whole run's frames, up and down."""
        federation = Federation.of(self.setting, self.patch, join=0)
        for client in range(3):
            federation.enter(client, evaluate=True)
        for _ in range(3):
            federation.round()
        federation.engine.evaluate(torch.zeros(0), federation.state.round)
        federation.wire.disconnect(0)
        federation.wire.settle()
        federation.enter(0, evaluate=True)  # a fresh process: it gets the whole state
        federation.round()
        federation.end()
        return federation.wire.up, federation.wire.down

    def a_conversation(self) -> Reader:
        """What a coordinator says, heard by a live site."""
        live = self.setting.site(0, evaluate=True)
        live.answer(Frame(Kind.WELCOME, bytes.fromhex(RUN), 0, 0, body=frames.encode_json({}, bytes(32))).encode())
        said = [frame for client, frame in self.spoken[1] if client == 0]
        evaluate = [frame._replace(kind=Kind.EVALUATE) for frame in said if frame.kind is Kind.WORK][:1]
        whole = [*said[:2], *evaluate, *said[2:]]

        def check(conversation: list[tuple[bytes, bool]]) -> None:
            site = copy(live)
            site._parts, site._answered = StateParts(site._client.rules.vectors * len(site.mask)), {}
            refusals = []
            for data, meant in conversation:
                try:
                    # what is meant for the theta that the site has goes deeper than what is not
                    answer = site.answer(_addressed(data, site) if meant else data)
                except MeerkatError as error:
                    refusals.append(error)
                    continue
                if answer is not None and (frame := Frame.decode(answer)).kind is Kind.FAILED:
                    assert frames.decode_json(frame.body)[1] != {"why": "out of memory"}
            if refusals:
                raise refusals[0]

        def around(at: int) -> SearchStrategy[list[tuple[bytes, bool]]]:
            before = [(frame.encode(), False) for frame in whole[max(0, at - 2) : at]]
            edits = st.one_of(edited_bytes([whole[at].encode()], 2), _refilled(whole[at]))
            return st.tuples(edits, st.booleans()).map(lambda edited: [*before, edited])

        inputs = st.integers(0, len(whole) - 1).flatmap(around)
        return Reader(inputs, check, [(frame.encode(), False) for frame in whole[:6]])

    def a_replies(self) -> Reader:
        """What sites say, heard by a coordinator in the middle of a round."""
        heard = [frame for frame in self.spoken[0] if frame.kind in (Kind.REPLY, Kind.BEHIND)][:12]
        heard += [heard[0]._replace(kind=Kind.SCORE, body=frames.encode_score("accuracy", 0.75, 4))]
        heard += [heard[0]._replace(kind=kind, body=frames.encode_json({"why": "error"})) for kind in (10, 11)]
        setting = self.setting.but(early_stop="none", update_rule="sgd")
        config, z = replace(setting.settings, examples=dict(enumerate(setting.sizes))), setting.directions
        theta = setting.theta_0

        def check(said: list[tuple[int, bytes]]) -> None:
            admission = setting.admission()
            wire = Wire(admission)
            self.patch.setattr(remote_engine, "time", wire)
            state = ServerState(Replica(0, theta))
            waiting = FederationConfig(
                clients_minimum=3, clients_wanted=3, start_s=5.0, quorum=2, deadline_s=5.0, patience_s=10.0
            )
            engine = RemoteEngine(wire, admission, config, waiting, state, z, Classification.scores)
            for client in range(3):
                wire.connect(cast(Site, Mute(client, admission.token(f"node {client}"), setting)))
            engine.arrivals(0)
            plan = open_round(state, config, engine.available())
            for client, data in said:
                wire.say(client, data)
            for client in range(3):
                scalars = torch.full((plan.steps[client], plan.directions), 0.5).numpy()
                wire.say(
                    client,
                    Frame(
                        Kind.REPLY,
                        bytes.fromhex(RUN),
                        client,
                        0,
                        bytes.fromhex(path.digest(theta)),
                        frames.Answer("training", 0, scalars).encode(),
                    ).encode(),
                )
            replies = engine.run(state, plan)
            if replies:
                state, record = close_round(state, plan, replies, config, z)
                engine.closed(state, record)
                assert state.theta.isfinite().all()
            engine.evaluate(theta, 1)
            engine.end("over")
            refused = engine.counts["malformed"] + engine.counts["foreign"]
            if refused:
                raise MeerkatError("a client was removed")

        one = st.tuples(
            st.integers(0, 3), st.one_of(edited_bytes([f.encode() for f in heard], 2), *map(_refilled, heard))
        )
        return Reader(st.lists(one, min_size=1, max_size=3), check, [(0, heard[0].encode())])

    def a_offer(self) -> Reader:
        """A run's offer, up to the site that takes part in it."""
        self.patch.setattr(setup.torch, "set_num_threads", lambda _: None)  # threads take more than is let be had
        paths = {"data": self.here / "sites" / "0", "model": self.root / "model", "ledger": self.here / "site.ledger"}
        own = SiteConfig(
            client=0, device="cpu", **{name: str(path) for name, path in paths.items()}, accepts={"mask_minimum": 1}
        )
        offer = self.setting.offer()
        text, mask = offer.encode("00" * 32)
        mask_file = self.written("offered.safetensors", mask)
        tensors, metadata = _parts(mask_file)
        known = json.loads(text)
        with_text = {**known, "task": "mine.toml", "task_text": 'template = "{sentence} {label}"\nlabels = ["a", "b"]'}

        def check(offered: tuple[bytes, bytes]) -> None:
            decoded = Offer.decode(offered[0].decode(errors="replace"), offered[1])
            Path(own.ledger).unlink(missing_ok=True)
            Site(decoded, own).close()

        edited = st.one_of(edited_values(known), edited_values(with_text)).map(as_json)
        inputs = st.one_of(
            st.tuples(edited, st.just(mask)),
            st.tuples(edited, st.just(mask)),
            st.tuples(edited_bytes([text.encode()]), st.just(mask)),
            st.tuples(st.just(text.encode()), edited_bytes([mask])),
            st.tuples(st.just(text.encode()), edited_safetensors(tensors, metadata)),
        )
        return Reader(inputs, check, (text.encode(), mask))

    def a_task(self) -> Reader:
        """A task file, up to tokens."""
        texts = [
            b'name = "mine"\ntemplate = "{title}: {body}\\nTopic: {label}"\nlabels = ["Sports", "Science"]\n',
            b'template = "{{}} {sentence} {label}"\nlabels = ["a", "b"]\n',
        ]

        def check(data: bytes) -> None:
            task = load_task(str(self.written("task.toml", data)))
            rows = [{**dict.fromkeys(task.needs, "it was"), "label": label} for label in (0, 1)]
            check_rows(task, rows, "rows")
            encode(task, rows, self.tokenizer, 64)

        return Reader(_toml(texts), check, texts[0])

    def a_rows(self) -> Reader:
        """A data folder's rows, up to tokens and who holds which."""
        fields = {
            "sentence": "a film",
            "question": "is it",
            "passage": "a text",
            "text": "the man",
            "span1_text": "man",
        }
        rows = [{**fields, "span2_text": "it", "label": i % 2, "site": i, "word": "x"} for i in range(4)]
        rows = [{**row, "premise": "p", "hypothesis": "h", "sentence1": "s", "sentence2": "t"} for row in rows]
        write_rows(self.here / "input" / "rows", rows)
        text = b"".join(line + b"\n" for line in lines_of(rows))

        def check(asked: tuple[str, bytes]) -> None:
            name, data = asked
            folder = self.written("rows/train.jsonl", data).parent
            for row in read_alone(folder, TASKS[name]):
                if not isinstance(row, MeerkatError):
                    encode(TASKS[name], [row], self.tokenizer, 64)
            loaded = load_rows(str(folder), "train")
            check_rows(TASKS[name], loaded, "rows")
            encode(TASKS[name], loaded, self.tokenizer, 64)
            for spec in ("iid", "dirichlet:0.5", "single-label", "mixed:1", "column:site"):
                partition(spec, loaded, min(2, len(loaded)), 0)

        edited = edited_values(rows).map(lambda values: b"".join(line + b"\n" for line in lines_of(_listed(values))))
        inputs = st.tuples(st.sampled_from(sorted(TASKS)), st.one_of(edited, edited, edited_bytes([text])))
        return Reader(inputs, check, ("wsc", text))


class Mute:
    """A site that came in and says nothing by itself."""

    ended, refused = "", False

    def __init__(self, client: int, token: str, setting: Setting) -> None:
        self.client = client
        said = {"examples": setting.sizes[client], "model": setting.mask.fingerprint, "mask": setting.mask.digest()}
        body = frames.encode_json({**said, "evaluates": True}, bytes.fromhex(token))
        digest = bytes.fromhex(path.digest(setting.theta_0))
        self._hello = Frame(Kind.HELLO, bytes.fromhex(RUN), client, 0, digest, body).encode()

    def hello(self) -> bytes:
        return self._hello

    def answer(self, _: bytes) -> None:
        return None


def _listed(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]


def _toml(texts: Sequence[bytes]) -> SearchStrategy[bytes]:
    """TOML text, changed as text and as tables."""
    tables = [edited_values(tomllib.loads(text.decode())).map(as_toml) for text in texts]
    return st.one_of(*tables, *tables, edited_bytes(list(texts)))


def _parts(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A safetensors file's tensors and metadata."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return load_file(file), json.loads(data[8 : 8 + size])["__metadata__"]


def _safetensors(file: Path) -> SearchStrategy[bytes]:
    """A safetensors file: its bytes, its header, or what the header describes changed."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]

    def headed(values: Any) -> bytes:
        text = as_json(values)
        return struct.pack("<Q", len(text)) + text + rest

    behind = edited_safetensors(*_parts(file))
    return st.one_of(behind, behind, edited_values(header).map(headed), edited_bytes([data]))


def _refilled(frame: Frame) -> SearchStrategy[bytes]:
    """A frame whose fields or body changed, each to what it could be."""
    words = [
        frames.encode_json({"why": "x"}),
        *(b'{"why":' + as_json(odd) + b"}" for odd in (None, [[1]], "@deep@", {})),
    ]
    deep = b'{"why":' + b"[" * 900 + b"]" * 900 + b"}"
    numbers = st.sampled_from([0, 1, 2, 3, 5, 2**31, 2**32 - 1])
    kinds = st.one_of(st.just(frame.kind), st.sampled_from(Kind))
    bodies = st.one_of(st.just(frame.body), edited_bytes([frame.body], 2), st.sampled_from([*words, deep, b""]))
    return st.builds(
        lambda kind, at, body: frame._replace(kind=kind, round=at, body=body).encode(),
        kinds,
        st.one_of(st.just(frame.round), numbers),
        bodies,
    )


def _addressed(data: bytes, site: Site) -> bytes:
    """A frame as if it were meant for the round and theta that a site stands at."""
    try:
        frame = Frame.decode(data)
    except MeerkatError:
        return data
    mine = Frame.decode(site.hello())
    return frame._replace(run=mine.run, client=mine.client, round=mine.round, digest=mine.digest).encode()
