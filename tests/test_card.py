"""The model card: what it says is what the run's folder says, it parses, and the code in it runs."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import Federation, Setting
from huggingface_hub import ModelCard
from torch import nn

import meerkat
from meerkat import demo
from meerkat.algorithm.directions import run_key
from meerkat.cli import main
from meerkat.export import model as export_model
from meerkat.export.model_card import CARD_FILE, model_card
from meerkat.masks.sparse_mask import SparseMask, fingerprint
from meerkat.privacy.mechanism import Guarantee
from meerkat.problems.classification import Classification
from meerkat.problems.tasks import TASKS, Task
from meerkat.record import verification
from meerkat.record.run_folder import RunFolder
from meerkat.run.evaluate import load_run

VP = (
    *("--method", "meerkat-vp", "--local-steps", "2", "--partition", "mixed:1", "--lr", "0.05"),
    *("--calibration-steps", "8", "--initial-steps", "2", "--later-steps", "2"),
    *("--vpcs-rule", "thresholds", "--rho-later", "6", "--rho-quie", "0"),
)
"""So few steps flag by chance, and these thresholds flag some."""


@pytest.fixture(scope="module")
def run(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Meerkat-vp, calibrated."""
    out = tmp_path_factory.mktemp("card") / "run"
    data = ("--model", str(federation / "model"), "--task", "sst2", "--data", str(federation / "data"))
    small = ("--density", "0.01", "--clients", "3", "--rounds", "6", "--batch-size", "4", "--threads", "1")
    text = ("--text", str(federation / "text.jsonl"), "--eval-every", "2")
    assert main(["simulate", *data, *text, *small, *VP, "--out", str(out)]) == 0
    return out


SST2 = Classification(nn.Module(), task=TASKS["sst2"])


def exported(run: Path, to: Path, *form: str) -> str:
    assert main(["export", str(run), "--to", str(to), *form]) == 0
    return (to / "README.md").read_text(encoding="utf-8")


def facts(text: str, section: str) -> dict[str, str]:
    """A section's two-column table."""
    part = text.split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("|").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return {row[0].strip(): row[1].strip() for row in rows if len(row) == 2 and row[0].strip(" -")}


def test_what_the_card_says_is_what_the_run_s_folder_says(run: Path, tmp_path: Path) -> None:
    text = exported(run, tmp_path / "merged")
    summary = json.loads((run / "summary.json").read_text())
    mask = SparseMask.load(run / "mask.safetensors")
    log = (run / "rounds.log").read_text().splitlines()
    opening, calibration = json.loads(log[0][65:]), json.loads(log[1][65:])
    assert calibration["kind"] == "calibration"
    assert 0 < len(calibration["early_stopped"]) < 3, "a run that stops nobody, or all, proves little"

    digests = facts(text, "Digests, and how to verify them")
    assert digests["theta, the moving entries' values"] == f"`{summary['theta_digest']}`"
    assert digests["theta_0, their base values"] == f"`{opening['theta']}`"
    assert digests["config.toml"] == f"`{hashlib.sha256((run / 'config.toml').read_bytes()).hexdigest()}`"
    assert digests["rounds.log, last hash of its chain"] == f"`{log[-1][:64]}`"
    assert digests["mask"] == f"`{mask.digest()}`"

    told = facts(text, "The mask")
    assert told["entries"] == f"{len(mask):,} of {mask.total:,} parameters"
    assert told["density"] == "0.01"
    assert told["SHA-256"] == f"`{mask.digest()}`"
    assert told["never moved"] == "`embeddings`"
    assert told["pre-training text"] == "`text.jsonl`"

    tuned = facts(text, "How it was tuned")
    assert tuned["base model"] == f"`model`, fingerprint `{mask.fingerprint}`"
    assert tuned["rounds"] == "6"
    assert tuned["local steps"] == "T = 2, P = 1 direction a step, batches of 4"
    assert (tuned["learning rate"], tuned["perturbation"]) == ("0.05, linear", "0.001")
    assert tuned["clients"] == "3, 3 asked each round"
    assert "Philox4x64-10" in tuned["directions"]

    data = facts(text, "Data")
    counts = opening["examples"]
    assert data["training rows"] == f"{sum(counts)}: " + ", ".join(f"client {k} {n}" for k, n in enumerate(counts))
    assert data["split"] == "`mixed:1`, clients simulated on one machine"
    assert data["source"] == "`data`, a local folder; its origin is not known"
    assert data["SHA-256 of the rows and their split"] == f"`{opening['data']}`"

    clients = facts(text, "Clients")
    stopped = calibration["early_stopped"]
    assert clients["stopped early"] == f"client{'s' * (len(stopped) > 1)} {', '.join(map(str, stopped))}"
    assert clients["flagged as extremely skewed"] == clients["stopped early"]
    assert clients["removed by the coordinator"] == clients["in no round"] == "none"
    assert clients["replies"] == "18 of the 18 that rounds asked for"

    assert "No differential privacy" in text
    before, after = (f"{summary[name]:.3f} | {summary[loss]:.3f}" for name, loss in _JUDGED)
    assert f"| 0 | {before} |\n| 6 | {after} |" in text
    assert "On the validation rows" in text


