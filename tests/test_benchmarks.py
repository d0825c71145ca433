import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHARED

from meerkat.cli import main

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("step_cost", ["--repeats", "2"]),
        ("client_batching", ["--repeats", "2"]),
        ("memory", []),
        ("mask_memory", ["--layers", "1", "--sequences", "1"]),
        ("gradip", ["--repeats", "1"]),
        ("selection", ["mixed:2/4/0/1", "iid/4/0/1", "--traces"]),
        ("mask_overlap", []),
        ("perturbed_entries", []),
        ("catch_up", ["--rounds", "2"]),
        ("protections", ["--repeats", "1"]),
        ("workers", ["--repeats", "1", "--", "--text-sequences", "2", "--batch-size", "2"]),
        ("same_bits", ["HEAD", "--only", "optimizer momentum"]),
        ("reconstruction", ["--candidates", "100", "--steps", "4", "--ratio", "0.03"]),
    ],
)
def test_every_benchmark_gives_its_headline(name: str, options: list[str], tmp_path: Path) -> None:
    if name == "client_batching" and not SHARED.is_dir():
        pytest.skip("the real model and data are not beside this checkout")
    if name == "selection":
        options = [*options, str(tmp_path)]
    if name == "mask_overlap":
        for seed in ("0", "1"):
            out = tmp_path / f"{seed}.safetensors"
            assert main(["mask", "--method", "random-mask", "--density", "0.1", "--seed", seed, "--out", str(out)]) == 0
            options = [*options, str(out)]
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--json", *options]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["name"] == name
    assert found["share_percent" if name == "protections" else "ratio"] > 0
    assert found["measured_on"]


ROUND_LATENCY = {"median_ms", "fsync_ms", "echo_ms", "bytes", "metrics_ms", "flower_messages_ms"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "headlines"),
    [
        ("round_latency", ["--rounds", "100", "--nodes", "2", "--message-rounds", "2"], ROUND_LATENCY),
        ("streams", ["--rounds", "50", "--sites", "8"], {"rounds_per_s", "replies_share"}),
        ("secure_aggregation", ["--clients", "3", "--steps", "1"], {"ratio"}),
    ],
)
def test_every_benchmark_of_the_network_gives_its_headlines(name: str, options: list[str], headlines: set[str]) -> None:
    pytest.importorskip("flwr")
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--json", *options]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["name"] == name
    assert found["measured_on"]
    assert all(found[headline] > 0 for headline in headlines)
    if name == "round_latency":
        assert 138 <= found["bytes"] <= 200  # a frame, its gRPC, HTTP/2 and TLS framing; and the goal
