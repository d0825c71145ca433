"""What a person reads of runs and comparisons: sentences, figures, and pages that open without a network."""

from meerkat.report.comparison_page import write_comparison_report
from meerkat.report.run_figures import draw_curves
from meerkat.report.run_page import write_run_report
from meerkat.report.sentences import summary_in_words

__all__ = ["draw_curves", "summary_in_words", "write_comparison_report", "write_run_report"]
