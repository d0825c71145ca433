"""Extensions: what is written outside the package goes through every command, and nothing that is read imports it."""

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nursery import Command
from test_compare import InThisProcess

from meerkat import extensions
from meerkat.cli import main
from meerkat.comparison import processes
from meerkat.errors import MeerkatError
from meerkat.federation.site_settings import Refused, SiteConfig
from meerkat.run.setup import resolve
from meerkat.settings.config import make_config

EXAMPLES = Path(__file__).parents[1] / "examples" / "extending"
SMALL = ("--clients", "3", "--batch-size", "4", "--eval-every", "0", "--text-sequences", "8", "--eps", "1e-3")
CASES = {
    "estimator": ("--estimator", "one-sided", "--directions", "2", "--lr", "0.05"),
    "update_rule": ("--update-rule", "diagonal", "--lr", "0.05"),
    "problem": ("--problem", "stripes", "--density", "0.2", "--lr", "0.3"),
    "partition": ("--partition", "power-law:1.5", "--lr", "0.05"),
}
ROUNDS = 12


def arguments(case: str, few_topics: Path) -> list[str]:
    """A case's settings, where its problem is one of rows with them, and its extension."""
    rows = () if "--problem" in CASES[case] else ("--data", str(few_topics))
    return [*SMALL, *CASES[case], *rows, "--extension", str(EXAMPLES / f"{case}.py")]


