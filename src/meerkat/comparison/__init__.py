"""Methods and settings side by side."""
