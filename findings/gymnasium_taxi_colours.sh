#!/usr/bin/env bash
# gymnasium 1.4.0: Taxi-v4 under render_mode="ansi" says by colour alone where the taxi, its passenger and the
# destination are. A text from which the escape codes are stripped, as a language model or a log gets it, is one of 22
# for the 500 states, so another task than the one that is played; with the codes each state has its own. FrozenLake-v1
# marks the player's square in the same way. And FrozenLake-v1 with map_name=None draws its map as it is made: the seed
# of reset does not decide it, so two environments of one seed are two games. Output seen: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gymnasium==1.4.0
cat > "$folder/expected" <<'END'
Taxi-v4: 500 states, 500 texts with colours, 22 without
FrozenLake-v1: 4 of 4 squares told apart with colours, 1 of 4 without
FrozenLake-v1, map_name=None, reset(seed=3) of 8 environments: 8 maps
END
"$folder/venv/bin/python" -W ignore - > "$folder/seen" <<'END'
import re

import gymnasium


def bare(text):
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def drawn(made, state):
    made.unwrapped.s, made.unwrapped.lastaction = state, None
    return made.render()


taxi = gymnasium.make("Taxi-v4", render_mode="ansi")
taxi.reset(seed=0)
texts = [drawn(taxi, state) for state in range(500)]
print(f"Taxi-v4: 500 states, {len(set(texts))} texts with colours, {len(set(map(bare, texts)))} without")
lake = gymnasium.make("FrozenLake-v1", render_mode="ansi")
lake.reset(seed=0)
texts = [drawn(lake, state) for state in (0, 1, 2, 3)]
print(f"FrozenLake-v1: {len(set(texts))} of 4 squares told apart with colours, {len(set(map(bare, texts)))} of 4 without")
maps = set()
for _ in range(8):
    made = gymnasium.make("FrozenLake-v1", desc=None, map_name=None, render_mode="ansi")
    made.reset(seed=3)
    maps.add(made.render())
print(f"FrozenLake-v1, map_name=None, reset(seed=3) of 8 environments: {len(maps)} maps")
END
diff "$folder/expected" "$folder/seen"
