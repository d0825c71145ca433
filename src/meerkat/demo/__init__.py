"""The embedded model and data, so that a first run needs nothing else. Made by scripts/make_demo.py."""

from pathlib import Path

from meerkat.problems.tasks import Task
from meerkat.problems.tasks import load_task as load_task_file

HERE = Path(__file__).parent
MODEL = HERE / "model"
TEXT = HERE / "text.jsonl"
TASKS = {"topics": HERE / "data" / "topics", "reviews": HERE / "data" / "reviews"}
"""The embedded tasks' names and data folders."""
DEFAULT_TASK = "topics"


def load_task(name: str) -> Task:
    """An embedded task."""
    return load_task_file(str(TASKS[name] / "task.toml"))
