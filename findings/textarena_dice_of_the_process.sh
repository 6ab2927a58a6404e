#!/usr/bin/env bash
# textarena 0.7.4: reset(seed=...) seeds the generator of the whole process (random.seed), and its games draw from that.
# So a game's dice hang on what is played beside it in the process, whatever its seed, and the caller's own generator is
# seeded along. And the package says Python >=3.10, but six of its games do not compile before 3.12 (Checkers, Chess,
# IteratedStagHunt, Klondike, ReverseTicTacToe, UltimateTexasHoldem: quotes of one kind inside an f-string), and numpy,
# which Sokoban and IteratedStagHunt import, is not among its requirements.
# Output seen with Python 3.11: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "run it with Python 3.11" >&2; exit 1; }
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check textarena==0.7.4
cat > "$folder/expected" <<'END'
alone, the same seed twice: the same rolls True
with another game between the rolls: the same rolls False
the caller's random.random() after reset(seed=7) is that of seed 7: True
Checkers-v0 SyntaxError
Chess-v0 SyntaxError
IteratedStagHunt-v0 SyntaxError
Klondike-v0 SyntaxError
ReverseTicTacToe-v0 SyntaxError
UltimateTexasHoldem-v0 SyntaxError
Sokoban-v0 ImportError
requires python >=3.10, numpy among the requirements: False
END
"$folder/venv/bin/python" -W ignore - > "$folder/seen" 2> "$folder/err" <<'END' || { cat "$folder/err" >&2; exit 1; }
import random
from importlib.metadata import metadata

import textarena


def begun():
    made = textarena.make("PigDice-v0")
    made.reset(num_players=2, seed=7)
    return made


def rolls(made, beside=None):
    shown = []
    for _ in range(12):
        made.step("[roll]")
        shown.append(str(made.state.game_state))
        if beside is not None:
            beside.step("[roll]")
    return shown


first = rolls(begun())
print("alone, the same seed twice: the same rolls", rolls(begun()) == first)
other = begun()
print("with another game between the rolls: the same rolls", rolls(begun(), other) == first)
random.seed(123)
textarena.make("TicTacToe-v0").reset(num_players=2, seed=7)
print("the caller's random.random() after reset(seed=7) is that of seed 7:", random.random() == random.Random(7).random())
for name in ("Checkers", "Chess", "IteratedStagHunt", "Klondike", "ReverseTicTacToe", "UltimateTexasHoldem", "Sokoban"):
    try:
        textarena.make(f"{name}-v0")
        print(name, "is made")
    except Exception as error:
        print(f"{name}-v0", type(error).__name__)
said = metadata("textarena")
numpy = any(one.lower().startswith("numpy") for one in said.get_all("Requires-Dist"))
print(f"requires python {said['Requires-Python']}, numpy among the requirements: {numpy}")
END
diff "$folder/expected" "$folder/seen"
