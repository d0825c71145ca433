"""Extensions: estimators, update rules, problems and partitions that are written outside the package.

An extension is a module or a Python file with any of these dictionaries, by the names that settings take:

    ESTIMATORS     name -> `algorithm.estimators.Estimator`
    UPDATE_RULES   name -> function of the run's settings that gives an `algorithm.update_rules.UpdateRule`
    PROBLEMS       name -> function of the run's settings that gives a `problems.problem.Problem`
    PARTITIONERS   name -> function that splits rows, as those of `problems.partition`

Whoever runs a command names its extensions (`--extension MODULE_OR_FILE`), or installs a package with an entry point in
the group `meerkat.extensions`. A run folder, a log or an offer can name what an extension defines, but never causes an
import: whoever resumes or verifies a run names its extensions again, and a site lists those that it allows.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from meerkat.algorithm.estimators import ESTIMATORS, Estimator
from meerkat.errors import MeerkatError, in_short
from meerkat.problems.partition import PARTITIONERS
from meerkat.run.setup import PROBLEMS
from meerkat.settings.algorithm import UPDATE_RULES

GROUP = "meerkat.extensions"
"""The entry points of installed packages."""

KINDS: dict[str, dict[str, Any]] = {
    "ESTIMATORS": ESTIMATORS,
    "UPDATE_RULES": UPDATE_RULES,
    "PROBLEMS": PROBLEMS,
    "PARTITIONERS": PARTITIONERS,
}
"""An extension's dictionaries, and those of the package that they are added to."""

BUILT_IN = {kind: frozenset(known) for kind, known in KINDS.items()}
"""The names that need no extension."""

_loaded: dict[str, ModuleType] = {}


def load(names: Iterable[str], installed: bool = True) -> None:
    """Add what extensions define to what settings can name. Loading one again does nothing.

    Args:
        names: modules, or Python files, which end in .py.
        installed: whether entry points are loaded, too.

    Raises:
        MeerkatError: an extension cannot be imported, defines nothing, or takes a name that is taken.
    """
    points = [point.value for point in entry_points(group=GROUP)] if installed else []
    for name in (*points, *names):
        if (key := _key(name)) not in _loaded:
            module = _imported(name)
            _add(name, module)
            _loaded[key] = module


def loaded() -> tuple[str, ...]:
    """The extensions loaded so far, as another process can load them."""
    return tuple(_loaded)


def defined_by(names: Iterable[str], kind: str) -> frozenset[str]:
    """The names of a kind that these extensions, loaded before, define."""
    return frozenset(defined for name in names for defined in getattr(_loaded[_key(name)], kind, {}))


def _key(name: str) -> str:
    return str(Path(name).resolve()) if name.endswith(".py") else name


def _imported(name: str) -> ModuleType:
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        if not Path(name).is_file():
            raise MeerkatError(f"extension '{name}': no such file; give a module's name or a .py file")
        spec = importlib.util.spec_from_file_location(f"meerkat_extension_{Path(name).stem}", name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    except MeerkatError:
        raise
    except SystemExit:
        raise MeerkatError(f"extension '{name}': cannot be imported: it ends the program") from None
    except Exception as error:  # whatever the extension's own code raises
        raise MeerkatError(f"extension '{name}': cannot be imported ({in_short(error)})") from None
    return module


def _add(name: str, module: ModuleType) -> None:
    defined = {kind: getattr(module, kind) for kind in KINDS if isinstance(getattr(module, kind, None), dict)}
    if not any(defined.values()):
        raise MeerkatError(f"extension '{name}': defines none of {', '.join(KINDS)}; give it at least one of them")
    for kind, values in defined.items():
        if taken := sorted(values.keys() & KINDS[kind].keys()):
            raise MeerkatError(f"extension '{name}': '{taken[0]}' of its {kind} is taken; give it another name")
        if wrong := [key for key, value in values.items() if not (isinstance(value, Estimator) or callable(value))]:
            raise MeerkatError(
                f"extension '{name}': '{wrong[0]}' of its {kind} is not what its name says; see extending.md"
            )
    for kind, values in defined.items():
        KINDS[kind].update(values)
