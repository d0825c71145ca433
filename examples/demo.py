"""The demo: Meerkat, and the same federation moving all parameters, side by side on the embedded model.

    make demo

Ten clients with a Dirichlet(0.5) share of each of four topics, 200 rounds of one local step. Each
method runs at its own best learning rate, found on held-back training rows: see docs/log.md.
"""

import os
import sys
import time
from pathlib import Path

from meerkat.errors import MeerkatError, RunFailed
from meerkat.progress import say
from meerkat.report import draw_curves, summary_in_words
from meerkat.run.simulation import simulate
from meerkat.settings.config import make_config

RATES = {"meerkat": 0.2, "full-fedzo": 1e-3}


def main() -> int:
    """Run both, say what came out, and draw it; returns the exit status."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    out = Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        run_both(out)
    except MeerkatError as error:
        say(f"make demo: {error}")
        return 1 if isinstance(error, RunFailed) else 2
    except KeyboardInterrupt:
        say(f"make demo: interrupted; if {out} is there, 'meerkat resume {out}/METHOD' continues a run")
        return 130
    return 0


def run_both(out: Path) -> None:
    """Run both below a folder, say what came out, and draw it."""
    summaries = {}
    for method, rate in RATES.items():
        say(f"\n=== {method} ===")
        config = make_config({"method": method, "lr": rate, "lr_schedule": "constant"})
        summaries[method] = simulate(config, out / method)
    for method, summary in summaries.items():
        print(f"\n{summary_in_words(summary, out / method)}\nIt took {summary['wall_s']:.0f} s.")
    picture, _ = draw_curves([out / method for method in RATES], out)
    print(f"\nPicture of both: {picture}")


if __name__ == "__main__":
    sys.exit(main())
