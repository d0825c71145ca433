"""A hostile coordinator's questions under example-level privacy: no answer tells of one row, unless it is charged."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import Setting
from test_site import Server, decoded

from meerkat.errors import MeerkatError
from meerkat.federation import frames
from meerkat.federation.frames import Frame
from meerkat.federation.site import Site
from meerkat.federation.site_settings import Refused, SiteConfig
from meerkat.problems.tasks import parse_task

ROWS = [{"text": f"row {i} of it", "label": i % 2, "diagnosis": "x"} for i in range(12)]
CANARIES: dict[str, str] = {
    "another label": json.dumps({"text": "row 7 of it", "label": 3, "diagnosis": "x"}),
    "a field without a value": json.dumps({"text": "row 7 of it", "label": 1, "diagnosis": None}),
    "half a character": '{"text": "row \\ud800", "label": 1, "diagnosis": "x"}',
    "not JSON": '{"text": "row 7',
    "not an object": "[7]",
    "not UTF-8": '{"text": "\udcff", "label": 1, "diagnosis": "x"}',
    "a number too long": '{"text": "a", "label": ' + 5000 * "1" + "}",
    "another kind of label": json.dumps({"text": "a", "label": "1", "diagnosis": "x"}),
}
UNFIT = "the site's rows are not fit for the run; its own log says why"
TEMPLATES = {"labels 0 to 1": "{text} It was {label}", "a field more": "{text} {diagnosis} It was {label}"}

TEXT = f"name = 'mine'\ntemplate = {json.dumps(TEMPLATES['a field more'])}\nlabels = ['a', 'b']\n"


@pytest.fixture(scope="module")
def setting(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    private = {"dp": "example", "dp_noise_multiplier": 50.0}
    return Setting.make(federation, tmp_path_factory.mktemp("sites"), **private)


def folder_of(folder: Path, canary: str = "") -> str:
    """A site's folder: twelve rows, the eighth of which may be another line."""
    folder.mkdir()
    lines = [json.dumps(row) for row in ROWS]
    if canary:
        lines[7] = canary
    (folder / "train.jsonl").write_bytes("".join(line + "\n" for line in lines).encode(errors="surrogateescape"))
    return str(folder)


def answer_to(setting: Setting, data: str, template: str, ledger: Path, **accepts: Any) -> str:
    """What a coordinator hears from a site that it offers a task of its own."""
    text = TEXT.replace(json.dumps(TEMPLATES["a field more"]), json.dumps(template))
    own = {"client": 0, "data": data, "model": str(setting.root / "model"), "device": "cpu", "ledger": str(ledger)}
    offer = replace(setting.offer(), task="mine.toml", task_text=text)
    try:
        site = Site(offer, SiteConfig(**own, accepts={"mask_minimum": 1, **accepts}))
    except MeerkatError as error:
        return f"refuses: {error}"
    _, said = frames.decode_json(Frame.decode(site.hello()).body, 32)
    answered = decoded(site.answer(Server(setting).ask()))
    site.close()
    return f"takes part with {said['examples']} rows and answers with {answered.kind.name}"


