"""A site's session: it follows the run to the bit, does what is asked and agreed, and says nothing of its rows."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import RUN, Federation, Setting, counted, frame, write_rows

from meerkat import demo
from meerkat.algorithm import path
from meerkat.algorithm.replica import Replica
from meerkat.algorithm.replies import Scalars
from meerkat.algorithm.rounds import RoundPlan, RoundRecord, Update
from meerkat.algorithm.server import ServerState, close_round, open_round, share_of
from meerkat.errors import MeerkatError
from meerkat.federation import frames
from meerkat.federation.certificates import make_signing_key
from meerkat.federation.frames import Answer, BadFrame, Closed, Frame, Kind, Work
from meerkat.federation.offer import Offer
from meerkat.federation.site import Site
from meerkat.federation.site_settings import Refused, SiteConfig
from meerkat.masks.sparse_mask import SparseMask
from meerkat.problems.data import load_rows
from meerkat.record.signatures import SigningKey
from meerkat.run.mask import make_mask
from meerkat.run.setup import open_problem, resolve
from meerkat.settings.config import make_config

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"update_rule": "momentum", "server_lr": 0.7},
    "adam": {"update_rule": "adam", "server_lr": 0.01},
    "feddyn": {"method": "feddyn", "feddyn_alpha": 0.1},
}


@pytest.fixture(scope="module")
def setting(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting.make(federation, tmp_path_factory.mktemp("sites"), local_steps=2, directions=2)


class Server:
    """The coordinator's side of one site, by hand; another client's scalars are made up."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.config = replace(setting.settings, examples={0: 16, 1: 10})
        self.state = ServerState(Replica(0, setting.theta_0))
        self.z = setting.directions
        self.records: list[RoundRecord] = []
        self.states = [self.state]

    def frame(self, kind: Kind, body: bytes = b"", client: int = 0) -> bytes:
        return frame(kind, client, self.state, body)

    def ask(self, closed: Sequence[Closed] = (), kind: Kind = Kind.WORK, **changes: Any) -> bytes:
        pointer = self.state.steps_made.get(0, 0)
        asked = {"lr": self.config.lr, "steps": self.config.local_steps, "pointer": pointer, **changes}
        return self.frame(kind, Work(closed=tuple(closed), **asked).encode())

    def plan(self, clients: Sequence[int] = (0, 1)) -> RoundPlan:
        return open_round(self.state, self.config, clients)

    def close(self, mine: np.ndarray | None) -> Closed:
        """Close a round with the site's scalars, or without, and another client's."""
        plan = self.plan()
        other = np.random.default_rng(self.state.round).normal(size=(2, 2)).astype("f4")
        replies = [Scalars(1, other), *([] if mine is None else [Scalars(0, mine)])]
        self.state, record = close_round(self.state, plan, replies, self.config, self.z)
        self.records.append(record)
        self.states.append(self.state)
        return Closed(plan.lr, share_of(self.config, record.scalars), record.aggregate, mine is not None)

    def whole_state(self) -> list[bytes]:
        values = self.state.replica_of(0).pack(self.config.rules)
        return [self.frame(Kind.STATE, part) for part in frames.encode_state(values)]


def decoded(data: bytes | None) -> Frame:
    assert data is not None
    return Frame.decode(data)


def scalars_of(data: bytes | None) -> np.ndarray:
    reply = decoded(data)
    assert reply.kind is Kind.REPLY
    return frames.Answer.decode(reply.body).scalars


def stands_at(site: Site, state: ServerState) -> bool:
    """What it says of itself: by its hello."""
    said = Frame.decode(site.hello())
    return (said.round, said.digest.hex()) == (state.round, path.digest(state.theta))


