"""Three ways to write a perturbed entry into bfloat16 weights: how far projected gradients are from exact slopes.

    python benchmarks/perturbed_entries.py [--model DIR --text FILE --task sst2] [--json]

rounded: to the nearest bfloat16, as Meerkat does. stochastic: up or down at random, right on average. beside: the
matrix keeps its rounded entries, and what they lack is a sparse float32 matrix beside it, y = W x + S x. float32 is for
comparison. The headline is the error of the best of the other two over that of rounding, each at its best eps.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from meerkat.algorithm.directions import Directions, Place
from meerkat.algorithm.perturbation import SIZES
from meerkat.algorithm.precision import weights_as
from meerkat.algorithm.zeroth_order import Loss, MaskedModel, slopes
from meerkat.masks.sparse_mask import SparseMask
from meerkat.run.mask import make_mask
from meerkat.run.precision import public_batches
from meerkat.run.setup import open_problem, resolve
from meerkat.settings.config import make_config

DIRECTIONS = 4


class Stochastic(MaskedModel):
    """Rounds each entry up or down at random, so that it is right on average."""

    def __init__(self, model: nn.Module, mask: SparseMask) -> None:
        super().__init__(model, mask)
        self._generator = torch.Generator().manual_seed(0)

    def write_(self, theta: Tensor) -> None:
        low_bits = torch.randint(1 << 16, theta.shape, generator=self._generator, dtype=torch.int32)
        super().write_(((theta.view(torch.int32) + low_bits) & -(1 << 16)).view(torch.float32))


class Beside(MaskedModel):
    """Leaves the weights rounded, and multiplies what they lack by itself, in float32."""

    def __init__(self, model: nn.Module, mask: SparseMask) -> None:
        super().__init__(model, mask)
        self._rounded = self.read()
        self.missing: dict[str, Tensor] = {}

    def write_(self, theta: Tensor) -> None:
        counts = [count for _, count in self.mask.counts()]
        self.missing = dict(zip(self.mask.entries, (theta - self._rounded).split(counts), strict=True))

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """While open, every masked layer adds what its weights lack. All masked parameters are weights of `Linear`s."""
        modules = dict(self.model.named_modules())
        hooks = [
            modules[name.removesuffix(".weight")].register_forward_hook(self._adding(name))
            for name in self.mask.entries
        ]
        yield
        for hook in hooks:
            hook.remove()

    def _adding(self, name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        at, shape = self.mask.entries[name], self.mask.shapes[name]
        assert at is not None
        rows, columns = at // shape[1], at % shape[1]
        starts = torch.searchsorted(rows.contiguous(), torch.arange(shape[0] + 1))

        def hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            sparse = torch.sparse_csr_tensor(starts, columns.contiguous(), self.missing[name], size=shape)
            with torch.autocast(output.device.type, enabled=False):  # which has no sparse product in bfloat16
                added = (sparse @ inputs[0].reshape(-1, shape[1]).float().T).T
            return (output.float() + added.reshape(output.shape)).to(output.dtype)

        return hook


def errors(model: MaskedModel, theta: Tensor, batches: list[tuple[Tensor, Loss]]) -> list[float]:
    """The error of g over exact slopes at each eps."""
    z, relative = Directions(0, len(theta)), []
    for eps in SIZES:
        off, of_all = 0.0, 0.0
        for number, (gradient, loss) in enumerate(batches):
            for p in range(DIRECTIONS):
                along = z(Place("training", number, 0, p))
                exact = float((gradient * along).sum(dtype=torch.float64))
                g = float(slopes(model, theta, [along], eps, loss).g)
                off, of_all = off + (g - exact) ** 2, of_all + exact**2
        relative.append((off / of_all) ** 0.5)
    return relative


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--text", default="")
    parser.add_argument("--task", default="topics")
    parser.add_argument("--mask", default="", help="a file that 'meerkat mask' wrote")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in ("model", "text", "task", "mask", "threads")}
    config = resolve(make_config({**given, "device": "cpu", "exclude": "embeddings,norms"}), rows=False)
    problem = open_problem(config)
    mask, public = make_mask(config, problem), problem.public()
    assert public is not None
    theta = MaskedModel(problem.model, mask).read()
    batches = public_batches(config, problem, mask, public.rows)
    curves = {"float32": errors(MaskedModel(problem.model, mask), theta, batches)}
    with weights_as(problem.model, torch.bfloat16):
        curves["rounded"] = errors(MaskedModel(problem.model, mask), theta, batches)
        curves["stochastic"] = errors(Stochastic(problem.model, mask), theta, batches)
        MaskedModel(problem.model, mask).write_(theta)
        with (beside := Beside(problem.model, mask)).hooked():
            curves["beside"] = errors(beside, theta, batches)
    best = {way: min(curve) for way, curve in curves.items()}
    ratio = min(best["stochastic"], best["beside"]) / best["rounded"]
    if arguments.json:
        facts = {"eps": SIZES, "errors": curves, "measured_on": f"{config.model}, {config.task}, n = {len(mask):,}"}
        print(json.dumps({"name": "perturbed_entries", "ratio": ratio, **facts}))
        return
    print("error of g     " + "".join(f"{f'eps {eps:g}':>11}" for eps in SIZES))
    for way, curve in curves.items():
        print(f"{way:15}" + "".join(f"{error:11.4f}" for error in curve))
    print(f"the best of the other two over rounding: {ratio:.3f}")


if __name__ == "__main__":
    main()
