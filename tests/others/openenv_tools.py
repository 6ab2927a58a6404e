"""An OpenEnv 0.10.0 environment with tools over MCP: a counter that is to reach three."""

from fastmcp import FastMCP
from openenv.core import CallToolAction, CallToolObservation, MCPEnvironment, State, create_app
from openenv.core.env_server.types import Observation


class Counter(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        server = FastMCP("counter")
        self.count = 0

        @server.tool
        def raise_by(step: int) -> str:
            """Raise the counter."""
            self.count += step
            return f"at {self.count}"

        super().__init__(server)

    def reset(self, seed=None, episode_id=None, **others):
        self.count = 0
        return Observation(metadata={"seed": seed})

    def _step_impl(self, action, timeout_s=None, **others):
        raise ValueError(f"no action: {action}")

    async def step_async(self, action, timeout_s=None, **others):
        found = await super().step_async(action, timeout_s=timeout_s, **others)
        if isinstance(action, CallToolAction):
            found.reward, found.done = float(self.count == 3), self.count >= 3
        return found

    @property
    def state(self) -> State:
        return State(episode_id="", step_count=self.count)


app = create_app(Counter, CallToolAction, CallToolObservation, env_name="counter", max_concurrent_envs=64)