def test_hello_says_who_it_is_and_welcome_gives_it_its_secret(setting: Setting) -> None:
    site = setting.site(1, token="ab" * 32)
    first = Frame.decode(site.hello())
    token, said = frames.decode_json(first.body, 32)
    assert (first.kind, first.run.hex(), first.client, first.round) == (Kind.HELLO, RUN, 1, 0)
    assert token == b"\xab" * 32
    assert said.keys() == {"examples", "model", "mask", "evaluates", "versions"}
    assert (said["examples"], said["evaluates"]) == (setting.sizes[1], False)
    assert first.digest.hex() == path.digest(setting.theta_0)
    secret = bytes(range(32))
    welcome = Frame(Kind.WELCOME, first.run, 1, 0, body=frames.encode_json({}, secret)).encode()
    assert site.answer(welcome) is None
    assert frames.decode_json(Frame.decode(site.hello()).body, 32)[0] == secret


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_follows_closed_rounds_to_the_bit(setting: Setting, name: str) -> None:
    """Also several at once, and rounds that it took no part in."""
    ours = setting.but(rounds=9, **OPTIMIZERS[name])
    server, site = Server(ours), ours.site(0)
    pending: list[Closed] = []
    for asked in (True, True, False, True, False, False, True):
        mine = None
        if asked:
            mine = scalars_of(site.answer(server.ask(pending)))
            assert mine.shape == (2, 2)
            assert stands_at(site, server.state)
            pending = []
        pending.append(server.close(mine))
    assert site.answer(server.ask(pending, Kind.CLOSED)) is None
    assert stands_at(site, server.state)
    assert path.digest(server.state.theta) != path.digest(setting.theta_0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_site_that_was_given_the_state_goes_on_as_one_that_followed(setting: Setting, name: str) -> None:
    ours = setting.but(**OPTIMIZERS[name])
    server, old = Server(ours), ours.site(0)
    pending: list[Closed] = []
    for _ in range(2):
        pending = [server.close(scalars_of(old.answer(server.ask(pending))))]
    late = ours.site(0)
    for part in server.whole_state():
        assert late.answer(part) is None
    assert stands_at(late, server.state)
    mine = old.answer(server.ask(pending))
    assert late.answer(server.ask()) == mine
    closed = server.close(scalars_of(mine))
    assert old.answer(server.ask([closed])) == late.answer(server.ask([closed]))


def test_a_late_joiner_by_rounds_replies_as_one_that_was_there(setting: Setting) -> None:
    server, old = Server(setting), setting.site(0)
    trail: list[Closed] = []
    for _ in range(3):
        trail.append(server.close(scalars_of(old.answer(server.ask(trail[-1:])))))
    assert setting.site(0).answer(server.ask(trail)) == old.answer(server.ask(trail[-1:]))


def test_feddyn_s_own_correction_is_asked_for_where_it_cannot_follow(setting: Setting) -> None:
    """A new process at theta_0 can follow theta by the rounds, but not its h: its own scalars are gone."""
    ours = setting.but(**OPTIMIZERS["feddyn"])
    server, old = Server(ours), ours.site(0)
    trail = [server.close(scalars_of(old.answer(server.ask())))]
    again = ours.site(0)
    assert again.answer(server.ask(trail, Kind.CLOSED)) is None
    assert stands_at(again, server.state)
    assert decoded(again.answer(server.ask())).kind is Kind.BEHIND
    for part in server.whole_state():
        again.answer(part)
    assert again.answer(server.ask()) == old.answer(server.ask(trail))


def test_the_same_request_gets_the_same_bytes(setting: Setting) -> None:
    server, site = Server(setting), setting.site(0)
    first = site.answer(server.ask())
    assert site.answer(server.ask()) == first
    closed = server.close(scalars_of(first))
    second = site.answer(server.ask([closed]))
    assert second != first
    assert site.answer(server.ask([closed])) == second
    assert site.answer(server.ask()) == second


def test_calibration_and_training_of_a_round_are_two_requests(setting: Setting) -> None:
    ours = setting.but(early_stop="vp", calibration_steps=4, initial_steps=2, later_steps=2)
    server, site = Server(ours), ours.site(0)
    calibrated = scalars_of(site.answer(server.ask(phase="calibration", steps=4)))
    trained = scalars_of(site.answer(server.ask()))
    assert calibrated.shape == (4, 2)
    assert trained.shape == (2, 2)
    assert not np.array_equal(calibrated[:2], trained)
    again = scalars_of(site.answer(server.ask(phase="calibration", steps=4)))
    assert again.tobytes() == calibrated.tobytes()


def test_it_says_behind_where_its_theta_is_not_meant_and_the_state_brings_it_right(setting: Setting) -> None:
    server, site = Server(setting), setting.site(0)
    closed = [server.close(None) for _ in range(2)]
    behind = decoded(site.answer(server.ask(closed[1:])))
    assert (behind.kind, behind.round, behind.body) == (Kind.BEHIND, 0, b"")
    assert behind.digest.hex() == path.digest(setting.theta_0)
    for part in server.whole_state():
        assert site.answer(part) is None
    assert scalars_of(site.answer(server.ask())).shape == (2, 2)


def test_a_state_that_is_not_the_announced_one_is_not_worked_on(setting: Setting) -> None:
    server, site = Server(setting), setting.site(0)
    server.close(None)
    for part in frames.encode_state(server.state.theta.numpy() + np.float32(1)):
        site.answer(server.frame(Kind.STATE, part))
    assert decoded(site.answer(server.ask())).kind is Kind.BEHIND


def test_a_wrong_round_on_the_way_is_found_out(setting: Setting) -> None:
    server, site = Server(setting), setting.site(0)
    closed = server.close(None)
    wrong = Closed(closed.lr, closed.share, closed.aggregate * np.float32(1.0001), False)
    assert decoded(site.answer(server.ask([wrong]))).kind is Kind.BEHIND


def test_frames_of_others_are_refused(setting: Setting) -> None:
    server, site = Server(setting), setting.site(0)
    body = Work("training", 0.1, 2).encode()
    for data in (server.frame(Kind.WORK, body, client=1), frame(Kind.WORK, 0, server.state, body, "ff" * 8)):
        with pytest.raises(BadFrame, match="another"):
            site.answer(data)


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.REPLY, Kind.BEHIND, Kind.SCORE, Kind.FAILED])
def test_what_a_coordinator_does_not_send_is_refused(setting: Setting, kind: Kind) -> None:
    with pytest.raises(BadFrame, match=kind.name.lower()):
        setting.site(0).answer(Server(setting).frame(kind))


