"""What runs and comparisons show a person: words, pictures and pages.

Pages are one HTML file each, readable without a network; their figures stand beside them as PNG and SVG.
"""

from meerkat.report.compare_page import write_comparison_report
from meerkat.report.curves import curves
from meerkat.report.run_page import write_run_report
from meerkat.report.sentences import in_words

__all__ = ["curves", "in_words", "write_comparison_report", "write_run_report"]
