"""PyTorch: transformers' own code from bytes to activations, one layer at a time."""

from parity.reference.checkpoint import Reference, ReferenceLayer

__all__ = ["Reference", "ReferenceLayer"]
