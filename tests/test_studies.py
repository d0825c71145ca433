"""What a comparison's file and flags ask for: grids, layers, short forms, claims, and every refusal in one line."""

from pathlib import Path
from typing import Any

import pytest

from meerkat.comparison.studies import Comparison, read_comparison, spelled, with_studies
from meerkat.errors import MeerkatError

EXAMPLE = Path(__file__).parents[1] / "examples" / "claims" / "embedded.toml"


def read(tmp_path: Path, text: str, quick: bool = False, **given: Any) -> Comparison:
    file = tmp_path / "studies.toml"
    file.write_text(text)
    return read_comparison(file, given, quick)


def test_settings_are_the_product_of_the_axes_and_the_last_varies_fastest(tmp_path: Path) -> None:
    study = read(tmp_path, 'method = ["meerkat", "full-fedzo"]\nlocal_steps = [1, 2]\nclients = 4').studies[0]
    assert [tuple(setting.values()) for setting in study.settings()] == [
        ("meerkat", 1),
        ("meerkat", 2),
        ("full-fedzo", 1),
        ("full-fedzo", 2),
    ]
    config = study.config(study.settings()[3], seed=7)
    assert (config.method, config.local_steps, config.clients, config.seed) == ("full-fedzo", 2, 4, 7)


def test_without_axes_or_a_file_there_is_one_setting() -> None:
    comparison = read_comparison(None, {})
    assert comparison.seeds == [0, 1, 2]
    assert [study.settings() for study in comparison.studies] == [[{}]]


def test_total_steps_gives_every_local_steps_its_rounds_and_ten_points_of_a_curve(tmp_path: Path) -> None:
    study = read(tmp_path, "total_steps = 100\nlocal_steps = [1, 5, 50]").studies[0]
    configs = [study.config(setting, 0) for setting in study.settings()]
    assert [(c.rounds, c.eval_every) for c in configs] == [(100, 10), (20, 2), (2, 1)]
    given = read(tmp_path, "total_steps = 100\neval_every = 7").studies[0]
    assert given.config({}, 0).eval_every == 7


def test_numbers_in_quotes_are_numbers(tmp_path: Path) -> None:
    study = read(tmp_path, 'total_steps = "6"\nlocal_steps = ["1", 2]\ndensity = ["1e-1"]').studies[0]
    assert study.axes == {"local_steps": [1, 2], "density": [0.1]}
    assert study.config(study.settings()[1], 0).rounds == 3


def test_what_is_excluded_is_an_axis_only_as_a_list_of_lists(tmp_path: Path) -> None:
    one = read(tmp_path, 'exclude = ["norms", "embeddings"]').studies[0]
    assert one.settings() == [{}]
    assert one.config({}, 0).exclude == ("norms", "embeddings")
    two = read(tmp_path, 'exclude = [[], ["norms"]]').studies[0]
    assert [two.config(setting, 0).exclude for setting in two.settings()] == [(), ("norms",)]


def test_a_study_overrides_the_file_and_flags_override_both(tmp_path: Path) -> None:
    text = 'clients = 3\nbatch_size = 2\n[[study]]\nname = "a"\nclients = 4\n[[study]]\nname = "b"'
    a, b = (study.config({}, 0) for study in read(tmp_path, text, batch_size="8").studies)
    assert (a.clients, b.clients, a.batch_size, b.batch_size) == (4, 3, 8, 8)


def test_studies_can_be_taken_by_name_in_the_files_order(tmp_path: Path) -> None:
    comparison = read(tmp_path, "seeds = [3]\n" + "".join(f'[[study]]\nname = "{name}"\n' for name in "abc"))
    some = with_studies(comparison, ["c", "a"])
    assert ([study.name for study in some.studies], some.seeds) == (["a", "c"], [3])
    with pytest.raises(MeerkatError, match=r"no study is called 'd'; give a, b, c$"):
        with_studies(comparison, ["a", "d"])


def test_rounds_and_total_steps_override_each_other(tmp_path: Path) -> None:
    text = 'total_steps = 100\n[[study]]\nname = "a"\nlocal_steps = 5\n[[study]]\nname = "b"\nrounds = 3'
    assert [study.config({}, 0).rounds for study in read(tmp_path, text).studies] == [20, 3]
    assert [study.config({}, 0).rounds for study in read(tmp_path, text, rounds=7).studies] == [7, 7]
    assert [study.config({}, 0).rounds for study in read(tmp_path, text, total_steps=10).studies] == [2, 10]


