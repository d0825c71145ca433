"""Meerkat, slow and literal: the twin that the fast implementation is compared with.

Written from the method's sections 1-5 (arXiv 2506.03337) and from nothing of the
package. Weights, gradients, masks and directions are dense [d] vectors over all of
`model.named_parameters()` (tied ones once). Arithmetic is float64, so that what is
left is the method and not its rounding; only the forward pass runs in the model's own
dtype. CPU only; models are put in evaluation mode, as dropout is off in the method.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import BoolTensor, Tensor, nn


def flat_parameters(model: nn.Module) -> Tensor:
    """A copy of all parameters: [d] float64."""
    parts = [p.detach().double().flatten() for _, p in model.named_parameters()]
    return torch.cat(parts)


def set_flat_parameters(model: nn.Module, w: Tensor) -> None:
    """Write w [d] into the model, rounded to its dtype."""
    parameters = [p for _, p in model.named_parameters()]
    parts = torch.split(w, [p.numel() for p in parameters])
    with torch.no_grad():
        for p, part in zip(parameters, parts, strict=True):
            p.copy_(part.view_as(p))


def _token_log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """log P(ids[i+1] | ids[:i+1]) for ids [L], one unpadded forward: [L-1]."""
    assert len(ids) >= 2, f"needs two tokens or more, not {ids}"
    logits: Tensor = model.eval()(input_ids=ids[None]).logits[0].double()
    return logits[:-1].log_softmax(-1).gather(-1, ids[1:, None]).squeeze(-1)


def _gradient(model: nn.Module, ids: Tensor) -> Tensor:
    """Gradient of one sequence's mean causal-LM loss: [d]."""
    assert all(p.requires_grad for p in model.parameters()), "frozen parameters"
    model.zero_grad()
    (-_token_log_probabilities(model, ids).mean()).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in model.named_parameters()]
    dense = torch.cat([g.double().flatten() for g in grads])
    model.zero_grad()
    return dense


def sensitivity(model: nn.Module, sequences: Sequence[Tensor]) -> Tensor:
    """Section 2: s = mean over sequences of (d loss / d w)^2, one sequence at a time."""
    total = torch.zeros_like(flat_parameters(model))
    for ids in sequences:
        total += _gradient(model, ids) ** 2
    return total / len(sequences)


def pretraining_gradient(model: nn.Module, sequences: Sequence[Tensor]) -> Tensor:
    """Section 2: grad_p = mean over sequences of d loss / d w, here on all d entries."""
    total = torch.zeros_like(flat_parameters(model))
    for ids in sequences:
        total += _gradient(model, ids)
    return total / len(sequences)


def top_n_mask(scores: Tensor, n: int) -> BoolTensor:
    """The n largest of scores [d], by a full sort; of equal ones the lower index."""
    order = torch.sort(scores, descending=True, stable=True).indices
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[order[:n]] = True
    return mask


def candidate_loss(
    model: nn.Module,
    token_ids_per_candidate: Sequence[tuple[Sequence[int], int]],
    gold: int,
) -> Tensor:
    """Section 9: cross-entropy over the candidates' mean label log-probabilities.

    Each candidate is (ids of prompt and label, number of label tokens at the end).
    """
    scores = []
    for ids, label_tokens in token_ids_per_candidate:
        assert 0 < label_tokens < len(ids), f"{label_tokens} of {len(ids)} tokens"
        log_p = _token_log_probabilities(model, torch.tensor(ids, dtype=torch.long))
        scores.append(log_p[-label_tokens:].mean())
    return -torch.stack(scores).log_softmax(0)[gold]


