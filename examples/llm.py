"""A real language model on a real task: SmolLM2-135M learns SST-2 in a federation of ten clients on this machine.

    make llm                                # rows and text from the Hugging Face hub
    make llm DATA=FOLDER TEXT=FILE.jsonl    # or from here

Each client has its share, by Dirichlet(0.5), of films that are liked or not. The model stands near chance before.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from meerkat.errors import MeerkatError, RunFailed
from meerkat.progress import say
from meerkat.report import summary_in_words, write_run_report
from meerkat.run.simulation import simulate
from meerkat.settings.config import make_config

SETTINGS = {
    **{"task": "sst2", "eval_every": 20},
    **{"text_sequences": 64, "text_length": 128},  # a mask in a minute
}


def main(argv: Sequence[str] | None = None) -> int:
    """Fine-tune, and say what came out; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="models/smollm2-135m", help="folder, GGUF file or hub name [%(default)s]")
    parser.add_argument("--data", default="stanfordnlp/sst2", help="folder or hub name [default: %(default)s]")
    parser.add_argument("--text", default="allenai/c4:en", help="file or hub name [default: %(default)s]")
    parser.add_argument("--rounds", default="80", help="[default: %(default)s]")
    parser.add_argument("--out", type=Path, help="folder for the run [default: a new one under runs/]")
    given = vars(parser.parse_args(argv))
    out, began = given.pop("out") or Path("runs") / f"llm-{time.strftime('%Y%m%d-%H%M%S')}", time.monotonic()
    try:
        summary = simulate(make_config(SETTINGS | given), out)
    except MeerkatError as error:
        say(f"make llm: {error}")
        return 1 if isinstance(error, RunFailed) else 2
    except KeyboardInterrupt:
        say(f"make llm: interrupted; if {out} is there, 'meerkat resume {out}' continues the run")
        return 130
    print(f"\n{summary_in_words(summary, out)}\nIt took {(time.monotonic() - began) / 60:.1f} minutes.")
    print(f"Report: {write_run_report(out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
