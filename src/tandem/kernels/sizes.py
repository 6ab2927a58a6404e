"""Sizes that kernels compute by and that a plan of memory counts by. No torch."""

from __future__ import annotations

PANEL = 64  # columns of a packed matrix that lie together, as in tile.h
STRIP = 16  # of them, those of one register
GROUP = 32  # inputs that share a scale where w4a8 rounds a matrix
KEPT_BYTES = 384 << 20  # most that the head keeps for its backward pass: 4,000 rows of 49,152 tokens in bf16
SLAB = 512  # rows that the head computes at once where all would be more
COMPARED_ROWS = 128  # whose logits of two models are in memory at once: 2 x 25 MB at 49,152 tokens
