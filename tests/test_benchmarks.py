import json
import math
import operator
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHARED

from meerkat import demo
from meerkat.algorithm.rounds import RoundRecord
from meerkat.cli import main
from meerkat.record.run_log import LogReader

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
        ("curvature", ["--rows", "40", "--rounds", "4", "--seeds", "1"]),
        ("catch_up", ["--rounds", "2"]),
        ("protections", ["--repeats", "1"]),
        ("workers", ["--repeats", "1", "--", "--text-sequences", "2", "--batch-size", "2"]),
        ("same_bits", ["HEAD", "--only", "optimizer momentum"]),
        ("peers", ["--repeats", "1", "--length", "8"]),
        ("reconstruction", ["--candidates", "100", "--steps", "4", "--ratio", "0.03"]),
    ],
)
def test_every_benchmark_gives_its_headline(name: str, options: list[str], tmp_path: Path) -> None:
    if name == "client_batching" and not SHARED.is_dir():
        pytest.skip("the real model and data are not beside this checkout")
    if name == "peers":
        pytest.importorskip("peft")
    if name == "selection":
        options = [*options, str(tmp_path)]
    if name == "mask_overlap":
        for seed in ("0", "1"):
            out = tmp_path / f"{seed}.safetensors"
            assert main(["mask", "--method", "random-mask", "--density", "0.1", "--seed", seed, "--out", str(out)]) == 0
            options = [*options, str(out)]
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--json", *options]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert result["name"] == name
    assert result["share_percent" if name == "protections" else "ratio"] > 0
    assert result["measured_on"]


@pytest.mark.slow
def test_drift_is_that_of_the_scalars_where_rounds_have_one_step(tmp_path: Path) -> None:
    """All clients move along one z then, each by its scalar."""
    run = tmp_path / "run"
    of_a_run = ["--rounds", "1", "--local-steps", "1", "--clients", "3", "--text-sequences", "8", "--gradip", "off"]
    assert main(["simulate", *of_a_run, "--lr", "0.1", "--eps", "1e-3", "--out", str(run)]) == 0
    (values,) = (one for one in LogReader(run / "rounds.log") if one["kind"] == "round")
    record = RoundRecord.from_json(values)
    p = list(record.weights.values())
    g = [float(scalars[0, 0]) for scalars in record.scalars.values()]
    mean = sum(map(operator.mul, p, g))
    expected = math.sqrt(sum(share * (one - mean) ** 2 for share, one in zip(p, g, strict=True))) / abs(mean)
    command = [sys.executable, str(BENCHMARKS / "drift.py"), "--json", str(run)]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert result["runs"]["run"] == [pytest.approx(expected), 1]
    assert result["ratio"] == result["runs"]["run"][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "is no run folder; give folders with a rounds.log"),
        (["--method", "fo-fedavg"], "its log has no client's scalars; give a run whose clients send them openly"),
        (["--estimator", "one-sided"], "has the estimator one-sided; drift can be rebuilt for plain alone"),
    ],
)
def test_what_drift_cannot_rebuild_is_refused_in_one_line(flags: list[str], said: str, tmp_path: Path) -> None:
    run, extension = tmp_path / "run", BENCHMARKS.parent / "examples" / "extending" / "estimator.py"
    if flags:
        small = ["--rounds", "1", "--clients", "3", "--text-sequences", "8", "--gradip", "off", "--lr", "0.1"]
        assert main(["simulate", *small, "--extension", str(extension), *flags, "--out", str(run)]) == 0
    command = [sys.executable, str(BENCHMARKS / "drift.py"), str(run)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line == f"drift: '{run}': {said}" + ", as meerkat simulate makes them" * (not flags)


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
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert result["name"] == name
    assert result["measured_on"]
    assert all(result[headline] > 0 for headline in headlines)
    if name == "round_latency":
        assert 138 <= result["bytes"] <= 200  # a frame, its gRPC, HTTP/2 and TLS framing; and the goal


@pytest.mark.slow
def test_what_is_measured_of_a_gpu_is_measured_of_a_cpu_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    rows = {"sst2": {"sentence": "a film"}, "boolq": {"passage": "It is.", "question": "is it"}}
    for task, row in rows.items():
        (tmp_path / task).mkdir()
        for split in ("train", "validation"):
            lines = [json.dumps({**row, "label": number % 2}) for number in range(40)]
            (tmp_path / task / f"{split}.jsonl").write_text("\n".join(lines))
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(out), "--device", "cpu", "--shapes", "tiny"]
    command += ["--model", str(demo.MODEL), "--data", str(tmp_path), "--text", str(demo.TEXT), "--rounds", "10"]
    command += ["--minutes", "60"]
    results = []
    for methods in ("meerkat", "meerkat,random-mask"):
        subprocess.run([*command, "--methods", methods], capture_output=True, check=True)
        results.append(json.loads(out.read_text()))
    assert all(results[0]["bits"].values())
    assert results[0]["shapes"]["tiny"]["backpropagation"]["ratio"] > 0
    reached = [{(line["task"], line["local_steps"]): line for line in each["accuracy"]} for each in results]
    assert reached[0].keys() == {(task, steps) for task in rows for steps in (1, 10)}
    assert len(results[1]["accuracy"]) == 8
    for line in results[0]["accuracy"]:
        again = next(each for each in results[1]["accuracy"] if each | {"seconds": 0} == line | {"seconds": 0})
        assert again["rates"]


@pytest.mark.slow
def test_the_table_of_all_benchmarks_has_figures_and_says_what_could_not_run(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "all.py"), "--out", str(tmp_path), "--turns", "1"]
    command += ["--only", "catch_up,client_batching", "--model", "/nowhere", "--task", "sst2", "--data", "/nowhere"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == (tmp_path / "bench.md").read_text()
    assert "| 100 missed rounds over theta, n = 1,240,000: bytes | " in printed
    assert "| not run: " in printed
    told = json.loads((tmp_path / "bench.json").read_text())["programs"]
    assert told["catch_up"][0]["ratio"] > 0
    assert "/nowhere" in told["client_batching"][0]
