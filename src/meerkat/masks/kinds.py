"""The names of the masks and of their options, apart from the code that makes them: settings load without torch."""

from typing import Literal

Kind = Literal["sensitivity", "magnitude", "random", "full", "task", "lora"]
Scope = Literal["global", "per-tensor"]
Exclusion = Literal["embeddings", "norms"]
