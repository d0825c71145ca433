"""The order of the packages is the architecture: each imports only from those before it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import meerkat

SOURCE = Path(meerkat.__file__).parent

PACKAGES = (
    *("errors", "seeds", "progress", "masks", "privacy", "problems", "demo", "algorithm", "settings", "record", "run"),
    *("extensions", "comparison", "report", "export", "federation", "cli"),
)
STRANGERS = {"problems": {"masks", "privacy"}, "demo": {"masks", "privacy"}, "algorithm": {"problems", "demo"}}
"""Packages that do not know packages before them: what is learned, and how."""


def _package(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _files() -> list[Path]:
    return [
        path
        for path in sorted(SOURCE.rglob("*.py"))
        if path.parent != SOURCE or path.stem not in ("__init__", "__main__")
    ]


def _imported_packages(path: Path) -> set[str]:
    """Meerkat's packages that a file imports from, anywhere in it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module] if node.module != "meerkat" else [f"meerkat.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("meerkat.")} & {*PACKAGES}


def test_every_module_is_in_a_package() -> None:
    assert {_package(path) for path in _files()} == {*PACKAGES}


def test_at_most_twelve_modules_stand_outside_of_packages() -> None:
    assert len(list(SOURCE.glob("*.py"))) <= 12


def test_no_import_runs_back_up() -> None:
    up = [
        (str(path.relative_to(SOURCE)), package)
        for path in _files()
        for package in _imported_packages(path)
        if PACKAGES.index(package) > PACKAGES.index(_package(path)) or package in STRANGERS.get(_package(path), ())
    ]
    assert not up


def test_help_and_version_load_no_heavy_package() -> None:
    code = (
        "import sys, meerkat.cli; meerkat.cli.build_parser(); "
        "assert not {'torch', 'transformers', 'pandas', 'matplotlib', 'safetensors'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    code = (
        "import meerkat; names = {name: getattr(meerkat, name) for name in meerkat.__all__}; "
        "assert {*names} < {*dir(meerkat)}; from meerkat import *; assert names['SparseMask'] is SparseMask; "
        "assert meerkat.demo.MODEL.is_dir()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_core_loads_without_transformers() -> None:
    core = (
        "import sys, meerkat.algorithm.server, meerkat.algorithm.client, meerkat.run.local_engine; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", core], check=True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_waiting_threads_soon_give_their_core_away_unless_told_otherwise(given: dict[str, str], expected: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if "GOMP" not in name and "OMP" not in name}
    shown = subprocess.run(
        [sys.executable, "-c", "import meerkat, torch"],
        env={**inherited, "OMP_DISPLAY_ENV": "verbose", **given},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    if "GOMP_SPINCOUNT" not in shown:
        pytest.skip("torch's threads are not libgomp's here")
    assert f"GOMP_SPINCOUNT = '{expected}'" in shown