CLAIMS = """
search = { factor = 3.0, trials = 5 }
quick = { seeds = [4], search = { trials = 3 } }
[[study]]
name = "a"
method = ["meerkat", "full-fedzo", "random-mask"]
local_steps = ["1", 10]
check = [
    { claim = "first", axis = "method", better = "meerkat", than = ["full-fedzo", "random-mask"] },
    { claim = "second", axis = "local_steps", equal = ["10", 1], where = { method = "full-fedzo" } },
]
quick = { method = ["meerkat", "random-mask"] }
"""


def test_the_quick_form_is_shorter_and_claims_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = read(tmp_path, CLAIMS)
    assert [check.claim for check in whole.studies[0].check] == ["first", "second"]
    assert whole.studies[0].check[1].equal == [10, 1]
    assert not capsys.readouterr().err
    quick = read(tmp_path, CLAIMS, quick=True)
    assert (quick.seeds, quick.search.trials, quick.search.factor) == ([4], 3, 3.0)
    (check,) = quick.studies[0].check
    assert (check.claim, check.than) == ("first", ["random-mask"])
    assert capsys.readouterr().err.strip().endswith("not checked, as its settings are left out: second")


def test_flags_take_claims_away_but_hide_no_wrong_one(tmp_path: Path) -> None:
    assert [check.claim for check in read(tmp_path, CLAIMS, local_steps=[1]).studies[0].check] == ["first"]
    with pytest.raises(MeerkatError, match="local_steps 11 is not among the study's: 1, 10"):
        read(tmp_path, CLAIMS.replace('["10", 1]', "[11, 1]"), local_steps=[1])


def test_the_papers_claims_can_be_read_in_both_forms() -> None:
    whole, quick = (read_comparison(EXAMPLE, {}, short) for short in (False, True))
    assert [study.name for study in whole.studies] == [study.name for study in quick.studies]
    for long, short in zip(whole.studies, quick.studies, strict=True):
        assert len(short.settings()) <= len(long.settings())
        assert short.total_steps < long.total_steps
    assert all(study.check for study in whole.studies[:3])


AXIS = '[[study]]\nname = "a"\nlocal_steps = [1, 2]\ncheck = [{ claim = "c", axis = "local_steps", '


SIX = ("clients", "local_steps", "directions", "batch_size", "micro_batch", "eval_every")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rounds = ", "not valid TOML"),
        ("round = 3", "round: unknown"),
        ("round = [3]", "round: unknown"),
        ("local_steps = []", "local_steps []: needs at least one value"),
        ('local_steps = [1, "a"]', "local_steps a: must be a valid integer"),
        ("local_steps = [[1, 2]]", "must be a valid integer"),
        ("local_steps = { a = 1 }", "must be a valid integer"),
        ('local_steps = ["2", 2]', "2 stands there twice"),
        ('method = ["meerkat", "sgd"]', "method sgd: must be 'meerkat'"),
        ("density = [0.1, 5]", "density 5: must be at most 1"),
        ("seed = 1", "takes 'seeds'"),
        ("seeds = 3", "seeds 3: must be a valid list"),
        ("seeds = []", "seeds []"),
        ("seeds = [0, -1]", "seeds.1 -1: must be at least 0"),
        ("seeds = [1, 1]", "each seed may stand there once"),
        ("total_steps = 10\nlocal_steps = [1, 4]", "must be a multiple of every local_steps, such as 4"),
        ("total_steps = -1", "total_steps -1"),
        ("total_steps = 0", "total_steps 0: must be at least 1"),
        ('feddyn_alpha = 0.1\nmethod = ["meerkat", "lora-fedzo"]', "feddyn_alpha 0.1: does nothing with method"),
        ("feddyn_alpha = [0.1, 0.001]", "feddyn_alpha 0.1: does nothing with method meerkat; use method feddyn"),
        ("total_steps = 10\nrounds = 5", "rounds and total_steps are given"),
        ("held_back = 0.3", "learning rates are chosen on held-back rows"),
        ("held_back = 0.3\nlr = ['search', 0.1]", "learning rates are chosen on held-back rows"),
        ("lr = 0", "lr 0: must be search, auto or a number above 0"),
        ("lr = [0.1, 0]", "lr 0: must be search, auto or a number above 0"),
        ("lr = 'best'", "lr best: must be search, auto or a number above 0"),
        ("server_optimizer = 'adam'\nupdate_rule = 'adam'", "server_optimizer: is an older name of update_rule"),
        ("quick = 3", "quick 3: must be a table"),
        ("search = { trials = 2 }", "search.trials 2"),
        ("search = { trial = 3 }", "search.trial: unknown"),
        ("study = [1, 2]", "studies are written [[study]]"),
        ('[study]\nname = "a"', "studies are written [[study]]"),
        ("[[study]]\nlocal_steps = 1", "name: missing"),
        ('[[study]]\nname = "a b"', "name a b: "),
        ('[[study]]\nname = "a"\n[[study]]\nname = "a"', "same name"),
        ('[[study]]\nname = "a"\nseeds = [1]', "'seeds' is for all studies alike"),
        (AXIS + "better = 1, than = [3] }]", "local_steps 3 is not among the study's: 1, 2"),
        (AXIS + "better = 1 }]", "needs either better and than, or equal"),
        (AXIS + "better = 1, than = [2], equal = [1, 2] }]", "needs either better and than, or equal"),
        (AXIS + "equal = [1] }]", "equal takes two values"),
        (AXIS + "equal = [1, 1] }]", "compares a value with itself"),
        (AXIS + "better = 1, than = [1] }]", "compares a value with itself"),
        (AXIS + "better = 1, than = [2], where = { clients = 3 } }]", "clients is no axis of the study"),
        (AXIS + "better = 1, than = [2], where = { local_steps = 1 } }]", "which is the axis"),
        ("\n".join(f"{name} = [1, 2, 3, 4, 5]" for name in SIX), "make 15,625 settings: at most 10,000"),
        (AXIS + "bettr = 1, than = [2] }]", "check.0.bettr: unknown"),
    ],
)
def test_what_cannot_be_compared_is_told_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(MeerkatError) as refused:
        read(tmp_path, text)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_setting_may_do_nothing_in_some_runs_and_a_file_s_own_in_all_that_flags_leave(tmp_path: Path) -> None:
    text = 'feddyn_alpha = 0.1\nmethod = ["meerkat", "feddyn"]'
    read(tmp_path, text)
    read(tmp_path, text, method=["meerkat"])
    read(tmp_path, '[[study]]\nname = "a"\n[[study]]\nname = "b"\nmethod = "feddyn"', feddyn_alpha="0.1")
    read(tmp_path, f'{text}\n[quick]\nmethod = ["meerkat"]', quick=True)
    with pytest.raises(MeerkatError, match=r"^feddyn_alpha 0\.1: does nothing with method meerkat"):
        read(tmp_path, text, method=["meerkat"], feddyn_alpha="0.1")
    with pytest.raises(MeerkatError, match=r"^config '.*': feddyn_alpha 0\.1: does nothing with method meerkat"):
        read(tmp_path, "feddyn_alpha = 0.1")


