"""Environments of verifiers (`verifiers.v1`): their tasks, tools and rewards; the policy answers for one agent.

An Env of verifiers runs itself and asks a model where it wants one. Here the model that it asks is an endpoint of this
process: a request waits until the program has its next turn, and what the request says that is new is what the program
observes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import itertools
import json
import sys
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tandem.errors import TaskError
from tandem.program.adapters.action import package
from tandem.program.environment import Environment, Episode, Fold, Step
from tandem.types import Message, Prompt, ToolCall

PIN = "verifiers==0.4.0"
START_S = 90.0  # for the servers of a taskset, and for one episode to ask its first question
HARNESS = "tandem_chat"  # that verifiers imports
T = TypeVar("T")


class _Thread:
    """An event loop of its own: what runs in it never waits for who asks."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def now(self, made: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(made, self.loop).result(START_S)

    async def later(self, made: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(made, self.loop))


@dataclass(slots=True)
class _Question:
    """A request of verifiers for the model's next turn."""

    trace: Any
    body: Mapping[str, Any]
    answer: asyncio.Future[dict[str, Any] | None]  # None: refused


@dataclass(slots=True)
class _Play:
    """An episode of verifiers. All its methods run in the thread's loop."""

    hub: Verifiers
    questions: asyncio.Queue[_Question] = field(default_factory=asyncio.Queue)
    traces: list[Any] = field(default_factory=list)
    task: asyncio.Task[Any] | None = None
    open: _Question | None = None  # that waits for its answer

    async def begin(self, task: Any) -> _Question | None:
        self.task = asyncio.create_task(self.hub.env.run_episode(task, self.hub.context, on_trace=self._minted))
        return await self.next()

    def _minted(self, trace: Any) -> None:
        self.traces.append(trace)
        self.hub.plays[trace.id] = self

    async def next(self) -> _Question | None:
        """The next request, or None where the episode is over."""
        assert self.task is not None
        asking = asyncio.ensure_future(self.questions.get())
        try:
            await asyncio.wait([asking, self.task], return_when=asyncio.FIRST_COMPLETED)
            self.open = asking.result() if asking.done() else None
        finally:
            asking.cancel()
        return self.open

    async def said(self, reply: dict[str, Any]) -> _Question | None:
        assert self.open is not None
        self.open.answer.set_result(reply)
        return await self.next()

    async def cut(self) -> None:
        """No turn of the model follows: verifiers ends the rollout as at a limit of its own, and scores it."""
        while self.open is not None:
            self.open.trace.stop("max_turns")
            self.open.answer.set_result(None)
            await self.next()

    async def reward(self) -> float:
        """Of the agent that the policy plays: the mean over its rollouts. ValueError where verifiers had an error."""
        assert self.task is not None
        episode = await self.task
        errors = [*episode.errors, *(error for trace in episode.traces if not trace.ok for error in trace.errors)]
        if errors:
            raise ValueError(f"verifiers: {errors[-1].type}: {errors[-1].message}")
        paid = [trace.reward for trace in episode.traces if trace.agent.name == self.hub.role]
        return sum(paid) / len(paid)

    async def end(self) -> None:
        if self.task is not None and not self.task.done():
            self.task.cancel()
            await asyncio.wait([self.task])
        for trace in self.traces:
            self.hub.plays.pop(trace.id, None)


