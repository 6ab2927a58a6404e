"""A child process, seen from its parent: sent calls, waited for within a deadline, killed.

Those of program/pool.py hold environments, those of run/workers.py the rest of a run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import tandem
from tandem.errors import EnvironmentFailure, TaskError
from tandem.program.printed import follow

if TYPE_CHECKING:
    from tandem.program.config import TaskConfig

Call = tuple[int, str, tuple[Any, ...], float]  # number, one of worker.Calls, its arguments, seconds that it may take
# What the child sends, behind the call's number: ("value", x), ("raised", one line), ("task_error", message) or, where
# it cancelled the call at its deadline, ("late", what more to say); then the seconds that the call waited to be begun.
Answer = tuple[int, str, Any, float]

GRACE_S = 2.0  # for a call that was cancelled at its deadline to end, before it is left behind
HOME = str(Path(tandem.__file__).parents[1])
NEEDED = ("tandem", "numpy", "msgspec", "annotated_types")  # by tandem.program, which loads no torch
_OWN = "import sys; sys.path[:] = paths\nfrom {module} import main; main(theirs, parent)"
# In another interpreter: what tandem needs (NEEDED) and that environment lacks is found where it runs, and so are the
# user's own modules; no other package of tandem's environment, for many import what they happen to find.
_GUEST = """
import sys
from importlib.machinery import PathFinder

def refuse(reason):
    from multiprocessing.connection import Connection
    Connection(theirs).send((0, "task_error", "task.python %s %s" % (python, reason), 0.0))
    sys.exit(1)

class Behind:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, paths, target) if name in needed else None

own = sys.implementation.cache_tag
if own != tag:
    refuse("is %s and tandem runs in %s. Make the environment with the same Python." % (own, tag))
sys.meta_path.append(Behind)
mine = [path for path in sys.path if path]
sys.path[:] = mine + [path for path in paths if "-packages" not in path and path not in mine]
try:
    from tandem.program.worker import main
except ImportError as error:
    advice = "%s -m pip install %s" % (python, error.name) if error.name else "Mend that package there."
    refuse("cannot hold environments: %s: %s. %s" % (type(error).__name__, error, advice))
main(theirs, parent)
"""


class Home(Protocol):
    """A process that holds a task, as program/workers.py asks it: a Child, or one elsewhere."""

    started: bool  # its task is built
    concurrent: bool  # calls may overlap: its episodes are asynchronous
    reason: str  # why it was ended

    def send(self, call: Call) -> None: ...

    def receive(self, deadline_s: float) -> Answer | None: ...

    def alive(self) -> bool: ...

    def ended(self) -> str: ...

    def end(self) -> None: ...

    def kill(self) -> None: ...

    def join(self, deadline_s: float) -> None: ...


def child_of(config: TaskConfig) -> Home:
    """One here."""
    return Child(f"task {config.label}", config, python=config.python)


class Child:
    """One child process and the pipe to it. It starts at once, so that its imports overlap with what comes next.

    label: what it is called where it prints. first: what it is sent first. module: whose `main` it runs. python:
    another interpreter than this process's, for environments.
    """

    def __init__(self, label: str, first: Any, module: str = "tandem.program.worker", python: str = "") -> None:
        self.started = False
        self.concurrent = False
        self.reason = ""
        self.connection, theirs = multiprocessing.Pipe()
        interpreter = os.path.expanduser(python)
        # sys.path travels, so that the child finds the package and the user's modules wherever the parent did.
        come = f"theirs, parent, paths = {theirs.fileno()}, {os.getpid()}, {[*sys.path, HOME]!r}\n"
        come += f"tag, python, needed = {sys.implementation.cache_tag!r}, {interpreter!r}, {NEEDED!r}\n"
        # A session of its own: Ctrl-C is the parent's to answer, and the kill reaches what the child started.
        try:
            self.popen = subprocess.Popen(
                [interpreter or sys.executable, "-c", come + (_GUEST if python else _OWN.format(module=module))],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,  # what a user's environment prints must not land between --json's lines
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            if not python:
                raise
            advice = "Give the interpreter of a virtual environment: task.python=DIR/bin/python"
            raise TaskError(f"task.python {python} cannot be run: {error.strerror}. {advice}") from error
        theirs.close()
        assert self.popen.stdout is not None
        self.printed = follow(self.popen.stdout, label)
        self._finalizer = weakref.finalize(self, _kill, self.popen, self.connection)
        with contextlib.suppress(OSError):  # it has ended already; who waits for its answer finds that
            self.connection.send(first)

    def send(self, call: Call) -> None:
        """Ask."""
        try:
            self.connection.send(call)
        except OSError:  # it died between calls; the receive that follows finds the end of the pipe
            return

    def receive(self, deadline_s: float) -> Answer | None:
        """The next message, or None at the deadline or the end of the child; `alive` tells which."""
        try:
            if not self.connection.poll(min(deadline_s, 1e6)):
                return None
            return read(self.connection.recv_bytes())
        except (EOFError, OSError):
            _end(self.popen)
            return None

    def alive(self) -> bool:
        return self.popen.returncode is None

    def ended(self) -> str:
        code = self.popen.returncode
        return "it hung" if code is None else f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def end(self) -> None:
        """Kill it, and leave the pipe to who reads from it."""
        if self.alive():
            _end(self.popen)

    def kill(self) -> None:
        self._finalizer()

    def join(self, deadline_s: float) -> None:
        """Until what it printed is shown; longer where a process of another session holds its end."""
        self.printed.join(deadline_s)


def _kill(popen: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    if popen.returncode is None:
        _end(popen)


def _end(popen: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the child's session, then reap it: until then nobody else can have its id."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, signal.SIGKILL)
    popen.wait()


def read(text: bytes) -> Answer:
    """An answer, as it came."""
    try:
        answer: Answer = pickle.loads(text)
        return answer
    except (AttributeError, ImportError, pickle.UnpicklingError) as error:
        said = f"its value holds an object that only the environment knows; use plain values ({error})"
        return (0, "raised", said, 0.0)


def unwrapped(answer: Answer, label: str) -> Any:
    _, kind, value, _ = answer
    if kind == "task_error":
        raise TaskError(value)
    if kind == "raised":
        raise EnvironmentFailure(f"task {label}: {value}")
    assert kind == "value", answer
    return value
