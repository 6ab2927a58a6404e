"""The program that plays an agent's seat in verifiers here: a chat with the task's tools, in this process.

verifiers loads it by the name of its module. It asks the model through verifiers' own
interception, as any harness must.
"""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from typing import Any

import httpx
from verifiers.v1.clients import ModelContext
from verifiers.v1.configs.harness import HarnessConfig
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harness import Harness
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp
from verifiers.v1.runtimes import ProgramResult, Runtime
from verifiers.v1.task import TaskData
from verifiers.v1.trace import Trace

__all__ = ["Chat", "ChatConfig"]


class ChatConfig(HarnessConfig):
    pass


class Chat(Harness[ChatConfig]):
    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: ModelContext,
        trace: Trace,
        runtime: Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        task: TaskData,
    ) -> ProgramResult:
        """Talk until a turn calls no tool, or the model is refused."""
        system, prompt = self.resolve_prompt(task)
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages.extend(message_to_wire(message) for message in prompt or [])
        async with AsyncExitStack() as stack:
            servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
            tools, dispatch, live = await connect_mcp({"mcpServers": servers}, stack)
            client = await stack.enter_async_context(httpx.AsyncClient(timeout=None))
            while True:
                body = {"model": ctx.model, "messages": messages} | ({"tools": tools} if tools else {})
                answer = await client.post(
                    f"{endpoint}/chat/completions", json=body, headers={"Authorization": f"Bearer {secret}"}
                )
                if answer.status_code != 200:
                    return ProgramResult(1, "", answer.text)
                message = answer.json()["choices"][0]["message"]
                messages.append({name: value for name, value in message.items() if value is not None})
                if not message.get("tool_calls"):
                    return ProgramResult(0, "", "")
                for call in message["tool_calls"]:
                    name = call["function"]["name"]
                    try:
                        if name not in dispatch:
                            raise ValueError(f"there is no tool {name!r}. Tools: {', '.join(dispatch)}.")
                        content = await call_mcp(
                            live, dispatch, name, json.loads(call["function"]["arguments"] or "{}")
                        )
                    except Exception as error:  # noqa: BLE001 - told to the model
                        content = f"error: {error}"
                    messages.append({"role": "tool", "tool_call_id": call["id"], "name": name, "content": content})
