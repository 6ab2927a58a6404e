"""An Env of verifiers 0.4.0 that opens the conversation itself and asks again."""

import verifiers.v1 as vf

__all__ = ["AsksTwice", "Asking"]


class Row(vf.TaskData):
    number: int


class Question(vf.Task[Row, vf.State, vf.TaskConfig]):
    pass


class Asking(vf.Taskset[Question, vf.TasksetConfig]):
    INFINITE = True

    def load(self):
        n = 0
        while True:
            yield Question(Row(prompt=None, number=n), self.config.task)
            n += 1


class AsksTwiceConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()


class AsksTwice(vf.Env[AsksTwiceConfig]):
    async def run(self, task, agents):
        async with agents.player.interaction(task) as interaction:
            first = await interaction.turn(f"Say {task.data.number}.")
            second = await interaction.turn(f"You said {first.last_reply}. Again?")
        said = [segment.last_reply for segment in (first, second) if not segment.terminated]
        interaction.trace.record_reward("right", float(said.count(str(task.data.number))), 1.0)
