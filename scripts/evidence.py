"""Write docs/evidence.md: what the runs in docs/evidence say of the paper's claims, at every size of model.

    python scripts/evidence.py

Each examples/claims/real/NAME.toml says what is compared, and docs/evidence/runs.csv has the runs of all of them, of
any number of models: `meerkat compare examples/claims/real/NAME.toml --evidence docs/evidence/runs.csv ...` adds them.
Rates are chosen anew from the trials in the file, and claims are checked anew, on differences paired by seed.
docs/evidence/mask-NAME.json is what `meerkat mask --json` prints of a model's sensitivity mask.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from meerkat.comparison.compare import known_line, without_idle
from meerkat.comparison.evidence import Entry, Evidence, Origin, Outcome, read
from meerkat.comparison.results import Line, results
from meerkat.comparison.studies import Comparison, Search, Setting, Study, read_comparison
from meerkat.problems.classification import Classification
from meerkat.record.files import write_atomically, write_text
from meerkat.report.drawing import drawing
from meerkat.report.style import CYCLE, GREY, MARKERS
from meerkat.settings.config import RunConfig

ROOT = Path(__file__).parents[1]

T975 = {
    **{1: 12.70620, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058},
    **{6: 2.44691, 7: 2.36462, 8: 2.30600, 9: 2.26216},
}
"""Two-sided 95% quantiles of Student's t by degrees of freedom."""
MOST_SEEDS = 100
WORSE = 0.05
"""How much lower accuracy, or higher loss, a setting may have that does as well as another."""
USUAL_SEEDS = 3
"""Other numbers are shown."""
DIVERGED, SAME = "a run diverged", "the same"
"""What is said of a claim that no interval can be given of."""
GAINS = (0.05, 0.1)
"""In accuracy, to which bytes are counted."""

INTRODUCTION = """# Evidence

What our own runs say of the claims in ["Mitigating Non-IID Drift in Zeroth-Order Federated LLM Fine-Tuning with
Transferable Sparsity"](https://arxiv.org/abs/2506.03337), and, from section 7 on, of our own. `make evidence` writes
this page from the runs in [docs/evidence/runs.csv](evidence/runs.csv), one line each
([what is in it](formats.md#evidence)). With a new `--evidence` file the commands below make every run again.

- Learning rates are searched by one rule on rows held back from the training rows, with the first seed, unless the
  section says otherwise. No rate is chosen on validation rows.
- Differences are paired by seed, and above 0 where the claim is right. **holds**, **fails**: the 95% interval of the
  mean difference (Student's t, two-sided, where `meerkat compare` prints one-sided verdicts) lies on one side of 0.
  **undecided**: it does not; *needs N seeds* says how many would decide it if mean and spread stayed as they are.
  Where one setting is claimed to do as well as another, **holds** means that the whole interval is above -0.05,
  **fails** that it is below; `meerkat compare` is more lenient, and allows for the reference's own spread over seeds.
  *the same*: both sides are the same runs.
- Intervals cover only what the seed changes: all runs of a model share their validation rows (300 rows give an accuracy
  to about 0.05) and the rate that the first seed chose, among neighbours a factor apart (3; in sections 7 and 9 1.75).
  What another factor would have chosen moves a mean by up to 0.3 on the topics and 0.06 on imdb-6m ([log](log.md)).
  Some settings were searched by both factors. Where the other one found a rate with a lower held-back loss, the
  verdict at that rate follows (*at best rates*); such a setting has had more trials than the one that it is compared
  with. In the tables of section "In short" a star marks a verdict that this changes.
- Nothing is corrected for the number of claims: among twenty intervals, one is off by chance. Numbers in brackets count
  settings. An empty cell was not run.
- Three seeds, 0 to 2, unless a table says otherwise; where there are more, both sides of a difference have them.
  `--seeds 0,1,2,3,4,5` makes their runs. Seeds were added where fewer had left claims undecided, and the intervals do
  not allow for such repeated looks: a verdict with more than three seeds is off more often than one time in twenty.
- Settings with missing runs are left out (the commands make them too), and so are runs at rates that an earlier search,
  with shorter trials, chose.
- On another kind of processor, or with another number of threads, sums are made in another order, and a run ends
  slightly elsewhere. Of 145 runs that the file has twice 110 agree to the bit; the losses of 34 differ by less than
  0.002, of one (FZOO on imdb-6m) by 0.03.
- T is the number of local steps per round, u the share of the parameters that move, mixed:N a split in which N clients
  have one label each; `meerkat simulate --help` explains methods and other settings. DATA is SST-2 as GLUE has it,
  6,000 of its training rows and the 872 for validation, of which 300 are used, or another task's rows where a command
  names one; TEXT is 2,091 passages of Wikipedia. `--model` takes a model's folder: imdb-6m is a Llama of 5.8M
  parameters that we trained on film reviews and have not published, the others are what `scripts/get_model.py` makes of
  4-bit files. Other rows or text make other runs, which `--evidence` tells apart.
- What we make of all this is in the [log](log.md#the-papers-claims-on-real-language-models).
"""


