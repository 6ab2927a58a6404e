"""Regression caught: a run folder with two writers, a half checkpoint that looks whole, or rows lost by a crash."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

import tandem.types
from tandem.config import override
from tandem.errors import CheckpointError, ConfigError, RunFolderError, WorldError
from tandem.recipes.tiny_arithmetic import tiny_arithmetic
from tandem.report.metrics import read_metrics
from tandem.run import folder as folder_module
from tandem.run.folder import RunFolder, check_new, latest_checkpoint

SOURCE = str(Path(tandem.types.__file__).parents[1])


@dataclass(frozen=True, slots=True)
class Learner:
    lr: float = 2e-5
    betas: tuple[float, ...] = (0.9, 0.95)


@dataclass(frozen=True, slots=True)
class Config:
    name: str = "tiny"
    steps: int = 3
    learner: Learner = field(default_factory=Learner)


PREAMBLE = f"""
import sys, time
sys.path.insert(0, {SOURCE!r})
from dataclasses import dataclass
from pathlib import Path
from tandem.run.folder import RunFolder
@dataclass(frozen=True, slots=True)
class Config:
    name: str = "tiny"
path = Path(sys.argv[1])
"""


def start(code: str, path: Path) -> subprocess.Popen[str]:
    """A second process that runs `code` and has printed its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + code, str(path)], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def save(folder: RunFolder, step: int, text: str = "weights") -> None:
    with folder.checkpoint(step) as directory:
        (directory / "optimiser").mkdir()
        (directory / "model.safetensors").write_text(text)
        (directory / "optimiser" / "state").write_text(f"{text} {step}")


def steps(folder: RunFolder) -> list[int]:
    return [saved.step for saved in folder.checkpoints()]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_another_process_is_refused_and_a_killed_one_lets_go(tmp_path):
    """A second process writing into the same run; a lock that survives kill -9 and blocks the resume."""
    path = tmp_path / "run"
    process = start("folder = RunFolder.create(path, Config())\nprint('ready', flush=True)\ntime.sleep(60)", path)
    try:
        for attempt in (lambda: RunFolder.open(path), lambda: RunFolder.create(path, Config())):
            with pytest.raises(RunFolderError, match=rf"in use by process {process.pid}\b.*kill -INT {process.pid}"):
                attempt()
    finally:
        process.kill()
        process.wait()
    with RunFolder.open(path) as folder:
        assert folder.config["name"] == "tiny"


def test_a_forked_worker_that_outlives_the_run_does_not_keep_the_lock(tmp_path):
    """flock instead of a record lock: an orphaned reward worker blocks the resume."""
    path = tmp_path / "run"
    code = """
import os
folder = RunFolder.create(path, Config())
child = os.fork()
if child == 0:
    os.close(1)
    time.sleep(30)
    os._exit(0)
(path / "child").write_text(str(child))
print('ready', flush=True)
time.sleep(60)
"""
    process = start(code, path)
    process.kill()
    process.wait()
    child = int((path / "child").read_text())
    try:
        os.kill(child, 0)
        RunFolder.open(path).close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_same_process_cannot_open_twice(tmp_path):
    """Record locks do not exclude their own process: two RunFolders interleave rows."""
    with RunFolder.create(tmp_path / "run", Config()) as folder:
        with pytest.raises(RunFolderError, match="already open in this process"):
            RunFolder.open(folder.path)
        (tmp_path / "alias").symlink_to(folder.path)
        with pytest.raises(RunFolderError, match="already open"):
            RunFolder.open(tmp_path / "alias")
    RunFolder.open(folder.path).close()


