"""Studies: a folder each, whose study.py has a function `study() -> Study`; docs/studies.md."""
