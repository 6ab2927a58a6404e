"""Checkpoints of quantised matrices, by the rules of the packages that make them (docs/numerics.md)."""
