"""Runs code that nobody has vouched for: no network, files of its own, limits on time, memory, processes and output."""
