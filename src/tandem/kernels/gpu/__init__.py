"""The forward pass in Triton, one operation a file, named and shaped as the CPU's beside this folder.

A row keeps its bits whatever rows ride along. A kernel is compiled for the shapes of the model alone: what depends on
the batch (counts of rows, strides, sizes of pages) is never specialised on, so engine and learner run one binary. The
matrix products alone have several, a tile each, tried against each other on the device (tiles.py). A sum has one
accumulator an element and runs in order: no split of the depth, no atomics. Backward passes are torch operations, but
attention's: equality of bits is a matter of the forward pass alone.
"""
