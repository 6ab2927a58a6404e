"""The ledger's page, its goodput, and the tables of docs/ledger.md.

The tables are written by `pytest tests/null/test_ledger_page.py --write-docs`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tandem.cli.main import main
from tandem.columns import Columns
from tandem.engine.batch import Stats
from tandem.errors import RunFolderError
from tandem.models.spec import ModelSpec
from tandem.plan.roofline import Machine, kv_bytes, layer_parameters, parameters
from tandem.report import ledger as page
from tandem.report.html import write_report
from tandem.run.ledger import AUDIT, ENGINE, FATES, KINDS, PHASES, Ledger
from tandem.run.useful import useful_work
from tandem.types import Sample

DOCS = Path(__file__).parents[2] / "docs" / "ledger.md"
SPEC = ModelSpec(
    "llama", vocab_size=11, width=8, ff_width=12, layers=2, heads=2, kv_heads=1, head_size=4, tied_embeddings=True,
    max_position=64,
)  # fmt: skip


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    rows = [head, ("---",) * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows).replace("| --- ", "|---").replace("---| ", "---|")


TABLES = {
    "fates": table(("fate", "meaning"), [(f"`{fate}`", meaning) for fate, meaning in FATES.items()]),
    "rows of engines": table(("rows", "of what"), [(f"`{name}`", meaning) for name, meaning in ENGINE.items()]),
    "audit": table(("count", "of what"), [(f"`{name}`", meaning) for name, meaning in AUDIT.items()]),
    "phases": table(
        ("phase", "kind", "what the worker did"),
        [(f"`{phase}`", kind, meaning) for phase, (kind, meaning) in PHASES.items()],
    )
    + "\n\n"
    + "\n".join(f"- {kind}: {meaning}" for kind, meaning in KINDS.items()),
}


def test_the_tables_in_the_docs_are_these(request: pytest.FixtureRequest) -> None:
    """A fate, a phase or a kind of row that the docs do not explain, or that no ledger has."""
    text = written = DOCS.read_text(encoding="utf-8")
    for name, lines in TABLES.items():
        begin, end = f"<!-- {name}: written by tests -->", f"<!-- end of {name} -->"
        before, rest = written.split(begin)
        written = f"{before}{begin}\n\n{lines}\n\n{end}{rest.split(end)[1]}"
    if request.config.getoption("--write-docs"):
        DOCS.write_text(written, encoding="utf-8")
    assert text == written or request.config.getoption("--write-docs"), (
        "docs/ledger.md is not run/ledger.py; write it with: pytest tests/null/test_ledger_page.py --write-docs"
    )
    assert {kind for kind, _ in PHASES.values()} == set(KINDS)


def run(folder: Path, machine: str = "") -> None:
    """A run's files: 100 tokens, ten seconds of each of two workers."""
    ledger = Ledger()
    ledger.meter("engine", Stats(sampled_tokens=100, run_tokens=120, prefilled_tokens=40))
    ledger.lose("stale", 30)
    ledger.lose("trained", 70)
    ledger.spend({"decode": 6.0, "full_buffer": 3.5}, "rollout")
    ledger.spend({"learner": 4.0, "discarded": 5.5}, "learner")
    closed = ledger.close({"rollout": 10.0, "learner": 10.0}) | {"machine": machine}
    (folder / "ledger.json").write_text(json.dumps(closed))
    useful = {"decode_flop": 4.0, "decode_bytes": 30.0}
    rows = [
        {"step": 1, "ess": 0.5, "useful": useful},
        {"step": 2, "useful": {"learner_flop": 8.0, "learner_bytes": 1.0}},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text("{}")


def test_the_report_has_both_waterfalls_and_the_goodput(tmp_path: Path) -> None:
    """A bar that does not begin where the one above ends; an ESS of a step that is lost; no picture."""
    run(tmp_path)
    (tmp_path / "roofline.json").write_text(json.dumps({"flop_s": 2.0, "bytes_s": 10.0}))
    found = page.section(tmp_path)
    assert [(line.name, line.share) for line in found.tables["tokens"]] == [("stale", 0.3), ("trained", 0.7)]
    assert [line.name for line in found.tables["rollout"]] == ["full_buffer", "unaccounted", "decode"]
    assert [line.name for line in found.tables["learner"]] == ["unaccounted", "discarded", "learner"]
    assert found.goodput is not None and found.goodput.share == pytest.approx((0.5 * 3.0 + 4.0) / 10.0)
    drawn = page.waterfall_figure("", "tokens", found.tables["tokens"])
    bars = [(bar.get_x(), bar.get_width()) for bar in drawn.axes[0].patches]
    assert bars == [(0, 100), (70, 30), (0, 70)]
    html = write_report(tmp_path).read_text()
    for name in ("ledger_tokens", "ledger_seconds_rollout", "ledger_seconds_learner"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert "Goodput 55.00 %" in html and html.count("What became of") >= 3


def test_the_ledger_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`tandem report RUN --ledger` that says nothing of tokens, seconds or goodput, or not in JSON."""
    run(tmp_path)
    (tmp_path / "roofline.json").write_text(json.dumps({"flop_s": 2.0, "bytes_s": 10.0}))
    assert main(["report", str(tmp_path), "--ledger"]) == 0
    printed = capsys.readouterr().out
    assert "seconds of learner" in printed and "goodput 55.00 %" in printed
    stale = next(line.split() for line in printed.splitlines() if line.split()[:1] == ["stale"])
    assert stale[:4] == ["stale", "30", "30.0", "%"]
    assert main(["report", str(tmp_path), "--ledger", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["ledger"]
    assert found["goodput"]["share"] == pytest.approx(0.55) and found["audit"]["lost"] == 0
    assert found["rollout"][0] == {
        "name": "full_buffer", "amount": 3.5, "share": 0.35, "kind": "idle", "meaning": PHASES["full_buffer"][1]
    }  # fmt: skip
    assert main(["report", str(tmp_path), str(tmp_path), "--ledger"]) == 2
    (tmp_path / "ledger.json").unlink()
    assert main(["report", str(tmp_path), "--ledger"]) == 2
    assert "it is written as a run ends" in capsys.readouterr().err


def test_no_goodput_of_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates of this machine taken for another's; measured by every report, or again and again."""
    measured: list[Machine] = []
    monkeypatch.setattr(page, "measure", lambda: measured.append(Machine(2.0, 10.0)) or measured[0])
    run(tmp_path, "far away, 96 threads")
    assert "no goodput: the run was on far away, 96 threads" in page.section(tmp_path, measures=True).headline()
    run(tmp_path, page.machine_name())
    assert "--ledger` measures this machine's roofline" in page.section(tmp_path).headline() and not measured
    for _ in range(2):
        assert page.section(tmp_path, measures=True).headline().startswith("goodput 55.00 %")
    assert len(measured) == 1
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "no row says what was useful" in page.section(tmp_path).headline()


def test_a_ledger_of_a_version_before_is_shown(tmp_path: Path) -> None:
    """A report of an old run that ends in a KeyError."""
    run(tmp_path)
    old = {"tokens": {"trained": 3, "total": 3}, "fates": {}, "seconds": {"main": {"rollout": 2.0, "wall": 2.0}}}
    (tmp_path / "ledger.json").write_text(json.dumps(old))
    assert "a machine that it does not name" in write_report(tmp_path).read_text()


@pytest.mark.parametrize("content", ["{}", '{"tokens": {"total": 0}}', "[]", "{"])
def test_a_damaged_ledger_is_said(tmp_path: Path, content: str) -> None:
    """A traceback in place of the file that is damaged."""
    (tmp_path / "ledger.json").write_text(content)
    with pytest.raises(RunFolderError, match="ledger.json is damaged"):
        page.read_ledger(tmp_path)


def test_useful_work_by_brute_force() -> None:
    """A shared prompt counted twice, a zero-advantage sample counted, a pair of positions left out."""

    def sample(name: str, prompt: int, mask: str, advantage: float) -> Sample:
        sampled = (False,) * prompt + tuple(one == "s" for one in mask)
        size = len(sampled)
        columns = Columns.of(tokens=(1,) * size, loss_mask=sampled).having(advantages=(advantage,) * size)
        return Sample(name, "p", columns)

    samples = [sample("a", 5, "sss", 1.0), sample("b", 5, "sseesss", -1.0), sample("c", 5, "ssssssss", 0.0)]
    found = useful_work(SPEC, samples, updates=2)
    layers, head, pair = layer_parameters(SPEC), 11 * 8, 4 * 2 * 2 * 4
    weights, kv = 2 * parameters(SPEC), kv_bytes(SPEC)
    seen_by = np.arange(1, 100)  # keys that the query at a position sees
    drawn = [*range(5, 8), 5, 6, *range(9, 12)]
    others = [*range(5), 7, 8]
    assert found["decode_flop"] == 2 * len(drawn) * (layers + head) + pair * seen_by[drawn].sum()
    assert found["decode_bytes"] == 5 * weights + kv * (5 * 5 + (seen_by[drawn] - 5).sum())
    assert found["prefill_flop"] == 2 * len(others) * layers + pair * seen_by[others].sum()
    assert found["prefill_bytes"] == weights + kv * len(others)
    forward = 2 * 15 * layers + 2 * len(drawn) * head + pair * seen_by[[*drawn, *others]].sum()
    assert found["learner_flop"] == 3 * forward
    assert found["learner_bytes"] == 2 * parameters(SPEC) * 38
    assert useful_work(SPEC, samples[2:], 1) == {}
    assert Machine(1.0, 1.0).flop_s == 1.0
