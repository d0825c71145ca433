"""Meerkat, slow and literal: the twin that the fast implementation is compared with.

Written from the method's sections 1-9 (arXiv 2506.03337) and from nothing of the
package. Weights, gradients, masks and directions are dense [d] vectors over all of
`model.named_parameters()` (tied ones once). Arithmetic is float64, so that what is
left is the method and not its rounding; only the forward pass runs in the model's own
dtype. CPU only; models are put in evaluation mode, as dropout is off in the method.
"""

from collections.abc import Callable, Sequence
from typing import Any

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


def _causal_lm_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """One sequence's mean causal-LM loss."""
    return -_token_log_probabilities(model, ids).mean()


def _gradient(model: nn.Module, example: Any, loss: Callable[[nn.Module, Any], Tensor]) -> Tensor:
    """Gradient of loss(model, example): [d]."""
    assert all(p.requires_grad for p in model.parameters()), "frozen parameters"
    model.zero_grad()
    loss(model.eval(), example).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in model.named_parameters()]
    dense = torch.cat([g.double().flatten() for g in grads])
    model.zero_grad()
    return dense


def sensitivity(model: nn.Module, sequences: Sequence[Tensor]) -> Tensor:
    """Section 2: s = mean over sequences of (d loss / d w)^2, one sequence at a time."""
    total = torch.zeros_like(flat_parameters(model))
    for ids in sequences:
        total += _gradient(model, ids, _causal_lm_loss) ** 2
    return total / len(sequences)


def pretraining_gradient(model: nn.Module, sequences: Sequence[Tensor]) -> Tensor:
    """Section 2: grad_p = mean over sequences of d loss / d w, here on all d entries."""
    total = torch.zeros_like(flat_parameters(model))
    for ids in sequences:
        total += _gradient(model, ids, _causal_lm_loss)
    return total / len(sequences)


def union_mask_scores(model: nn.Module, examples: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor]) -> Tensor:
    """Section 8, task mask: mean over all clients' examples of (d loss(model, example) / d w)^2: [d]."""
    assert len(examples) > 0, "no examples"
    total = torch.zeros_like(flat_parameters(model))
    for example in examples:
        total += _gradient(model, example, loss) ** 2
    return total / len(examples)


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


def feddyn(
    loss: Callable[[Tensor, int, int, int], float],
    w0: Tensor,
    mask: Tensor,
    direction: Callable[[int, int, int], Tensor],
    rounds: int,
    steps: int,
    p: Sequence[float],
    lr: float,
    eps: float,
    alpha: float,
    participants: Callable[[int], Sequence[int]] | None = None,
) -> tuple[list[Tensor], list[dict[int, Tensor]]]:
    """Section 8: FedDyn (Acar et al. 2021) in weight space, zeroth-order local steps, P = 1.

    Client k minimises f_k(w) - <h_k, w> + alpha / 2 |w - w_r|^2. `loss(w, client, round, t)`
    and `direction(round, t, 0)` count from 0; `participants(round)` names the clients that
    take part, None means all len(p). Returns dense w [d] after each round, and for each
    round the corrected projected gradients g' [T] of each participant.
    """
    assert alpha > 0, f"alpha {alpha}"
    w_r, q = w0.double(), _shares(p)
    h = torch.zeros_like(w_r)
    h_k = [torch.zeros_like(w_r) for _ in p]
    after_round, g_of_round = [], []
    for r in range(rounds):
        ks = list(range(len(p)) if participants is None else participants(r))
        assert 0 < len(ks) == len(set(ks)), f"participants {ks}"
        assert set(ks) <= set(range(len(p))), f"participants {ks} of {len(p)}"
        ends: dict[int, Tensor] = {}
        g_by_client: dict[int, Tensor] = {}
        for k in ks:
            w, g = w_r, []
            for t in range(steps):
                z = direction(r, t, 0).double()
                assert not z[~mask].any(), "a direction leaves the mask"
                plus, minus = float(loss(w + eps * z, k, r, t)), float(loss(w - eps * z, k, r, t))
                correction = -(h_k[k] * z).sum() + alpha * ((w - w_r) * z).sum()
                g.append((plus - minus) / (2 * eps) + float(correction))
                w = w - lr * g[-1] * z
            ends[k], g_by_client[k] = w, torch.tensor(g, dtype=torch.float64)
        for k in ks:
            h_k[k] = h_k[k] - alpha * (ends[k] - w_r)
            h = h - alpha * q[k] * (ends[k] - w_r)
        mean = aggregate_weights([ends[k] for k in ks], [p[k] for k in ks])
        # Outside the mask nothing moves, not even by the rounding of the mean.
        w_r = torch.where(mask, mean - h / alpha, w_r)
        after_round.append(w_r)
        g_of_round.append(g_by_client)
    return after_round, g_of_round


def fedavgm(w0: Tensor, deltas: Sequence[Tensor], beta: float, server_lr: float) -> list[Tensor]:
    """Section 5, server momentum on D_r = (lr / P) sum G z, which points uphill: dense w [d] after each round."""
    w, m, after_round = w0.double(), torch.zeros_like(w0, dtype=torch.float64), []
    for delta in deltas:
        m = beta * m + delta.double()
        w = w - server_lr * m
        after_round.append(w)
    return after_round


