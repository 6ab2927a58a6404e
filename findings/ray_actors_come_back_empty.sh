#!/usr/bin/env bash
# ray 2.60.0, an actor with max_restarts that dies, and one whose code raises:
# - The call in flight raises ActorUnavailableError, "temporarily unavailable ... might be restarting", not ActorDiedError, and the
#   actor's next calls are answered: by a new object, made by its constructor, without anything that was told it since. A
#   retry loop around the call, which the name suggests, goes on with a counter at 0, a model without its updates.
#   RayActorError is the base of both errors.
# - What a method raises comes as a RayTaskError that is also an instance of the method's own exception, of a class made for
#   it: `except ValueError` takes it, `type(error) is ValueError` is false, and its text is the remote traceback. Where that
#   exception's constructor needs other arguments than its args, it comes as an UnserializableException: `except` of either misses it.
# - With log_to_driver=False, the driver prints nothing of its workers but this: that one died, on the driver's stdout, among
#   whatever it writes there for a program to read. RAY_DEDUP_LOGS_SKIP_REGEX=. in the environment before the import keeps
#   it away.
# Output seen: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/expected" <<'END'
died: ActorUnavailableError, an ActorDiedError False, a RayActorError True
then: count 1 after 2 earlier calls
raised: RayTaskError(ValueError), a ValueError True, its type ValueError False, lines in its text over 3 True
raised: a Strange False, a RayTaskError False: UnserializableException
on stdout, of 5 lines: 1 that a worker died
END
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ray==2.60.0
export HOME="$folder" RAY_AUTH_MODE=token RAY_AUTH_TOKEN=0123456789abcdef0123456789abcdef RAY_USAGE_STATS_ENABLED=0
"$folder/venv/bin/python" -W ignore - > "$folder/seen" 2> "$folder/err" <<'END' || { tail -20 "$folder/err" >&2; exit 1; }
import os
import time

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=os.environ["HOME"] + "/r")


class Strange(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class Counts:
    def __init__(self):
        self.count = 0

    def one(self):
        self.count += 1
        return self.count

    def dies(self):
        os._exit(1)

    def raises(self):
        raise ValueError("seven")

    def is_strange(self):
        raise Strange(1, 2)


actor = ray.remote(Counts).options(max_restarts=1).remote()
ray.get([actor.one.remote(), actor.one.remote()])
try:
    ray.get(actor.dies.remote(), timeout=60)
except RayActorError as error:
    died, actors = isinstance(error, ActorDiedError), isinstance(error, RayActorError)
    print(f"died: {type(error).__name__}, an ActorDiedError {died}, a RayActorError {actors}")
while True:
    try:
        print(f"then: count {ray.get(actor.one.remote(), timeout=60)} after 2 earlier calls")
        break
    except ActorUnavailableError:
        time.sleep(0.2)
try:
    ray.get(actor.raises.remote(), timeout=60)
except RayTaskError as error:
    own, exact = isinstance(error, ValueError), type(error) is ValueError
    lines = len(str(error).splitlines()) > 3
    print(f"raised: {type(error).__name__}, a ValueError {own}, its type ValueError {exact}, lines in its text over 3 {lines}")
try:
    ray.get(actor.is_strange.remote(), timeout=60)
except Exception as error:
    own, task = isinstance(error, Strange), isinstance(error, RayTaskError)
    print(f"raised: a Strange {own}, a RayTaskError {task}: {type(error).__name__}", flush=True)
time.sleep(3)
END
deaths=$(grep -c "A worker died or was killed" "$folder/seen") || true
sed -i '/A worker died or was killed/d' "$folder/seen"
echo "on stdout, of $(($(wc -l < "$folder/seen") + deaths)) lines: $deaths that a worker died" >> "$folder/seen"
diff "$folder/expected" "$folder/seen"
