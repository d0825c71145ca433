"""The two ways a run can end badly, each told in one line."""


class MeerkatError(Exception):
    """Something asked for cannot be done: what was received, what is allowed, what to do. Exit status 2."""


class RunFailed(MeerkatError):
    """A run that was rightly asked for went wrong on the way, or its record is damaged. Exit status 1."""


class Diverged(RunFailed):
    """A loss or a score that is not finite: the learning rate is too high, or the weights' type too narrow."""