_JUDGED = (("accuracy_before", "loss_before"), ("accuracy", "loss"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"quantize": "nf4"}, "with weights quantised to nf4; the model here may score otherwise."),
        ({"dtype": "bfloat16"}, "with weights multiplied in bfloat16; the model here may score otherwise."),
        ({"quantize": "int8", "dtype": "bfloat16"}, "with weights quantised to int8 and multiplied in bfloat16; the"),
    ],
)
def test_the_card_says_which_model_was_evaluated(run: Path, given: dict[str, str], said: str) -> None:
    replayed = verification.verify(run)
    assert "Measured in the run" not in model_card(RunFolder(run), replayed, SST2, "model")
    config = replayed.config.model_copy(update=given)
    text = model_card(RunFolder(run), replace(replayed, config=config), SST2, "model")
    assert f"round 0 is the base model. Measured in the run, {said}" in text


def test_the_card_tells_neither_the_run_s_key_nor_where_data_lie(run: Path, tmp_path: Path) -> None:
    text = exported(run, tmp_path / "merged")
    config = RunFolder(run).config()
    assert f"{run_key(config.seed):x}" not in text
    assert config.data not in text
    assert config.model not in text


def test_the_front_matter_parses(run: Path, tmp_path: Path) -> None:
    front_matter = ModelCard(exported(run, tmp_path / "merged"), ignore_metadata_errors=False).data.to_dict()
    assert front_matter["library_name"] == "transformers"
    assert front_matter["metrics"] == ["accuracy"]
    assert {"meerkat", "federated-learning", "method:meerkat-vp"} <= {*front_matter["tags"]}
    assert not front_matter.keys() & {"base_model", "datasets", "license"}, "paths are no names of the hub"


def test_names_of_the_hub_stand_in_the_front_matter(run: Path) -> None:
    replayed = verification.verify(run)
    config = replayed.config.model_copy(update={"model": "meta-llama/Llama-3.2-1B", "data": "aps/super_glue:boolq"})
    text = model_card(RunFolder(run), replace(replayed, config=config), SST2, "delta")
    front_matter = ModelCard(text).data.to_dict()
    assert front_matter["base_model"] == "meta-llama/Llama-3.2-1B"
    assert front_matter["datasets"] == ["aps/super_glue"]
    assert front_matter["library_name"] == "meerkat"
    assert 'base = "meta-llama/Llama-3.2-1B"\n' in text
    assert facts(text, "Data")["source"] == "`aps/super_glue:boolq`, a hub data set"


def loaded_by_the_card(folder: Path, text: str, alone: bool = False) -> dict[str, Any]:
    """What the card's own code makes of a folder, for who stands in it; `alone`: in a process of its own."""
    code = text.split("```python\n", 1)[1].split("\n```", 1)[0]
    code += """
import json, torch
from meerkat.masks.sparse_mask import fingerprint
logits = model(torch.arange(5, 25)[None]).logits
told = json.dumps([fingerprint(model), logits[0, -1].tolist(), tokenizer("it was great")["input_ids"][0]])
"""
    if alone:
        environment = {**os.environ, "PYTHONPATH": str(Path(meerkat.__file__).parents[1])}
        command = [sys.executable, "-W", "ignore", "-c", f"{code}print(told)"]
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        said = ran.stdout.splitlines()[-1]
    else:
        scope: dict[str, Any] = {}
        with contextlib.chdir(folder), warnings.catch_warnings(action="ignore"):
            exec(code, scope)
        said = scope["told"]
    digest, logits, first = json.loads(said)
    return {"fingerprint": digest, "logits": torch.tensor(logits), "first": first}


