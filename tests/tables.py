"""Tables of the docs that a test writes: `pytest FILE --write-docs`."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def check_table(request: pytest.FixtureRequest, page: str, name: str, text: str) -> None:
    """Between a page's marks of `name` stands `text`; or, on request, write it there."""
    begin, end = f"<!-- {name}: written by tests -->", f"<!-- end of {name} -->"
    path = ROOT / page
    found = path.read_text(encoding="utf-8")
    before, rest = found.split(begin)
    wanted = f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"
    if request.config.getoption("--write-docs"):
        path.write_text(wanted, encoding="utf-8")
    else:
        command = f"pytest {request.path.relative_to(ROOT)} --write-docs"
        assert found == wanted, f"the table of {name} in {page} is not the code's; write it with: {command}"
