#!/usr/bin/env bash
# gymnasium 1.4.0: the vector environments' default, AutoresetMode.NEXT_STEP, resets a sub-environment in the step after
# its end. The action given in that step is never played, its reward is 0 and neither a flag nor the infos say so: a loop
# that trains on every (observation, action, reward) trains on one in every episode that had no effect. Under SAME_STEP
# every action is played, and the observation of an end is in infos["final_obs"] alone.
# Output seen: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gymnasium==1.4.0
cat > "$folder/expected" <<'END'
default (NEXT_STEP): given 1 2 3 4 5 6, played 1 2 4 5
  of action 3: observation 0, reward 0.0, terminated False, truncated False, infos {}
SAME_STEP: given 1 2 3 4 5 6, played 1 2 3 4 5 6
  of action 2: observation 0, reward 2.0, terminated True, final observation 2
END
"$folder/venv/bin/python" -W ignore - > "$folder/seen" <<'END'
import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

played = []


class TwoSteps(gymnasium.Env):
    observation_space = gymnasium.spaces.Discrete(10)
    action_space = gymnasium.spaces.Discrete(10)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return 0, {}

    def step(self, action):
        self.steps += 1
        played.append(int(action))
        return self.steps, float(action), self.steps == 2, False, {}


for name, options, at in (("default (NEXT_STEP)", {}, 3), ("SAME_STEP", {"autoreset_mode": AutoresetMode.SAME_STEP}, 2)):
    played.clear()
    made = SyncVectorEnv([TwoSteps], **options)
    made.reset(seed=0)
    found = {action: made.step(np.array([action])) for action in range(1, 7)}
    print(f"{name}: given {' '.join(map(str, found))}, played {' '.join(map(str, played))}")
    observation, reward, terminated, truncated, infos = found[at]
    end = f"truncated {truncated[0]}, infos {infos}" if at == 3 else f"final observation {infos['final_obs'][0]}"
    print(f"  of action {at}: observation {observation[0]}, reward {reward[0]}, terminated {terminated[0]}, {end}")
END
diff "$folder/expected" "$folder/seen"
