import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHARED

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("step_cost", ["--repeats", "2"]),
        ("client_batching", ["--repeats", "2"]),
        ("memory", []),
        ("gradip", ["--repeats", "1"]),
    ],
)
def test_every_benchmark_gives_its_headline(name: str, options: list[str]) -> None:
    if name == "client_batching" and not SHARED.is_dir():
        pytest.skip("the real model and data are not beside this checkout")
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--json", *options]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["name"] == name
    assert found["ratio"] > 0
    assert found["measured_on"]
