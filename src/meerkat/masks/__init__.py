"""What moves: the sparse mask, how its entries are chosen, LoRA adapters."""
