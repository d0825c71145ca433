"""DeComFL's or HiSo's own program on a model folder and rows of SST-2, judged as Meerkat's runs are.

    python benchmarks/peers/decomfl.py CHECKOUT --model DIR --data DIR --lr 1e-5 [--hiso] [--held-back 0.1]

CHECKOUT is a clone of DeComFL, which has HiSo too. README.md beside this file says what of it is changed. Prints a line
of JSON.
"""

import argparse
import random
import sys
import time
import types
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import judge
import torch

NAME = "smollm3-3b"
"""A model that DeComFL knows by name, in whose place ours is loaded."""


def main() -> None:
    """Run it once."""
    parser = judge.parser(__doc__)
    parser.add_argument(
        "--hiso", action="store_true", help="HiSo's directions and steps: --estimator-type adam_forward"
    )
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--alpha", type=float, default=0.5, help="of the Dirichlet split")
    parser.add_argument("--iid", action="store_true", help="no Dirichlet split")
    given = parser.parse_args()
    judged = judge.Judge(given)
    server = _server(given, judged.training)
    began = time.perf_counter()
    with torch.no_grad():
        for round_ in range(given.rounds):
            server.train_one_step(round_)
    seconds = time.perf_counter() - began
    judged.problem.model.load_state_dict(server.server_model.state_dict())
    print(
        judged.line(
            "HiSo" if given.hiso else "DeComFL",
            **{name: getattr(given, name) for name in ("clients", "batch_size", "rounds")},
            partition="iid" if given.iid else f"dirichlet:{given.alpha:g}",
            seconds=seconds,
            rows_forwarded=2 * given.rounds * given.clients * given.batch_size,
        )
    )


def _server(given: argparse.Namespace, training: Sequence[Any]) -> Any:
    """DeComFL's server and clients, by its own functions and flags."""
    # DeComFL reads its settings from the command line, and imports torchvision for pictures alone
    sys.argv = ["decomfl_main.py", "--large-model", NAME, "--dataset", "sst2", "--no-cuda", "--no-mps"]
    sys.argv += ["--train-batch-size", str(given.batch_size), "--num-clients", str(given.clients), "--no-optim"]
    sys.argv += ["--num-sample-clients", str(given.clients), "--lr", str(given.lr), "--mu", str(given.mu)]
    sys.argv += ["--seed", str(given.seed + 1)]
    sys.argv += ["--estimator-type", "adam_forward"] if given.hiso else []
    sys.argv += ["--iid"] if given.iid else ["--no-iid", "--dirichlet-alpha", str(given.alpha)]
    sys.path.insert(0, str(given.checkout))
    import_module("datasets")  # before torchvision, which it would take for the real one
    pictures: Any = types.ModuleType("torchvision")
    pictures.transforms = types.ModuleType("torchvision.transforms")
    sys.modules |= {"torchvision": pictures, "torchvision.transforms": pictures.transforms}
    import decomfl_main
    from cezo_fl.util import language_utils
    from experiment_helper import data

    language_utils.SUPPORTED_LLM[NAME] = given.model
    language_utils.SST2Template.verbalizer = {0: " terrible", 1: " great"}
    # it shuffles what it evaluates on, and evaluates on none of it here
    data.huggingface_load_dataset = lambda *_: {"train": training, "validation": training[:8]}
    random.seed(given.seed)
    torch.manual_seed(given.seed)
    settings = decomfl_main.CliSetting()
    loaders, _ = data.get_dataloaders(settings.data_setting, given.clients, settings.seed, given.model)
    devices = decomfl_main.use_device(settings.device_setting, given.clients)
    return decomfl_main.setup_server_and_clients(settings, devices, loaders)


if __name__ == "__main__":
    main()
