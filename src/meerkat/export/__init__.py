"""Taking a run's model away, with its model card."""