def test_a_short_form_needs_saying_what_it_is(tmp_path: Path) -> None:
    for ask in (lambda: read(tmp_path, "clients = 3", quick=True), lambda: read_comparison(None, {}, quick=True)):
        with pytest.raises(MeerkatError, match=r"--quick: needs a file with a \[quick\] table"):
            ask()


def test_a_rate_is_searched_for_unless_it_is_auto_or_a_number(tmp_path: Path) -> None:
    study = read(tmp_path, 'lr = ["search", "auto", "0.1"]').studies[0]
    assert study.axes == {"lr": ["search", "auto", 0.1]}
    assert [study.searches(setting) for setting in study.settings()] == [True, False, False]
    assert [study.config(setting, 0).lr for setting in study.settings()] == ["auto", "auto", 0.1]
    assert read(tmp_path, "").studies[0].searches({})
    for given in ("auto", 0.1):
        assert not read(tmp_path, 'lr = "search"', lr=given).studies[0].searches({})


def test_an_older_name_serves_as_an_axis_and_is_overridden_by_the_name_of_today(tmp_path: Path) -> None:
    check = 'check = [{ claim = "c", axis = "server_optimizer", better = "adam", than = ["sgd"] }]'
    text = f'[[study]]\nname = "a"\nserver_optimizer = ["sgd", "adam"]\n{check}'
    study = read(tmp_path, text).studies[0]
    assert study.axes == {"update_rule": ["sgd", "adam"]}
    assert study.check[0].axis == "update_rule"
    assert read(tmp_path, 'server_optimizer = "adam"', update_rule="momentum").studies[0].config({}, 0).update_rule == (
        "momentum"
    )


def test_masks_of_two_runs_are_told_apart() -> None:
    shown = [spelled({"mask": f"runs/{run}/mask.safetensors"})["mask"] for run in "ab"]
    assert shown == ["a/mask.safetensors", "b/mask.safetensors"]


def test_a_rate_that_is_given_leaves_held_back_rows_free(tmp_path: Path) -> None:
    study = read(tmp_path, "held_back = 0.3\nlr = 0.1").studies[0]
    assert study.config({}, 0).held_back == 0.3
