"""requirements.lock: the federation's packages by hash, in the versions that constraints.txt pins."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BESIDE = re.compile(r"(cuda|nvidia)-.*|triton|setuptools|colorama|httpx2-jsfetch")
"""What torch brings with CUDA, what builds the package, and what other platforms need: not in constraints.txt."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def locked() -> dict[str, str]:
    """Package -> its entry."""
    text = "\n".join(line for line in (ROOT / "requirements.lock").read_text().splitlines() if line[:1] != "#")
    entries = re.split(r"\n(?=\S)", text)
    return {normal(entry.split("==")[0]): entry for entry in entries if entry.strip()}


@pytest.fixture(scope="module")
def pinned() -> dict[str, str]:
    """Package -> the version in constraints.txt."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def test_versions_are_those_of_the_constraints(locked: dict[str, str], pinned: dict[str, str]) -> None:
    versions = {name: re.split(r"[\s;]", entry.split("==")[1])[0] for name, entry in locked.items()}
    differing = {name: version for name, version in versions.items() if pinned.get(name, version) != version}
    assert not differing
    assert not [name for name in versions.keys() - pinned.keys() if not BESIDE.fullmatch(name)]


def test_every_package_has_its_hashes_and_comes_from_no_address(locked: dict[str, str]) -> None:
    assert not [name for name, entry in locked.items() if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry)]
    assert not re.search(r"://|--index|--find-links| @ ", "\n".join(locked.values()))


def test_all_that_a_federation_needs_is_in_it(locked: dict[str, str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["flower"], *extras["privacy"]]
    assert {normal(re.split(r"[<>=!~\[; ]", each)[0]) for each in wanted} <= locked.keys()


def test_the_image_installs_by_hash() -> None:
    image = (ROOT / "examples" / "federation" / "docker" / "Dockerfile").read_text()
    assert "--require-hashes -r /usr/src/meerkat/requirements.lock" in image
    for line in (line for line in image.splitlines() if "pip install" in line):
        assert "--require-hashes" in line or "--no-deps --no-build-isolation" in line