def logits_of(run: Path) -> torch.Tensor:
    _, problem = load_run(run)
    with torch.no_grad():
        logits: torch.Tensor = problem.model(torch.arange(5, 25)[None]).logits
    return logits[0, -1]


@pytest.mark.parametrize("form", ["merged", "delta"])
def test_the_card_s_code_loads_the_run_s_model(run: Path, tmp_path: Path, form: str) -> None:
    text = exported(run, tmp_path / form, "--form", form)
    loaded = loaded_by_the_card(tmp_path / form, text)
    torch.testing.assert_close(loaded["logits"], logits_of(run), rtol=0, atol=1e-6)
    said = facts(text, "Digests, and how to verify them")["fingerprint of the tuned model"]
    assert said == f"`{loaded['fingerprint']}`"
    assert loaded["first"] == 0


@pytest.mark.parametrize(("form", "library"), [("merged", "transformers"), ("delta", "peft")])
def test_a_lora_run_s_card(simulate_arguments: list[str], tmp_path: Path, form: str, library: str) -> None:
    run = tmp_path / "run"
    assert main([*simulate_arguments, "--method", "lora-fedzo", "--lr", "1", "--out", str(run)]) == 0
    text = exported(run, tmp_path / form, "--form", form)
    loaded = loaded_by_the_card(tmp_path / form, text)
    torch.testing.assert_close(loaded["logits"], logits_of(run), rtol=1e-4, atol=1e-4)
    assert ModelCard(text).data.library_name == library
    assert "by zeroth-order federated fine-tuning of LoRA adapters with" in text
    assert facts(text, "The mask")["never moved"] == "`everything but the adapters`"
    assert ("fingerprint of the tuned model" in text) == (form == "merged")


@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("fo-fedavg", "federated fine-tuning by backpropagation"),
        ("full-fedzo", "zeroth-order federated fine-tuning"),
        ("random-mask", "sparse zeroth-order federated fine-tuning"),
    ],
)
def test_the_card_says_how_a_method_tunes(simulate_arguments: list[str], tmp_path: Path, method: str, way: str) -> None:
    run = tmp_path / "run"
    assert main([*simulate_arguments, "--method", method, "--rounds", "1", "--out", str(run)]) == 0
    text = exported(run, tmp_path / "delta", "--form", "delta")
    assert f"tuned for the task `sst2` by {way} with" in text.replace("\n", " ")
    of_scalars = method != "fo-fedavg"
    assert ("perturbation" in facts(text, "How it was tuned")) == of_scalars
    assert ("zeroth-order-optimization" in (ModelCard(text).data.tags or [])) == of_scalars


def test_the_embedded_model_s_card_loads_it_by_its_name(tmp_path: Path) -> None:
    arguments = ["simulate", "--rounds", "1", "--clients", "2", "--text-sequences", "4", "--threads", "1"]
    assert main([*arguments, "--eval-every", "0", "--out", str(tmp_path / "run")]) == 0
    text = exported(tmp_path / "run", tmp_path / "delta", "--form", "delta")
    assert loaded_by_the_card(tmp_path / "delta", text, alone=True)["logits"].isfinite().all()
    assert str(demo.HERE) not in text
    assert facts(text, "Data")["source"] == "Meerkat's embedded data `topics`"


