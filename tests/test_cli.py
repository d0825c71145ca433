"""What a person meets: help, errors in one line, exit statuses, JSON alone on standard output."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model

from meerkat.cli import main
from meerkat.errors import MeerkatError
from meerkat.record.run_folder import RunFolder
from meerkat.run.setup import has_device
from meerkat.settings import config
from meerkat.settings.config import RunConfig, make_config
from meerkat.settings.groups import GROUPS


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], *said: str, status: int = 2) -> None:
    """The command exits with one line on standard error that says all of this."""
    capsys.readouterr()
    try:
        ended = main(arguments)
    except SystemExit as end:
        ended = int(end.code or 0)
    out, err = capsys.readouterr()
    lines = [line for line in err.strip().splitlines() if line]
    assert ended == status, err
    assert not out
    assert len(lines) == 1, err
    for text in said:
        assert text in lines[0]


def with_flag(arguments: list[str], flag: str, value: str) -> list[str]:
    return [*arguments, flag, value]


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--model", "/no/such/model", "no such folder"),
        ("--model", "./nowhere", "no such folder"),
        ("--model", "a" * 300, "aaa: File name too long"),
        ("--task", "sst3", "must be one of sst2"),
        ("--task", "boolq", "no field 'question'"),
        ("--data", "/no/such/data", "no such folder"),
        ("--text", "/no/such/text.jsonl", "No such file"),
        ("--mask", "/no/such/mask.safetensors", "no such file"),
        ("--density", "0", "--density 0: must be greater than 0"),
        ("--density", "1.5", "--density 1.5: must be at most 1"),
        ("--density", "many", "must be a valid number"),
        ("--lr", "many", "--lr many: must be a valid number, or 'auto'"),
        ("--eps", "1e-7", "--eps 1e-7: must be at least 0.000001, or 'auto'"),
        ("--eps", "nan", "--eps nan"),
        ("--lr", "inf", "--lr inf"),
        ("--lr", "-1", "--lr -1"),
        ("--lr", "0", "--lr 0: must be greater than 0, or 'auto'"),
        ("--eps", "0", "--eps 0: must be at least 0.000001, or 'auto'"),
        ("--server-lr", "0", "--server-lr 0: must be greater than 0, or 'auto'"),
        ("--attack-scale", "0", "--attack-scale 0: must be greater than 0, or 'auto'"),
        ("--dp-noise-multiplier", "0", "--dp-noise-multiplier 0: must be greater than 0, or 'auto'"),
        ("--threads", "0", "--threads 0: must be at least 1, or 'auto'"),
        ("--tokens-per-pass", "0", "--tokens-per-pass 0: must be at least 1, or 'auto'"),
        ("--update-rule", "newton", "update rule 'newton': not known here, only sgd, momentum, adam"),
        ("--estimator", "exact", "estimator 'exact': not known here"),
        ("--server-lr", "2", "server_lr 2: sgd has none; use lr, or update_rule momentum or adam"),
        ("--dp-delta", "-1e-5", "--dp-delta -1e-5: must be greater than 0"),
        ("--clients", "49", "at most the number of training rows, 48"),
        ("--clients", "0", "--clients 0"),
        ("--clients-per-round", "4", "must be at most clients, 3"),
        ("--partition", "dirichlet", "must be one of iid, dirichlet:A"),
        ("--partition", "mixed:9", "1 to the number of clients, 3"),
        ("--method", "sgd", "must be 'meerkat', 'meerkat-vp'"),
        ("--rounds", "2.5", "must be a valid integer"),
        ("--exclude", "heads", "must be 'embeddings' or 'norms'"),
        ("--device", "tpu", "device 'tpu'"),
        ("--device", "meta", "device 'meta'"),
        ("--batch-size", "1" + 30 * "0", "must be less than 2147483648"),
        ("--directions", "1" + 30 * "0", "must be less than 2147483648"),
        ("--text-sequences", "1" + 30 * "0", "must be less than 2147483648"),
        ("--calibration-steps", "1" + 30 * "0", "must be less than 2147483648"),
        ("--max-length", "2", "leaves no prompt"),
        ("--data", "/tmp/\udcff", "must be UTF-8; rename it"),
        ("--sigma", "1e308", "--sigma 1e308: must be at most 1000000"),
        ("--chat-template", "yes", "--chat-template yes: must be 'off' or 'on'"),
        ("--chat-template", "on", "has no chat template; use off"),
        ("--held-back", "0.001", "leaves no rows on one side"),
        ("--batch", "3", "unrecognized arguments: --batch"),
    ],
)
def test_bad_values_are_told_in_one_line_and_nothing_is_written(
    simulate_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str, said: str
) -> None:
    out = tmp_path / "run"
    fails([*simulate_arguments, flag, value, "--out", str(out)], capsys, said)
    assert not out.exists()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("", "no rows"),
        ('{"sentence": "a", "label": 2}\n', "label 2 is out of range; task 'sst2' has labels 0 to 1"),
        ('{"sentence": "a", "label": "great"}\n', "label 'great' must be a whole number, from 0 to 1"),
        ('{"text": "a", "label": 1}\n', "no field 'sentence', or no value in it (it has text, label)"),
        ("sentence\tlabel\n", "line 1: not JSON"),
    ],
)
def test_bad_data_is_told_in_one_line(
    simulate_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: str, said: str
) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(rows)
    fails([*simulate_arguments, "--data", str(tmp_path), "--out", str(tmp_path / "run")], capsys, said, "train")
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_tokenizer(
    simulate_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    fails([*simulate_arguments, "--model", str(tmp_path / "model")], capsys, "has no tokenizer", "save_pretrained")


def test_a_mask_of_another_model(
    simulate_arguments: list[str],
    federation: Path,
    tmp_path: Path,
    tokenizer: object,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    made = str(tmp_path / "mask.safetensors")
    text = str(federation / "text.jsonl")
    assert main(["mask", "--model", str(tmp_path / "one"), "--text", text, "--out", made]) == 0
    arguments = [*simulate_arguments, "--model", str(tmp_path / "two"), "--mask", made, "--out", str(tmp_path / "run")]
    fails(arguments, capsys, "other weights", "meerkat mask")
    fails(["mask", "--model", str(tmp_path / "one"), "--text", text, "--out", made], capsys, "exists already")
    fails(["mask", "--model", str(tmp_path / "one"), "--text", text, "--out", "/no/folder/m"], capsys, "no folder")


def test_a_mask_is_not_made_where_it_cannot_be_written(
    federation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    given = ["--model", str(federation / "model"), "--text", str(federation / "text.jsonl")]
    fails(
        ["mask", *given, "--out", str(tmp_path / "m.safetensors")], capsys, "cannot be written to; give another --out"
    )


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("meerkat.run.run.make_mask", "interrupted; nothing was begun"),
        ("meerkat.run.simulation.run_rounds", "interrupted; what was logged is safe: 'meerkat resume {out}' continues"),
    ],
)
def test_an_interrupt_says_what_is_left(
    simulate_arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    said: str,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "run").mkdir()  # an empty folder may be given, and holds no run
    with monkeypatch.context() as patch:
        patch.setattr(where, interrupted)
        assert main([*simulate_arguments, "--out", str(tmp_path / "run")]) == 130
    assert said.format(out=tmp_path / "run") in capsys.readouterr().err
    if (tmp_path / "run" / "config.toml").exists():
        assert main(["resume", str(tmp_path / "run")]) == 0


def test_a_run_is_resumed_on_its_device_alone(
    simulate_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert has_device("cpu")
    assert not has_device("cuda:99")
    assert main([*simulate_arguments, "--out", str(tmp_path / "run")]) == 0
    (tmp_path / "run" / "summary.json").unlink()
    monkeypatch.setattr("meerkat.run.simulation.has_device", lambda _: False)
    fails(
        ["resume", str(tmp_path / "run")],
        capsys,
        "was begun on cpu, which this machine does not have; resume it on one",
    )


def test_out_with_a_run_or_anything_else_in_it_is_refused(
    simulate_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([*simulate_arguments, "--out", str(out)]) == 0
    before = {file: file.read_bytes() for file in out.iterdir()}
    fails([*simulate_arguments, "--out", str(out)], capsys, "already holds a run", f"meerkat resume {out}")
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    fails([*simulate_arguments, "--out", str(tmp_path / "mine")], capsys, "is not empty")
    (tmp_path / "file").write_text("x")
    fails([*simulate_arguments, "--out", str(tmp_path / "file")], capsys, "run folder")


@pytest.mark.parametrize("command", ["resume", "verify", "evaluate", "export"])
def test_commands_on_a_run_need_one(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--to", str(tmp_path / "to")] if command == "export" else []
    fails([command, str(tmp_path / "nothing"), *more], capsys, "no run in it")
    (tmp_path / "file").touch()
    fails([command, str(tmp_path / "file"), *more], capsys, "is a file; give the folder of a run")


def test_an_unknown_task_is_told_before_missing_data(capsys: pytest.CaptureFixture[str]) -> None:
    fails(["simulate", "--task", "sst3"], capsys, "task 'sst3': must be one of sst2")


@pytest.mark.parametrize("missing", ["--task", "--data", "--text"])
def test_what_a_model_of_ones_own_needs(missing: str, federation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--model": str(federation / "model"), "--task": "sst2", "--data": "x", "--text": "y"}
    del given[missing]
    fails(["simulate", *(part for pair in given.items() for part in pair)], capsys, f"{missing}: needed")


def test_json_stands_alone_on_standard_output(
    simulate_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*simulate_arguments, "--json", "--out", str(tmp_path / "run")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert main(["verify", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["theta_digest"] == printed["theta_digest"]


def test_a_config_file_gives_settings_and_flags_override_them(
    simulate_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('rounds = 2\nlr = 0.5\nexclude = ["norms"]\n')
    at = simulate_arguments.index("--lr")
    arguments = ["simulate", str(file), *simulate_arguments[1:at], *simulate_arguments[at + 2 :]]
    assert main([*arguments, "--rounds", "1", "--out", str(tmp_path / "run")]) == 0
    from meerkat.record.run_folder import RunFolder

    settings = RunFolder(tmp_path / "run").config()
    assert (settings.rounds, settings.lr, settings.exclude) == (1, 0.5, ("norms",))
    file.write_text("round = 2\n")
    fails(arguments, capsys, "--round: unknown; must be one of model, task")
    file.write_text("rounds = \n")
    fails(arguments, capsys, "not valid TOML")
    fails(["simulate", str(tmp_path / "none.toml")], capsys, "No such file")


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_every_setting_is_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of("simulate", capsys)
    for name, field in RunConfig.model_fields.items():
        assert shown.count("\n  --" + name.replace("_", "-") + " ") == 1
        assert field.description


@pytest.mark.parametrize("command", ["simulate", "compare"])
def test_help_has_the_settings_that_matter_most_first_and_the_others_in_groups(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shown = help_of(command, capsys)
    assert max(map(len, shown.splitlines())) <= 100
    places = [shown.index(f"\n{title}:\n") for title in ("the settings that matter most", *GROUPS)]
    assert places == sorted(places)
    assert shown[places[0] : places[1]].count("\n  --") == (10 if command == "simulate" else 8)
    assert places[1] < shown.index("--max-length") < places[2] < shown.index("--density") < places[3]
    assert shown.index("--threads" if command == "simulate" else "--dtype") > places[-1]


@pytest.mark.parametrize(
    ("clients", "said"),
    [("1", "1 client (iid) holds 48 rows; 1 round of 1 local step"), ("3", "3 clients (iid) hold 16 rows each; ")],
)
def test_the_plan_is_told_in_plain_english(
    simulate_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], clients: str, said: str
) -> None:
    given = ["--clients", clients, "--rounds", "1", "--out", str(tmp_path / "run")]
    assert main([*simulate_arguments, *given]) == 0
    assert said in capsys.readouterr().err


@pytest.mark.draws
def test_a_picture_that_cannot_be_written_costs_no_outcome(
    simulate_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", full)
        assert main([*simulate_arguments, "--rounds", "1", "--out", str(run)]) == 0
    said = capsys.readouterr().out
    assert "A client sent at most 4 bytes a round, on average about 4 in all." in said
    cure = f"make room, then 'meerkat resume {run}'"
    assert f"Picture: not written ({run / 'curves.png'}: No space left on device; {cure})" in said
    assert main(["resume", str(run)]) == 0
    assert (run / "curves.svg").is_file()


@pytest.mark.parametrize("command", ["resume", "verify", "evaluate", "export"])
def test_a_comparison_is_told_from_a_run(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cells").mkdir()
    more = ["--to", str(tmp_path / "model")] if command == "export" else []
    again = f"give the same 'meerkat compare' command again, with --out {tmp_path}"
    fails([command, str(tmp_path), *more], capsys, "a comparison; give one of its runs, such as", again)


def test_an_empty_list_of_signers_is_not_taken_for_none(
    simulate_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*simulate_arguments, "--rounds", "1", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    fails(["verify", str(tmp_path / "run"), "--signers", ""], capsys, "--signers")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["simulate", "--out", ""], "meerkat simulate: error: argument --out: is empty; give a value, or leave it out"),
        (["simulate", ""], "argument CONFIG.toml: is empty"),
        (["compare", "--out", ""], "argument --out: is empty"),
        (["compare", "--evidence", ""], "argument --evidence: is empty"),
        (["export", "run", "--to", ""], "argument --to: is empty"),
        (["certify", "--host", "a", "--out", ""], "argument --out: is empty"),
        (["doctor", "site.toml", "--connect", ""], "argument --connect: is empty"),
    ],
)
def test_nothing_empty_is_taken_for_a_default(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    fails(arguments, capsys, said)
    assert not [*tmp_path.iterdir()]


def test_flags_may_leave_a_file_s_settings_without_use(
    simulate_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "vp.toml"
    file.write_text('method = "meerkat-vp"\ncalibration_steps = 80\neps = 3e-3\n')
    run = ["simulate", str(file), *simulate_arguments[1:], "--rounds", "1", "--method", "fo-fedavg"]
    eps = run.index("--eps")
    assert main([*run[:eps], *run[eps + 2 :], "--out", str(tmp_path / "one")]) == 0
    assert RunFolder(tmp_path / "one").config().calibration_steps == RunConfig().calibration_steps
    given = [*run, "--calibration-steps", "50", "--out", str(tmp_path / "two")]
    fails(given, capsys, "calibration_steps 50: does nothing with early_stop none; use method meerkat-vp")
    file.write_text('method = "meerkat"\ncalibration_steps = 80\n')
    fails([*run[:eps], *run[eps + 2 :], "--out", str(tmp_path / "two")], capsys, "calibration_steps 80: does nothing")
    assert not (tmp_path / "two").exists()


def test_an_interrupt_while_the_command_line_loads_ends_quietly() -> None:
    program = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
class Interrupting:
    def find_spec(self, name, *_):
        if name == "meerkat.cli":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
from meerkat.__main__ import main
sys.exit(main())
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "meerkat: interrupted\n")


def test_text_with_a_zero_byte_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text('task = "a\\u0000b.toml"\n')
    said = "task 'a\\x00b.toml': must be text in UTF-8, without zero bytes"
    fails(["simulate", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run")], capsys, said)
    assert not (tmp_path / "run").exists()


def test_settings_survive_toml(tmp_path: Path) -> None:
    made = make_config({"lr": 1e-5, "exclude": "embeddings,norms", "text": 'a "b" \\ c\nü'})
    (tmp_path / "c.toml").write_text(made.to_toml())
    assert make_config(config.read_toml(tmp_path / "c.toml")) == made
    with pytest.raises(MeerkatError, match="makes its mask from the run's own rows"):
        make_config({"method": "task-mask", "mask": "m"})


def test_an_update_rule_may_be_given_by_its_older_name_but_not_by_both(
    simulate_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_config({"server_optimizer": "adam"}) == make_config({"update_rule": "adam"})
    file = tmp_path / "settings.toml"
    file.write_text('server_optimizer = "adam"\n')
    arguments = ["simulate", str(file), *simulate_arguments[1:], "--rounds", "1"]
    assert main([*arguments, "--out", str(tmp_path / "older")]) == 0
    assert main([*arguments, "--server-optimizer", "momentum", "--out", str(tmp_path / "flag")]) == 0
    rules = [config.read_toml(tmp_path / run / "config.toml")["update_rule"] for run in ("older", "flag")]
    assert rules == ["adam", "momentum"]
    file.write_text('server_optimizer = "adam"\nupdate_rule = "adam"\n')
    capsys.readouterr()
    fails(arguments, capsys, "server_optimizer: is an older name of update_rule", "give only update_rule")


def test_a_run_that_has_begun_says_no_auto(
    simulate_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    at = simulate_arguments.index("--lr")
    assert main([*simulate_arguments[:at], "--rounds", "1", "--out", str(run)]) == 0
    settings = config.read_toml(run / "config.toml")
    assert {type(settings[name]) for name in ("lr", "eps", "server_lr")} == {float}
    assert {type(settings[name]) for name in ("threads", "tokens_per_pass")} == {int}
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace(f"threads = {settings['threads']}", 'threads = "auto"'))
    capsys.readouterr()
    fails(["report", str(run)], capsys, "threads auto: must be a number")


def test_no_command_no_traceback() -> None:
    ran = subprocess.run([sys.executable, "-m", "meerkat"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
