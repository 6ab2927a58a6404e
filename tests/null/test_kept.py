"""Reports of folders in which a file is damaged, in the way, or none of the run's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem.cli import main
from tandem.errors import RunFolderError
from tandem.report.kept import read_object, trajectory_files
from tests.courses import Noise

ROW = {"program_id": "a/1/0", "segment": 0, "prompt_id": "a", "text": "4", "reward": 1.0, "prompt": []}
ROW |= {"sampled_tokens": 1, "stop_reason": "stop_token", "answer": "4", "failure": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's, with all that reports read."""
    (tmp_path / "trajectories").mkdir()
    for name, content in (
        ("config", {"name": "sums"}),
        ("plan", {}),
        ("ledger", {"tokens": {"total": 0}, "seconds": {}}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in Noise(1).run(14)))
    (tmp_path / "trajectories/step-1.jsonl").write_text(json.dumps(ROW) + "\n")
    return tmp_path


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe{}", b'"text"'])
def test_what_is_no_object(folder: Path, content: bytes) -> None:
    """A file of JSON that holds none, or no object, is taken for an empty one, or ends in a traceback."""
    (folder / "plan.json").write_bytes(content)
    with pytest.raises(RunFolderError, match="plan.json is damaged: .* Restore the file"):
        read_object(folder / "plan.json")
    assert read_object(folder / "none.json") == {}


@pytest.mark.parametrize("words", [[], ["--scaling"], ["--trajectories"]])
@pytest.mark.parametrize("name", ["config.json", "plan.json", "ledger.json"])
def test_a_damaged_file(folder: Path, name: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged file of a run ends its report in a traceback."""
    (folder / name).write_text("{")
    assert main.main(["report", str(folder), *words]) == 2
    assert f"{folder / name} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("line", ['{"program_id": "a/1/1", "te', "[]", '{"program_id": "a", "prompt_id": "a"}', "7"])
def test_a_line_that_is_no_trajectory(folder: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A torn line of trajectories ends a report in a traceback, with the page or without."""
    with (folder / "trajectories/step-1.jsonl").open("a") as file:
        file.write(f"{line}\n")
    for words in (["--trajectories"], []):
        assert main.main(["report", str(folder), *words]) == 2
        assert "step-1.jsonl is damaged: line 2 is no trajectory" in capsys.readouterr().err


def test_a_copy_beside_the_trajectories(folder: Path) -> None:
    """A file that a person laid beside the steps ends a report in a traceback, or is read as a step."""
    for name in ("step-1 (copy).jsonl", "step-x.jsonl", "step-.jsonl"):
        (folder / "trajectories" / name).write_text("nothing\n")
    assert main.main(["report", str(folder), "--trajectories"]) == 0
    assert [*trajectory_files(folder)] == [1]


@pytest.mark.parametrize("name", ["report.html", "reward.png", "scaling.png", "trajectories.html"])
def test_a_page_that_cannot_be_written(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A place that is taken, or a full disk, ends a report in a traceback."""
    (folder / name).mkdir()
    assert main.main(["report", str(folder), "--scaling", "--trajectories"]) == 1
    assert f"{folder / name} could not be written: Is a directory. " in capsys.readouterr().err
