"""A run's settings, and what they ask of each other."""
