"""A small model drafts in a run of the whole loop: it changes no weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem.kernels.build.load import matrix_unit
from tandem.kernels.build.toolchain import compiler
from tests.multi.test_goldens import GOLDENS, RUNS, home, run  # noqa: F401

pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels' bits depend on the batch")


@pytest.mark.parametrize(("name", "vocabulary"), [("turns", 0), ("lag, corrected", 60)])
def test_a_model_that_drafts_changes_no_weight(home: Path, tmp_path: Path, name: str, vocabulary: int) -> None:  # noqa: F811
    """A run that drafts by a model trains on other tokens, log-probs or kept sets than the golden one without; or the
    drafter, which is the policy at the start, is asked nothing, or follows the policy's weights."""
    goldens = json.loads(GOLDENS.read_text()).get(matrix_unit(), {})
    if name not in goldens:
        pytest.skip(f"no golden for {matrix_unit()}")
    by = {"by": "model", "model": str(home / "model"), "tokens": "4", "lengths": "fixed", "vocabulary": f"{vocabulary}"}
    changes = RUNS[name] | {f"engine.draft.{setting}": value for setting, value in by.items()}
    assert run(home, changes, tmp_path / "run") == goldens[name]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shares = [row["accepted_tokens"] / row["drafted_tokens"] for row in rows if row["step"]]
    covered = [(row["draft_covered_tokens"], row["draft_seen_tokens"]) for row in rows if row["step"]]
    assert all(0.4 * seen < kept < 0.95 * seen for kept, seen in covered) if vocabulary else covered == [(0, 0)] * 3
    if vocabulary:
        assert 0.1 < max(shares) < 0.95, shares
    else:
        assert shares[0] == 1 > shares[1] > shares[2] > 0.1, shares
