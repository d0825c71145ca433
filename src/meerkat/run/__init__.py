"""Running a federation on this machine: set-up, the round loop, engines, evaluation, metrics."""
