"""MeZO's own steps on a model folder and rows of SST-2, judged as Meerkat's runs are.

    python benchmarks/peers/mezo.py CHECKOUT --model DIR --data DIR --lr 1e-5 [--held-back 0.1]

CHECKOUT is a clone of MeZO. README.md beside this file says what of it is used. Prints a line of JSON.
"""

import argparse
import ast
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import judge
import numpy as np
import torch
import transformers

STEPS = ("zo_perturb_parameters", "zo_forward", "zo_step", "zo_update")
"""MeZO's methods of its trainer, which otherwise is a copy of an old version of transformers' one."""


def main() -> None:
    """Run it once."""
    parser = judge.parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=120)
    given = parser.parse_args()
    judged = judge.Judge(given)
    transformers.set_seed(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(given, judged, folder)
        trainer.create_optimizer_and_scheduler(given.steps)
        began = time.perf_counter()
        for inputs in itertools.islice(_batches(trainer), given.steps):
            trainer.zo_step(trainer.model, inputs)
            trainer.zo_update(trainer.model)
        seconds = time.perf_counter() - began
    trainer.model.forward = trainer.model.original_forward
    print(
        judged.line(
            "MeZO",
            clients=1,
            batch_size=given.batch_size,
            rounds=given.steps,
            partition="one site",
            seconds=seconds,
            rows_forwarded=2 * given.steps * given.batch_size,
        )
    )


def _trainer(given: argparse.Namespace, judged: judge.Judge, folder: str) -> Any:
    """Transformers' trainer with MeZO's steps, and the rows, the template and the loss that MeZO gives it."""
    sys.path.insert(0, str(given.checkout / "large_models"))
    import tasks
    import utils

    problem: Any = judged.problem  # a classification
    model, tokenizer = problem.model, problem.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.add_bos_token = getattr(tokenizer, "add_bos_token", False)
    model.requires_grad_(True)
    model.original_forward = model.forward
    model.forward = utils.forward_wrap_with_option_len.__get__(model, type(model))
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        learning_rate=given.lr,
        lr_scheduler_type="constant",
        per_device_train_batch_size=given.batch_size,
        max_steps=given.steps,
        seed=given.seed,
        remove_unused_columns=False,
        report_to="none",
    )
    arguments.zo_eps, arguments.non_diff = given.mu, False
    made = type("OurTrainer", (transformers.Trainer,), _methods(given.checkout / "large_models" / "trainer.py"))
    return made(
        model=model,
        args=arguments,
        train_dataset=_encoded(tasks.SST2Dataset.__new__(tasks.SST2Dataset), judged.training, tokenizer, utils),
        data_collator=utils.DataCollatorWithPaddingAndNesting(tokenizer, pad_to_multiple_of=8),
    )


def _methods(file: Path) -> dict[str, Any]:
    """MeZO's steps, compiled from its file, most of which today's transformers cannot import."""
    trainer = next(node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef))
    steps: list[ast.stmt] = [node for node in trainer.body if isinstance(node, ast.FunctionDef) and node.name in STEPS]
    names: dict[str, Any] = {"torch": torch, "np": np}
    exec(compile(ast.Module(steps, []), str(file), "exec"), names)
    return {name: names[name] for name in STEPS}


def _encoded(task: Any, rows: Sequence[Any], tokenizer: Any, utils: Any) -> list[list[dict[str, Any]]]:
    """Rows as MeZO's run.py makes them with --train_as_classification: all candidates of each."""
    made = []
    for idx, row in enumerate(rows):
        sample = task.build_sample({**row, "idx": idx})
        tokens, lengths = utils.encode_prompt(task, task.get_template(), [], sample, tokenizer, max_length=2048)
        correct, count = sample.candidates.index(sample.correct_candidate), len(sample.candidates)
        made.append(
            [
                {"input_ids": ids, "labels": correct, "option_len": length, "num_options": count}
                for ids, length in zip(tokens, lengths, strict=True)
            ]
        )
    return made


def _batches(trainer: Any) -> Iterator[Any]:
    """The trainer's batches, epoch after epoch."""
    while True:
        yield from trainer.get_train_dataloader()


if __name__ == "__main__":
    main()
