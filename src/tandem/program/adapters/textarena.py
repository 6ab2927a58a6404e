"""textarena's games: the model holds one seat, a fixed opponent the others."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from tandem.errors import TaskError, nearest
from tandem.program.adapters.action import named, package, said, seed_of
from tandem.program.environment import Environment, Episode, Step
from tandem.types import Message, Prompt

PIN = "textarena==0.7.4"
ATTEMPTS, STRIDE = 64, 1_000_003  # seeds for one prompt, where games end before the model's seat has a turn
MOST_MOVES = 1000  # of others between two turns of the model
_MOVE = re.compile(r"\[[^\[\]\n]{1,40}\]")


class TextArena(Environment):
    """A game by its id. Rewards are the game's own, for the model's seat, when it ends.

    players: how many seats. seat: the model's; -1 draws it by the prompt. opponent: who holds the others, "random" (one
    of the [moves] that the last thing it was shown lists) or "package.module:function" of (all that it was shown, a
    random.Random), which returns a text. bad_moves: so many invalid moves in a row are told to the model before one
    loses; -1: the game's own rule, mostly 1. Any other parameter is an option of the game.

    The game is given what the model marks as <action>...</action>, or all its text outside of its thoughts.
    """

    def __init__(
        self,
        id: str,
        players: int = 1,
        seat: int = 0,
        opponent: str = "random",
        bad_moves: int = -1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.arena = package("textarena", PIN)
        if not -1 <= seat < players:
            raise TaskError(f"task.parameters: seat is {seat}. Allowed: 0 to {players - 1}, or -1 to draw it.")
        self.opponent: Callable[[str, random.Random], str] = (
            random_move if opponent == "random" else named(opponent, "opponent")
        )
        self.id, self.players, self.seat, self.bad_moves = id, players, seat, bad_moves
        self.seed, self.options = seed, options
        if id not in (known := self.arena.envs.registration.ENV_REGISTRY):
            raise TaskError(f"task.parameters: id is {id!r}, which textarena does not have.{nearest(id, known)}")
        _Game(self, 0, 0)

    def prompt(self, split: str, index: int) -> Prompt:
        for attempt in range(ATTEMPTS):
            seed = seed_of(self.seed, split, index + attempt * STRIDE)
            seat = self.seat if self.seat >= 0 else seed % self.players
            game = _Game(self, seed, seat)
            text, state = game.go_on()
            if not game.over:
                break
        else:
            raise TaskError(
                f"{ATTEMPTS} games of {self.id} are over before seat {seat} has a turn. Choose another seat."
            )
        record = {"seed": seed, "seat": seat, "first": text, "state": state}
        return Prompt(f"{split}/{index}", (Message("user", text),), record)

    def key(self, prompt: Prompt) -> str:
        return f"{prompt.messages[-1].content}\n{prompt.record['seed']}"  # what a game hides is drawn by the seed

    def episode(self, prompt: Prompt) -> Episode:
        return _Run(prompt, self)


class _Run(Episode):
    def __init__(self, prompt: Prompt, task: TextArena) -> None:
        super().__init__(prompt)
        self.task = task

    def setup(self) -> None:
        self.game = _Game(self.task, self.prompt.record["seed"], self.prompt.record["seat"])
        text, self.state = self.game.go_on()
        if text != self.prompt.record["first"]:
            raise ValueError("reset(seed=...) does not give what the prompt shows: the game draws from elsewhere")

    def observe(self, turns: tuple[Message, ...]) -> Step:
        before, text = self.state, ""
        self.game.move(said(turns[-1].content))
        if not self.game.over:
            text, self.state = self.game.go_on()
        self.counts["bad_actions"] += self.game.take_bad()
        if not self.game.over:
            return Step([Message("user", text)], state=before)
        reward, bad = self.game.outcome()
        self.counts["lost_by_bad_action"] += bad
        return Step(None, reward, before)


class _Game:
    """A game in which all seats but one are played. Its draws are its own: textarena uses the process's generator."""

    def __init__(self, task: TextArena, seed: int, seat: int) -> None:
        self.task, self.seat, self.over = task, seat, False
        self.noise = random.Random(seed).getstate()
        self.others = random.Random(f"others {seed}")
        self.shown: dict[int, list[str]] = {}  # to each other seat
        self.bad = 0
        with self.own_draws():
            self.env = task.arena.make(task.id, **task.options)
            self.env.reset(num_players=task.players, seed=seed)
        self.raw = self.env
        while isinstance(self.raw, task.arena.Wrapper):
            self.raw = self.raw.env
        if task.bad_moves >= 0:
            self.raw.state.error_allowance = task.bad_moves

    @contextlib.contextmanager
    def own_draws(self) -> Iterator[None]:
        outside = random.getstate()
        random.setstate(self.noise)
        try:
            yield
        finally:
            self.noise = random.getstate()
            random.setstate(outside)

    def move(self, text: str) -> None:
        with self.own_draws():
            done, _ = self.env.step(action=text)
        self.over = bool(done)

    def go_on(self) -> tuple[str, str]:
        """Play the others up to the next turn of the model's seat: what it is shown, and the state that it is in."""
        for _ in range(MOST_MOVES):
            with self.own_draws():
                player, messages = self.raw.get_observation()
            if player == self.seat:
                return self.told(messages)
            text, _ = self.told(messages, player)
            self.shown.setdefault(player, []).append(text)
            self.move(self.task.opponent("\n".join(self.shown[player]), self.others))
            if self.over:
                if (self.raw.state.game_info or {}).get(player, {}).get("invalid_move"):
                    raise ValueError(f"the opponent in seat {player} lost by an invalid move; give another one")
                return "", ""
        raise ValueError(f"{MOST_MOVES} moves without a turn of seat {self.seat}")

    def told(self, messages: list[Any], player: int | None = None) -> tuple[str, str]:
        """New messages to a seat without its own, and the last board among them, or all."""
        kinds = self.task.arena.ObservationType
        seat = self.seat if player is None else player
        names = {**(self.raw.state.role_mapping or {}), self.task.arena.GAME_ID: "GAME"}
        lines, board = [], ""
        for sender, text, kind in messages:
            self.bad += kind == kinds.GAME_ADMIN and "invalid move" in text and player is None
            board = text if kind == kinds.GAME_BOARD else board
            if not (kind == kinds.PLAYER_ACTION and sender == seat):
                lines.append(f"[{names.get(sender, f'Player {sender}')}] {text}")
        whole = "\n".join(lines).strip() or "Your turn."
        return whole, board or whole

    def take_bad(self) -> int:
        """Invalid moves of the model that the game told it of, since this was last asked."""
        bad, self.bad = self.bad, 0
        return bad

    def outcome(self) -> tuple[float, bool]:
        """The reward of the model's seat, and whether it lost by an invalid move."""
        rewards, facts = self.env.close()
        if not rewards or self.seat not in rewards:
            raise ValueError(f"{self.task.id} ended without a reward for seat {self.seat}")
        return float(rewards[self.seat]), bool(facts.get(self.seat, {}).get("invalid_move"))


def random_move(shown: str, others: random.Random) -> str:
    """One of the [moves] in the last part of what a seat was shown that lists any.

    >>> random_move("[Player 1] [2]\\nAvailable Moves: '[4]'", random.Random(0))
    '[4]'
    """
    for line in reversed(shown.splitlines()):
        if moves := _MOVE.findall(re.sub(r"^\[(?:GAME|Player \d+)\]", "", line)):
            return others.choice(moves)
    raise ValueError("the game lists no [moves] that a random opponent could choose from; give opponent=")