def fedadam(
    w0: Tensor, deltas: Sequence[Tensor], beta1: float, beta2: float, tau: float, server_lr: Sequence[float]
) -> list[Tensor]:
    """Section 5, FedAdam (Reddi et al. 2021: no bias correction, v_0 = 0) on D_r: dense w [d] after each round.

    `server_lr` is one rate a round.
    """
    assert tau > 0, f"tau {tau}"
    w = w0.double()
    m, v, after_round = torch.zeros_like(w), torch.zeros_like(w), []
    for delta, rate in zip(deltas, server_lr, strict=True):
        m = beta1 * m + (1 - beta1) * delta.double()
        v = beta2 * v + (1 - beta2) * delta.double() ** 2
        w = w - rate * m / (v.sqrt() + tau)
        after_round.append(w)
    return after_round


def fo_fedavg(
    gradient: Callable[[Tensor, int, int, int], Tensor],
    w0: Tensor,
    mask: Tensor,
    rounds: int,
    steps: int,
    p: Sequence[float],
    lr: float,
) -> list[Tensor]:
    """Section 8: FedAvg by plain SGD on the mask: dense w after each round; len(p) clients.

    `gradient(w, client, round, t)`, dense [d], counts from 0.
    """
    w_r, after_round = w0.double(), []
    for r in range(rounds):
        client_ends = []
        for k in range(len(p)):
            w = w_r
            for t in range(steps):
                w = torch.where(mask, w - lr * gradient(w, k, r, t).double(), w)
            client_ends.append(w)
        # Outside the mask nothing moves, not even by the rounding of the mean.
        w_r = torch.where(mask, aggregate_weights(client_ends, p), w_r)
        after_round.append(w_r)
    return after_round


def gradip(grad_p: Tensor, g: Tensor, directions: Sequence[Sequence[Tensor]]) -> Tensor:
    """Section 5: <grad_p, g_t z_t> for each step, with P = 1: g [T, 1] -> [T]."""
    assert g.shape == (len(directions), 1), f"g is {tuple(g.shape)}, not [T, 1]"
    rebuilt = [g[t, 0].double() * z.double() for t, (z,) in enumerate(directions)]
    return torch.stack([(grad_p.double() * v).sum() for v in rebuilt])


def gradip_directions(grad_p: Tensor, g: Tensor, directions: Sequence[Sequence[Tensor]]) -> Tensor:
    """Section 5, any P: <grad_p, (1 / P) sum_p g[t, p] z_t^p> for each step: g [T, P] -> [T]."""
    products = []
    for g_t, zs in zip(g.double(), directions, strict=True):
        rebuilt = torch.zeros_like(grad_p, dtype=torch.float64)
        for g_tp, z in zip(g_t, zs, strict=True):
            rebuilt += g_tp * z.double() / len(zs)
        products.append((grad_p.double() * rebuilt).sum())
    return torch.stack(products)


def rho_later(gradip: Tensor, t_init: int, t_later: int) -> float:
    """Section 6: mean |GradIP| of the first t_init over that of the last t_later steps: gradip [T].

    Over a mean of zero it is inf, and nan where both are zero.
    """
    a = gradip.double().abs()
    assert 0 < min(t_init, t_later) <= max(t_init, t_later) <= len(a), f"{t_init}, {t_later} of {len(a)} steps"
    return float(a[:t_init].mean() / a[len(a) - t_later :].mean())


def rho_quie(gradip: Tensor, t_later: int, sigma: float) -> float:
    """Section 6: the share of the last t_later steps with |GradIP| < sigma: gradip [T]."""
    a = gradip.double().abs()
    assert 0 < t_later <= len(a), f"{t_later} of {len(a)} steps"
    quiet = 0
    for a_t in a[len(a) - t_later :]:
        quiet += int(float(a_t) < sigma)
    return quiet / t_later


def vpcs_extreme(
    gradips: Sequence[Tensor],
    t_init: int,
    t_later: int,
    sigma: float,
    later_threshold: float,
    quie_threshold: float,
) -> set[int]:
    """Section 6, the paper's rule: the clients above the first threshold and not below the second; gradips[k] [T]."""
    extreme = set()
    for k, a in enumerate(gradips):
        if rho_later(a, t_init, t_later) > later_threshold and rho_quie(a, t_later, sigma) >= quie_threshold:
            extreme.add(k)
    return extreme


def _rebuilt_update(g: Tensor, directions: Sequence[Sequence[Tensor]], rate: float) -> Tensor:
    """rate * sum over t, p of g[t, p] z^{t,p}, missing steps as zero: g [T_k, P], T_k <= len(directions) -> [d]."""
    assert len(g) <= len(directions), f"{len(g)} steps, directions for {len(directions)}"
    total = torch.zeros_like(directions[0][0], dtype=torch.float64)
    for g_t, zs in zip(g.double(), directions, strict=False):
        for g_tp, z in zip(g_t, zs, strict=True):
            total += rate * g_tp * z.double()
    return total


def update_geometry(
    g_by_client: Sequence[Tensor], G: Tensor, directions: Sequence[Sequence[Tensor]], rate: float
) -> list[tuple[Tensor, float, float]]:
    """Section 5: each client's update rebuilt from g_k [T_k, P], and how it lies to that of G [T, P].

    For each client (D_k [d] = rate * sum of g_k z, its L2 norm, its cosine with the
    global update); rate is lr / P. The cosine is nan where one of the two is zero.
    """
    whole = _rebuilt_update(G, directions, rate)
    geometry = []
    for g_k in g_by_client:
        update = _rebuilt_update(g_k, directions, rate)
        norm = (update**2).sum().sqrt()
        cosine = (update * whole).sum() / (norm * (whole**2).sum().sqrt())
        geometry.append((update, float(norm), float(cosine)))
    return geometry


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