@dataclass(frozen=True)
class Group:
    """Runs of one model on one task, in one type."""

    origin: Origin
    task: str
    dtype: str
    """Empty where types are compared."""
    model: str = field(compare=False)
    """The name of its folder, where it was first met."""

    @classmethod
    def of(cls, entry: Entry) -> "Group":
        """The group that a run belongs to."""
        return cls(entry.origin, entry.settings.get("task", ""), entry.settings.get("dtype", "auto"), entry.model)

    @property
    def name(self) -> str:
        """Model and task."""
        return f"{self.model}, {self.task}"


@dataclass(frozen=True)
class Verdict:
    """What paired differences say of a claim."""

    claim: str
    at: Setting
    """The axes that the two settings share."""
    setting: str
    """The same in words, and what is compared where it is no method."""
    against: str
    measure: str
    difference: float
    """Mean, above 0 where the claim is right; nan where a run diverged."""
    half: float
    """Of the 95% interval's width."""
    seeds: int
    as_well: bool = False
    """Whether a setting is claimed to do as well as another, not better."""

    @property
    def word(self) -> str:
        """holds, fails or undecided; the same, where both sides are the same runs; whether a run diverged."""
        if math.isnan(self.difference):
            return DIVERGED
        if self.difference == 0 and self.half == 0:
            return SAME
        low, high = self.difference - self.half, self.difference + self.half
        return "holds" if low > self._line else "fails" if high < self._line else "undecided"

    @property
    def _line(self) -> float:
        """What the difference has to be above, if the claim is right."""
        return -WORSE if self.as_well else 0.0

    @property
    def words(self) -> str:
        """The verdict, the difference, its interval, and what would settle it."""
        if self.seeds == 1:
            return "one seed"
        if self.word == DIVERGED:
            return DIVERGED
        if self.word == SAME:
            return "the same runs"
        low, high = self.difference - self.half, self.difference + self.half
        notes = [f"; {self.seeds} seeds"] * (self.seeds != USUAL_SEEDS)
        notes += [f"; needs {self._needed()}"] * (self.word == "undecided")
        return f"**{self.word}** {self.difference:+.3f} ({low:+.3f} to {high:+.3f}){''.join(notes)}"

    def _needed(self) -> str:
        deviation = self.half / quantile(self.seeds) * math.sqrt(self.seeds)
        for seeds in range(self.seeds + 1, MOST_SEEDS + 1):
            if abs(self.difference - self._line) > quantile(seeds) * deviation / math.sqrt(seeds):
                return f"{seeds} seeds"
        return f"more than {MOST_SEEDS} seeds"


def quantile(seeds: int) -> float:
    """Of a mean over so many seeds."""
    freedom = seeds - 1
    return T975.get(freedom, 1.96 + 2.37 / freedom + 2.82 / freedom**2)


@dataclass(frozen=True)
class Block:
    """What one comparison says of one group."""

    group: Group
    lines: Sequence[Line]
    verdicts: Mapping[str, Sequence[Verdict]]
    """By study."""
    at_best_rates: Mapping[str, Sequence[Verdict]] = field(default_factory=dict)
    """By study: the same with each setting at its best rate of all searches, ours and other comparisons'."""

    @property
    def parameters(self) -> int:
        """Of the model, without adapters."""
        return min((int(s["params_total"]) for line in self.lines for s in line.summaries if s), default=0)

    def otherwise(self, study: str, verdict: Verdict) -> Verdict | None:
        """A verdict at the best rates of all searches, where it is another."""
        for other in self.at_best_rates.get(study, ()):
            if (other.claim, other.setting, other.against) == (verdict.claim, verdict.setting, verdict.against):
                return None if other.words == verdict.words else other
        return None

    def line(self, study: Study, setting: Setting) -> Line | None:
        """A setting's runs, if they are there."""
        return next((one for one in self.lines if one.study.name == study.name and one.setting == setting), None)


def blocks(comparison: Comparison, file: Path, searches: Sequence[Search] = ()) -> list[Block]:
    """Every group's share of a comparison, the smallest model first.

    Args:
        comparison: what is compared.
        file: the runs.
        searches: those of other comparisons.
    """
    made, programs = [], {tuple(run[name] for name in _OF_A_PROGRAM) for run in _of_programs(file.parent)}
    groups: Iterable[Group] = map(Group.of, read(file))
    if any("dtype" in study.axes for study in comparison.studies):
        assert all("dtype" in study.axes for study in comparison.studies), (
            "types are compared in all studies or in none"
        )
        groups = (replace(group, dtype="") for group in groups)
    for group in dict.fromkeys(groups):
        lines = list(_lines(comparison, file, group, [comparison.search]))
        enough = {
            study.name
            for study in comparison.studies
            if _is_compared(study, lines)
            or (group.model, *(study.shared.get(name) for name in _OF_A_PROGRAM[1:])) in programs
        }
        if lines := [line for line in lines if line.study.name in enough]:
            at_best = [
                line
                for line in _lines(comparison, file, group, [comparison.search, *searches])
                if line.study.name in enough
            ]
            made.append(Block(group, lines, _all_verdicts(comparison, lines), _all_verdicts(comparison, at_best)))
    return sorted(made, key=lambda block: (block.parameters, block.group.task))


