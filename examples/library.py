"""Meerkat as a library: any torch model and loss, here three sites with one class each and a small classifier."""

import numpy as np
import torch
from torch import Tensor, nn

import meerkat

torch.manual_seed(0)
CLASSES, FEATURES, BATCH = 3, 16, 16
centres, drift = torch.randn(CLASSES, FEATURES), 1.5 * torch.randn(FEATURES)


def rows_of(label: int, count: int, shift: float = 0.0) -> Tensor:
    """Rows of one class, float32 [count, FEATURES]."""
    return centres[label] + shift * drift + torch.randn(count, FEATURES)


def loss_of(rows: Tensor, label: int) -> Tensor:
    """The loss of rows of one class: float32 []."""
    return nn.functional.cross_entropy(model(rows), torch.full((len(rows),), label))


def accuracy() -> float:
    """On rows that no site trains on."""
    return float(np.mean([(model(test[k]).argmax(1) == k).float().mean().item() for k in range(CLASSES)]))


# a model, pre-trained by backpropagation on data of its own
model = nn.Sequential(nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, CLASSES))
corpus = [(rows_of(k % CLASSES, 32), k % CLASSES) for k in range(300)]
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for rows, label in corpus:
    loss_of(rows, label).backward()
    optimizer.step()
    optimizer.zero_grad()

# the mask: its most sensitive entries on that data
mask = meerkat.sensitivity_mask(model, corpus, lambda item: loss_of(*item), density=0.05)
masked, directions = meerkat.MaskedModel(model, mask), meerkat.Directions(key=7, count=len(mask))

# the federation: every round each site makes one step on a batch of its own and sends four bytes
sites, test = ([rows_of(k, count, shift=1.0) for k in range(CLASSES)] for count in (400, 200))
config = meerkat.ServerConfig(400, 1, 1, 0.1, 1e-3, CLASSES, CLASSES, dict.fromkeys(range(CLASSES), 400))
engine = meerkat.LocalEngine(
    masked,
    directions,
    batch_of=lambda site, step: np.append(np.arange(step * BATCH, (step + 1) * BATCH) % 400, site),
    losses_of=lambda batches: lambda: torch.stack([loss_of(sites[b[-1]][b[:-1]], int(b[-1])) for b in batches]),
)
state, before = meerkat.ServerState(meerkat.Replica(0, masked.read())), accuracy()
for _ in range(config.rounds):
    plan = meerkat.open_round(state, config)
    state, record = meerkat.close_round(
        state, plan, engine.run(state, plan), config, directions, mask.pretraining_gradient
    )
masked.write_(state.theta)
print(f"{len(mask)} of {mask.total} parameters moved: accuracy {before:.3f} before, {accuracy():.3f} after")