@pytest.mark.parametrize(
    "asked",
    [
        {"steps": 0},
        {"steps": 3},
        {"steps": 2, "phase": "calibration"},  # nobody is calibrated in this run
        {"steps": 2**32 - 1},
    ],
)
def test_steps_that_were_not_agreed_are_refused(setting: Setting, asked: dict[str, Any]) -> None:
    server, site = Server(setting), setting.site(0)
    with pytest.raises(BadFrame, match="asked for"):
        site.answer(server.ask(**asked))
    assert scalars_of(site.answer(server.ask())).shape == (2, 2)


def test_no_round_beyond_the_run_s_last_is_worked_on(setting: Setting) -> None:
    server, site = Server(setting), setting.site(0)
    closed = [server.close(None) for _ in range(setting.config.rounds)]
    with pytest.raises(BadFrame, match="asked for"):
        site.answer(server.ask(closed))


@pytest.mark.parametrize("kind", [Kind.WORK, Kind.EVALUATE])
@pytest.mark.parametrize("back", [0, 1])
def test_a_round_is_answered_about_one_theta_alone(setting: Setting, tmp_path: Path, kind: Kind, back: int) -> None:
    """In one session, and in every later one: what a second process of the site is asked, it knows."""
    own = {"evaluate": True, "ledger": str(tmp_path / "ledger")}
    server, site = Server(setting), setting.site(0, **own)
    closed = server.close(None)
    first = site.answer(server.ask([closed], kind=kind))
    if back:
        site.answer(server.ask([server.close(None)], kind=kind))
    else:
        assert site.answer(server.ask(kind=kind)) == first  # the same again is no news
    server.state = ServerState(Replica(1, setting.theta_0 + 1e-3))
    with pytest.raises(BadFrame, match="nobody asked for"):
        site.answer(server.whole_state()[0])
    site.close()
    again = setting.site(0, **own)
    for part in server.whole_state():
        again.answer(part)
    with pytest.raises(BadFrame, match="not as agreed"):
        again.answer(server.ask(kind=kind))
    again.close()


def test_a_round_of_more_steps_than_the_run_has_is_not_followed(setting: Setting) -> None:
    server, site = Server(setting), setting.site(0)
    server.close(None)
    with pytest.raises(BadFrame, match="a round of 3 steps of 2 directions, in a run of 2 steps"):
        site.answer(server.ask([Closed(0.1, 1.0, np.ones((3, 2), "f4"), False)]))


def test_a_task_of_a_known_name_has_its_own_text(setting: Setting) -> None:
    text = 'name = "topics"\ntemplate = "{diagnosis} {label}"\nlabels = ["a", "b", "c", "d"]\n'
    own = SiteConfig(client=0, data="rows", accepts={"task": "topics"})
    with pytest.raises(MeerkatError, match="is built in"):
        Site(replace(setting.offer(), task="own.toml", task_text=text), own)


