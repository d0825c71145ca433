"""Meerkat as a library: any torch model and loss, here three sites with one class each and a small classifier."""

import torch
from torch import nn

import meerkat
from meerkat.problems.module import ModuleProblem, Score, Tensors, right
from meerkat.problems.partition import ClientRows, partition
from meerkat.problems.problem import client_losses

torch.manual_seed(0)
CLASSES, FEATURES = 3, 16
centres, drift = torch.randn(CLASSES, FEATURES), 1.5 * torch.randn(FEATURES)


def rows_of_each_class(count: int, shift: float) -> Tensors:
    """`count` rows of each class, all moved by a shift of the same direction."""
    targets = torch.arange(CLASSES).repeat(count)
    return Tensors(centres[targets] + shift * drift + torch.randn(len(targets), FEATURES), targets)


loss = nn.CrossEntropyLoss(reduction="none")  # a loss a row

# a model, pre-trained by backpropagation on public data
public = rows_of_each_class(3200, shift=0.0)
model = nn.Sequential(nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, CLASSES))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for inputs, targets in zip(*(tensor.split(32) for tensor in public), strict=True):
    loss(model(inputs), targets).mean().backward()
    optimizer.step()
    optimizer.zero_grad()

# what is learned: the same classes where all has moved; the mask is made from the public data
problem = ModuleProblem(
    model,
    loss,
    train=rows_of_each_class(400, shift=1.0),
    validation=rows_of_each_class(200, shift=1.0),
    labels=("red", "green", "blue"),
    row_scores={"accuracy": Score(right, "higher")},
    public_data=Tensors(*(tensor[:300] for tensor in public)),
)
known, judged = problem.public(), problem.batch(problem.prepare(problem.rows("validation")))
mask = meerkat.sensitivity_mask(model, known.examples, known.loss, density=0.05)
masked, directions = meerkat.MaskedModel(model, mask), meerkat.Directions(key=7, count=len(mask))

# the federation: every round each site makes one step on a batch of its own and sends four bytes
rows = problem.rows("train")
sites = [ClientRows(k, of_site, 16, seed=0) for k, of_site in enumerate(partition("single-label", rows, 3, 0).rows)]
losses_of = client_losses(problem, problem.prepare(rows))
engine = meerkat.LocalEngine(masked, directions, lambda site, step: sites[site].batch(step), losses_of)
config = meerkat.ServerConfig(400, 1, 1, 0.1, 1e-3, len(sites), len(sites), {site.client: 400 for site in sites})
state, before = meerkat.ServerState(meerkat.Replica(0, masked.read())), problem.evaluate(judged).scores["accuracy"]
for _ in range(config.rounds):
    plan = meerkat.open_round(state, config)
    state, _ = meerkat.close_round(state, plan, engine.run(state, plan), config, directions, mask.pretraining_gradient)
masked.write_(state.theta)
after = problem.evaluate(judged).scores["accuracy"]
print(f"{len(mask)} of {mask.total} parameters moved: accuracy {before:.3f} before, {after:.3f} after")