def test_create_refuses_a_run_and_any_other_files(tmp_path):
    """A new run written over an old one, or among someone's files."""
    path = tmp_path / "run"
    with RunFolder.create(path, Config()) as folder:
        save(folder, 7)
    with pytest.raises(RunFolderError, match=rf"already holds a run .*step 7.*--resume {path}"):
        RunFolder.create(path, Config())
    assert latest_checkpoint(path).step == 7
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("x")
    with pytest.raises(RunFolderError, match="not empty and holds no run"):
        RunFolder.create(other, Config())
    assert sorted(entry.name for entry in other.iterdir()) == ["chapter1.tex"]
    with pytest.raises(RunFolderError, match="does not exist.*Did you mean run"):
        RunFolder.open(tmp_path / "rum")
    with pytest.raises(RunFolderError, match="holds no run"):
        RunFolder.open(other)
    with pytest.raises(RunFolderError, match="Cannot make the run folder"):
        RunFolder.create(other / "chapter1.tex" / "run", Config())
    for taken, said in (
        (path, "already holds a run"),
        (other, "holds no run"),
        (other / "chapter1.tex", "Cannot make"),
    ):
        with pytest.raises(RunFolderError, match=said):
            check_new(taken)
    check_new(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_resume_takes_what_changes_no_token(tmp_path):
    """A run that is to go on with more workers, or with drafts, is refused; or one under another seed is taken."""
    config = tiny_arithmetic()
    RunFolder.create(tmp_path / "run", config).close()
    for settings in ({"task.workers": "2"}, {"engine.draft.by": "lookup"}, {"engine.replicas": "2"}, {"steps": "1600"}):
        config = override(config, settings)
        RunFolder.open(tmp_path / "run", config).close()
    with pytest.raises(RunFolderError, match="seed: 0 -> 1"):
        RunFolder.open(tmp_path / "run", override(config, {"seed": "1"}))


def test_resume_shows_how_the_config_differs(tmp_path):
    """A resume under another learning rate, unnoticed; or an extension by more steps refused."""
    path = tmp_path / "run"
    RunFolder.create(path, Config()).close()
    changed = Config(steps=9, learner=Learner(lr=3e-5))
    with pytest.raises(RunFolderError) as caught:
        RunFolder.open(path, changed)
    assert "  learner.lr: 2e-05 -> 3e-05\n" in str(caught.value)
    assert "steps: 3" not in str(caught.value)
    assert json.loads((path / "config.json").read_text())["steps"] == 3
    with RunFolder.open(path, replace(Config(), steps=9)) as folder:
        assert folder.config["steps"] == 9
    assert json.loads((path / "config.json").read_text())["steps"] == 9
    with RunFolder.open(path, changed, may_differ=("steps", "learner")) as folder:
        assert folder.config["learner"] == {"lr": 3e-5, "betas": [0.9, 0.95]}
    with RunFolder.open(path) as folder:
        save(folder, 5)
    for fewer in (4, 1):  # step 5 is done; this was an exit of 0 and a config.json that says 4
        with pytest.raises(ConfigError, match=rf"steps is {fewer}, and step 5 of .* is done. Give as many or more"):
            RunFolder.open(path, replace(changed, steps=fewer), may_differ=("steps", "learner"))
        assert json.loads((path / "config.json").read_text())["steps"] == 9
    RunFolder.open(path, replace(changed, steps=5)).close()
    (path / "config.json").write_text('{"name": "tiny", "steps": 3}')
    with pytest.raises(RunFolderError, match="does not fit this version"):
        RunFolder.open(path, Config())
    (path / "config.json").write_text('{"name": ')
    with pytest.raises(RunFolderError, match="damaged"):
        RunFolder.open(path)


def test_metrics_survive_a_torn_line_and_rewind(tmp_path):
    """A row glued to a torn one; rows of steps after the checkpoint kept on resume, so that steps appear twice."""
    path = tmp_path / "run"
    with RunFolder.create(path, Config()) as folder:
        for step in range(6):
            folder.append_metrics({"step": step, "reward": step / 10, "loss": float("nan")})
            folder.write_trajectories(step, [{"text": "\u2028é", "reward": float("inf")}])
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    with RunFolder.open(path) as folder:
        assert [row["step"] for row in lines(path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
        folder.append_metrics({"step": 6, "reward": 0.6})
        aside = folder.rewind(3)
        assert aside.steps == (4, 5, 6) and list(aside.rows) == lines(aside.path / "metrics.jsonl")
        assert [(row["step"], row["reward"]) for row in aside.rows] == [(4, 0.4), (5, 0.5), (6, 0.6)]
        assert sorted(entry.name for entry in aside.path.glob("step-*")) == ["step-4.jsonl", "step-5.jsonl"]
        folder.append_metrics({"step": 4, "reward": 0.9})
        rows = lines(path / "metrics.jsonl")
    assert [(row["step"], row["reward"]) for row in rows] == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3), (4, 0.9)]
    assert rows[0]["loss"] is None
    assert sorted(entry.name for entry in (path / "trajectories").iterdir()) == [f"step-{n}.jsonl" for n in range(4)]
    assert json.loads((path / "trajectories/step-0.jsonl").read_text()) == {"text": "\u2028é", "reward": None}


def test_keys_are_added_to_the_lines_that_they_are_of(tmp_path):
    """Credit in another trajectory's line, or a text that breaks the line."""
    with RunFolder.create(tmp_path / "run", Config()) as folder:
        path = folder.write_trajectories(1, iter([{"a": "\u2028é\n}"}, {"a": 2}, {"a": 3}]))
        folder.extend_trajectories(1, [{"b": [0.5, 2]}, {}, {"b": float("nan"), "c": 1}])
    assert lines(path) == [{"a": "\u2028é\n}", "b": [0.5, 2]}, {"a": 2}, {"a": 3, "b": None, "c": 1}]


def test_what_is_set_aside_is_never_lost_or_counted_twice(tmp_path):
    """A second resume from one checkpoint writes over what the first set aside, or its ledger forgets that."""
    with RunFolder.create(tmp_path / "run", Config()) as folder:
        assert folder.rewind(-1).steps == () and not (folder.path / "set_aside").exists()
        for reward in (1.0, 2.0):
            for step in (0, 1, 2):
                folder.append_metrics({"step": step, "reward": reward})
                folder.write_trajectories(step, [{"reward": reward}])
            aside = folder.rewind(-1)
            assert aside.steps == (0, 1, 2) and lines(folder.path / "metrics.jsonl") == []
            assert json.loads((aside.path / "step-2.jsonl").read_text()) == {"reward": reward}
        assert [row["reward"] for row in aside.rows] == [1.0] * 3 + [2.0] * 3
        folder.write_trajectories(1, [{"reward": 3.0}])  # killed before the row
        again = folder.rewind(-1)
        assert again.steps == (1,) and again.rows == aside.rows and again.path.name == "after-step-0.3"
        (again.path.parent / "after-step-0.1").rename(tmp_path / "tidied")
        for number in (1, 4):  # the first free number, then the one after those that are there
            folder.write_trajectories(1, [{"reward": 4.0}])
            assert folder.rewind(-1).path.name == f"after-step-0.{number}"


@pytest.mark.parametrize("fatal", range(1, 8))
def test_a_crash_while_setting_aside_loses_nothing(tmp_path, monkeypatch, fatal):
    """Rows dropped before they are written elsewhere; trajectories of a half finished move replaced by the next run."""
    folder = RunFolder.create(tmp_path / "run", Config())
    for step in (1, 2, 3):
        folder.append_metrics({"step": step, "reward": step / 7})
        folder.write_trajectories(step, [{"step": step}])
    calls = []

    def crash_at(original):
        def wrapped(*args, **kwargs):
            calls.append(args)
            if len(calls) == fatal:
                raise SystemExit
            return original(*args, **kwargs)

        return wrapped

    for name in ("rename", "replace", "mkdir"):
        monkeypatch.setattr(Path, name, crash_at(getattr(Path, name)))
    try:
        folder.rewind(1)
    except SystemExit:
        pass
    else:
        assert fatal > 5
    monkeypatch.undo()
    folder.close()
    with RunFolder.open(tmp_path / "run") as again:
        aside = again.rewind(1)
        assert [(row["step"], row["reward"]) for row in aside.rows] == [(2, 2 / 7), (3, 3 / 7)]
        assert [row["step"] for row in lines(again.path / "metrics.jsonl")] == [1]
        kept = {entry.name: json.loads(entry.read_text())["step"] for entry in again.path.glob("*/**/step-*.jsonl")}
        assert kept == {f"step-{step}.jsonl": step for step in (1, 2, 3)}


@pytest.mark.parametrize(
    "torn", [b'{"step": 6, "rew', b'{"step": 6, "rew\n', b"\0" * 40, b"\0" * 9 + b"\n", b"7\n", b"\xff"]
)
def test_any_torn_end_is_left_out(tmp_path, torn):
    """What a crash or a power cut leaves at the end of the rows blocks the resume, the report, or both."""
    path = tmp_path / "run"
    with RunFolder.create(path, Config()) as folder:
        folder.append_metrics({"step": 5})
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert [row["step"] for row in read_metrics(path)] == [5]
    with RunFolder.open(path) as folder:
        assert folder.rewind(5).steps == () and lines(path / "metrics.jsonl") == [{"step": 5}]


@pytest.mark.parametrize("content", ["[]", "null", "7", '"x"', "\0\0", ""])
def test_a_torn_config_is_one_line(tmp_path, content):
    """A config.json that holds no object is a traceback."""
    path = tmp_path / "run"
    RunFolder.create(path, Config()).close()
    (path / "config.json").write_text(content)
    with pytest.raises(RunFolderError, match="config.json is damaged"):
        RunFolder.open(path, Config())


def test_a_row_that_does_not_fit_on_the_disk_leaves_whole_lines(tmp_path, monkeypatch):
    """A full disk in the middle of a row: half a line stays and the next row is glued to it."""
    with RunFolder.create(tmp_path / "run", Config()) as folder:
        folder.append_metrics({"step": 1})
        write, calls = os.write, []

        def full(descriptor: int, content: bytes) -> int:
            calls.append(len(content))
            if len(calls) == 1:
                return write(descriptor, content[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(folder_module.os, "write", full)
        with pytest.raises(WorldError, match="metrics.jsonl could not be written: No space left.*--resume"):
            folder.append_metrics({"step": 2})
        monkeypatch.undo()
        folder.append_metrics({"step": 3})
        assert [row["step"] for row in lines(folder.path / "metrics.jsonl")] == [1, 3]


def test_checkpoints_are_kept_and_pruned(tmp_path):
    """Pruning the newest, or none; a checkpoint of the same step left half old, half new."""
    with RunFolder.create(tmp_path / "run", Config(), keep=2) as folder:
        assert folder.latest_checkpoint() is None
        for step in (2, 9, 10, 11):  # as text, 9 sorts after 10 and 11
            save(folder, step)
        assert steps(folder) == [10, 11]
        save(folder, 11, "better")
        latest = folder.latest_checkpoint()
        assert (latest.path / "model.safetensors").read_text() == "better"
        assert (latest.path / "optimiser" / "state").read_text() == "better 11"
        assert sorted(entry.name for entry in (folder.path / "checkpoints").iterdir()) == ["step-10", "step-11"]
    with RunFolder.open(folder.path, keep=None) as again:
        for step in (12, 13):
            save(again, step)
        assert steps(again) == [10, 11, 12, 13]


def _to_full_device(directory: Path) -> None:
    with open("/dev/full", "w") as file:
        file.write("weights")


def _raise_runtime(directory: Path) -> None:
    raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


@pytest.mark.parametrize("write", [_to_full_device, _raise_runtime], ids=["oserror", "torch"])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, write):
    """A failed write that leaves a partial checkpoint, hides the good one or ends in a bare OSError."""
    with RunFolder.create(tmp_path / "run", Config(), keep=1) as folder:
        with pytest.raises(CheckpointError, match="There is no earlier one"), folder.checkpoint(1) as directory:
            write(directory)
        save(folder, 2)
        with pytest.raises(CheckpointError) as caught, folder.checkpoint(3) as directory:
            (directory / "config.json").write_text("{}")
            write(directory)
        assert f"The last good one stays: {folder.path / 'checkpoints/step-2'}" in str(caught.value)
        assert ("No space left" in str(caught.value)) == (write is _to_full_device)
        assert [entry.name for entry in (folder.path / "checkpoints").iterdir()] == ["step-2"]
        assert (folder.latest_checkpoint().path / "model.safetensors").read_text() == "weights"


def test_a_disk_that_fails_when_synced_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    """Renaming before the sync: delayed allocation reports a full disk only then."""
    with RunFolder.create(tmp_path / "run", Config(), keep=1) as folder:
        save(folder, 1)

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(folder_module.os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save(folder, 2)
        monkeypatch.undo()
        assert [entry.name for entry in (folder.path / "checkpoints").iterdir()] == ["step-1"]


def test_a_failed_replacement_puts_the_old_checkpoint_back(tmp_path, monkeypatch):
    """A checkpoint of the same step set aside for a new one that could not be moved in: none is left to resume from."""
    with RunFolder.create(tmp_path / "run", Config()) as folder:
        save(folder, 1, "old")
        rename = Path.rename

        def refuse_new(self: Path, target: Path) -> Path:
            if self.name.endswith(".partial"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", refuse_new)
        with pytest.raises(CheckpointError, match="step-1"):
            save(folder, 1, "new")
        assert (folder.latest_checkpoint().path / "model.safetensors").read_text() == "old"


def test_any_other_exception_passes_and_cleans_up(tmp_path):
    """Ctrl-C or a bug inside a checkpoint turned into a disk error, or leaving a part behind."""
    with RunFolder.create(tmp_path / "run", Config()) as folder:
        for error in (KeyboardInterrupt, KeyError):
            with pytest.raises(error), folder.checkpoint(1):
                raise error
        assert list((folder.path / "checkpoints").iterdir()) == []


def test_a_real_full_file_system(tmp_path):
    """What /dev/full cannot show: the real order of errors on a file system of one megabyte."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs root to mount a small tmpfs")
    try:
        with RunFolder.create(mount / "run", Config()) as folder:
            save(folder, 1, "x" * 300_000)
            with pytest.raises(CheckpointError, match="No space left.*step-1"):
                save(folder, 2, "x" * 600_000)
            folder.append_metrics({"step": 2})
            assert steps(folder) == [1]
            assert len((folder.latest_checkpoint().path / "model.safetensors").read_text()) == 300_000
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_kill_in_the_middle_of_a_checkpoint(tmp_path):
    """kill -9 during a checkpoint: the half is taken for the latest, or stays for ever."""
    path = tmp_path / "run"
    code = """
folder = RunFolder.create(path, Config())
with folder.checkpoint(1) as directory:
    (directory / "w").write_text("good")
with folder.checkpoint(2) as directory:
    (directory / "w").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""
    process = start(code, path)
    process.kill()
    process.wait()
    assert (path / "checkpoints/.step-2.partial/w").read_text() == "half"
    with RunFolder.open(path) as folder:
        latest = folder.latest_checkpoint()
        assert (latest.step, (latest.path / "w").read_text()) == (1, "good")
        assert [entry.name for entry in (path / "checkpoints").iterdir()] == ["step-1"]


@pytest.mark.parametrize("fatal", range(1, 13))
def test_a_crash_at_any_rename_leaves_a_whole_checkpoint(tmp_path, monkeypatch, fatal):
    """A crash between the two renames of a replaced checkpoint, or inside pruning, loses both or leaves half."""
    path = tmp_path / "run"
    folder = RunFolder.create(path, Config(), keep=1)
    save(folder, 1, "first")
    save(folder, 2, "old")
    calls = []

    def crash_at(name, original):
        def wrapped(*args, **kwargs):
            calls.append(name)
            if len(calls) == fatal:
                if name == "rmtree" and Path(args[0]).is_dir():  # killed half way through the removal
                    (Path(args[0]) / "model.safetensors").unlink(missing_ok=True)
                raise SystemExit
            return original(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(Path, "rename", crash_at("rename", Path.rename))
    monkeypatch.setattr(folder_module.shutil, "rmtree", crash_at("rmtree", folder_module.shutil.rmtree))
    try:
        save(folder, 2, "new")
        save(folder, 3, "newest")
    except SystemExit:
        pass
    monkeypatch.undo()
    folder.close()
    with RunFolder.open(path) as again:
        assert again.checkpoints()
        for found in again.checkpoints():
            text = (found.path / "model.safetensors").read_text()
            assert (found.step, text) in {(2, "old"), (2, "new"), (3, "newest")}
            assert (found.path / "optimiser" / "state").read_text() == f"{text} {found.step}"
        assert not [entry for entry in (path / "checkpoints").iterdir() if entry.name.startswith(".")]
