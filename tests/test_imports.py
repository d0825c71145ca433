"""Imports point one way: commands -> experiment -> engines -> server and client -> paths -> mask."""

import ast
import subprocess
import sys
from pathlib import Path

import meerkat

SOURCE = Path(meerkat.__file__).parent

# Lower layers never import higher ones, nor does a module import its neighbours' layer except downwards.
LAYERS = [
    {"errors", "seeds"},
    {"mask", "directions", "tasks", "progress", "selection", "certificates", "privacy"},
    {"sensitivity", "zeroth_order", "rounds", "partition", "data", "adapters", "accounting"},
    {"path", "gradip", "alignment", "robust", "first_order", "demo", "models", "signatures"},
    {"optimizers", "client", "runlog"},
    {"server"},
    {"engines.local", "calibration", "methods", "register"},
    {"consistency"},
    {"config"},
    {"budget", "ledger", "attacks"},
    {"runfolder", "record", "replay", "agreement", "engines.attacked", "engines.frames"},
    {"metrics", "workplace", "studies", "engines.door", "engines.offer", "engines.trail", "trackers"},
    {"engines.account", "engines.link"},
    {"engines.site"},
    {"engines.remote"},
    {"experiment", "audit", "results", "sites"},
    {"card"},
    {"history", "export", "compare", "coordinator", "engines.flower.stream", "engines.flower.messages"},
    {"engines.flower.server_app", "engines.flower.client_app", "checkup"},
    {"doctor"},
    {"report.look", "report.style", "report.words", "report.curves", "report.study"},
    {"report.page", "report.clients", "report.story", "report.run_figures", "report.study_figures"},
    {"report.client_figures", "report.compare_page"},
    {"report.run_clients"},
    {"report.run_page"},
    {"report"},
    {"cli"},
]
ALGORITHM = {
    *("mask", "sensitivity", "directions", "zeroth_order", "rounds", "path", "client", "server", "adapters"),
    *("gradip", "alignment", "selection", "calibration", "optimizers", "first_order", "robust", "privacy"),
}
EDGE = {"tasks", "partition", "models", "data", "demo"}


def _modules() -> dict[str, Path]:
    paths = {p.relative_to(SOURCE).with_suffix("").as_posix().replace("/", "."): p for p in SOURCE.rglob("*.py")}
    packages = ("__init__", "engines.__init__", "engines.flower.__init__")
    return {name.removesuffix(".__init__"): p for name, p in paths.items() if name not in packages}


def _imports(path: Path) -> set[str]:
    """The package's modules that a file imports, anywhere in it."""
    known, found = set(_modules()), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "meerkat":
            inside = node.module.removeprefix("meerkat").removeprefix(".")
            named = {".".join(filter(None, (inside, alias.name))) for alias in node.names}
            found |= (named | {inside}) & known
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("meerkat.") for alias in node.names} & known
    return found


def test_every_module_has_a_layer() -> None:
    assert set().union(*LAYERS) == set(_modules())


def test_no_import_runs_back_up() -> None:
    height = {name: level for level, names in enumerate(LAYERS) for name in names}
    up = [(m, i) for m, path in _modules().items() for i in _imports(path) if height[i] >= height[m]]
    assert not up


def test_the_algorithm_and_the_edge_do_not_know_each_other() -> None:
    modules = _modules()
    for name in ALGORITHM:
        assert not _imports(modules[name]) & (EDGE | {"runfolder", "runlog", "config"}), name
    for name in EDGE:
        assert not _imports(modules[name]) & ALGORITHM, name


def test_the_core_loads_without_transformers() -> None:
    core = "import sys, meerkat.server, meerkat.client, meerkat.engines.local; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", core], check=True)
