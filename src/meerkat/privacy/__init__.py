"""Differential privacy of scalars: the mechanism, and what it costs."""
