"""Export of a run's model, with its model card."""