def test_a_run_without_metrics_or_end_says_what_is_not_known(run: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    for name in ("config.toml", "mask.safetensors"):
        (half / name).write_bytes((run / name).read_bytes())
    lines = (run / "rounds.log").read_bytes().splitlines(keepends=True)
    (half / "rounds.log").write_bytes(b"".join(lines[:4]))  # opening, calibration, two rounds
    text = exported(half, tmp_path / "delta", "--form", "delta")
    assert "Not known: the run's folder has no evaluation." in text
    assert facts(text, "How it was tuned")["rounds"] == "2 of 6: the run is not finished"
    assert facts(text, "Clients")["replies"] == "6 of the 6 that rounds asked for"
    (half / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    text = exported(half, tmp_path / "again", "--form", "delta")
    assert "| 2 | " in text
    assert "| 4 | " not in text, "an evaluation of rounds that the log does not hold"


def test_a_federation_s_card_tells_who_joined_and_that_rows_stayed(
    federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting.make(federation, tmp_path / "sites", rounds=2)
    lived = Federation.of(setting, monkeypatch, join=2)
    lived.lived(tmp_path / "run")
    events = [{"event": "shown out", "client": 1}, {"event": "left", "client": 0}]
    (tmp_path / "run" / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events) + '{"event": "sho')
    text = exported(tmp_path / "run", tmp_path / "delta", "--form", "delta")
    data = facts(text, "Data")
    assert data["training rows"] == f"32: client 0 {setting.sizes[0]}, client 1 {setting.sizes[1]}"
    assert "never left the sites" in data["source"]
    assert data["split"] == f"each site of federation `{setting.opening.federation}` holds its own"
    assert data["SHA-256 of the rows and their split"] == "not known"
    clients = facts(text, "Clients")
    assert clients["removed by the coordinator"] == "client 1"
    assert clients["in no round"] == "none", "client 2 never joined"
    assert clients["flagged as extremely skewed"] == "not known: there was no calibration"
    assert "On the coordinator's own validation rows" in text


def test_many_clients_are_counted_not_listed(run: Path) -> None:
    many = replace(verification.verify(run), examples={k: 10 + k for k in range(50)})
    assert facts(model_card(RunFolder(run), many, SST2, "model"), "Data")["training rows"] == (
        "1,725: 10 to 59 at each of 50 clients"
    )


def test_a_guarantee_is_told_with_all_it_rests_on(run: Path) -> None:
    told = {"epsilon": 3.5, "otherwise": 7.25, "delta": 1e-5, "clip": 2.0, "noise_multiplier": 0.7}
    promised = replace(verification.verify(run), guarantee=Guarantee("client", "add-or-remove", **told))
    text = model_card(RunFolder(run), promised, SST2, "model")
    assert "No differential privacy" not in text
    assert facts(text, "Privacy") == {
        "differential privacy": "epsilon 3.5 at delta 1e-05, one client added or removed; 7.25 where one is replaced",
        "mechanism": "clip 2, noise multiplier 0.7",
    }


def test_of_a_federation_with_noisy_replies_the_log_s_hash_is_told(run: Path) -> None:
    """Nothing in its log is a function of rows but through the noise."""
    told = {"epsilon": 3.5, "otherwise": 7.25, "delta": 1e-5, "clip": 2.0, "noise_multiplier": 0.7}
    plain = verification.verify(run)
    private = replace(plain, guarantee=Guarantee("example", "add-or-remove", **told))
    apart = replace(private, opening=replace(plain.opening, data="", federation="0" * 16))
    for each, is_told in ((plain, True), (private, False), (apart, True)):
        assert (plain.log_hash in model_card(RunFolder(run), each, SST2, "model")) == is_told


def test_words_of_files_stay_in_their_place(run: Path) -> None:
    task = Task("a|b`c\n## Privacy", "{x}\n```\n# no\n{label}", ("`", "```\n"))
    text = model_card(RunFolder(run), verification.verify(run), task, "model")
    assert text.count("\n## Privacy") == 1
    assert facts(text, "Data")["task"] == "`a¦b'c ## Privacy`"
    assert text.count("\n```") == 2, "the code's own fence alone"


def test_an_export_that_fails_at_its_card_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_model, "model_card", full)
    assert main(["export", str(run), "--to", str(tmp_path / "merged")]) == 1
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_is_the_tuned_model_s_not_the_base_s(run: Path, tmp_path: Path) -> None:
    text = exported(run, tmp_path / "delta", "--form", "delta")
    _, problem = load_run(run)
    said = facts(text, "Digests, and how to verify them")["fingerprint of the tuned model"]
    assert said == f"`{fingerprint(problem.model)}`" != f"`{verification.verify(run).mask.fingerprint}`"
    assert CARD_FILE == "README.md"
