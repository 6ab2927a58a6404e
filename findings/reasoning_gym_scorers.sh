#!/usr/bin/env bash
# reasoning-gym 0.1.25 (default parameters, seed 1, 32 prompts a set): what its scorers pay for.
#   game_of_life_halting  full marks for any text: bool(answer) of a string is compared
#   complex_arithmetic    full marks for "nan": min(1.0, exp(-nan)) is 1.0
#   coin_flip             full marks for "0" on most prompts: an absolute tolerance of 1e-4 on small probabilities
#   boxnet, game_of_life, prime_factorization, coin_flip raise on malformed answers
#   boxnet, graph_color, propositional_logic, rubiks_cube, rush_hour keep answer=None, so entry["answer"] scores below 0.02
#   base_conversion asks for the number 0 as an empty string, with an empty answer
# Output seen: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check reasoning-gym==0.1.25
cat > "$folder/expected" <<'END'
game_of_life_halting 'nonsense' 1.00
complex_arithmetic 'nan' 1.00
coin_flip '0' 0.94
boxnet '0' TypeError
game_of_life '{}' KeyError
prime_factorization 'nonsense' ValueError
coin_flip '1e999' OverflowError
boxnet None 0.00
graph_color None 0.00
propositional_logic None 0.00
rubiks_cube None 0.01
rush_hour None 0.01
base_conversion empty answer: True
END
"$folder/venv/bin/python" - > "$folder/seen" <<'END'
import reasoning_gym

CASES = [
    ("game_of_life_halting", "nonsense"), ("complex_arithmetic", "nan"), ("coin_flip", "0"), ("boxnet", "0"),
    ("game_of_life", "{}"), ("prime_factorization", "nonsense"), ("coin_flip", "1e999"),
    *((name, None) for name in ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour")),
]
for name, reply in CASES:
    dataset = reasoning_gym.create_dataset(name, seed=1, size=32)
    try:
        scores = [float(dataset.score_answer(str(e["answer"]) if reply is None else reply, e)) for e in dataset]
        print(name, repr(reply), f"{sum(scores) / 32:.2f}")
    except Exception as error:
        print(name, repr(reply), type(error).__name__)
zeros = reasoning_gym.create_dataset("base_conversion", seed=1, size=32, min_value=0, max_value=1)
print("base_conversion empty answer:", any(e["answer"] == "" and e["metadata"]["source_repr"] == "" for e in zeros))
END
diff "$folder/expected" "$folder/seen"
