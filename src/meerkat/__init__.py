"""Meerkat: sparse zeroth-order federated fine-tuning of language models."""

__version__ = "0.1.0"