def test_a_task_s_name_is_no_file_s_name(setting: Setting, tmp_path: Path) -> None:
    """No file could be called so: nothing looks for one."""
    text = 'template = "{sentence} {label}"\nlabels = ["a", "b"]\n'
    paths = {
        "data": str(setting.folder / "0"),
        "model": str(setting.root / "model"),
        "ledger": str(tmp_path / "ledger"),
    }
    own = SiteConfig(client=0, device="cpu", **paths, accepts={"mask_minimum": 1})
    Site(replace(setting.offer(), task="\u20ac" * 250 + ".toml", task_text=text), own).close()


def test_a_round_of_other_directions_is_refused(setting: Setting) -> None:
    server, site = Server(setting), setting.site(0)
    server.close(None)
    with pytest.raises(BadFrame, match="directions"):
        site.answer(server.ask([Closed(0.1, 1.0, np.ones((2, 3), "f4"), False)]))


@pytest.mark.parametrize(("lr", "value"), [(float("nan"), 1.0), (0.01, float("inf"))])
def test_a_round_with_a_number_that_is_not_finite_is_not_followed(setting: Setting, lr: float, value: float) -> None:
    server, site = Server(setting), setting.site(0)
    before = server.state
    server.close(None)
    with pytest.raises(BadFrame, match="a closed round with a number that is not finite"):
        site.answer(server.ask([Closed(lr, 1.0, np.full((2, 2), value, "f4"), False)]))
    assert stands_at(site, before)


def test_a_site_that_lost_its_ledger_begins_where_the_coordinator_counted_though_it_evaluated_before(
    setting: Setting,
) -> None:
    server, site = Server(setting), setting.site(0, evaluate=True)
    assert decoded(site.answer(server.ask(kind=Kind.EVALUATE, steps=0, pointer=0))).kind is Kind.SCORE
    assert Answer.decode(decoded(site.answer(server.ask(pointer=500))).body).pointer == 500


def test_bytes_of_any_kind_are_bad_frames_or_change_nothing(setting: Setting) -> None:
    """Damaged requests: an answer, or a BadFrame; and the site works on afterwards."""
    server, site = Server(setting), setting.site(0)
    good = server.ask()
    expected = site.answer(good)
    generator = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(server.ask([a_closed()]) if generator.random() < 0.5 else good)
        for _ in range(generator.integers(1, 4)):
            data[generator.integers(3, len(data))] ^= 1 << generator.integers(8)
        try:
            site.answer(bytes(data[: generator.integers(52, len(data) + 1)]))
        except BadFrame:
            continue
    for part in server.whole_state():
        site.answer(part)
    assert scalars_of(site.answer(good)).tobytes() == scalars_of(expected).tobytes()


def a_closed() -> Closed:
    return Closed(0.01, 1.0, np.ones((2, 2), "f4"), False)


@pytest.mark.parametrize(("kind", "refused"), [(Kind.END, False), (Kind.REFUSAL, True)])
def test_the_session_is_over_when_the_coordinator_says_so(setting: Setting, kind: Kind, refused: bool) -> None:
    server, site = Server(setting), setting.site(0)
    assert site.ended == ""
    assert site.answer(server.frame(kind, frames.encode_json({"why": "all done"}))) is None
    assert (site.ended, site.refused) == ("all done", refused)
    silent = setting.site(0)
    silent.answer(server.frame(kind, frames.encode_json({})))
    assert silent.ended


def test_it_evaluates_where_it_has_agreed_to(setting: Setting) -> None:
    server, site = Server(setting), setting.site(0, evaluate=True)
    answer = decoded(site.answer(server.ask(kind=Kind.EVALUATE)))
    accuracy, rows = frames.decode_score(answer.body, "accuracy", 1000)
    assert (answer.kind, rows) == (Kind.SCORE, setting.sizes[0])
    assert 0 < accuracy < 1
    assert accuracy * rows == pytest.approx(round(accuracy * rows))
    reply = site.answer(server.ask())
    assert reply == setting.site(0).answer(server.ask())  # an evaluation leaves no trace