_OF_A_PROGRAM = ("model", "partition", "clients", "batch_size")
"""What runs of a peer's program and of ours have in common where they are compared."""


def _is_compared(study: Study, lines: Sequence[Line]) -> bool:
    """Whether enough of a study is there to be shown: comparisons have runs in common, and one of several settings, or
    one of several lengths, compares nothing.
    """
    settings = [line.setting for line in lines if line.study.name == study.name]
    lengths = {setting["rounds"] for setting in settings if "rounds" in setting}
    return len(settings) >= min(2, len(study.settings())) and len(lengths) >= min(2, len(study.axes.get("rounds", ())))


def _lines(comparison: Comparison, file: Path, group: Group, searches: Sequence[Search]) -> Iterator[Line]:
    """The settings whose runs of all the comparison's seeds are there, with those of further seeds that are.

    A rate that is searched for is the best of all these searches that are there.
    """
    evidence, own = Evidence(file, group.origin), {"task": group.task} | ({"dtype": group.dtype} if group.dtype else {})
    for study in comparison.studies:
        for setting in study.settings():

            def run_of(seed: int, study: Study = study, setting: Setting = setting) -> RunConfig:
                return without_idle(study.config(setting, seed)).model_copy(update=own)

            tried = searches if study.searches(setting) else [None]
            known = [
                _known(map(run_of, _seeds(comparison)), len(comparison.seeds), search, evidence) for search in tried
            ]
            if not (complete := [one for one in known if one and any(outcome.summary for outcome in one[1])]):
                continue
            rates, outcomes = min(complete, key=lambda one: np.nanmin([loss for _, loss in one[0]] or [0.0]))
            yield Line(
                study=study,
                setting=setting,
                rates=tuple(rates),
                lrs=tuple(outcome.lr for outcome in outcomes),
                better=Classification.scores,
                runs=tuple(ROOT / "runs" / str(i) for i in range(len(outcomes))),
                summaries=tuple(outcome.summary for outcome in outcomes),
            )


def _known(
    configs: Iterable[RunConfig], at_least: int, search: Search | None, evidence: Evidence
) -> tuple[list[tuple[float, float]], list[Outcome]] | None:
    """A setting's search, and its runs of as many seeds as are there; None where they are fewer."""
    known, so_far = None, list[RunConfig]()
    for config in configs:
        so_far.append(config)
        if len(so_far) >= at_least:
            if (more := known_line(so_far, search, evidence)) is None:
                break
            known = more
    return known


def _seeds(comparison: Comparison) -> list[int]:
    """The comparison's seeds, and further ones."""
    return [*comparison.seeds, *(seed for seed in range(MOST_SEEDS) if seed not in comparison.seeds)]


def _all_verdicts(comparison: Comparison, lines: Sequence[Line]) -> dict[str, list[Verdict]]:
    """What every study's lines say of its claims, each pair on as many seeds as both have."""
    as_well = {check.claim for study in comparison.studies for check in study.check if check.equal}
    verdicts: dict[str, dict[tuple[str, ...], Verdict]] = {}
    for count in sorted({len(line.runs) for line in lines}, reverse=True):
        first = [
            replace(line, lrs=line.lrs[:count], runs=line.runs[:count], summaries=line.summaries[:count])
            for line in lines
        ]
        of_as_many = [line for line in first if len(line.runs) == count]
        with_seeds = comparison.model_copy(update={"seeds": _seeds(comparison)[:count]})
        for study in results(with_seeds, of_as_many, ROOT)["studies"]:
            of_study = verdicts.setdefault(study["name"], {})
            for verdict in (v for check in study["checks"] for v in _verdicts(check, count, as_well)):
                of_study.setdefault((verdict.claim, verdict.setting, verdict.against), verdict)
    return {study.name: list(verdicts[study.name].values()) for study in comparison.studies if study.name in verdicts}


def _verdicts(check: Mapping[str, Any], seeds: int, as_well: Collection[str]) -> Iterator[Verdict]:
    for pair in check["differences"]:
        sides = {axis: str(value) for axis, value in pair["setting"].items() if " against " in str(value)}
        at = {axis: value for axis, value in pair["setting"].items() if axis not in sides}
        compared = in_words({axis: side for axis, side in sides.items() if axis != "method"})
        error = math.nan if pair["se"] is None else pair["se"]
        yield Verdict(
            claim=check["claim"],
            at=at,
            setting=", ".join(filter(None, [in_words(at), compared])),
            against=next(iter(sides.values())).split(" against ")[1],
            measure=check["measure"],
            difference=math.nan if pair["se"] is None else pair["mean"],
            half=quantile(seeds) * error,
            seeds=seeds,
            as_well=check["claim"] in as_well,
        )


def in_words(setting: Setting) -> str:
    """A setting, briefly."""
    names = {"local_steps": "T = ", "density": "u = ", "partition": "", "method": ""}
    return ", ".join(f"{names.get(axis, axis + ' ')}{value}" for axis, value in setting.items())


# --- words ----------------------------------------------------------------------------------------


