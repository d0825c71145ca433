"""What a person reads of runs and comparisons: sentences, figures, and pages that open without a network.

The names below load their module, and with it matplotlib, when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meerkat.report.comparison_page import write_comparison_report
    from meerkat.report.run_figures import draw_curves
    from meerkat.report.run_page import write_run_report
    from meerkat.report.sentences import summary_in_words

__all__ = ["draw_curves", "summary_in_words", "write_comparison_report", "write_run_report"]

_MODULES = {
    "draw_curves": "run_figures",
    "summary_in_words": "sentences",
    "write_comparison_report": "comparison_page",
    "write_run_report": "run_page",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
