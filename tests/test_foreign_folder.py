"""A run folder from somebody else writes nowhere but into itself, and others cannot read what we write.

Each attack is a link, or a file with a name that we might use, in a folder that was made before us.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_compare import InThisProcess
from transformers import PreTrainedTokenizerBase

from meerkat.cli import main
from meerkat.comparison import processes
from meerkat.federation.ledger import Ledger
from meerkat.record.run_folder import RunFolder
from meerkat.record.run_log import RunLog
from meerkat.settings.config import make_config

PRECIOUS = "precious\n"


@pytest.fixture(scope="module")
def finished(simulate_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("foreign") / "run"
    assert main([*simulate_arguments, "--rounds", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture
def theirs(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, from somebody else."""
    return Path(shutil.copytree(finished, tmp_path / "theirs"))


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of ours, outside of the folder."""
    file = tmp_path / "victim.txt"
    file.write_text(PRECIOUS)
    return file


def comparison(simulate_arguments: list[str]) -> list[str]:
    """The command line of a comparison of one run, but for --out."""
    settings = simulate_arguments[1 : simulate_arguments.index("--threads")]
    return ["compare", *settings, "--rounds", "1", "--seeds", "0", "--jobs", "1"]


def refused_in_one_line(capsys: pytest.CaptureFixture[str], named: str) -> None:
    said = [line for line in capsys.readouterr().err.splitlines() if named in line]
    assert len(said) == 1
    assert "is a link" in said[0]


def test_a_new_run_does_not_write_through_a_link_that_was_there_before_it(
    simulate_arguments: list[str], victim: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.toml.part").symlink_to(victim)
    status = main([*simulate_arguments, "--rounds", "1", "--out", str(theirs)])
    assert victim.read_text() == PRECIOUS
    assert status == 2
    refused_in_one_line(capsys, "config.toml.part")


WRITTEN = (
    *("config.toml", "mask.safetensors", "metrics.jsonl", "summary.json", "rounds.log", "events.jsonl"),
    *("curves.png", "curves.svg", "report.html"),
)


@pytest.mark.parametrize("name", [*WRITTEN, *(f"{name}.part" for name in WRITTEN)])
@pytest.mark.parametrize("command", ["resume", "report", "verify", "evaluate"])
def test_no_command_reads_or_writes_through_a_link(
    theirs: Path, victim: Path, name: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it is read, a link shows another's file in a report; where it is written, it overwrites one."""
    link = theirs / name
    if link.exists():  # reading through it would succeed
        victim.unlink()
        link.rename(victim)
    before = victim.read_bytes()
    link.symlink_to(victim)
    status = main([command, str(theirs)])
    assert victim.read_bytes() == before
    assert status == 2
    refused_in_one_line(capsys, name)


