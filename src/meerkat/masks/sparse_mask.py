"""The static sparse mask: which entries of which tensors move, and its file (method, section 2).

A mask is chosen once and never changes; sensitivity.py and baselines.py choose the entries.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from meerkat.errors import DAMAGE, MeerkatError, in_short
from meerkat.masks.kinds import Kind

FORMAT_VERSION = 1
CURVE = "perturbation"
"""The fact that is the curve which a run's eps was chosen by: values of eps, and errors, as JSON."""
CURVATURE = "curvature"
"""The fact that is the curvature which a run's learning rates were chosen by: trace and largest eigenvalue, as JSON."""
MEASURED = (CURVE, CURVATURE)
"""Facts that a run adds to its mask."""
_CHUNK = 1 << 22
"""Entries hashed together, so that no float32 copy of a whole tensor is made."""
_DIMENSIONS, _SIZE = 8, 2**40
"""No tensor of a model has more sizes, nor one as large."""


@dataclass(frozen=True)
class SparseMask:
    """Which entries move. `theta` is their values, float32 [n], tensor by tensor in the order of `entries`."""

    entries: Mapping[str, Tensor | None]
    """Parameter name -> its moving flat indices, int64, ascending; None where the whole tensor moves."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of these parameters."""
    fingerprint: str
    """Of the model whose weights the mask was chosen on."""
    total: int
    """d: the model's parameters, tied ones counted once."""
    kind: str = "sensitivity"
    density: float = 1.0
    facts: Mapping[str, str] = field(default_factory=dict)
    """How it was made, for people: text source, number of sequences, scope, exclusions."""
    pretraining_gradient: Tensor | None = None
    """grad_p: mean gradient of the pre-training loss at the moving entries, float32 [n]."""
    theta_0: Tensor | None = None
    """The moving entries' pre-trained values, float32 [n]: with a log, all that replay needs."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        entries: Mapping[str, Tensor | None],
        kind: Kind,
        density: float = 1.0,
        facts: Mapping[str, str] | None = None,
    ) -> "SparseMask":
        """A mask that moves these entries of a model."""
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        return cls(
            entries=entries,
            shapes={name: shapes[name] for name in entries},
            fingerprint=fingerprint(model),
            total=sum(map(math.prod, shapes.values())),
            kind=kind,
            density=density,
            facts=facts or {},
        )

    def __len__(self) -> int:
        return sum(count for _, count in self.counts())

    def counts(self) -> Iterator[tuple[str, int]]:
        """(parameter name, number of its moving entries), in theta's order."""
        for name, indices in self.entries.items():
            yield name, math.prod(self.shapes[name]) if indices is None else len(indices)

    def overlap(self, other: "SparseMask") -> float:
        """The share of this mask's entries that the other moves too, in [0, 1]."""
        common, counts = 0, dict(other.counts())
        for name, count in self.counts():
            mine, theirs = self.entries[name], other.entries.get(name)
            if mine is None or theirs is None:
                common += min(count, counts.get(name, 0))
            else:
                common += int(torch.isin(mine, theirs, assume_unique=True).sum())
        return common / len(self)

    def digest(self) -> str:
        """SHA-256 of the moving entries: equal for masks that move the same ones."""
        sha = hashlib.sha256()
        for name, indices in self.entries.items():
            sha.update(json.dumps([name, list(self.shapes[name]), indices is None]).encode())
            if indices is not None:
                sha.update(indices.numpy().astype("<i8", copy=False).tobytes())
        return sha.hexdigest()

    def description_digest(self) -> str:
        """SHA-256 of what the mask says of itself: kind, density, the model's size and facts, as compact JSON.

        What a run measures is left out: a mask that is made again does not have it.
        """
        facts = {name: fact for name, fact in self.facts.items() if name not in MEASURED}
        said = [self.kind, self.density, self.total, facts]
        return hashlib.sha256(json.dumps(said, separators=(",", ":")).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the mask, its gradient and its base values to one safetensors file."""
        tensors, metadata = self._as_file()
        save_file(tensors, path, metadata=metadata)

    def _as_file(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and metadata of the mask's file.

        Indices are int32 where the tensor's size allows. All metadata are strings; `entries` lists the tensors
        in order, each with its shape and whether all of it moves.
        """
        tensors: dict[str, Tensor] = {}
        for name, indices in self.entries.items():
            if indices is not None:
                narrow = math.prod(self.shapes[name]) < 2**31
                tensors[f"indices/{name}"] = indices.to(torch.int32 if narrow else torch.int64)
        for name in ("pretraining_gradient", "theta_0"):
            if (values := getattr(self, name)) is not None:
                tensors[name] = values
        metadata = {
            "format": "meerkat-mask",
            "format_version": str(FORMAT_VERSION),
            "kind": self.kind,
            "density": repr(self.density),
            "model_fingerprint": self.fingerprint,
            "parameters_total": str(self.total),
            "parameters_masked": str(len(self)),
            "entries": json.dumps([[n, list(self.shapes[n]), i is None] for n, i in self.entries.items()]),
            "facts": json.dumps(dict(self.facts)),
        }
        return tensors, metadata

    @classmethod
    def load(cls, path: Path) -> "SparseMask":
        """Read a mask. Raises MeerkatError: no such file, or it holds no mask, or one of another format version."""
        path = Path(path)
        if not path.is_file():
            raise MeerkatError(f"mask '{path}': no such file; make one with 'meerkat mask'")
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                if meta.get("format") != "meerkat-mask":
                    raise MeerkatError(f"mask '{path}': not a mask file; make one with 'meerkat mask'")
                if meta["format_version"] != str(FORMAT_VERSION):
                    raise MeerkatError(
                        f"mask '{path}': format version {meta['format_version']}, this program reads "
                        f"{FORMAT_VERSION}; make it again with 'meerkat mask'"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return cls._from_file(meta, tensors)
        except SafetensorError as error:
            raise MeerkatError(f"mask '{path}': damaged, or not a safetensors file ({error}); make it again") from None
        except DAMAGE as error:
            raise MeerkatError(f"mask '{path}': damaged ({in_short(error)}); make it again") from None

    @classmethod
    def _from_file(cls, meta: Mapping[str, str], tensors: Mapping[str, Tensor]) -> "SparseMask":
        """The mask in a file. Raises one of DAMAGE if it is malformed."""
        listed = json.loads(meta["entries"])
        mask = cls(
            entries={name: None if whole else tensors[f"indices/{name}"] for name, _, whole in listed},
            shapes={name: tuple(shape) for name, shape, _ in listed},
            fingerprint=meta["model_fingerprint"],
            total=int(meta["parameters_total"]),
            kind=meta["kind"],
            density=float(meta["density"]),
            facts={str(name): str(value) for name, value in json.loads(meta["facts"]).items()},
            pretraining_gradient=tensors.get("pretraining_gradient"),
            theta_0=tensors.get("theta_0"),
        )
        mask.check_form()
        expected, metadata = mask._as_file()
        types, expected_types = ({name: t.dtype for name, t in each.items()} for each in (tensors, expected))
        if meta != metadata or types != expected_types:
            raise ValueError("it is not written as this version writes a mask, with nothing added")
        return replace(mask, entries={name: None if at is None else at.long() for name, at in mask.entries.items()})

    def check_form(self) -> None:
        """Raise ValueError unless this can be the mask of some model."""
        for name, shape in self.shapes.items():
            # before any product of them, whose digits would be as many as theirs together
            if len(shape) > _DIMENSIONS or not all(type(size) is int and 0 <= size < _SIZE for size in shape):
                allowed = f"at most {_DIMENSIONS} sizes, each below {_SIZE}"
                raise ValueError(f"a tensor has {allowed}, not {len(shape)}: {list(shape)}")
            indices = self.entries[name]
            if indices is None:
                continue
            if indices.dtype not in (torch.int32, torch.int64) or not _ascend(indices, math.prod(shape)):
                raise ValueError(f"entries of '{name}' that are not ascending indices, each once")
        n = sum(count for _, count in self.counts())
        if not 0 < n <= self.total < 2**63:
            raise ValueError(f"{n} of {self.total} parameters")
        if not 0 < self.density <= 1:
            raise ValueError(f"density {self.density}")
        for name in ("pretraining_gradient", "theta_0"):
            values = getattr(self, name)
            if values is not None and (values.dtype != torch.float32 or values.shape != (n,)):
                raise ValueError(f"{name} of {list(values.shape)} {values.dtype}, not {n} float32")

    def check_fits(self, model: nn.Module) -> None:
        """Raise MeerkatError unless this mask was made for exactly this model."""
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        total = sum(math.prod(shape) for shape in shapes.values())
        differing = [name for name, shape in self.shapes.items() if shapes.get(name) != shape]
        if differing or total != self.total:
            raise MeerkatError(
                f"the mask is of a model with {self.total:,} parameters, this one has {total:,}"
                + (f" and differs at '{differing[0]}'" if differing else "")
                + "; make a mask for this model with 'meerkat mask'"
            )
        for name, at in self.entries.items():
            if at is not None and not _ascend(at, math.prod(self.shapes[name])):
                trouble = f"the mask's entries of '{name}' are not ascending indices, each once"
                raise MeerkatError(f"{trouble}; make it again with 'meerkat mask'")
        if (of_model := fingerprint(model)) != self.fingerprint:
            raise MeerkatError(
                f"the mask is of the same architecture with other weights (fingerprint {self.fingerprint[:12]}, "
                f"this model's is {of_model[:12]}); make a mask for this model with 'meerkat mask'"
            )


def _ascend(indices: Tensor, size: int) -> bool:
    """Whether these are indices into a tensor of `size` entries, ascending, each once: repeated, n would be wrong."""
    if indices.dim() != 1 or not len(indices):
        return indices.dim() == 1
    return bool(indices[0] >= 0 and indices[-1] < size and (indices[1:] > indices[:-1]).all())


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the model's parameter names, shapes and float32 values, tied weights once."""
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sha.update(json.dumps([name, list(parameter.shape)]).encode())
        for chunk in parameter.detach().reshape(-1).split(_CHUNK):
            sha.update(chunk.float().cpu().numpy().astype("<f4", copy=False))
    return sha.hexdigest()
