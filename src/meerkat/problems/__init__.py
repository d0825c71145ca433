"""What is learned: rows, prompts, models, losses, and who holds which rows."""
