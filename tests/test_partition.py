import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat.errors import MeerkatError
from meerkat.problems.partition import PARTITIONERS, ClientRows, Partition, partition

Rows = list[dict[str, Any]]

BALANCED: Rows = [{"label": i % 3, "site": f"site {i % 7}"} for i in range(120)]
SPECS = ["iid", "dirichlet:1", "single-label", "mixed:2", "column:site"]


@st.composite
def rows_and_clients(draw: st.DrawFn, most_clients: int = 6) -> tuple[Rows, int]:
    """Rows of one to four labels, as many of each as there are clients or more, in any order."""
    clients = draw(st.integers(1, most_clients))
    names = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
    labels = [name for name in names for _ in range(draw(st.integers(clients, clients + 12)))]
    return [{"label": label} for label in draw(st.permutations(labels))], clients


@st.composite
def balanced_rows_and_clients(draw: st.DrawFn) -> tuple[Rows, int]:
    """Rows of one to four labels, equally many of each."""
    clients, count, each = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(6, 20))
    return [{"label": label} for label in draw(st.permutations([*range(count)] * each))], clients


seeds = st.integers(0, 2**63)


def labels_of(rows: Rows, part: np.ndarray) -> list[int]:
    return [rows[i]["label"] for i in part]


def check_is_split(split: Partition, rows: Rows, clients: int, covers: bool = True) -> None:
    """Every client has rows, ascending; no row is held twice; all are held if the form says so."""
    assert len(split.rows) == clients
    assert all(len(part) for part in split.rows)
    assert all(part.dtype == np.int64 and part.tolist() == sorted(part.tolist()) for part in split.rows)
    dealt = [row for part in split.rows for row in part.tolist()]
    assert len(dealt) == len(set(dealt))
    assert set(dealt) <= set(range(len(rows)))
    assert len(dealt) == len(rows) or not covers


def same(one: Partition, other: Partition) -> bool:
    return one.extreme == other.extreme and [p.tolist() for p in one.rows] == [p.tolist() for p in other.rows]


# --- what every form keeps ---


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_a_split_is_a_function_of_the_seed(spec: str, seed: int) -> None:
    split = partition(spec, BALANCED, 5, seed)
    check_is_split(split, BALANCED, 5)
    assert same(split, partition(spec, [dict(row) for row in BALANCED], 5, seed))


@pytest.mark.parametrize("spec", ["iid", "dirichlet:1", "single-label", "mixed:2"])
def test_another_seed_gives_another_split(spec: str) -> None:
    splits = [partition(spec, BALANCED, 5, seed) for seed in range(6)]
    assert not any(same(splits[i], splits[j]) for i in range(6) for j in range(i))


@pytest.mark.parametrize("spec", SPECS)
def test_one_client_holds_rows_and_as_many_clients_as_rows_one_each(spec: str) -> None:
    rows = [{"label": 0, "site": i} for i in range(5)]
    spec = spec.replace("mixed:2", "mixed:1").replace("dirichlet:1", "dirichlet:1e6")
    [alone] = partition(spec, rows, 1, 0).rows
    assert alone.tolist() == [0, 1, 2, 3, 4]
    if not spec.startswith("dirichlet"):  # its shares need not leave each client one of five
        assert sorted(len(part) for part in partition(spec, rows, 5, 0).rows) == [1] * 5


# --- iid ---


@settings(deadline=None)
@given(rows_and_clients(), seeds)
def test_iid_deals_all_rows_evenly(given_: tuple[Rows, int], seed: int) -> None:
    rows, clients = given_
    split = partition("iid", rows, clients, seed)
    check_is_split(split, rows, clients)
    sizes = [len(part) for part in split.rows]
    assert max(sizes) - min(sizes) <= 1
    assert split.extreme == ()
    assert same(split, partition("iid", rows, clients, seed))


def test_iid_clients_hold_the_labels_in_their_overall_shares() -> None:
    rows: Rows = [{"label": int(i >= 2000)} for i in range(4000)]  # sorted: a split without a shuffle shows
    for part in partition("iid", rows, 4, 0).rows:
        assert 0.45 < np.mean(labels_of(rows, part)) < 0.55  # 3 standard deviations