@pytest.mark.parametrize("name", ["figures", "tensorboard"])
def test_a_folder_that_is_a_link_is_not_written_into(
    theirs: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (theirs / name).symlink_to(elsewhere)
    status = main(["report", str(theirs)])
    assert not [*elsewhere.iterdir()]
    assert status == 2
    refused_in_one_line(capsys, name)


def test_a_figure_s_link_is_refused(theirs: Path, victim: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (theirs / "figures").mkdir()
    (theirs / "figures" / "score.png.part").symlink_to(victim)
    assert main(["report", str(theirs)]) == 2
    assert victim.read_text() == PRECIOUS
    refused_in_one_line(capsys, "score.png.part")


def test_a_comparison_s_report_follows_no_link(theirs: Path, victim: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (theirs / "compare.json").write_text("{}")
    (theirs / "report.html").symlink_to(victim)
    assert main(["report", str(theirs)]) == 2
    assert victim.read_text() == PRECIOUS
    refused_in_one_line(capsys, "report.html")


def test_a_comparison_is_not_continued_through_a_link(
    simulate_arguments: list[str], victim: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs"
    for name in ("cells", "search", "logs"):
        (theirs / name).mkdir(parents=True)
    (theirs / "logs" / "runs-000.txt").symlink_to(victim)
    assert main([*comparison(simulate_arguments), "--out", str(theirs)]) == 2
    assert victim.read_text() == PRECIOUS
    refused_in_one_line(capsys, "runs-000.txt")


def test_something_that_is_neither_file_nor_folder_is_refused(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe would make whoever reads it wait for ever."""
    (theirs / "metrics.jsonl").unlink()
    os.mkfifo(theirs / "metrics.jsonl")
    assert main(["verify", str(theirs)]) == 2
    assert "neither a file nor a folder" in capsys.readouterr().err


def test_a_folder_that_cannot_be_listed_is_refused(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mode 0311, as an archive can make it: its files can be opened by name, so that a link in it goes unseen."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (theirs / "figures").symlink_to(elsewhere)
    listed = os.scandir

    def scandir(path: str) -> "os._ScandirIterator[str]":  # no permission binds root, who may run this test
        if Path(path) == theirs:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    status = main(["report", str(theirs)])
    assert not [*elsewhere.iterdir()]
    assert status == 2
    assert "cannot be listed (Permission denied)" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_s_folder_may_itself_be_a_link(theirs: Path, tmp_path: Path) -> None:
    """As runs/latest often is: whoever names it knows it."""
    (tmp_path / "latest").symlink_to(theirs)
    assert main(["report", str(tmp_path / "latest")]) == 0
    assert (theirs / "report.html").is_file()


def test_a_log_is_not_opened_through_a_link(victim: Path, tmp_path: Path) -> None:
    (tmp_path / "rounds.log").symlink_to(victim)
    with pytest.raises(OSError, match="is a link"):
        RunLog(tmp_path / "rounds.log")
    assert victim.read_text() == PRECIOUS


def test_metrics_and_events_are_not_appended_through_a_link(victim: Path, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", make_config({}))
    for file, append in (
        (folder.metrics_path, lambda: folder.append_metric({"kind": "x", "round": 0})),
        (folder.events_path, lambda: folder.append_event("x")),
    ):
        file.symlink_to(victim)
        with pytest.raises(Exception, match="is a link"):
            append()
    assert victim.read_text() == PRECIOUS


def test_a_mask_is_not_written_through_a_link(simulate_arguments: list[str], victim: Path, tmp_path: Path) -> None:
    (tmp_path / "mask.safetensors.part").symlink_to(victim)
    wanted = [word for word in simulate_arguments[1:] if word not in ("--clients", "3", "--partition", "iid")]
    model = wanted[: wanted.index("--rounds")]
    assert main(["mask", *model, "--threads", "1", "--out", str(tmp_path / "mask.safetensors")]) == 0
    assert victim.read_text() == PRECIOUS


def test_an_export_deletes_nothing_beside_it(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "model.part").mkdir()
    (tmp_path / "model.part" / "thesis.txt").write_text(PRECIOUS)
    assert main(["export", str(finished), "--to", str(tmp_path / "model"), "--form", "delta"]) == 0
    assert (tmp_path / "model.part" / "thesis.txt").read_text() == PRECIOUS
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "model.part"]


def test_an_export_does_not_write_through_a_link_beside_it(finished: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "model.part").symlink_to(elsewhere)
    assert main(["export", str(finished), "--to", str(tmp_path / "model"), "--form", "delta"]) == 0
    assert not [*elsewhere.iterdir()]
    assert (tmp_path / "model" / "delta.safetensors").is_file()


# --- who may read what we write ------------------------------------------------------------------


@pytest.fixture
def usual_umask() -> Iterator[None]:
    """The usual one, by which new files can be read by everybody."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def modes(root: Path) -> dict[str, str]:
    """The permissions of a folder and of all that is in it."""
    every = [root, *root.rglob("*")]
    return {str(each.relative_to(root.parent)): oct(stat.S_IMODE(each.stat().st_mode)) for each in every}


def check_private(root: Path) -> None:
    private = {True: "0o700", False: "0o600"}
    assert not {name: mode for name, mode in modes(root).items() if mode != private[(root.parent / name).is_dir()]}


@pytest.mark.usefixtures("usual_umask")
@pytest.mark.draws
def test_nobody_else_can_read_a_run(simulate_arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([*simulate_arguments, "--rounds", "1", "--out", str(run)]) == 0
    RunFolder.open(run).append_event("arrived")
    assert main(["report", str(run)]) == 0
    check_private(run)


@pytest.mark.usefixtures("usual_umask")
def test_a_folder_of_ours_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o755)
    RunFolder.create(tmp_path / "run", make_config({}))
    assert modes(tmp_path / "run") == {"run": "0o755", "run/config.toml": "0o600"}


@pytest.mark.usefixtures("usual_umask")
def test_nobody_else_can_read_a_comparison(
    simulate_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "ProcessPoolExecutor", InThisProcess)
    assert main([*comparison(simulate_arguments), "--out", str(tmp_path / "all")]) == 0
    check_private(tmp_path / "all")


@pytest.mark.usefixtures("usual_umask")
def test_nobody_else_can_read_a_ledger_or_a_site_s_rows(federation: Path, tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger").close()
    assert modes(tmp_path / "ledger") == {"ledger": "0o600"}
    split = ["--data", str(federation / "data"), "--task", "sst2", "--clients", "2", "--partition", "iid"]
    assert main(["partition", *split, "--out", str(tmp_path / "sites")]) == 0
    check_private(tmp_path / "sites")


@pytest.mark.usefixtures("usual_umask")
def test_an_exported_model_can_be_shared(finished: Path, tmp_path: Path) -> None:
    assert main(["export", str(finished), "--to", str(tmp_path / "model")]) == 0
    assert modes(tmp_path / "model")["model"] == "0o755"
    assert modes(tmp_path / "model")["model/model.safetensors"] == "0o644"


@pytest.mark.usefixtures("usual_umask")
def test_a_folder_in_an_exported_model_can_be_entered(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer with several chat templates is saved with a folder of them."""

    def save_pretrained(_: Any, folder: Path, **__: Any) -> None:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("x")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", save_pretrained)
    assert main(["export", str(finished), "--to", str(tmp_path / "model")]) == 0
    permissions = modes(tmp_path / "model")
    assert permissions["model/additional_chat_templates"] == "0o755"
    assert permissions["model/additional_chat_templates/tool_use.jinja"] == "0o644"


# --- what a killed process leaves -----------------------------------------------------------------


def test_what_a_killed_process_left_blocks_nothing_and_goes(finished: Path, tmp_path: Path) -> None:
    """A temporary file of each kind, as it is named; the run's own are gone once it goes on."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "summary.json").unlink()
    (run / ".mask.safetensors.0a1b2c3d.part").write_bytes(bytes(1000))
    (run / ".metrics.jsonl.0a1b2c3d.part").write_bytes(bytes(1000))
    assert main(["resume", str(run)]) == 0
    assert not [*run.glob("*.part"), *run.glob(".*.part")]


def test_a_new_run_may_begin_where_one_was_killed_before_it_had_its_settings(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.toml.0a1b2c3d.part").write_text("")
    RunFolder.create(tmp_path / "run", make_config({}))
