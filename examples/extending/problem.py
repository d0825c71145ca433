"""A problem: a small vision network that learns which way generated stripes run.

    meerkat simulate --extension examples/extending/problem.py --problem stripes --density 0.1 --lr 0.1

The network is pre-trained on sharp stripes, which are public; the clients' are noisy. The mask comes from the former.
"""

import torch
from torch import nn

from meerkat.problems.module import ModuleProblem, Score, Tensors, right
from meerkat.settings.config import RunConfig

DIRECTIONS = ("level", "upright", "rising", "falling")
SIZE = 12


def stripes(count: int, noise: float, seed: int) -> Tensors:
    """Images, float32 [count, 1, 12, 12], and the direction of their stripes, int64 [count]."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % len(DIRECTIONS)
    across = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7], [0.7, -0.7]])[targets]
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    phase = 6.3 * torch.rand(count, 1, 1, generator=generator)
    waves = torch.sin(1.6 * (across[:, 0, None, None] * y + across[:, 1, None, None] * x) + phase)
    images = waves + noise * torch.randn(count, SIZE, SIZE, generator=generator)
    return Tensors(images[:, None], targets)


def pretrained(public: Tensors) -> nn.Module:
    """A convolutional network, briefly pre-trained by backpropagation; the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 8, 5), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(32, len(DIRECTIONS))
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for inputs, targets in zip(*(tensor.split(16) for tensor in public), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model


def problem(settings: RunConfig) -> ModuleProblem:
    """The problem, on the run's device."""
    public = stripes(320, noise=0.2, seed=0)
    return ModuleProblem(
        pretrained(public).to(settings.device),
        nn.CrossEntropyLoss(reduction="none"),
        train=stripes(400, noise=1.0, seed=1),
        validation=stripes(200, noise=1.0, seed=2),
        labels=DIRECTIONS,
        row_scores={"accuracy": Score(right)},
        public_data=Tensors(*(tensor[:128] for tensor in public)),
    )


PROBLEMS = {"stripes": problem}
