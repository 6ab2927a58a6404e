#!/usr/bin/env bash
# jsonschema-rs 0.60.3: a schema with a $ref to http is fetched while the validator is made, unless offline=True is given (or a retriever).
# Who validates schemas of strangers opens addresses of their choice, inside the network too. jsonschema 4.26 does as much, with a DeprecationWarning,
# when the reference is first met, unless it is given a registry.
# Output seen: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/expected" <<'END'
jsonschema-rs: GET /x
jsonschema-rs, offline: nothing
jsonschema: GET /x
jsonschema, a registry: nothing
END
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jsonschema-rs==0.60.3 jsonschema==4.26.0
"$folder/venv/bin/python" -W ignore - > "$folder/seen" <<'END'
import http.server
import threading

import jsonschema
import jsonschema_rs
import referencing

asked = []


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked.append(f"GET {self.path}")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *words):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
threading.Thread(target=server.serve_forever, daemon=True).start()
schema = {"$ref": f"http://127.0.0.1:{server.server_port}/x"}
for name, validate in {
    "jsonschema-rs": lambda: jsonschema_rs.validator_for(schema),
    "jsonschema-rs, offline": lambda: jsonschema_rs.validator_for(schema, offline=True),
    "jsonschema": lambda: jsonschema.Draft202012Validator(schema).is_valid(1),
    "jsonschema, a registry": lambda: jsonschema.Draft202012Validator(schema, registry=referencing.Registry()).is_valid(1),
}.items():
    asked.clear()
    try:
        validate()
    except Exception:
        pass
    print(f"{name}: {', '.join(asked) or 'nothing'}")
END
diff "$folder/expected" "$folder/seen"
