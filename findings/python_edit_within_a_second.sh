#!/usr/bin/env bash
# CPython 3.11: an edit that keeps a file's length and comes in the same second as the last one is not seen by the next process.
# A .pyc is taken for fresh by the file's size and the whole seconds of its time alone, so an agent that tests, turns a + into a - and
# tests again is told what the old code does, and a grader in the same folder grades it. Way out: PYTHONDONTWRITEBYTECODE=1 for every run.
# Output seen: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
[[ $(python3 --version) == "Python 3.11"* ]] || echo "another version: $(python3 --version)" >&2
cat > "$folder/expected" <<'END'
as it comes: add(2, 1) is 3, after the edit to a - b it is 3
PYTHONDONTWRITEBYTECODE=1: add(2, 1) is 3, after the edit to a - b it is 1
END
python3 - "$folder" > "$folder/seen" <<'END'
import os
import pathlib
import subprocess
import sys

folder = pathlib.Path(sys.argv[1])


def run(**more):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", "import sums; print(sums.add(2, 1))"]
    return subprocess.run(command, cwd=folder, env=environment | more, capture_output=True, text=True).stdout.strip()


def tried(**more):
    module = folder / "sums.py"
    while True:  # until both writes fall into one second
        subprocess.run(["rm", "-rf", folder / "__pycache__"], check=True)
        module.write_text("def add(a, b): return a + b\n")
        first, before = run(**more), int(module.stat().st_mtime)
        module.write_text("def add(a, b): return a - b\n")
        if int(module.stat().st_mtime) == before:
            return f"add(2, 1) is {first}, after the edit to a - b it is {run(**more)}"


print("as it comes:", tried())
print("PYTHONDONTWRITEBYTECODE=1:", tried(PYTHONDONTWRITEBYTECODE="1"))
END
diff "$folder/expected" "$folder/seen"
