"""docs/security.md names a test for each claim: they exist."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = (HERE.parent / "docs" / "security.md").read_text()


def named() -> list[tuple[str, str]]:
    """Each file that is named, and the test in it; empty for the whole file. A test alone is of the file before."""
    tests, file = [], ""
    for match in re.finditer(r"`(?:(test_\w+\.py))?(?:::(test_\w+))?`", PAGE):
        file = match[1] or file
        tests.append((file, match[2] or ""))
    return tests


def test_the_page_names_tests() -> None:
    assert len(named()) > 40


@pytest.mark.parametrize(("file", "test"), named())
def test_a_claim_s_test_exists(file: str, test: str) -> None:
    text = (HERE / file).read_text()
    assert not test or re.search(rf"^def {test}\(", text, re.MULTILINE)