class _Run(Episode):
    def __init__(self, prompt: Prompt, hub: Verifiers) -> None:
        super().__init__(prompt)
        self.hub, self.play = hub, _Play(hub)
        self.answered = 0  # turns of the model that verifiers has
        self.heard = 0  # that were observed
        self.over = False

    async def setup(self) -> None:
        task = self.hub.task(self.prompt.record["position"])
        question = await self.hub.thread.later(self.play.begin(task))
        if question is None or digest(question.body) != self.prompt.record["first"]:
            raise ValueError(
                "the episode does not begin with what the prompt shows: verifiers' task draws from elsewhere"
            )
        self.known, self.trace = wire(question.body), question.trace.id

    async def observe(self, turns: tuple[Message, ...]) -> Step:
        message = turns[-1]
        self.heard = spoken(turns)
        self.counts["tool_calls"] += len(message.calls)
        self.counts["malformed_calls"] += len(message.faults)
        told = [Message("tool", f"error: {reason}", more={"name": "unreadable"}) for reason in message.faults]
        if told and not message.calls:  # for verifiers it would be a turn that calls nothing, which ends the rollout
            return Step(told)
        question = await self._said(message)
        if question is None:
            return Step(None)
        found = wire(question.body)
        if question.trace.id == self.trace and found[: len(self.known)] == self.known:
            news: Any = [*told, *map(message_of, found[len(self.known) :])]
        else:
            news = Fold([message_of(one) for one in found])
        self.known, self.trace = found, question.trace.id
        return Step(news)

    async def _said(self, message: Message) -> _Question | None:
        calls = [called(call, f"call_{self.answered}_{place}") for place, call in enumerate(message.calls)]
        reply: dict[str, Any] = {"role": "assistant", "content": message.content}
        if "reasoning_content" in message.more:
            reply["reasoning_content"] = message.more["reasoning_content"]
        reply |= {"tool_calls": calls} if calls else {}
        self.answered += 1
        self.known = [*self.known, plain(reply)]
        question = await self.hub.thread.later(self.play.said(reply))
        self.over = question is None
        return question

    async def score(self, turns: tuple[Message, ...]) -> float:
        if not self.over:  # cut by rollout.max_turns, or a turn by rollout.max_new_tokens
            if spoken(turns) > self.heard:
                await self._said(turns[-1])
            await self.hub.thread.later(self.play.cut())
        return await self.hub.thread.later(self.play.reward())

    async def teardown(self) -> None:
        await self.hub.thread.later(self.play.end())


class Verifiers(Environment):
    """An Env of verifiers over a taskset, both by the ids of installed packages.

    taskset: its id. env: of another Env than the taskset's own. hidden: the prompts do not show all that makes a task,
    so that tasks of equal prompts are other questions. Any other parameter is a setting of the Env's config by its
    dotted name, as `taskset.game=Wordle-v0` or `agent.max_turns=4`. One agent is the policy: of several, all but one
    have a `client` of their own. Each is played by a chat with the task's tools, in place of its own harness.
    """

    episodes = _Run

    def __init__(self, taskset: str, env: str = "", hidden: bool = False, **options: Any) -> None:
        package("verifiers.v1", PIN)
        sys.modules[HARNESS] = importlib.import_module("tandem.program.adapters.verifiers_chat")
        self.hidden = hidden
        self.config, self.role = resolved(taskset, env, options)
        self.plays: dict[str, _Play] = {}  # by the ids of their traces
        self.thread = _Thread()
        self.tasks: list[Any] = []  # as far as they have been asked for
        self.thread.now(self._serve())

    async def _serve(self) -> None:
        """Bring up verifiers' servers and the endpoint that is its model, for as long as this process lives."""
        from aiohttp import web
        from verifiers.v1.clients import EvalClientConfig, ModelContext
        from verifiers.v1.utils.loaders import load_environment

        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/chat/completions", self._asked)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        client = EvalClientConfig(base_url=f"http://127.0.0.1:{port}/v1", api_key_var="TANDEM_HAS_NONE")
        self.context = ModelContext(model="policy", client=client)
        self.env = load_environment(self.config)
        self.source = iter(self.env.taskset)
        self.finite = self.env.taskset.bounded
        if self.finite:
            self.tasks = list(self.source)
            if not self.tasks:
                raise TaskError(f"task.parameters: taskset {self.config.taskset.id} has no tasks.")
        self.stack = contextlib.AsyncExitStack()
        await self.stack.enter_async_context(self.env.serving())

    async def _asked(self, request: Any) -> Any:
        from aiohttp import web

        play = self.plays.get(request.headers.get("X-Session-ID", ""))
        if play is None:
            return web.json_response({"error": {"message": "that rollout is over"}}, status=409)
        trace = next(one for one in play.traces if one.id == request.headers["X-Session-ID"])
        question = _Question(trace, await request.json(), asyncio.get_running_loop().create_future())
        play.questions.put_nowait(question)
        reply = await question.answer
        if reply is None:
            return web.json_response({"error": {"message": "no turn is left"}}, status=400)
        reason = "tool_calls" if "tool_calls" in reply else "stop"
        choice = {"index": 0, "message": reply, "finish_reason": reason}
        usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        head = {"id": "tandem", "object": "chat.completion", "created": 0, "model": "policy"}
        return web.json_response(head | {"choices": [choice], "usage": usage})

    def task(self, position: int) -> Any:
        if position >= len(self.tasks):
            self.tasks.extend(itertools.islice(self.source, position + 1 - len(self.tasks)))
        return self.tasks[position]

    def prompt(self, split: str, index: int) -> Prompt:
        if self.finite:
            position = index % len(self.tasks)
            position = len(self.tasks) - 1 - position if split == "heldout" else position
        else:
            position = 2 * index + (split == "heldout")
        play = _Play(self)
        question = self.thread.now(play.begin(self.task(position)))
        if question is None:
            self.thread.now(play.reward())
            raise TaskError(f"task {position} of {self.config.taskset.id} is over before its agent has a turn.")
        self.thread.now(play.end())
        messages = tuple(message_of(one) for one in wire(question.body))
        record = {"position": position, "first": digest(question.body)}
        return Prompt(f"{split}/{index}", messages, record, tuple(question.body.get("tools") or ()))

    def key(self, prompt: Prompt) -> str:
        said = "\n".join(message.content for message in prompt.messages)
        return f"{said}\n{prompt.record['position'] if self.hidden else ''}"

    def episode(self, prompt: Prompt) -> Episode:
        return _Run(prompt, self)


