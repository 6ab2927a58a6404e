#!/usr/bin/env bash
# verifiers 0.4.0 needs mcp==2.0.0, openenv 0.10.0 (through fastmcp 3) mcp<2. In one command pip refuses both; one after
# the other it exits 0 with a line of error among its output, and either order breaks the package that was there first,
# elsewhere than where one looks:
#   openenv last: verifiers.v1 is imported as before; the module that its tool servers run in is gone from mcp, so tasks
#   with tools fail when their first episode starts
#   verifiers last: openenv.core cannot be imported, and says that fastmcp is not installed, which it is
# So each has an environment of its own. Takes some minutes and 0.7 GB. Output seen: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/expected" <<'END'
both in one command: ResolutionImpossible, exit 1
openenv last: exit 0; verifiers requires mcp==2.0.0, but you have an older one
openenv last: import verifiers.v1 exits 0
openenv last: import verifiers.v1.mcp.server, mcp.server.mcpserver exits 1
verifiers last: exit 0
verifiers last: FastMCP client support is not installed; fastmcp is there True
END
cd "$folder"
python3 -m venv venv
pip() { venv/bin/pip "$1" --disable-pip-version-check "${@:2}" > said 2>&1; }
{
    code=0
    pip install --dry-run verifiers==0.4.0 openenv==0.10.0 || code=$?
    echo "both in one command: $(grep -o 'ResolutionImpossible' said | head -1), exit $code"
    pip install verifiers==0.4.0
    pip install openenv==0.10.0
    grep -q 'verifiers 0.4.0 requires mcp==2.0.0, but you have mcp 1' said
    echo "openenv last: exit 0; verifiers requires mcp==2.0.0, but you have an older one"
    venv/bin/python -c 'import verifiers.v1' 2> err && echo "openenv last: import verifiers.v1 exits 0"
    venv/bin/python -c 'import verifiers.v1.mcp.server, mcp.server.mcpserver' 2> err ||
        echo "openenv last: import verifiers.v1.mcp.server, mcp.server.mcpserver exits $?"
    pip install verifiers==0.4.0 mcp==2.0.0
    echo "verifiers last: exit $?"
    venv/bin/python -c 'import openenv.core' 2> err || true
    there=$(venv/bin/python -c 'from importlib.metadata import version; print(version("fastmcp").startswith("3."))')
    echo "verifiers last: $(grep -o 'FastMCP client support is not installed' err | head -1); fastmcp is there $there"
} > seen
diff expected seen
