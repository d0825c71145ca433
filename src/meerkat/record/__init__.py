"""What stays of a run: log, folder, signatures, replay, verification, history."""