def client_steps(
    loss: Callable[[Tensor, int], float],
    w: Tensor,
    mask: Tensor,
    directions: Sequence[Sequence[Tensor]],
    lr: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Section 3: T local steps from w on `loss(w, t)` along `directions[t][p]`.

    Returns the projected gradients g [T, P] and the client's last weights [d].
    """
    w, g = w.double(), []
    for t, zs in enumerate(directions):
        g_t = []
        for z in zs:
            assert not z[~mask].any(), "a direction leaves the mask"
            plus, minus = loss(w + eps * z.double(), t), loss(w - eps * z.double(), t)
            g_t.append((float(plus) - float(minus)) / (2 * eps))
        for g_tp, z in zip(g_t, zs, strict=True):
            w = w - lr / len(zs) * g_tp * z.double()
        g.append(g_t)
    return torch.tensor(g, dtype=torch.float64), w


def _shares(p: Sequence[float]) -> list[float]:
    """Client weights renormalised over the replies that count (section 5)."""
    return [float(p_k) / float(sum(p)) for p_k in p]


def aggregate_weights(client_ends: Sequence[Tensor], p: Sequence[float]) -> Tensor:
    """FedAvg: the mean, by shares p [K], of the clients' last weights: [d]."""
    total = torch.zeros_like(client_ends[0], dtype=torch.float64)
    for w_k, p_k in zip(client_ends, _shares(p), strict=True):
        total += p_k * w_k.double()
    return total


def aggregate_scalars(g_by_client: Sequence[Tensor], p: Sequence[float]) -> Tensor:
    """Section 5: G[t, p] = sum_k p_k g_k[t, p] [t < T_k], from g_k [T_k, P]: [T, P].

    T is the largest T_k; the steps that a client did not make count as zero.
    """
    steps = max(len(g_k) for g_k in g_by_client)
    total = torch.zeros(steps, g_by_client[0].shape[1], dtype=torch.float64)
    for g_k, p_k in zip(g_by_client, _shares(p), strict=True):
        total[: len(g_k)] += p_k * g_k.double()
    return total


def meerkat(
    loss: Callable[[Tensor, int, int, int], float],
    w0: Tensor,
    mask: Tensor,
    direction: Callable[[int, int, int], Tensor],
    rounds: int,
    steps: int,
    P: int,
    p: Sequence[float],
    lr: float,
    eps: float,
) -> list[Tensor]:
    """Section 4 in weight space: dense w after each round; len(p) clients.

    `loss(w, client, round, t)` and `direction(round, t, p)` count from 0.
    """
    w, after_round = w0.double(), []
    for r in range(rounds):
        zs = [[direction(r, t, i) for i in range(P)] for t in range(steps)]
        client_ends = []
        for k in range(len(p)):

            def client_loss(v: Tensor, t: int, k: int = k, r: int = r) -> float:
                return loss(v, k, r, t)

            client_ends.append(client_steps(client_loss, w, mask, zs, lr, eps)[1])
        # Outside the mask nothing moves, not even by the rounding of the mean.
        w = torch.where(mask, aggregate_weights(client_ends, p), w)
        after_round.append(w)
    return after_round


def gradip(grad_p: Tensor, g: Tensor, directions: Sequence[Sequence[Tensor]]) -> Tensor:
    """Section 5: <grad_p, g_t z_t> for each step, with P = 1: g [T, 1] -> [T]."""
    assert g.shape == (len(directions), 1), f"g is {tuple(g.shape)}, not [T, 1]"
    rebuilt = [g[t, 0].double() * z.double() for t, (z,) in enumerate(directions)]
    return torch.stack([(grad_p.double() * v).sum() for v in rebuilt])


def philox_normals(
    key: int,
    counter_words: tuple[int, int, int, int],
    count: int,
    table: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """`count` entries of table [65536], picked by the 16-bit chunks of Philox4x64-10.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), in Python
    integers. Key (128 bits) and counter (256 bits) have their lowest word first, and
    so has each 64-bit output word its 16-bit chunks.
    """
    word = 2**64 - 1
    counter = sum(c << (64 * i) for i, c in enumerate(counter_words))
    chunks: list[int] = []
    while len(chunks) < count:
        counter = (counter + 1) % 2**256  # before the block, as NumPy does
        x0, x1, x2, x3 = (counter >> (64 * i) & word for i in range(4))
        k0, k1 = key & word, key >> 64
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
            x0, x1, x2, x3 = b >> 64 ^ x1 ^ k0, b & word, a >> 64 ^ x3 ^ k1, a & word
            k0 = k0 + 0x9E3779B97F4A7C15 & word
            k1 = k1 + 0xBB67AE8584CAA73B & word
        chunks += [x >> s & 0xFFFF for x in (x0, x1, x2, x3) for s in (0, 16, 32, 48)]
    return table[np.array(chunks[:count], dtype=np.int64)]
