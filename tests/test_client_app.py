"""What leaves a site when something breaks there: never the words of the error, which may quote a row."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import RecordDict

from meerkat.errors import MeerkatError, RunFailed
from meerkat.federation.flower import client_app


@pytest.mark.parametrize(
    ("error", "told", "again"),
    [
        (KeyError("diagnosis: positive"), "the site failed (KeyError); its own log says more", True),
        (MeerkatError("max_length 3: too short"), "max_length 3: too short", False),
        (RunFailed("the stream broke"), "the stream broke", True),
        (SystemExit(3), "the site was interrupted", True),
    ],
)
def test_an_error_is_told_in_words_of_our_own(
    error: BaseException,
    told: str,
    again: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a message can be made inside a run alone
    monkeypatch.setattr(client_app, "Message", lambda content, reply_to: SimpleNamespace(content=content, to=reply_to))

    def act() -> RecordDict:
        raise error

    asked: Any = object()
    answer = client_app._answer(asked, act)
    assert dict(answer.content["session"]) == {"why": told, "again": again}
    if isinstance(error, KeyError):
        assert "diagnosis: positive" in capsys.readouterr().err