# --- dirichlet ---


@settings(deadline=None)
@given(st.permutations([0, 1] * 20), st.integers(1, 3), st.floats(1, 100), seeds)
def test_dirichlet_covers_all_rows(labels: list[int], clients: int, alpha: float, seed: int) -> None:
    rows: Rows = [{"label": label} for label in labels]
    split = partition(f"dirichlet:{alpha}", rows, clients, seed)
    check_is_split(split, rows, clients)
    assert split.extreme == ()
    assert same(split, partition(f"dirichlet:{alpha}", rows, clients, seed))


def skew(rows: Rows, split: Partition) -> float:
    """Mean over the clients of the total-variation distance between their labels' shares and all rows'."""
    shares = [np.bincount(labels_of(rows, part), minlength=3) / len(part) for part in split.rows]
    overall = np.bincount([row["label"] for row in rows], minlength=3) / len(rows)
    return float(np.mean([np.abs(share - overall).sum() / 2 for share in shares]))


def test_dirichlet_draws_the_rows_of_a_label() -> None:
    rows: Rows = [{"label": 0}] * 200
    first, _ = partition("dirichlet:1e6", rows, 2, 0).rows
    assert 60 < np.mean(first) < 140  # not the first hundred


def test_a_smaller_a_makes_clients_more_skewed() -> None:
    rows: Rows = [{"label": i % 3} for i in range(900)]
    skews = [
        np.mean([skew(rows, partition(f"dirichlet:{a}", rows, 5, s)) for s in range(8)]) for a in (0.1, 1, 10, 1e4)
    ]
    assert skews[0] > skews[1] + 0.1 > skews[1] > skews[2] + 0.1 > skews[2] > skews[3] + 0.05
    assert skews[0] > 0.4
    assert skews[3] < 0.02


def test_dirichlet_shares_have_the_variance_of_the_distribution() -> None:
    """A label's share at one of K clients has variance (K - 1) / (K^2 (K A + 1))."""
    rows: Rows = [{"label": 0}] * 400
    shares = [len(part) / 400 for seed in range(300) for part in partition("dirichlet:2", rows, 3, seed).rows]
    assert np.mean(shares) == pytest.approx(1 / 3)
    assert np.var(shares) == pytest.approx(2 / (9 * 7), rel=0.15)


def test_a_dirichlet_split_that_leaves_a_client_empty_is_drawn_again() -> None:
    """With A = 0.2 and one label a single draw leaves one of four clients empty about half the time."""
    rows: Rows = [{"label": 0}] * 60
    for seed in range(40):
        check_is_split(partition("dirichlet:0.2", rows, 4, seed), rows, 4)


# --- single-label ---


@settings(deadline=None)
@given(rows_and_clients(), seeds)
def test_single_label_clients_hold_one_label_each(given_: tuple[Rows, int], seed: int) -> None:
    rows, clients = given_
    split = partition("single-label", rows, clients, seed)
    labels = sorted({row["label"] for row in rows})
    check_is_split(split, rows, clients, covers=clients >= len(labels))
    assert split.extreme == tuple(range(clients))
    assert [set(labels_of(rows, part)) for part in split.rows] == [{labels[k % len(labels)]} for k in range(clients)]
    assert same(split, partition("single-label", rows, clients, seed))


# --- mixed ---


@settings(deadline=None)
@given(balanced_rows_and_clients(), st.integers(1, 6), seeds)
def test_mixed_makes_the_first_clients_single_label_and_the_rest_iid(
    given_: tuple[Rows, int], single: int, seed: int
) -> None:
    rows, clients = given_
    single = min(single, clients)
    split = partition(f"mixed:{single}", rows, clients, seed)
    check_is_split(split, rows, clients, covers=single < clients)
    assert split.extreme == tuple(range(single))
    assert all(len(set(labels_of(rows, part))) == 1 for part in split.rows[:single])
    others = [len(part) for part in split.rows[single:]]
    assert max(others, default=0) - min(others, default=0) <= 1
    assert same(split, partition(f"mixed:{single}", rows, clients, seed))