def page(claims: Path, evidence: Path) -> str:
    """The page; pictures are drawn into the folder of evidence.

    Args:
        claims: a folder of comparisons' files.
        evidence: a folder with runs.csv, the runs of all of them.
    """
    parts, overview, every, models = [], list[str](), list[Block](), dict[Group, Block]()
    of_peers = None
    comparisons = {toml: read_comparison(toml, {}) for toml in claims.glob("*.toml")}
    for toml, comparison in sorted(comparisons.items(), key=lambda item: item[1].title):
        searches = [other.search for other in comparisons.values() if other.search != comparison.search]
        if not (of_models := blocks(comparison, evidence / "runs.csv", searches)):
            continue
        every += of_models
        for block in of_models:
            models |= {one.group: one for one in _by_type(block) if one.group not in models or block.group.dtype}
        overview += _overview(comparison, of_models)
        parts += [f"## {comparison.title}", _commands(toml, of_models)]
        parts += [part for study in comparison.studies for part in _study(study, of_models)]
        parts += draw_sizes(comparison.studies[0].name, of_models, evidence / f"{toml.stem}.png")
        parts += draw_map(comparison, of_models, evidence / f"{toml.stem}-map.png")
        if toml.stem == "peers":
            of_peers = len(parts)
    of_peers = len(parts) if of_peers is None else of_peers
    parts[of_peers:of_peers] = _peers(evidence, every)
    head = ["model", "parameters", "task", "accuracy before", "loss before", "type"]
    by_size = sorted(models.values(), key=lambda block: (block.parameters, block.group.task, block.group.dtype))
    about = table(head, map(_about, by_size))
    rates = _measured_rates(evidence, [block.group for block in by_size])
    words = [verdict.word for block in every for of_study in block.verdicts.values() for verdict in of_study]
    words = [word for word in words if word not in (SAME, DIVERGED)]
    decided = sum(word != "undecided" for word in words)
    count = f"{len(words)} intervals, some of them in two sections; {decided} decide something."
    return (
        "\n\n".join(
            [
                *(INTRODUCTION.strip(), about, "## In short", count, *overview, *parts),
                *(*rates, *_masks(evidence)),
            ]
        )
        + "\n"
    )


def _by_type(block: Block) -> Iterator[Block]:
    """The block itself, or one for each of the types that it compares."""
    if block.group.dtype:
        yield block
        return
    for dtype in dict.fromkeys(line.setting["dtype"] for line in block.lines):
        lines = [line for line in block.lines if line.setting["dtype"] == dtype]
        yield Block(replace(block.group, dtype=dtype), lines, {})


def table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def _about(block: Block) -> list[str]:
    first = next(s for line in block.lines for s in line.summaries if s)
    group, before = block.group, first["scores_before"]
    scores = [f"{before[name]:.3f}" for name in ("accuracy", "loss")]
    return [group.model, f"{block.parameters:,}", group.task, *scores, group.dtype]


def _overview(comparison: Comparison, of_models: Sequence[Block]) -> Iterator[str]:
    """Each claim's verdicts on every model, where something is claimed."""
    claims = dict.fromkeys(check.claim for study in comparison.studies for check in study.check)
    rows = []
    for claim in claims:
        cells = []
        for block in of_models:
            words = [
                verdict.word + r"\*" * (other is not None and other.word != verdict.word)
                for study, of_study in block.verdicts.items()
                for verdict, other in ((one, block.otherwise(study, one)) for one in of_study if one.claim == claim)
            ]
            cells.append(_counted(words))
        if any(cells):
            rows.append([claim, *cells])
    if rows:
        yield table([comparison.title, *(block.group.name for block in of_models)], rows)


def _counted(words: Sequence[str]) -> str:
    order = ("holds", "fails", "undecided", SAME, DIVERGED)
    counts = {
        word: words.count(word) for word in (one + star for one in order for star in ("", r"\*")) if word in words
    }
    return ", ".join(f"{word} ({count})" if len(words) > 1 else word for word, count in counts.items())


def _commands(toml: Path, of_models: Sequence[Block]) -> str:
    """What makes each group's runs, with extensions as the file's comment has them; what it says itself is no flag."""
    given, lines = toml.read_text(encoding="utf-8"), []
    for group in (block.group for block in of_models):
        flags = [] if group.model == "embedded" else [f"--model {group.model} --data DATA --text TEXT"]
        flags += re.findall(r"--extension \S+", given)
        for name in ("task", "dtype"):
            value = getattr(group, name)
            if f'{name} = "{value}"' not in given and value not in ("", "auto"):
                flags.append(f"--{name} {value}")
        alone = sum(group.model == other.group.model for other in of_models) == 1
        name = group.model if alone else f"{group.model}-{group.task}"
        files = f"--evidence docs/evidence/runs.csv --out runs/{toml.stem}-{name}"
        lines.append(f"    meerkat compare examples/claims/real/{toml.name} {' '.join([*flags, files])}")
    return "\n".join(lines)


