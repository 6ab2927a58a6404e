"""OpenEnv environments: a server by its address, or its app served here; a session for each program."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Mapping
from typing import Any

from tandem.errors import TaskError
from tandem.program.adapters.action import named, package, said, seed_of
from tandem.program.environment import Environment, Episode, Step
from tandem.types import Message, Prompt

PIN = "openenv==0.10.0"
START_S = 60.0  # for an app to answer
FULL_S = 3.0  # that a session is tried for where the server has none left: one that ended is closed a moment later
TOOL_ACTIONS = ("Action", "CallToolAction", "ListToolsAction")  # titles of an action schema that stands for tools
_FENCED = re.compile(r"```(?:json)?\n(.*?)```", re.DOTALL)


class _Session(Episode):
    """One run: a session of its own on the server."""

    def __init__(self, prompt: Prompt, task: OpenEnv) -> None:
        super().__init__(prompt)
        self.task, self.client, self.bad = task, None, 0

    async def setup(self) -> None:
        until_s = time.monotonic() + FULL_S
        while True:
            client = self.task.new_client()
            try:
                found = await client.reset(**self.prompt.record["reset"])
                break
            except BaseException as error:
                await client.close()
                if not (isinstance(error, RuntimeError) and "CAPACITY_REACHED" in str(error)):
                    raise
                if time.monotonic() > until_s:
                    advice = "serve it with a max_concurrent_envs of at least the programs that are open at once"
                    raise RuntimeError(f"the server has no session left: {advice}") from error
            await asyncio.sleep(0.1)
        self.client, self.text = client, self.task.text(found.observation)
        if self.text != self.prompt.record["first"]:
            raise ValueError(
                "reset(seed=...) does not give what the prompt shows: the environment draws from elsewhere"
            )

    async def observe(self, turns: tuple[Message, ...]) -> Step:
        message, before = turns[-1], self.text
        if self.task.tools:
            return await self._called(message, before)
        try:
            action = self.task.action(said(message.content))
            found = await self.client.step(action)  # type: ignore[attr-defined]
        except ValueError as error:
            return self._refused(str(error), before)
        except RuntimeError as error:
            if "VALIDATION_ERROR" not in str(error):
                raise
            return self._refused(f"That is no action. Its JSON schema: {self.task.schema}", before)
        self.bad = 0
        self.text = self.task.text(found.observation)
        return Step(None if found.done else [Message("user", self.text)], float(found.reward or 0.0), before)

    def _refused(self, why: str, before: str) -> Step:
        self.bad += 1
        self.counts["bad_actions"] += 1
        return Step(None if self.bad >= self.task.patience else [Message("user", why)], state=before)

    async def _called(self, message: Message, before: str) -> Step:
        """Tools of an environment that speaks MCP; a turn that calls nothing ends the run."""
        answers, reward, done = [], 0.0, False
        for call in message.calls:
            self.counts["tool_calls"] += 1
            asked = {"type": "call_tool", "tool_name": call.name, "arguments": dict(call.arguments)}
            found = await self.client.step(asked)  # type: ignore[attr-defined]
            reward, done = reward + float(found.reward or 0.0), done or found.done
            self.text, wrong = told(found.observation)
            self.counts["tool_errors"] += wrong
            answers.append(Message("tool", self.text, call_id=call.id, more={"name": call.name}))
        for reason in message.faults:
            self.counts["malformed_calls"] += 1
            answers.append(Message("tool", f"error: {reason}", more={"name": "unreadable"}))
        return Step(None if done else answers or None, reward, before)

    async def teardown(self) -> None:
        if self.client is not None:
            await self.client.close()


class OpenEnv(Environment):
    """An environment behind an OpenEnv server.

    url: of a server that runs. app: "package.module:app" in its place, served by each child for itself. field: of the
    observation that is shown, where it has several; else all of it, as JSON. instructions: the first message's text,
    before the observation. patience: so many texts in a row that are no action end the run. hidden: a seed draws more
    than the first observation shows, so prompts of other seeds are other questions. Any other parameter is given to
    `reset`, as the `seed` is.

    An action of one text field is what the model marks as <action>...</action>, or all its text outside of its
    thoughts; of other fields a JSON object, fenced or not. Tools of an environment that speaks MCP are the prompt's.
    """

    episodes = _Session

    def __init__(
        self,
        url: str = "",
        app: str = "",
        field: str = "",
        instructions: str = "",
        patience: int = 3,
        hidden: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if bool(url) == bool(app):
            raise TaskError("task.parameters: give url=http://HOST:PORT or app=package.module:app, one of them.")
        self.kind = package("openenv.core", PIN).GenericEnvClient
        self.url = url.rstrip("/") or serve(app)
        self.field, self.instructions, self.patience = field, instructions, patience
        self.hidden, self.seed, self.options = hidden, seed, options
        self.schema = schema_of(self.url)
        self.fields = {name: one for name, one in self.schema.get("properties", {}).items() if name != "metadata"}
        self.tools = self._tools() if self.schema.get("title") in TOOL_ACTIONS else ()

    def new_client(self) -> Any:
        return self.kind(base_url=self.url)

    def _tools(self) -> tuple[Mapping[str, Any], ...]:
        with self.new_client().sync() as client:
            listed = client.step({"type": "list_tools"}).observation["tools"]
        return tuple(
            {
                "type": "function",
                "function": {
                    "name": one["name"],
                    "description": one.get("description", ""),
                    "parameters": one["input_schema"],
                },
            }
            for one in listed
        )

    def prompt(self, split: str, index: int) -> Prompt:
        seed = seed_of(self.seed, split, index)
        reset = {"seed": seed, **self.options}
        with self.new_client().sync() as client:
            text = self.text(client.reset(**reset).observation)
        content = "\n\n".join(part for part in (self.instructions or self._ask(), text) if part)
        record = {"seed": seed, "reset": reset, "first": text}
        return Prompt(f"{split}/{index}", (Message("user", content),), record, self.tools)

    def _ask(self) -> str:
        if self.tools or list(self.fields) == [self._one_text()]:
            return ""
        return f"Answer with one JSON object. Its schema: {json.dumps(self.fields)}"

    def key(self, prompt: Prompt) -> str:
        return f"{prompt.messages[-1].content}\n{prompt.record['seed'] if self.hidden else ''}"

    def episode(self, prompt: Prompt) -> Episode:
        return _Session(prompt, self)

    def _one_text(self) -> str:
        """The name of the action's one field, where it has one and that is a text."""
        names = self.schema.get("required", []) or list(self.fields)
        return names[0] if len(names) == 1 and self.fields.get(names[0], {}).get("type") == "string" else ""

    def action(self, text: str) -> dict[str, Any]:
        """The action that a text says; ValueError, to be told to the model, where it says none."""
        fenced = _FENCED.findall(text)
        try:
            value = json.loads(fenced[-1] if fenced else text)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and value.keys() <= self.fields.keys():
            return value
        if name := self._one_text():
            return {name: text}
        raise ValueError(f"That is no JSON object with the fields {', '.join(self.fields)}.")

    def text(self, observation: Mapping[str, Any]) -> str:
        """What the model is shown of an observation."""
        shown = {name: value for name, value in observation.items() if name != "metadata"}
        if self.field and self.field not in shown:
            raise ValueError(f"field={self.field} is not in the observation, which has {', '.join(shown)}")
        value = shown[self.field] if self.field else next(iter(shown.values())) if len(shown) == 1 else shown
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def told(observation: Mapping[str, Any]) -> tuple[str, bool]:
    """What a tool answered, and whether it is an error."""
    if (error := observation.get("error")) is not None:
        return f"error: {error.get('message', error) if isinstance(error, dict) else error}", True
    result = observation.get("result")
    if isinstance(result, dict) and isinstance(result.get("content"), list):
        texts = [part["text"] for part in result["content"] if isinstance(part, dict) and "text" in part]
        return "\n".join(texts), bool(result.get("is_error"))
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False), False


def schema_of(url: str) -> dict[str, Any]:
    """Of a server's actions; TaskError where there is no such server."""
    try:
        with urllib.request.urlopen(f"{url}/schema", timeout=10.0) as answer:
            found = json.load(answer)["action"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TaskError(
            f"task.parameters: url={url} is no OpenEnv server: {error}. Start it, or give its address."
        ) from error
    return found if isinstance(found, dict) else {}


def serve(app: str) -> str:
    """Serve an app from a thread of this process: its address."""
    uvicorn = package("uvicorn", "uvicorn")
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(named(app, "app"), log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    until_s = time.monotonic() + START_S
    while not server.started:
        if time.monotonic() > until_s or not thread.is_alive():
            raise TaskError(f"task.parameters: app={app} did not start. Run `uvicorn {app}` to see why.")
        time.sleep(0.02)
    return f"http://127.0.0.1:{listening.getsockname()[1]}"