def test_mixed_goes_round_the_labels_and_gives_all_clients_equally_many_rows() -> None:
    rows: Rows = [{"label": i * 3 // 2400} for i in range(2400)]
    split = partition("mixed:4", rows, 8, 3)
    assert [set(labels_of(rows, part)) for part in split.rows[:4]] == [{0}, {1}, {2}, {0}]
    assert [len(part) for part in split.rows] == [300] * 8
    for part in split.rows[4:]:  # iid over what is left: 200, 500 and 500
        assert np.bincount(labels_of(rows, part)) / 300 == pytest.approx([2 / 12, 5 / 12, 5 / 12], abs=0.1)


# --- column ---


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60), st.data())
def test_column_keeps_groups_together_and_clients_even(sites: list[str], data: st.DataObject) -> None:
    rows: Rows = [{"label": 0, "site": site} for site in sites]
    clients = data.draw(st.integers(1, len(set(sites))))
    split = partition("column:site", rows, clients, data.draw(seeds))
    check_is_split(split, rows, clients)
    holders = [{rows[i]["site"] for i in part} for part in split.rows]
    assert sum(map(len, holders)) == len(set(sites))
    sizes = [len(part) for part in split.rows]
    assert max(sizes) - min(sizes) <= max(sites.count(site) for site in sites)
    assert split.extreme == ()
    assert same(split, partition("column:site", rows, clients, 0))  # there is nothing to draw


def test_column_places_large_groups_first() -> None:
    rows = [{"label": 0, "site": site} for site in "abcdeeee"]
    assert [len(part) for part in partition("column:site", rows, 2, 0).rows] == [4, 4]


def test_column_takes_numbers_and_names_with_colons() -> None:
    rows = [{"label": 0, "a:b": value} for value in (3, 1, 3, 0, 1)]
    assert sorted(part.tolist() for part in partition("column:a:b", rows, 3, 0).rows) == [[0, 2], [1, 4], [3]]


# --- what is refused ---


@pytest.mark.parametrize(
    ("spec", "clients", "said"),
    [
        *((spec, 5, "must be one of iid, dirichlet:A") for spec in ("", "even", "IID", "iid:3", "single-label:2")),
        *((spec, 5, "must be one of iid, dirichlet:A") for spec in ("dirichlet", "dirichlet:", "mixed", "column:")),
        *((f"dirichlet:{a}", 5, "needs a number A above 0") for a in ("x", "0", "-1", "-0.0", "nan", "inf", "-inf")),
        *((f"mixed:{n}", 5, "needs a whole number N") for n in ("0", "-1", "1.5", "x", "nan")),
        ("mixed:6", 5, "'mixed:6': N must be 1 to the number of clients, 5"),
        ("dirichlet:0.00001", 5, "use a larger A, fewer clients or another --seed"),
        ("column:town", 5, "has no field 'town'"),
        ("column:site", 8, "use --clients 7 or fewer"),
        *((spec, 121, "at most the number of training rows, 120") for spec in SPECS),
        *((spec, 0, "0 clients: must be at least 1") for spec in SPECS),
        *((spec, -1, "-1 clients: must be at least 1") for spec in SPECS),
    ],
)
def test_what_cannot_be_split_is_refused_in_one_line(spec: str, clients: int, said: str) -> None:
    with pytest.raises(MeerkatError, match=re.escape(said)) as refusal:
        partition(spec, BALANCED, clients, 0)
    assert "\n" not in str(refusal.value)


def rare(common: int, few: int) -> Rows:
    return [{"label": 0}] * common + [{"label": 1}] * few