def _study(study: Study, of_models: Sequence[Block]) -> Iterator[str]:
    of_study = [block for block in of_models if any(line.study.name == study.name for line in block.lines)]
    if not of_study:
        return
    yield f"### {study.title or study.name}"
    if study.note:
        yield study.note
    yield (
        "Accuracy and loss on validation rows, mean and standard deviation over seeds; the rate. These runs alone: "
        f"`--studies {study.name}`."
    )
    rows = [
        [in_words(setting), *(_cell(block.line(study, setting)) for block in of_study)] for setting in study.settings()
    ]
    yield table(["setting", *(block.group.name for block in of_study)], (row for row in rows if any(row[1:])))
    yield from _bytes(study, of_study)
    yield from _selection(study, of_study)
    yield from _differences(study, of_study)


def _bytes(study: Study, of_study: Sequence[Block]) -> Iterator[str]:
    """What a client sends and receives until runs of some length are so much more accurate than before."""
    if "rounds" not in study.axes:
        return
    shortest: dict[str, dict[Group, list[str]]] = {}
    for setting in sorted(study.settings(), key=lambda setting: setting["rounds"]):
        rest = in_words({axis: value for axis, value in setting.items() if axis != "rounds"})
        for block in of_study:
            if line := block.line(study, setting):
                cells = shortest.setdefault(rest, {}).setdefault(block.group, [""] * len(GAINS))
                summaries = [summary for summary in line.summaries if summary]
                if len(summaries) < len(line.summaries):
                    continue
                lengths = [{**setting, "rounds": rounds} for rounds in study.axes["rounds"]]
                only = ", the only length tried" * (sum(map(partial(_is_there, block, study), lengths)) == 1)
                gain = mean(s["scores"]["accuracy"] - s["scores_before"]["accuracy"] for s in summaries)
                sent = mean((s["payload_bytes_up"] + s["payload_bytes_down"]) / s["clients"] for s in summaries)
                said = f"{sent:,.0f} ({setting['rounds']} round{'s' * (setting['rounds'] > 1)}{only})"
                cells[:] = [
                    cell or (said if round(gain, 9) >= more else "") for cell, more in zip(cells, GAINS, strict=True)
                ]
    yield (
        "Bytes of payload, in both directions together, that a client has sent and received at the end of the "
        "shortest runs whose mean accuracy is so much above that before."
    )
    rows = [
        [
            rest,
            f"+{more:g}",
            *(of_rest[block.group][i] or "not reached" if block.group in of_rest else "" for block in of_study),
        ]
        for rest, of_rest in shortest.items()
        for i, more in enumerate(GAINS)
    ]
    yield table(["setting", "accuracy", *(block.group.name for block in of_study)], rows)
    if "method" in study.axes:
        yield "For comparison: what a round costs in which a client sends and receives weights, in float32."
        yield table(["what is sent", *(block.group.name for block in of_study)], _one_round(of_study))


def _is_there(block: Block, study: Study, setting: Setting) -> bool:
    return block.line(study, setting) is not None


def _one_round(of_study: Sequence[Block]) -> Iterator[list[str]]:
    """Bytes of a round in which weights travel."""
    columns = [[s for line in block.lines for s in line.summaries if s] for block in of_study]
    yield ["all parameters", *(f"{2 * min(s['dense_bytes_per_client_round'] for s in column):,}" for column in columns)]
    kinds: dict[str, Callable[[Mapping[str, Any]], bool]] = {
        "all but embeddings": lambda s: s["method"] == "fo-fedavg" and 2 * s["params_masked"] > s["params_total"],
        "the mask's entries": lambda s: s["method"] == "meerkat",
        "LoRA's adapters": lambda s: s["method"] == "lora-fedzo",
    }
    for words, is_kind in kinds.items():
        moving = [{s["params_masked"] for s in column if is_kind(s)} for column in columns]
        if any(moving):
            yield [words, *(f"{8 * min(of_model):,}" if of_model else "" for of_model in moving)]


def _differences(study: Study, of_study: Sequence[Block]) -> Iterator[str]:
    """What each claim's paired differences are on every model."""
    cells: dict[tuple[str, str, str], dict[Group, str]] = {}
    for check in study.check:
        for block in of_study:
            for verdict in block.verdicts.get(study.name, ()):
                if verdict.claim == check.claim:
                    key = verdict.claim, verdict.setting, verdict.against
                    other = block.otherwise(study.name, verdict)
                    also = "" if other is None else f"; at best rates {other.words}"
                    cells.setdefault(key, {})[block.group] = verdict.words + also
    if cells:
        yield "Differences, each with its 95% interval."
        rows = ([*key[:2], *(of_key.get(block.group, "") for block in of_study)] for key, of_key in cells.items())
        yield table(["claim", "at", *(block.group.name for block in of_study)], rows)


def _selection(study: Study, of_study: Sequence[Block]) -> Iterator[str]:
    """Whom Meerkat-vp stopped early, where a study has it."""
    rows = []
    for setting in study.settings():
        lines = [block.line(study, setting) for block in of_study]
        if setting.get("method") == "meerkat-vp" and any(lines):
            rest = {axis: value for axis, value in setting.items() if axis != "method"}
            rows.append([in_words(rest), *map(_stopped, lines)])
    if rows:
        yield (
            "Clients that Meerkat-vp stopped, all seeds together: of those with one label, of the others. Calibrations "
            "of one seed differ only by rounding between rows, which now and then moves a borderline client."
        )
        yield table(["setting", *(block.group.name for block in of_study)], rows)


