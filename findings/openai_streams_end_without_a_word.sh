#!/usr/bin/env bash
# openai 3.57.0: what its streams do with answers that a server of OpenAI's protocol may give.
# A stream that is answered by plain JSON (status 200) is an empty iterator, even where the JSON is an error: errors have
# to be events. An event without choices is given as a chunk, and what follows [DONE] is dropped. A response that ends in
# response.incomplete (its max_output_tokens) has no final response for responses.stream(): get_final_response raises,
# though the event, which the iterator gives, holds it whole. retry-after is slept as given up to 120 s, where
# its own waits end at 8 s, and with more it does not ask again.
# Output seen with Python 3.11: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openai==3.57.0
cat > "$folder/expected" <<'END'
JSON for a stream: [] without an exception
an error as JSON for a stream: [] without an exception
an error as an event: APIError broken
an event without choices: a chunk, choices None
behind [DONE]: 1 chunk
incomplete: events ['response.created', 'response.incomplete'], then RuntimeError Didn't receive a `response.completed` event.
retry-after 7, 119, 121: slept 7 s, 119 s
END
"$folder/venv/bin/python" - > "$folder/seen" <<'END'
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

import openai

CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
CHOICE = {"index": 0, "delta": {"content": "a"}, "finish_reason": None}
answer = {"status": 200, "type": "", "body": "", "retry": None}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(answer["status"])
        self.send_header("content-type", answer["type"])
        self.send_header("content-length", str(len(answer["body"])))
        if answer["retry"]:
            self.send_header("retry-after", answer["retry"])
        self.end_headers()
        self.wfile.write(answer["body"].encode())

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1"
client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def events(*bodies, named=False):
    lines = [(f"event: {one['type']}\n" if named else "") + f"data: {json.dumps(one)}\n\n" for one in bodies]
    return "".join(lines) + ("" if named else "data: [DONE]\n\n")


def chat(kind, body):
    answer.update(type=kind, body=body)
    return client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], stream=True)


print("JSON for a stream:", list(chat("application/json", json.dumps(CHUNK))), "without an exception")
failed = json.dumps({"error": {"message": "broken"}})
print("an error as JSON for a stream:", list(chat("application/json", failed)), "without an exception")
try:
    list(chat("text/event-stream", events({"error": {"message": "broken"}})))
except openai.APIError as error:
    print("an error as an event:", type(error).__name__, error.message)
(chunk,) = chat("text/event-stream", events({"message": "not a chunk"}))
print("an event without choices: a chunk, choices", chunk.choices)
behind = events({**CHUNK, "choices": [CHOICE]}) + events({**CHUNK, "choices": [CHOICE]})
print("behind [DONE]:", len(list(chat("text/event-stream", behind))), "chunk")
response = {"id": "r", "object": "response", "created_at": 1, "model": "m", "output": [], "status": "incomplete"}
response |= {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "incomplete_details": {"reason": "max_output_tokens"}}
told = [{"type": f"response.{name}", "sequence_number": n, "response": response} for n, name in enumerate(("created", "incomplete"))]
answer.update(type="text/event-stream", body=events(*told, named=True))
with client.responses.stream(model="m", input="x") as stream:
    kinds = [event.type for event in stream]
    try:
        stream.get_final_response()
    except RuntimeError as error:
        print(f"incomplete: events {kinds}, then RuntimeError {error}")
slept = []
patient = openai.OpenAI(base_url=url, api_key="none", max_retries=1)
with mock.patch("time.sleep", slept.append):
    for seconds in ("7", "119", "121"):
        answer.update(status=429, type="application/json", body="{}", retry=seconds)
        try:
            patient.chat.completions.create(model="m", messages=[])
        except openai.RateLimitError:
            pass
print(f"retry-after 7, 119, 121: slept {', '.join(f'{one:g} s' for one in slept)}")
END
diff "$folder/expected" "$folder/seen"