@pytest.mark.parametrize(
    ("spec", "rows", "clients", "said"),
    [
        ("single-label", rare(10, 1), 4, "label 1 has 1 rows for 2 single-label clients; use fewer clients"),
        ("mixed:4", rare(19, 1), 5, "label 1 has no rows left for client 3; use a smaller N"),
        ("column:site", [{"label": 0, "site": "a"}, {"label": 0}], 1, "training row 2 has no field 'site'"),
        ("column:site", [{"label": 0, "site": None}], 1, "training row 1 has no field 'site'"),
        ("iid", [], 1, "1 clients"),
    ],
)
def test_rows_that_cannot_be_split_so_are_refused(spec: str, rows: Rows, clients: int, said: str) -> None:
    with pytest.raises(MeerkatError, match=re.escape(said)) as refusal:
        partition(spec, rows, clients, 0)
    assert "\n" not in str(refusal.value)


# --- batches ---


def batches(client: ClientRows, steps: Sequence[int]) -> list[list[int]]:
    return [client.batch(step).tolist() for step in steps]


some_rows = st.lists(st.integers(0, 10**6), min_size=1, max_size=30, unique=True).map(sorted)


@settings(deadline=None)
@given(some_rows, st.integers(1, 40), seeds, st.integers(0, 9))
def test_every_epoch_goes_through_all_rows_once(rows: list[int], batch_size: int, seed: int, client: int) -> None:
    client_rows = ClientRows(client, np.array(rows), batch_size, seed)
    size = min(batch_size, len(rows))
    taken = batches(client_rows, range(-(-3 * len(rows) // size)))  # three epochs, and the rest of the last batch
    assert {len(batch) for batch in taken} == {size}
    stream = [row for batch in taken for row in batch]
    for epoch in range(3):
        assert sorted(stream[epoch * len(rows) : (epoch + 1) * len(rows)]) == rows


def test_a_batch_is_a_function_of_seed_client_and_step() -> None:
    def client(number: int = 1, seed: int = 7) -> ClientRows:
        return ClientRows(number, np.arange(100, 140), 16, seed)

    inorder = batches(client(), range(20))
    assert batches(client(), range(19, -1, -1))[::-1] == inorder
    assert batches(client(), [13]) == [inorder[13]]
    assert batches(client(number=2), range(20)) != inorder
    assert batches(client(seed=8), range(20)) != inorder


def test_each_epoch_has_an_order_of_its_own() -> None:
    client_rows = ClientRows(0, np.arange(16), 16, 0)
    orders = batches(client_rows, range(5))
    assert len({tuple(order) for order in [*orders, sorted(orders[0])]}) == 6


def test_a_late_batch_is_found_without_those_before_it() -> None:
    client_rows = ClientRows(0, np.arange(10), 4, 0)
    assert len(client_rows.batch(10**12)) == 4


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ([[0], [1]], "must give a Partition of 2 clients"),
        (Partition((np.array([0]),)), "must give a Partition of 2 clients"),
        (Partition((np.array([0]), np.array([], np.int64))), "leaves client 1 without a row"),
        (Partition((np.array([0]), np.array([0, 1]))), "must give each of 120 rows to one client at most"),
        (Partition((np.array([0]), np.array([120]))), "must give each of 120 rows to one client at most"),
        (Partition((np.array([-1]), np.array([1]))), "must give each of 120 rows to one client at most"),
    ],
)
def test_a_split_of_an_extension_is_checked(monkeypatch: pytest.MonkeyPatch, made: Any, said: str) -> None:
    monkeypatch.setitem(PARTITIONERS, "mine", lambda *_: made)
    with pytest.raises(MeerkatError, match=f"partition 'mine': {said}"):
        partition("mine", BALANCED, 2, 0)


@pytest.mark.parametrize("argument", ["nan", "-400", "inf", "x", "101"])
def test_the_example_of_a_partition_takes_a_number(argument: str) -> None:
    power_law = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "extending" / "partition.py"))["power_law"]
    with pytest.raises(MeerkatError, match="must be a number from 0 to 100"):
        power_law(argument, BALANCED, 2, 0)
    assert sum(map(len, power_law("0", BALANCED, 2, 0).rows)) == len(BALANCED)