def _stopped(line: Line | None) -> str:
    counts = np.zeros(4, np.int64)
    for summary in line.summaries if line else ():
        if summary:
            extreme, stopped = set(summary["extreme_clients"]), set(summary["early_stopped_clients"])
            others = summary["clients"] - len(extreme)
            counts += [len(stopped & extreme), len(extreme), len(stopped - extreme), others]
    right, extremes, wrong, others = counts
    return f"{right} of {extremes}, {wrong} of {others}" if line else ""


def _cell(line: Line | None) -> str:
    if line is None:
        return ""
    finished = [summary["scores"] for summary in line.summaries if summary]
    if not finished:
        return "diverged"
    shown = [_spread([scores[name] for scores in finished]) for name in ("accuracy", "loss")]
    tried = [rate for rate, _ in line.rates]
    edge = {max(tried): "; the highest rate tried", min(tried): "; the lowest rate tried"} if tried else {}
    lost, seeds = len(line.summaries) - len(finished), len(line.summaries)
    worse = sum(s["scores"]["loss"] > s["scores_before"]["loss"] for s in line.summaries if s)
    notes = [f"; {seeds} seed{'s' * (seeds != 1)}"] * (seeds != USUAL_SEEDS) + [f"; {lost} diverged"] * bool(lost)
    notes += [f"; {worse} ended above the start"] * bool(worse)
    return f"{'; '.join(shown)}; {line.lr:g}{edge.get(line.lr, '')}{''.join(notes)}"


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _measured_rates(evidence: Path, order: Sequence[Group]) -> Iterator[str]:
    """The rate that `--lr auto` measures, at which every search begins, beside the best of the search."""
    searches: dict[str, dict[tuple[Group, str], dict[float, tuple[bool, float]]]] = {}
    for entry in read(evidence / "runs.csv"):
        if "held_back" in entry.settings:
            defaults = {name: RunConfig.model_fields[name].default for name in _ALWAYS_SAID}
            fixed = defaults | dict(entry.settings)
            name = in_words({axis: fixed[axis] for axis in _OF_A_SEARCH if axis in fixed})
            column = Group.of(entry), f"{fixed['clients']} clients of {fixed['batch_size']}"
            loss = math.inf if entry.outcome.summary is None else entry.outcome.summary["scores"]["loss"]
            trials = searches.setdefault(name, {}).setdefault(column, {})
            trials[entry.outcome.lr] = ("lr" not in entry.settings, loss)
    met = dict.fromkeys(column for of_columns in searches.values() for column in of_columns)
    columns = sorted((column for column in met if column[0] in order), key=lambda column: order.index(column[0]))
    rows = [
        [name, *(_beside_the_best(of_columns.get(column, {})) for column in columns)]
        for name, of_columns in sorted(searches.items())
    ]
    if rows := [row for row in rows if any(row[1:])]:
        yield "## The measured rate beside a search's"
        yield (
            "Every search begins at the rate that `--lr auto` measures, and tries its neighbours, on held-back rows, "
            "with one seed. Each cell: the best rate over the measured one; how much higher the held-back loss is at "
            "the measured one than at the best."
        )
        yield table(["setting", *(f"{group.name}, {group.dtype}, {form}" for group, form in columns)], rows)


_OF_A_SEARCH = (
    *("method", "local_steps", "rounds", "density", "weights", "partition"),
    *("update_rule", "directions", "estimator"),
)
"""What searches of one column differ in."""
_ALWAYS_SAID = ("method", "local_steps", "clients", "batch_size")
"""Settings that are shown at their defaults too."""


def _beside_the_best(trials: Mapping[float, tuple[bool, float]]) -> str:
    measured = [lr for lr, (is_measured, _) in trials.items() if is_measured]
    if not measured or len(trials) < 3:
        return ""
    best = min(trials, key=lambda lr: trials[lr][1])
    return f"{best / measured[0]:.2g}; {trials[measured[0]][1] / trials[best][1] - 1:+.0%}"


def _masks(evidence: Path) -> Iterator[str]:
    """How concentrated sensitivity is, and in which layers the most sensitive entries lie."""
    rows = []
    for file in evidence.glob("mask-*.json"):
        about = json.loads(file.read_text(encoding="utf-8"))
        shares, of_all = np.array(json.loads(about["concentration"])).T
        top, next_ = np.interp(np.log([1e-3, 1e-2]), np.log(shares), of_all)
        kinds, layers = dict[str, int](), dict[int, int]()
        for name, count in about["by_tensor"].items():
            path = name.split(".")
            kind = path[-2]
            kinds[kind] = kinds.get(kind, 0) + count
            if "layers" in path:
                layer = int(path[path.index("layers") + 1])
                layers[layer] = layers.get(layer, 0) + count
        n, ends = about["params_masked"], layers[0] + layers[max(layers)]
        most = sorted(kinds, key=lambda kind: -kinds[kind])[:3]
        said = ", ".join(f"{kind} {kinds[kind] / n:.2f}" for kind in most)
        ratio = (top / 1e-3) / ((next_ - top) / 9e-3)
        cells = [file.stem.removeprefix("mask-"), f"{ratio:.3g}", f"{top:.2f}", said, f"{ends / n:.2f}"]
        rows.append((about["params_total"], [*cells, f"{2 / (max(layers) + 1):.2f}"]))
    if rows:
        yield "## Where the most sensitive entries are"
        yield (
            "Among the parameters that may move (all but embeddings), on Wikipedia's or the embedded model's text. The "
            "paper: the top 0.1% have 52 times the mean squared gradient of the 0.1% to 1% tier."
        )
        made = "--out runs/mask.safetensors --json > docs/evidence/mask-MODEL.json"
        yield f"    meerkat mask --model MODEL --text TEXT {made}"
        head = ["model", "mean square of the top 0.1% over that of the 0.1% to 1% tier", "their share of all"]
        head += ["the kinds of tensor with most of them", "in the first and the last layer", "of all layers these are"]
        yield table(head, (cells for _, cells in sorted(rows)))