def killed(process: Command, log: Path, records: int) -> None:
    """Kill a process once its log has so many records."""
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < records):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("case", CASES)
def test_an_extension_goes_through_every_command(
    case: str,
    few_topics: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    start_meerkat: Callable[[list[str]], Command],
) -> None:
    extension = ["--extension", str(EXAMPLES / f"{case}.py")]
    given = arguments(case, few_topics)
    run = ["simulate", *given, "--rounds", str(ROUNDS), "--threads", "1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*run, "--out", str(whole), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    killed(start_meerkat([*run, "--out", str(cut)]), cut / "rounds.log", records=3)
    assert main(["resume", str(cut), *extension, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["theta_digest"] == summary["theta_digest"]
    assert (cut / "rounds.log").read_bytes() == (whole / "rounds.log").read_bytes()
    assert main(["verify", str(whole), *extension, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["theta_digest"] == summary["theta_digest"]
    assert main(["report", str(whole), *extension]) == 0
    assert (whole / "report.html").stat().st_size > 10_000
    if case != "estimator":  # one in processes of their own, which load it anew, is enough
        monkeypatch.setattr(processes, "ProcessPoolExecutor", InThisProcess)
    compared = ["compare", *given, "--methods", "meerkat", "--seeds", "0,1", "--total-steps", "2", "--jobs", "1"]
    assert main([*compared, "--out", str(tmp_path / "compared")]) == 0
    assert main(["report", str(tmp_path / "compared"), *extension]) == 0


@pytest.mark.parametrize("case", CASES)
def test_the_examples_are_short(case: str) -> None:
    assert len((EXAMPLES / f"{case}.py").read_text().splitlines()) <= 60


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose folder names an estimator, an update rule and a partition that are not the package's."""
    run = tmp_path_factory.mktemp("extended") / "run"
    names = [part for case in ("estimator", "update_rule", "partition") for part in CASES[case][:2]]
    files = [
        part for case in ("estimator", "update_rule", "partition") for part in ("--extension", EXAMPLES / f"{case}.py")
    ]
    command = ["simulate", *SMALL, *names, "--lr", "0.05", "--rounds", "2", *files, "--out", run]
    assert main([str(part) for part in command]) == 0
    return run


@pytest.mark.parametrize("command", ["verify", "resume"])
def test_a_folder_that_names_an_extension_imports_nothing(
    command: str, extended: Path, tmp_path: Path, start_meerkat: Callable[..., Command]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(extended, run)
    (run / "summary.json").unlink()
    # what would be imported if a name in a folder were taken for a module's
    (tmp_path / "diagonal.py").write_text("raise SystemExit(99)")
    ran = start_meerkat([command, str(run)], modules=tmp_path)
    assert ran.wait() == 2
    error = ran.stderr.strip().splitlines()[-1]
    assert "damaged" not in error
    assert "not known here" in error or "must be one of" in error
    assert "--extension" in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ESTIMATORS = {'plain': None}", "'plain' of its ESTIMATORS is taken"),
        ("x = 1", "defines none of ESTIMATORS, UPDATE_RULES, PROBLEMS, PARTITIONERS"),
        ("import nowhere_to_be", "cannot be imported (ModuleNotFoundError"),
        ("raise ValueError('broken')", "cannot be imported (ValueError: broken)"),
        ("raise SystemExit(0)", "cannot be imported: it ends the program"),
        ("PROBLEMS = {'x': 5}", "'x' of its PROBLEMS is not what its name says"),
    ],
)
def test_an_extension_that_cannot_be_used_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "extension.py"
    file.write_text(content)
    known = {kind: set(values) for kind, values in extensions.KINDS.items()}
    with pytest.raises(MeerkatError) as error:
        extensions.load([str(file)])
    assert message in str(error.value)
    assert {kind: set(values) for kind, values in extensions.KINDS.items()} == known


def test_what_is_not_there_is_said_by_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--extension", str(tmp_path / "none.py")]) == 2
    assert "none.py': no such file" in capsys.readouterr().err
    assert main(["verify", str(tmp_path), "--extension", "no_such_module_of_mine"]) == 2
    assert "cannot be imported" in capsys.readouterr().err


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What a test loads is not known after it: a comparison's processes load all that is."""
    known, kinds = {**extensions._loaded}, {kind: {**values} for kind, values in extensions.KINDS.items()}
    yield
    for now, before in ((extensions._loaded, known), *((extensions.KINDS[kind], kinds[kind]) for kind in kinds)):
        now.clear()
        now.update(before)


@pytest.mark.usefixtures("forgotten")
def test_a_module_by_its_name_and_twice_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_partition_of_rows.py").write_text("PARTITIONERS = {'all-to-one': lambda *_: None}")
    monkeypatch.syspath_prepend(tmp_path)
    extensions.load(["my_partition_of_rows", "my_partition_of_rows"])
    extensions.load(["my_partition_of_rows"])
    assert "all-to-one" in extensions.KINDS["PARTITIONERS"]
    assert extensions.defined_by(["my_partition_of_rows"], "PARTITIONERS") == {"all-to-one"}
    assert extensions.defined_by(["my_partition_of_rows"], "ESTIMATORS") == frozenset()


@pytest.mark.usefixtures("forgotten")
def test_installed_packages_name_extensions_by_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "an_installed_extension.py").write_text("PARTITIONERS = {'by-entry-point': lambda *_: None}")
    metadata = tmp_path / "an_extension-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: an-extension\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[meerkat.extensions]\nmine = an_installed_extension\n")
    monkeypatch.syspath_prepend(tmp_path)
    extensions.load([], installed=False)
    assert "by-entry-point" not in extensions.KINDS["PARTITIONERS"]
    extensions.load([])
    assert "by-entry-point" in extensions.KINDS["PARTITIONERS"]


def test_names_that_nobody_defines_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, name in (("--estimator", "e"), ("--update-rule", "u"), ("--problem", "p"), ("--partition", "q")):
        given: list[Any] = ["simulate", flag, f"nowhere-{name}", "--rounds", "1", "--out", str(tmp_path / name)]
        assert main(given) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"nowhere-{name}" in error
        assert "--extension" in error
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize(("case", "setting"), [("estimator", "estimator"), ("update_rule", "update_rule")])
def test_a_site_takes_part_only_with_the_extensions_that_it_lists(case: str, setting: str, tmp_path: Path) -> None:
    """Loaded or not: what the process knows from elsewhere is not what the site's operator has agreed to."""
    extensions.load([str(EXAMPLES / f"{case}.py")])
    asked = resolve(make_config({setting: CASES[case][1], "eps": 1e-3}))
    lines = 'client = 0\ndata = "rows"\n'
    (tmp_path / "without.toml").write_text(lines)
    (tmp_path / "with.toml").write_text(f'{lines}[accepts]\nextensions = ["{EXAMPLES / f"{case}.py"}"]\n')
    with pytest.raises(Refused, match=rf"^{setting}: the run asks for {CASES[case][1]}, the site accepts"):
        SiteConfig.load(tmp_path / "without.toml").check_settings(asked, "topics")
    SiteConfig.load(tmp_path / "with.toml").check_settings(asked, "topics")
