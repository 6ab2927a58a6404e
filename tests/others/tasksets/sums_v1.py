"""A taskset of verifiers 0.4.0: sums, with a tool that adds, or with a second question by the Env."""

import verifiers.v1 as vf

__all__ = ["Sums"]


class Row(vf.TaskData):
    answer: int


class Adder(vf.Toolset[vf.ToolsetConfig, vf.State]):
    TOOL_PREFIX = None

    @vf.tool
    async def add(self, a: int, b: int) -> int:
        """Add two numbers."""
        return a + b


class Setting(vf.TaskConfig):
    tools: bool = False


class Sum(vf.Task[Row, vf.State, Setting]):
    @classmethod
    def toolsets(cls, config: Setting) -> list[vf.Toolset]:
        return [Adder(vf.ToolsetConfig())] if config.tools else []

    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == str(self.data.answer))

    @vf.reward(weight=0.5)
    async def turns(self, trace: vf.Trace) -> float:
        return float(trace.num_turns)


class SumsConfig(vf.TasksetConfig):
    task: Setting = Setting()
    size: int = 20


class Sums(vf.Taskset[Sum, SumsConfig]):
    def load(self):
        for n in range(self.config.size):
            yield Sum(Row(prompt=f"What is {n} + 1?", system_prompt="Sums.", answer=n + 1), self.config.task)


if __name__ == "__main__":
    Adder.run()
