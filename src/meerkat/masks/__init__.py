"""What moves: the sparse mask, how it is chosen, LoRA adapters."""

from meerkat.masks.sparse_mask import SparseMask, fingerprint

__all__ = ["SparseMask", "fingerprint"]
