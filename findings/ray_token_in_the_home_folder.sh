#!/usr/bin/env bash
# ray 2.60.0: token authentication is on without being asked for. ray.init() with no configuration writes a random token to
# ~/.ray/auth_token and leaves it there for good: it is what every later Ray of that user takes, on every cluster, and a
# container or CI job that throws its home folder away has another one each time, so its drivers are refused by a cluster
# that was started before. A token in the environment (RAY_AUTH_TOKEN) keeps the home folder as it was; so does
# RAY_AUTH_MODE=disabled. Output seen: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/expected" <<'END'
as it is: .ray .ray/auth_token
with RAY_AUTH_TOKEN: nothing
with RAY_AUTH_MODE=disabled: nothing
END
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ray==2.60.0
unset RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH RAY_ADDRESS
export RAY_USAGE_STATS_ENABLED=0
started() {
    mkdir "$folder/$1"
    HOME="$folder/$1" "$folder/venv/bin/python" -W ignore -c "
import sys
import ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])
ray.shutdown()" "$folder/t$1" 2> "$folder/err" >&2 || { tail -20 "$folder/err" >&2; exit 1; }
    (cd "$folder/$1" && find . -mindepth 1 | sed 's,^\./,,' | sort | paste -sd' ')
}
{
    echo "as it is: $(started 1)"
    left=$(RAY_AUTH_TOKEN=0123456789abcdef0123456789abcdef started 2)
    echo "with RAY_AUTH_TOKEN: ${left:-nothing}"
    left=$(RAY_AUTH_MODE=disabled started 3)
    echo "with RAY_AUTH_MODE=disabled: ${left:-nothing}"
} > "$folder/seen"
diff "$folder/expected" "$folder/seen"