def _peers(evidence: Path, every: Sequence[Block]) -> Iterator[str]:
    """What peers' own programs reach, at the rate of the lowest held-back loss, and Meerkat in the same form."""
    runs, rows = _of_programs(evidence), []
    for form in dict.fromkeys(map(_form, runs)):
        of_form = {(run["lr"], run["seed"], run["held_back"]): run for run in runs if _form(run) == form}.values()
        trials = {run["lr"]: run["scores"]["loss"] for run in of_form if run["held_back"]}
        lr = min(trials, key=lambda rate: math.inf if math.isnan(trials[rate]) else trials[rate], default=None)
        if seeds := [run for run in of_form if not run["held_back"] and run["lr"] == lr]:
            shown = [_spread([run["scores"][name] for run in seeds]) for name in ("accuracy", "loss")]
            rows.append([*form, f"{lr:g}", f"{len(trials)}", *shown, *_meerkat_beside(seeds, every)])
    if rows:
        yield "### DeComFL's, HiSo's and MeZO's own programs"
        yield (
            "All parameters in float32, on the same rows, after 3,840 forward passes of a row, as above. "
            "They train on their own template and are judged by our evaluation; rates were tried by hand, on held-back "
            "rows. MeZO has all rows at one site. [What is run of each](../benchmarks/peers/README.md). Beside them "
            "Meerkat in the same form, from above: weighted by examples, with the rate of its search. Differences "
            "are paired by seed, and above 0 where Meerkat's loss is lower."
        )
        options = "--model MODEL --data DATA --lr LR [--held-back 0.1] [--seed N]"
        commands = f"decomfl.py CHECKOUT {options} [--hiso] [--iid]", f"mezo.py CHECKOUT {options}"
        yield "\n".join(f"    python benchmarks/peers/{one} >> docs/evidence/programs.jsonl" for one in commands)
        head = [
            "program",
            "model",
            "split",
            "clients, rounds",
            "rate",
            "rates tried",
            "accuracy",
            "loss",
            "Meerkat: accuracy; loss",
            "how much lower Meerkat's loss is",
        ]
        yield table(head, rows)


def _meerkat_beside(runs: Sequence[Mapping[str, Any]], every: Sequence[Block]) -> Iterator[str]:
    """Meerkat's scores in the form of a peer's runs, and the paired difference in loss; empty where it was not run."""
    form = {name: runs[0][name] for name in ("clients", "batch_size", "rounds", "partition")}
    form |= {"method": "meerkat", "local_steps": 1, "weights": "examples"}
    if form["clients"] == 1:
        form["partition"] = "iid"
    for block in every:
        for line in block.lines if block.group.model == runs[0]["model"] else ():
            said = {"weights": "examples", **line.study.shared, **line.setting, **(line.summaries[0] or {})}
            if block.group.dtype == "float32" and all(said[name] == value for name, value in form.items()):
                losses = {s["seed"]: s["scores"]["loss"] for s in line.summaries if s}
                lower = [run["scores"]["loss"] - losses[run["seed"]] for run in runs if run["seed"] in losses]
                yield _cell(line)
                half = quantile(len(lower)) * stdev(lower) / math.sqrt(len(lower)) if len(lower) > 1 else math.nan
                yield Verdict("", {}, "", "", "loss", mean(lower), half, len(lower)).words if lower else ""
                return
    yield from ("", "")


def _of_programs(evidence: Path) -> list[Mapping[str, Any]]:
    """Runs of peers' own programs."""
    file = evidence / "programs.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _form(run: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return (
        run["program"],
        run["model"],
        run["partition"],
        f"{run['clients']} of {run['batch_size']} rows, {run['rounds']}",
    )


# --- pictures -------------------------------------------------------------------------------------


