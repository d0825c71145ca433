"""An extension's problems: a small network on made-up pictures, and one that predicts numbers."""

import torch
from torch import Tensor, nn

from meerkat.problems.module import ModuleProblem, Score, Tensors, right
from meerkat.settings.config import RunConfig

SHAPES = ("upright", "level", "dot")
SIZE = 8


def pictures(seed: int, each: int) -> Tensors:
    """Noisy bars and dots: inputs float32 [3 each, 1, 8, 8], targets int64 [3 each]."""
    generator = torch.Generator().manual_seed(seed)
    inputs = 0.5 * torch.randn(3 * each, 1, SIZE, SIZE, generator=generator)
    targets = torch.arange(3).repeat(each)
    places = torch.randint(0, SIZE, (3 * each, 2), generator=generator)
    for picture, target, (row, column) in zip(inputs, targets.tolist(), places.tolist(), strict=True):
        if target == 0:
            picture[0, :, column] += 1.5
        elif target == 1:
            picture[0, row] += 1.5
        else:
            picture[0, row, column] += 4
    return Tensors(inputs, targets)


def shapes(config: RunConfig) -> ModuleProblem:
    """Which of three shapes is on a picture."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.AdaptiveMaxPool2d(2), nn.Flatten())
        model.append(nn.Linear(32, len(SHAPES)))
    return ModuleProblem(
        model.to(config.device),
        nn.CrossEntropyLoss(reduction="none"),
        train=pictures(1, 40),
        validation=pictures(2, 20),
        labels=SHAPES,
        row_scores={"accuracy": Score(right)},
        public_data=pictures(3, 10),
        name="shapes",
    )


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """A number's squared error, [rows]."""
    return (outputs[:, 0] - targets) ** 2


def absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """A number's absolute error, [rows]."""
    return (outputs[:, 0] - targets).abs()


def numbers(config: RunConfig) -> ModuleProblem:
    """A sum of inputs: rows without labels, nothing public, and a score of which less is better."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(120, 4, generator=generator)
    both = [Tensors(part, part.sum(1)) for part in inputs.split((80, 40))]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
    scores = {"absolute error": Score(absolute_error, "lower")}
    return ModuleProblem(model.to(config.device), squared_error, *both, row_scores=scores, name="numbers")


PROBLEMS = {"shapes": shapes, "numbers": numbers}