@pytest.mark.parametrize("name", CANARIES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_one_row_does_not_show_in_whether_a_private_site_takes_part(
    setting: Setting, tmp_path: Path, name: str, template: str
) -> None:
    canaries = {"without": "", "with": CANARIES[name]}
    said = {
        which: answer_to(setting, folder_of(tmp_path / which, line), TEMPLATES[template], tmp_path / f"{which}.ledger")
        for which, line in canaries.items()
    }
    assert said["with"] == said["without"] == "takes part with 12 rows and answers with REPLY"


@pytest.mark.parametrize("name", CANARIES)
def test_a_site_with_a_budget_takes_no_task_whose_text_it_has_not_agreed_to(
    setting: Setting, tmp_path: Path, name: str
) -> None:
    for which, line in {"without": "", "with": CANARIES[name]}.items():
        data, ledger = folder_of(tmp_path / which, line), tmp_path / f"{which}.ledger"
        said = answer_to(setting, data, TEMPLATES["a field more"], ledger, epsilon=1.0, task="mine")
        assert said.startswith("refuses: task_digest: the run asks for ")
        assert not ledger.exists()


def test_an_unfit_row_counts_as_nothing_and_is_counted_as_a_row(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every row is sampled and hardly any noise added: the sum is that of the other rows alone."""
    ours = setting.but(batch_size=12, dp_noise_multiplier=1e-9)
    offer = replace(ours.offer(), task="mine.toml", task_text=TEXT)
    replies = {}
    for which, line in {"unfit": CANARIES["not JSON"], "absent": "\n"}.items():
        own = {"client": 0, "data": folder_of(tmp_path / which, line), "model": str(setting.root / "model")}
        site = Site(offer, SiteConfig(**own, device="cpu", ledger=str(tmp_path / f"{which}.ledger")))
        _, said = frames.decode_json(Frame.decode(site.hello()).body, 32)
        replies[which] = said["examples"], frames.Answer.decode(decoded(site.answer(Server(ours).ask())).body).scalars
        site.close()
    assert (replies["unfit"][0], replies["absent"][0]) == (12, 11)
    np.testing.assert_allclose(replies["unfit"][1], replies["absent"][1], rtol=1e-5)
    told = capsys.readouterr().err
    assert "note: 1 row of 12 cannot be used: counted, with slopes of zero" in told
    assert "line 8: not JSON" in told


def test_only_rows_of_which_each_stands_alone_are_read(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.csv").write_text("text,label,diagnosis\na,0,x\n")
    said = answer_to(setting, str(tmp_path / "rows"), TEMPLATES["a field more"], tmp_path / "ledger")
    assert said == f"refuses: {UNFIT}"
    assert "dp example reads rows only from train.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("canary", CANARIES.values(), ids=CANARIES)
def test_without_privacy_a_site_refuses_in_the_same_words_whatever_is_wrong(
    federation: Path, tmp_path: Path, canary: str
) -> None:
    ours = Setting.make(federation, tmp_path / "sites")
    said = answer_to(ours, folder_of(tmp_path / "rows", canary), TEMPLATES["a field more"], tmp_path / "ledger")
    assert said == f"refuses: {UNFIT}"


def test_a_prompt_too_long_or_a_tokenizer_that_fails_is_told_in_the_same_words(
    federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Setting.make(federation, tmp_path / "sites")
    data = folder_of(tmp_path / "rows")
    assert (
        answer_to(ours.but(max_length=2), data, TEMPLATES["a field more"], tmp_path / "ledger") == f"refuses: {UNFIT}"
    )

    def broken(*_: Any) -> None:
        raise IndexError("row 7 of it")

    monkeypatch.setattr("meerkat.problems.classification.encode", broken)
    assert answer_to(ours, data, TEMPLATES["a field more"], tmp_path / "ledger") == f"refuses: {UNFIT}"


def test_a_token_without_an_embedding_is_an_unfit_row(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meerkat.problems.causal_lm.vocabulary", lambda _: 5)
    said = answer_to(setting, folder_of(tmp_path / "rows"), TEMPLATES["a field more"], tmp_path / "ledger")
    assert said == "takes part with 12 rows and answers with REPLY"


def test_a_site_takes_the_task_that_it_pinned(setting: Setting, tmp_path: Path) -> None:
    data, template = folder_of(tmp_path / "rows"), TEMPLATES["a field more"]
    digest, file = parse_task(TEXT, "mine.toml").digest(), tmp_path / "own.toml"
    file.write_text(f"# as we read it\n{TEXT}".replace("name = 'mine'", "name = 'ours'"))
    takes_part = "takes part with 12 rows and answers with REPLY"
    for number, pin in enumerate(
        ({"task_digest": digest}, {"task": str(file)}, {"task": "mine", "task_digest": digest})
    ):
        ledgers = [tmp_path / f"{number} {which}" for which in ("agreed", "other")]
        assert answer_to(setting, data, template, ledgers[0], epsilon=1.0, **pin) == takes_part
        said = answer_to(setting, data, "{text} {label}", ledgers[1], epsilon=1.0, **pin)
        assert said.startswith("refuses: task_digest: the run asks for ")
        assert digest in said
    said = answer_to(setting, data, template, tmp_path / "ledger", epsilon=1.0, task="sst2")
    assert said.startswith("refuses: task: the run asks for mine, the site accepts sst2")


def test_a_built_in_task_needs_no_digest(setting: Setting, tmp_path: Path) -> None:
    setting.site(0, ledger=str(tmp_path / "ledger"), accepts={"epsilon": 1.0}).close()
    with pytest.raises(Refused, match="task_digest: the run asks for "):
        setting.site(0, ledger=str(tmp_path / "ledger"), accepts={"epsilon": 1.0, "task_digest": "0" * 64})
