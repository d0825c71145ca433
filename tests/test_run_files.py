"""A run's files stay open: its lines are written even where no further file can be opened."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meerkat.record.run_folder import RunFolder


@contextmanager
def no_more_files() -> Iterator[None]:
    """No file can be opened until the end of the `with`; those that are open stay open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_metrics_and_events_need_no_further_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metric({"kind": "round", "round": 0})
    folder.append_event("arrived", client=0)
    with no_more_files():
        folder.append_metric({"kind": "round", "round": 1})
        folder.append_metric({"kind": "round", "round": 2}, sync=False)
        folder.append_event("left", client=0)
    folder.close()
    assert [metric["round"] for metric in folder.metrics()] == [0, 1, 2]
    assert [event["event"] for event in folder.events()] == ["arrived", "left"]


def test_metrics_that_were_rewritten_are_added_to(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open_files()
    folder.append_metric({"kind": "round", "round": 1})
    kept = folder.rewrite_metrics(lambda _: True, lambda metric: metric["round"], [{"kind": "round", "round": 0}])
    with no_more_files():
        folder.append_metric({"kind": "round", "round": 2})
    folder.close()
    assert [metric["round"] for metric in kept] == [0, 1]
    assert [metric["round"] for metric in folder.metrics()] == [0, 1, 2]