def test_it_does_not_evaluate_without_consent(setting: Setting) -> None:
    with pytest.raises(BadFrame, match="has not agreed"):
        setting.site(0).answer(Server(setting).ask(kind=Kind.EVALUATE))


def test_a_loss_that_is_not_finite_is_told_in_one_word(setting: Setting) -> None:
    server, site = Server(setting), setting.site(0)
    huge = Closed(1.0, 1.0, np.full((2, 2), 3e38, "f4"), False)
    update = Update(replace(server.plan(), lr=1.0), huge.aggregate)
    server.state = ServerState(Replica(1, path.moved(setting.theta_0, update, server.z)))
    failed = decoded(site.answer(server.ask([huge])))
    assert (failed.kind, failed.round) == (Kind.FAILED, 1)
    assert json.loads(failed.body) == {"why": "diverged"}


def test_no_memory_is_told_in_one_word(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("GPU 0 has 3 rows of 'a patient's text' in it")

    monkeypatch.setattr("meerkat.federation.site_client.local_steps", full)
    failed = decoded(setting.site(0).answer(Server(setting).ask()))
    assert (failed.kind, json.loads(failed.body)) == (Kind.FAILED, {"why": "out of memory"})


def test_a_run_that_is_not_agreed_to_is_refused_before_a_row_is_read(setting: Setting) -> None:
    with pytest.raises(Refused, match="batch_size: the run asks for 4, the site accepts at least 5"):
        setting.site(0, data="no such folder", accepts={"batch_minimum": 5})
    with pytest.raises(Refused, match="mask_minimum"):
        setting.site(0, data="no such folder", accepts={"mask_minimum": 10**6})


def test_another_model_at_the_mask_is_told(setting: Setting) -> None:
    other = replace(setting.offer(), theta="ab" * 32)
    paths = {"data": str(setting.folder / "0"), "model": str(setting.root / "model")}
    own = SiteConfig(client=0, device="cpu", **paths)
    with pytest.raises(MeerkatError, match="its values at the mask are not the coordinator's"):
        Site(other, own)


@pytest.mark.parametrize(
    "change",
    [
        *({name: None} for name in ("run", "settings", "task", "task_text", "theta", "token", "stream", "patience_s")),
        *({"run": "0123"}, {"token": "x" * 64}, {"settings": [1]}, {"patience_s": float("nan")}, {"version": [1]}),
    ],
)
def test_an_offer_with_a_part_of_another_kind_is_refused(setting: Setting, change: dict[str, Any]) -> None:
    text, mask = setting.offer().encode("00" * 32)
    with pytest.raises(MeerkatError, match="use the same version of meerkat"):
        Offer.decode(json.dumps({**json.loads(text), **change}), mask)


def test_an_offer_of_threads_that_no_machine_has_is_refused(setting: Setting) -> None:
    offer = setting.offer()
    with pytest.raises(MeerkatError, match="the offered threads 1000000: must be at most 1024"):
        replace(offer, settings={**offer.settings, "threads": 10**6}).config({})
    for name in ("eps", "lr", "server_lr"):
        with pytest.raises(MeerkatError, match=f"the offered {name} 0: must be "):
            replace(offer, settings={**offer.settings, name: 0}).config({})
        with pytest.raises(MeerkatError, match=f"the offered {name} auto: must be a number"):
            replace(offer, settings={**offer.settings, name: "auto"}).config({})


def test_an_offered_mask_that_is_none_is_refused(setting: Setting) -> None:
    with pytest.raises(MeerkatError, match="the offered mask is damaged"):
        replace(setting.offer(), mask=setting.offer().mask[:100]).load_mask()


def test_no_frame_has_room_for_a_loss_a_label_or_a_text(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every frame of a whole federation, byte by byte of its body."""
    ours = setting.but(early_stop="vp", calibration_steps=4, initial_steps=2, later_steps=2, rounds=3)
    federation = Federation.of(ours, monkeypatch, join=2)
    hellos: list[bytes] = [federation.wire.sites[k].hello() for k in (0, 1)]
    federation.round()
    federation.enter(2, evaluate=True)  # late, so it is caught up
    federation.round()
    assert counted(federation)[1] == setting.sizes[2]
    federation.round()
    federation.end()
    said = federation.wire.up
    assert {frame.kind for frame in said} == {Kind.REPLY, Kind.SCORE}
    for one in said:
        if one.kind is Kind.REPLY:
            phase, _, scalars = frames.Answer.decode(one.body)
            steps = 4 if phase == "calibration" else len(scalars)
            assert scalars.shape == (steps, 2)
            assert steps in (1, 2, 4)
            assert len(one.body) == 15 + 4 * steps * 2
        else:
            assert one.body[16:] == b"accuracy"
    for hello in hellos:
        _, words = frames.decode_json(Frame.decode(hello).body, 32)
        assert words.keys() == {"examples", "model", "mask", "evaluates", "versions"}
        assert set(words["versions"]) == {"meerkat", "torch", "transformers"}


# signing


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("keys")
    return [str(make_signing_key(folder / f"{name}.key").private) for name in ("old", "new")]


def test_a_site_with_a_key_says_so_and_signs_its_replies(setting: Setting, keys: list[str]) -> None:
    server, site = Server(setting), setting.site(0, node="n", signing_key=keys[1], signing_key_before=keys[0])
    _, said = frames.decode_json(Frame.decode(site.hello()).body, 32)
    assert {"key", "signature", "handover"} <= said.keys()
    assert said["key"] == SigningKey.load(keys[1]).public.hex()
    first = site.answer(server.ask())
    assert decoded(first).kind is Kind.SIGNED
    (phase, _, scalars), signature = frames.decode_reply(decoded(first))
    plain = setting.site(0).answer(server.ask())
    assert decoded(plain).kind is Kind.REPLY
    assert (phase, scalars.tobytes()) == ("training", scalars_of(plain).tobytes())
    assert len(signature) == 64
    assert site.answer(server.ask()) == first
    again = setting.site(0, node="n", signing_key=keys[1])
    assert again.answer(server.ask()) == first  # a process of its own signs the same


def test_a_site_that_was_kept_answers_with_the_key_it_has_now(setting: Setting, keys: list[str]) -> None:
    server, old = Server(setting), setting.site(0, node="n", signing_key=keys[0])
    first = old.answer(server.ask())
    same, renewed = (setting.site(0, node="n", signing_key=key) for key in keys)
    for site in (same, renewed):
        site.restore(old.snapshot())
    assert same.answer(server.ask()) == first
    second = renewed.answer(server.ask())
    assert second != first
    assert frames.decode_reply(decoded(second))[0].encode() == frames.decode_reply(decoded(first))[0].encode()


def test_a_run_of_signed_replies_is_refused_without_a_key_before_a_row_is_read(setting: Setting) -> None:
    with pytest.raises(Refused, match="signing_key: the run takes only signed replies"):
        replace(setting, signed=True).site(0, data="no such folder")


def test_the_embedded_model_takes_part(tmp_path: Path) -> None:
    """The demonstration's own model, task and data, as a first federation has them."""
    setting = Setting(tmp_path, tmp_path, embedded(), mask_of(embedded()), [8])
    write_rows(tmp_path / "0", load_rows(str(demo.TASKS["topics"]), "train")[:8])
    server, site = Server(setting), setting.site(0, model="embedded", evaluate=True)
    closed = server.close(scalars_of(site.answer(server.ask())))
    scalars_of(site.answer(server.ask([closed])))
    assert stands_at(site, server.state)
    assert frames.decode_score(decoded(site.answer(server.ask(kind=Kind.EVALUATE))).body, "accuracy", 1000)[1] == 8


def embedded() -> Any:
    given = {"text_sequences": 4, "threads": 1, "device": "cpu", "lr": 0.1, "batch_size": 4, "local_steps": 2}
    given |= {"eps": 1e-3, "dtype": "float32"}
    return resolve(make_config({**given, "directions": 2, "clients": 2}))


def mask_of(config: Any) -> SparseMask:
    return make_mask(config, open_problem(config))


@pytest.mark.parametrize("row", [{"text": "a", "label": "positive"}, {"diagnosis": "b", "label": 0}, ["positive"]])
def test_what_is_wrong_with_a_row_is_not_told_to_the_coordinator(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Any
) -> None:
    write_rows(tmp_path, [row])
    with pytest.raises(MeerkatError) as refused:
        setting.site(0, data=str(tmp_path))
    words = str(refused.value)
    assert "its own log says why" in words
    assert not [word for word in ("positive", "diagnosis", str(tmp_path), "row 1", "line 1") if word in words]
    assert "row 1" in (here := capsys.readouterr().err) or "line 1" in here
