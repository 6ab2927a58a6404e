"""Problems of one's own to be repaired: a folder of repositories, or JSON lines. Each is checked before a run begins.

A folder of problems has one in each folder below it:

    till/repo/          what the program works on; files that pytest would collect (test_*.py, *_test.py) are read only
    till/hidden.py      tests that grade it, which it never sees: some fail now, and pass once it is mended
    till/issue.md       what is wrong, in words; need not be there
    till/failing.txt    names of the hidden tests that fail now, one a line; without it they are run first, each time

A JSON line has the same: `files` and `tests` (path -> text), `hidden`, `issue` and, where known, `failing`.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from tandem.errors import TaskError
from tandem.program.config import half_character
from tandem.program.reward import clipped
from tandem.program.tasks.lines import read_lines
from tandem.sandbox.listed import test_names

FIELDS = {"files": dict, "tests": dict, "hidden": str, "issue": str}
MOST_BYTES = 4 << 20  # of a problem's files: each of its programs gets them anew
_ISSUE = "A test fails."


def read_problems(path: str) -> list[dict[str, Any]]:
    """Those of a folder, by name, or of a file of JSON lines; TaskError says which is broken, and how."""
    if not Path(path).exists():
        raise TaskError(f"{path} is not there. Give a folder that holds a folder for each problem, or a .jsonl file.")
    if not Path(path).is_dir():
        return [_checked(row, f"{path}, line {row.pop('line')}") for row in read_lines(path, FIELDS)]
    folders = sorted(each for each in Path(path).iterdir() if each.is_dir() and not each.name.startswith("."))
    if not folders:
        raise TaskError(f"{path} holds no folder. Give one that holds a folder for each problem.")
    return [_checked(_read(folder), str(folder)) for folder in folders]


def _read(folder: Path) -> dict[str, Any]:
    repo = folder / "repo"
    if not repo.is_dir():
        raise TaskError(f"{folder} has no folder repo with the files to be mended.")
    hidden = _text(folder / "hidden.py").removeprefix("\ufeff")  # some editors write it, and Python reads past it
    row: dict[str, Any] = {"files": {}, "tests": {}, "hidden": hidden, "issue": _ISSUE}
    for file in _files(repo):
        name = file.relative_to(repo).as_posix()
        row["tests" if collected(name) else "files"][name] = _text(file)
    if (issue := folder / "issue.md").exists():
        row["issue"] = _text(issue).strip() or _ISSUE
    if (failing := folder / "failing.txt").exists():
        row["failing"] = _text(failing).split()
    return row


def _files(folder: Path) -> Iterator[Path]:
    """All below it; hidden ones (.git) and what Python compiled are none of the problem's."""
    for each in sorted(folder.iterdir()):
        if each.name.startswith(".") or each.name == "__pycache__" or each.suffix == ".pyc":
            continue
        kind = each.lstat().st_mode
        if stat.S_ISDIR(kind):
            yield from _files(each)
        elif stat.S_ISREG(kind):
            yield each
        else:
            raise TaskError(f"{each} is neither file nor folder, such as a link. Put the file itself there.")


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except OSError as error:
        raise TaskError(f"{file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{file} is no UTF-8 text ({error.reason} at byte {error.start}). Remove it.") from error


def collected(name: str) -> bool:
    """Whether pytest would look for tests in a file.

    >>> collected("tests/test_till.py"), collected("till_test.py"), collected("tests/till.py")
    (True, True, False)
    """
    path = PurePosixPath(name)
    return path.suffix == ".py" and (path.stem.startswith("test_") or path.stem.endswith("_test"))


def _check_files(row: dict[str, Any], place: str) -> None:
    """TaskError unless a sandbox takes each file, and Python finds each test."""
    given, names = [*row["files"].items(), *row["tests"].items()], {*row["files"], *row["tests"]}
    for name, text in given:
        if not isinstance(text, str) or half_character(text) or not _is_inside(name):
            raise TaskError(f"{place}: {name!r} is {clipped(text)}; wanted: a path inside the folder, and a text.")
        if above := {str(folder) for folder in PurePosixPath(name).parents} & names:
            raise TaskError(f"{place}: {min(above)!r} is a file, and a folder with {name!r} in it. Rename one.")
    if both := row["files"].keys() & row["tests"].keys():
        raise TaskError(f"{place}: {min(both)!r} stands in its files and in its tests. Take it out of one.")
    for name in row["tests"]:
        if not name.endswith(".py") or "." in name.removesuffix(".py"):
            raise TaskError(
                f"{place}: the test {name!r} cannot be imported; wanted: a file NAME.py in folders without a dot."
            )
    if not row["files"]:
        raise TaskError(f"{place}: it has no file to be mended, other than tests.")
    if (size := sum(len(text) for _, text in given)) > MOST_BYTES:
        raise TaskError(f"{place}: its files have {size:,} characters; allowed are {MOST_BYTES:,}. Leave some out.")
    for name in ("issue", "hidden"):
        if half := half_character(row[name]):
            raise TaskError(f"{place}: its {name!r} {half}")


def _is_inside(path: str) -> bool:
    """
    >>> _is_inside("shop/till.py"), _is_inside("../till.py"), _is_inside("shop//till.py"), _is_inside("shop/")
    (True, False, False, False)
    """
    plain = not half_character(path) and "\0" not in path
    return plain and all(part not in ("", ".", "..") and len(part.encode()) < 256 for part in path.split("/"))


def _checked(row: dict[str, Any], place: str) -> dict[str, Any]:
    _check_files(row, place)
    try:
        tests = test_names(row["hidden"])
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise TaskError(f"{place}: its hidden tests are no Python ({error}). Mend or remove it.") from error
    found = [test.title for test in tests]
    if wrong := [test for test in tests if test.wrong]:
        raise TaskError(
            f"{place}: its hidden test {wrong[0].title} cannot be run: {wrong[0].wrong}. Mend or remove it."
        )
    if not found:
        raise TaskError(f"{place}: its hidden tests have no function whose name begins with test.")
    failing = row.get("failing") or []
    if not isinstance(failing, list) or not all(isinstance(name, str) for name in failing):
        raise TaskError(f"{place}: its 'failing' is {clipped(failing)}; wanted: names of hidden tests.")
    if unknown := [name for name in failing if name not in found]:
        raise TaskError(f"{place}: no hidden test is called {unknown[0]!r}; there are {clipped(', '.join(found))}.")
    return {"place": place} | {name: row.get(name) for name in (*FIELDS, "failing")}
