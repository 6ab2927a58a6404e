"""What an engine has room for, as it tells who chooses between engines (engine/affinity.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from tandem.engine.policies import Room, counted

if TYPE_CHECKING:
    from tandem.engine.programs import Programs


class Space(Struct):
    """Of an engine that gives programs places.

    tokens: for which a program could be restored now, beside those that ask already; below 0 where those are too many.
    paused: programs that were paused and ask for nothing yet (`Programs.name`), with the tokens of their contexts.
    """

    tokens: int
    paused: dict[str, int]


class Spaces:
    """One engine's, looked at anew after engine.programs.tick_s."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._looked_s = -float("inf")
        self._space = Space(0, {})

    def space(self, now: float) -> Space | None:
        """None where nobody waits for a place. Where nothing runs, there is room for anybody.

        From any thread: of what stands, whatever step runs.
        """
        programs = self._programs
        if not (programs.gated and programs.mode == "enforce"):
            return None
        config, index = programs.config, programs.index
        if now >= self._looked_s + config.tick_s:
            room = Room(programs.policy, now, index.pool.num_pages, (), config.half_life_s, config.patience_s)
            every, taken, paused = list(programs.by_name.values()), 0.0, dict[str, int]()
            for one in every:
                if one.phase == "paused" and not one.live:
                    paused[one.name] = one.tokens
                else:
                    taken += counted(room, programs.look_at(one)) if one.phase != "paused" else one.pages
            free = int(room.capacity - taken) if any(one.live for one in every) else room.capacity
            self._looked_s = now
            self._space = Space(index.layout.capacity_tokens(free, index.pool.page_tokens), paused)
        return self._space