def draw_sizes(study: str, of_models: Sequence[Block], to: Path) -> Iterator[str]:
    """Draw one study's differences in loss over the models' sizes, where there are several; gives what shows them."""
    points: dict[str, list[tuple[Block, Verdict]]] = {}
    drawn = []
    for block in of_models:
        known = [v for v in block.verdicts.get(study, ()) if v.measure == "loss" and v.word not in (SAME, DIVERGED)]
        drawn += [block] * bool(known)
        for verdict in known:
            against = [f"against {verdict.against}"] * (" against " not in verdict.setting)
            name = ", ".join(filter(None, [*against, verdict.setting]))
            points.setdefault(name, []).append((block, verdict))
    if len({block.parameters for block in drawn}) < 2:
        return
    with drawing(8.8, 3.8) as (figure, axes):
        axes.axhline(0, color=GREY, lw=1)
        shown = [verdict for of_name in points.values() for _, verdict in of_name]
        if any(verdict.as_well for verdict in shown):
            axes.axhline(-WORSE, color=GREY, lw=1, ls="--")
        for i, (name, of_name) in enumerate(points.items()):
            places = [drawn.index(block) + 0.7 * ((i + 0.5) / len(points) - 0.5) for block, _ in of_name]
            means, halves = [v.difference for _, v in of_name], [v.half for _, v in of_name]
            look: dict[str, Any] = {
                "color": CYCLE[i % len(CYCLE)],
                "marker": MARKERS[(i + i // len(CYCLE)) % len(MARKERS)],
                "ls": "",
            }
            axes.errorbar(places, means, halves, label=name, capsize=2, **look)
        axes.set(xlabel="model, by its number of parameters", ylabel="loss: how much lower the first is")
        names = [f"{_short(block)}\n{block.group.task}, {block.parameters / 1e6:.3g}M" for block in drawn]
        axes.set_xticks(range(len(names)), labels=names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.grid(visible=False, axis="x")
        axes.set_yscale("symlog", linthresh=0.1)
        most = max([1.0, *(abs(verdict.difference) + verdict.half for verdict in shown)])
        sizes = [size for size in (0.05, 0.1, 0.3, 1, 3, 10) if size <= most]
        ticks = [*(-size for size in sizes), 0, *sizes]
        axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        _save(figure, to)
    yield f"![How much lower the loss is, by size of the model](evidence/{to.name})"
    yield (
        "Above the line the first of the two named is better; a claim to do as well allows for 0.05 below it, where a "
        "dashed line stands. Bars are 95% intervals; the axis is linear between -0.1 and 0.1."
    )


def _short(block: Block) -> str:
    """A model's name, as there is room for in a picture."""
    return block.group.model.removesuffix("-Instruct")


def draw_map(comparison: Comparison, of_models: Sequence[Block], to: Path) -> Iterator[str]:
    """Draw where Meerkat-vp ends at a lower loss than Meerkat, and where at a higher, by how many clients are extreme.

    Gives the words that show it.
    """
    cells: dict[tuple[int, str, str], dict[tuple[str, str], Verdict]] = {}
    for study in comparison.studies:
        claims = {check.claim for check in study.check if check.better == "meerkat-vp" and check.measure == "loss"}
        for block in of_models:
            for verdict in block.verdicts.get(study.name, ()):
                mixed = str(verdict.at.get("partition")).startswith("mixed:")
                compared = mixed and verdict.claim in claims and verdict.against == "meerkat"
                if compared and not math.isnan(verdict.difference):
                    rest = {axis: value for axis, value in verdict.at.items() if axis != "partition"}
                    rows = study.shared["batch_size"]
                    row = -rows, str(rest.get("missing_steps", "")), f"{in_words(rest)}, {rows} rows"
                    column = f"{_short(block)}, {block.group.task}", str(verdict.at.get("partition"))
                    cells.setdefault(row, {})[column] = verdict
    if not cells:
        return
    cells = dict(sorted(cells.items()))
    columns = list(dict.fromkeys(column for of_row in cells.values() for column in of_row))
    values = np.array([[getattr(of_row.get(c), "difference", math.nan) for c in columns] for of_row in cells.values()])
    with drawing(2.4 + 1.3 * len(columns), 0.8 + 0.42 * len(cells)) as (figure, axes):
        limit = float(np.nanmax(np.abs(values)))
        axes.imshow(values, cmap="RdBu", vmin=-1.6 * limit, vmax=1.6 * limit, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            if math.isnan(value):
                axes.text(x, y, "not run", ha="center", va="center", color=GREY)
            else:
                word = list(cells.values())[y][columns[x]].word
                shown = f"{value:+.2f}" + (f"\n{word}" if word != "undecided" else "")
                axes.text(x, y, shown, ha="center", va="center")
        axes.set_xticks(range(len(columns)), labels=["\n".join(column) for column in columns])
        axes.set_yticks(range(len(cells)), labels=[words for *_, words in cells])
        axes.grid(visible=False)
        _save(figure, to)
    yield f"![Where stopping early helps](evidence/{to.name})"
    yield (
        "How much lower the loss of Meerkat-vp is than Meerkat's: blue where stopping early helps, red where it hurts. "
        "*holds* and *fails* say that the 95% interval lies on one side of 0; without a word it is undecided."
    )


def _save(figure: Figure, to: Path) -> None:
    form: dict[str, Any] = {"format": "png", "metadata": {"Software": "meerkat"}, "facecolor": "white"}
    write_atomically(to, partial(figure.savefig, **form))


def main() -> None:
    """Write the page and its pictures."""
    write_text(ROOT / "docs" / "evidence.md", page(ROOT / "examples" / "claims" / "real", ROOT / "docs" / "evidence"))
    print("docs/evidence.md: written")


if __name__ == "__main__":
    main()
