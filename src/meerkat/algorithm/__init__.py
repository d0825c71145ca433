"""The paper: directions, zeroth-order steps, rounds, paths, GradIP, aggregation, selection."""
