"""Signals, closed pipes, closed terminals and full disks that end a run, or are answered too late."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import tandem.types
from tandem.run.stop import StopSignal

SOURCE = str(Path(tandem.types.__file__).parents[1])
# A verb that prints more than a pipe holds, on both streams, and says at its end what it met.
TALKS = f"""
import sys
sys.path.insert(0, {SOURCE!r})
from pathlib import Path
from tandem.cli import doctor, main, train
from tandem.run import outlet
def talk():
    for number in range(4000):
        print("row", number, "." * 40, flush=True)
        print("note", number, file=sys.stderr)
    Path(sys.argv[1]).write_text(repr(sorted(outlet.LOST.items())))
    yield from ()
doctor.CHECKS = (talk,)
sys.exit(main.main(["doctor"]))
"""


def test_both_streams_in_one_file_keep_their_order(tmp_path: Path):
    """A note on stderr, as what a resume goes on with, comes after all rows where PYTHONUNBUFFERED is set."""
    said = "print('note', file=sys.stderr); print('row', flush=True)"
    script = f"import sys; sys.path.insert(0, {SOURCE!r}); from tandem.run import outlet; outlet.outlive(); {said}"
    for unbuffered in ("", "1"):
        with (tmp_path / "log").open("w") as log:
            known = os.environ | {"PYTHONUNBUFFERED": unbuffered}
            subprocess.run([sys.executable, "-c", script], stdout=log, stderr=log, env=known, timeout=60, check=True)
        assert (tmp_path / "log").read_text() == "note\nrow\n"


def test_first_signal_asks_and_second_insists():
    """Ctrl-C that kills the run at once, or that can never be insisted on; handlers left behind."""
    before = {number: signal.getsignal(number) for number in StopSignal.SIGNALS}
    said: list[str] = []
    for number in StopSignal.SIGNALS:
        with StopSignal(said.append) as stop:
            assert not stop.requested and stop.exit_code == 0
            os.kill(os.getpid(), number)
            assert stop.requested and stop.exit_code == 128 + number
            for other in set(StopSignal.SIGNALS) - {signal.SIGINT}:  # a closed terminal sends SIGHUP twice
                os.kill(os.getpid(), other)
            assert stop.exit_code == 128 + number
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert {number: signal.getsignal(number) for number in StopSignal.SIGNALS} == before
    assert len(said) == len(StopSignal.SIGNALS) and "Ctrl-C again" in said[0] and "SIGHUP" in said[2]


def test_the_line_says_what_is_ahead():
    """Before the first step is there to save, a signal is answered with a promise to save it."""
    said: list[str] = []
    with StopSignal(said.append) as stop:
        stop.ahead = "nothing to save yet"
        os.kill(os.getpid(), signal.SIGHUP)
    assert said == ["Stopping (SIGHUP): nothing to save yet. Press Ctrl-C to stop at once."]


def test_a_signal_inside_a_print_does_not_end_the_run():
    """Python refuses to enter a stream twice: RuntimeError from the handler, in the middle of whatever printed."""

    def reentered(text: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    with StopSignal(reentered) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


def test_nohup_is_respected():
    """A run started with nohup ends when its terminal closes all the same."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_stop_signal_off_the_main_thread_is_inert():
    """signal.signal raises ValueError in a worker thread and takes the run with it."""
    seen: list[bool] = []

    def body() -> None:
        with StopSignal() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [False]


def talking(path: Path, **streams: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", TALKS, str(path / "end")], **streams)


def test_a_reader_that_left_is_no_error(tmp_path: Path) -> None:
    """`| head` ends a verb in a traceback, in the middle of its work, or with the interpreter's own exit code."""
    with talking(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b"row 0")
        process.stdout.close()
        assert b"Error" not in process.stderr.read()
    assert process.wait(60) == 141
    assert (tmp_path / "end").read_text() == "[('stdout', 'Broken pipe')]"


def test_both_streams_closed_by_the_reader(tmp_path: Path) -> None:
    """A note on a stderr that nobody reads ends the run: warnings print there from anywhere."""
    with talking(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None and process.stdout.readline()
        process.stdout.close()
    assert process.wait(60) == 141 and "stderr" in (tmp_path / "end").read_text()


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    """Output that could not be written counts as written, or ends in a traceback of the interpreter's exit."""
    with open("/dev/full", "wb") as full:
        process = talking(tmp_path, stdout=full, stderr=subprocess.PIPE)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and said.endswith(b"the output could not be written: No space left on device.\n")
    assert b"Traceback" not in said and (tmp_path / "end").exists()


def test_streams_closed_from_the_start(tmp_path: Path) -> None:
    """The first file that is opened gets the closed descriptor, and all that is printed: a row of metrics among it."""
    command = 'exec "$0" -c "$1" "$2" <&- >&- 2>&-'
    arguments = ["sh", "-c", command, sys.executable, TALKS, str(tmp_path / "end")]
    assert subprocess.run(arguments, check=False, timeout=60).returncode == 0
    assert (tmp_path / "end").read_text() == "[]"


def test_a_terminal_that_is_gone(tmp_path: Path) -> None:
    """Writing to a terminal whose window was closed is an I/O error, not a broken pipe."""
    ours, theirs = pty.openpty()
    with talking(tmp_path, stdout=theirs, stderr=theirs, stdin=theirs, start_new_session=True) as process:
        os.close(theirs)
        assert os.read(ours, 3) == b"row"
        os.close(ours)
    assert process.wait(60) in (1, 141) and "stdout" in (tmp_path / "end").read_text()