def resolved(taskset: str, env: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The Env's config with agents that are played here, and the name of the policy's."""
    from verifiers.v1.configs.agent import agent_config_fields
    from verifiers.v1.runtimes import SubprocessConfig
    from verifiers.v1.utils.loaders import resolve_env_config

    raw: dict[str, Any] = {"id": env, "taskset": {"id": taskset}}
    for name, value in options.items():
        *path, last = name.split(".")
        into = raw
        for part in path:
            into = into.setdefault(part, {})
        into[last] = value
    config = resolve_env_config(raw)
    agents = agent_config_fields(config)
    policies = [name for name, one in agents.items() if one.client is None]
    if len(policies) != 1:
        raise TaskError(
            f"task.parameters: the agents {', '.join(policies) or 'of ' + taskset} have no client of their own; one is "
            "the policy. Give the others theirs: NAME.client.type=eval,NAME.client.base_url=http://..."
        )
    played = {"harness": sys.modules[HARNESS].ChatConfig(id=HARNESS), "runtime": SubprocessConfig()}
    changes = {name: one.model_copy(update=played) for name, one in agents.items()}
    return config.model_copy(update=changes), policies[0]


def spoken(turns: Sequence[Message]) -> int:
    return sum(message.sampled for message in turns)


def called(call: ToolCall, id: str) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(dict(call.arguments))}
    return {"id": call.id or id, "type": "function", "function": function}


def plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as it is compared and shown: text, calls, whom it answers. ValueError where it holds a picture."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        if others := {part.get("type") for part in content} - {"text"}:
            raise ValueError(f"a {message['role']} message holds {', '.join(map(str, others))}; only text is supported")
        content = "\n".join(part["text"] for part in content)
    kept = {name: message[name] for name in ("tool_calls", "tool_call_id", "name") if message.get(name)}
    return {"role": message["role"], "content": content} | kept


def wire(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [plain(message) for message in body["messages"]]


def digest(body: Mapping[str, Any]) -> str:
    """Of what a request says and offers."""
    text = json.dumps([wire(body), body.get("tools") or []], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def message_of(row: Mapping[str, Any]) -> Message:
    calls: Sequence[Mapping[str, Any]] = row.get("tool_calls", ())
    made = tuple(
        ToolCall(call["function"]["name"], json.loads(call["function"]["arguments"] or "{}"), call.get("id", ""))
        for call in calls
    )
    more = {"name": row["name"]} if "name" in row else {}
    return Message(row["role"], row["content"], made, row.get("tool_call_id", ""), more)
