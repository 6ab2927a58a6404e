"""Drafts in a run of the whole loop: they change no weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem.engine import draft
from tandem.kernels.build.load import matrix_unit
from tandem.kernels.build.toolchain import compiler
from tests.multi.test_goldens import GOLDENS, RUNS, home, run  # noqa: F401

pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels' bits depend on the batch")


@pytest.mark.parametrize("name", ["grpo", "lag, corrected", "top-p", "hybrid attention, float32", "turns"])
def test_drafts_change_no_weight(home: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A run that drafts trains on other tokens, log-probs or kept sets than the golden one without."""
    goldens = json.loads(GOLDENS.read_text()).get(matrix_unit(), {})
    if name not in goldens:
        pytest.skip(f"no golden for {matrix_unit()}")
    drafted: list[int] = []
    lookup = draft.lookup

    def counting(tokens: list[int], most: int) -> list[int]:
        drafts = lookup(tokens, most)
        drafted.append(len(drafts))
        return drafts

    monkeypatch.setattr(draft, "lookup", counting)
    lengths = "measured" if name == "grpo" else "fixed"
    drafting = {"engine.draft.by": "lookup", "engine.draft.tokens": "4", "engine.draft.lengths": lengths}
    assert run(home, RUNS[name] | drafting, tmp_path / "run") == goldens[name]
    assert sum(drafted) > 20 or lengths == "measured"
