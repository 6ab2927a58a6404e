"""Environments of other packages, as tasks: docs/environments_of_others.md.

Each module imports its package when an environment is built, in a child whose interpreter `task.python` may name.
"""
