"""How many drafts each sequence gets in a step: by what steps took on this machine, and by how often drafts stood.

Drafts are handed out to whose next one is likeliest to stand while that raises the tokens a second that are expected.
Where none raises them drafting sleeps, and is tried anew when the number of sequences changes much, when other texts
begin, and else as far as such tries take a hundredth of the time. A decision is a function of the seconds and of what
stood. It decides how long a text takes, and never what it is.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 9  # latest times of a bucket, whose median counts
LEAST = 3  # times of plain steps that are known before anything is drafted
COLD_ROWS = 64  # rows that are taken to double a step, where only plain ones were timed
PACE = 0.1  # weight of the latest step in how fast the machine is now
MARGIN = 0.01  # by which drafts must pay
PROBED = 0.01  # share of the time that tries may take while none pay
PROBE_TOKENS = 2  # that a sequence is drafted in such a try
PLAIN = 128  # steps, of which one is without drafts so that its time stays known
HORIZON = 64.0  # drafts at a position that the share which stood is of
OWN = 0.9  # of a sequence's own counts that stay with each of its drafts
WEIGHT = 2.0  # drafts that the share of all counts as beside a sequence's own
FAR = 1 << 20
FORM = 1  # of the file


class Times:
    """Seconds of steps by (sequences, rows): a median for each doubling of sequences and half doubling of rows.

    >>> times = Times(cold_rows=64)
    >>> times.add(4, 4, 1.0)
    >>> times.at(4, np.array([4, 36])).tolist()
    [1.0, 1.5]
    >>> times.add(4, 16, 2.0)
    >>> times.at(4, np.array([4, 10, 28])).tolist()
    [1.0, 1.5, 3.0]
    """

    def __init__(self, cold_rows: int = 0) -> None:
        """cold_rows: that are taken to add as much as a step of one known time takes; 0: more rows add nothing then."""
        self._cold_rows = cold_rows
        self._seen: dict[tuple[int, int], deque[tuple[float, float]]] = {}
        self._points: dict[int, dict[int, tuple[float, float]]] = {}
        self._curves: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}

    @staticmethod
    def block(sequences: int, rows: float) -> int:
        """Bucket of rows: 0 of one row a sequence.

        >>> [Times.block(4, rows) for rows in (4, 5, 8, 12, 64)]
        [0, 1, 3, 4, 9]
        """
        return 0 if rows <= sequences else 1 + int(2 * math.log2(rows / sequences))

    def add(self, sequences: int, rows: int, seconds: float) -> None:
        """A step took so long."""
        bucket, block = sequences.bit_length(), self.block(sequences, rows)
        seen = self._seen.setdefault((bucket, block), deque(maxlen=WINDOW))
        seen.append((seconds, float(rows)))
        took, rows_then = sorted(seen)[len(seen) // 2][0], sum([one for _, one in seen]) / len(seen)
        self._points.setdefault(bucket, {})[block] = rows_then, took
        self._curves.pop(bucket, None)

    def known(self, sequences: int) -> int:
        """How many plain steps of about so many sequences were timed, WINDOW at most."""
        return len(self._seen.get((sequences.bit_length(), 0), ()))

    def reach(self, sequences: int) -> float:
        """The most rows of about so many sequences that were timed; 0 of none."""
        return max([rows for rows, _ in self._points.get(sequences.bit_length(), {}).values()], default=0.0)

    def at(self, sequences: int, rows: NDArray[Any]) -> NDArray[np.float64]:
        """Seconds, 0 where nothing near was timed. More rows never take less."""
        bucket = sequences.bit_length()
        curve = self._curves.get(bucket)
        if curve is None:
            curve = self._curves[bucket] = self._curve(bucket)
        return np.interp(rows, *curve)

    def _curve(self, bucket: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        points = sorted(self._points.get(bucket, {}).values()) or [(1.0, 0.0)]
        rows = [one for one, _ in points]
        seconds = np.maximum.accumulate([took for _, took in points]).tolist()
        if len(points) > 1:
            slope = (seconds[-1] - seconds[-2]) / max(1e-9, rows[-1] - rows[-2])
        else:
            slope = seconds[0] / self._cold_rows if self._cold_rows else 0.0
        return np.array([*rows, rows[-1] + FAR]), np.array([*seconds, seconds[-1] + FAR * slope])

    def table(self) -> dict[tuple[int, int], tuple[float, float]]:
        """(doubling of sequences, bucket of rows) -> rows and seconds."""
        return {(bucket, block): point for bucket, row in self._points.items() for block, point in row.items()}

    def kept(self) -> dict[str, tuple[float, float]]:
        return {f"{bucket} {block}": point for (bucket, block), point in sorted(self.table().items())}

    def take(self, kept: Mapping[str, Sequence[float]]) -> None:
        """What was kept."""
        for name, (rows, seconds) in kept.items():
            bucket, block = map(int, name.split())
            self._seen[bucket, block] = deque([(seconds, rows)] * LEAST, maxlen=WINDOW)
            self._points.setdefault(bucket, {})[block] = rows, seconds
        self._curves.clear()


class Chances:
    """How likely a draft stands at each position after those before it stood, of all sequences and of each."""

    def __init__(self, most: int) -> None:
        self.positions = np.arange(most)
        self._stood_K, self._tried_K = np.zeros(most), np.zeros(most)
        self._given_K, self._asked_K = np.ones(most), np.ones(most)
        self._own: dict[int, int] = {}  # sequence -> its row
        self._free: list[int] = []
        self._stood_RK, self._tried_RK = np.zeros((0, most)), np.zeros((0, most))

    def __len__(self) -> int:
        return len(self._own)

    def renew(self) -> None:
        """Other texts begin: what was learned counts an eighth."""
        for counts in (self._stood_K, self._tried_K, self._given_K, self._asked_K):
            counts /= 8
        self._given_K += 1
        self._asked_K += 1

    def rows(self, names: Sequence[int]) -> NDArray[np.int64]:
        """The rows of sequences, those that are new among them."""
        own = self._own
        try:
            return np.array([own[name] for name in names])
        except KeyError:
            for name in names:
                if name not in own:
                    if not self._free:
                        count, most = len(self._stood_RK), len(self.positions)
                        more = np.zeros((max(8, count), most))
                        self._stood_RK = np.concatenate([self._stood_RK, more])
                        self._tried_RK = np.concatenate([self._tried_RK, more])
                        self._free = list(range(count, len(self._stood_RK)))
                    row = own[name] = self._free.pop()
                    self._stood_RK[row] = self._tried_RK[row] = 0.0
            return np.array([own[name] for name in names])

    def forget(self, name: int) -> None:
        """A sequence ended."""
        row = self._own.pop(name, None)
        if row is not None:
            self._free.append(row)

    def given(self) -> NDArray[np.float64]:
        """How likely a drafter that is asked for it has a draft at each position."""
        return self._given_K / self._asked_K

    def shares(self) -> list[float]:
        """How likely a draft stands at each position after those before it, of any sequence."""
        found, before = [], 0.5
        for stood, tried in zip(self._stood_K.tolist(), self._tried_K.tolist(), strict=True):
            before = (stood + 2 * before) / (tried + 2)
            found.append(before)
        return found

    def all_stand(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """[sequences, positions]: how likely a draft and all before it stand."""
        prior = WEIGHT * np.array(self.shares())
        return np.cumprod((self._stood_RK[rows] + prior) / (self._tried_RK[rows] + WEIGHT), axis=1)

    def offered(self, asked: Sequence[int], given: Sequence[int]) -> None:
        """Of each sequence: drafts that were asked for, and that there were."""
        asked_K = (np.array(asked)[:, None] > self.positions).sum(0)
        kept = HORIZON / (HORIZON + asked_K)
        self._asked_K = self._asked_K * kept + asked_K
        self._given_K = self._given_K * kept + (np.array(given)[:, None] > self.positions).sum(0)

    def stood(self, names: Sequence[int], drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Of each sequence: drafts that were run, and the first so many stood."""
        rows, right = self.rows(names), np.array(accepted)[:, None]
        stood = self.positions < right
        tried = (self.positions <= right) & (self.positions < np.array(drafted)[:, None])
        kept = np.where(tried, OWN, 1.0)
        self._stood_RK[rows] = self._stood_RK[rows] * kept + stood
        self._tried_RK[rows] = self._tried_RK[rows] * kept + tried
        tried_K = tried.sum(0)
        left = HORIZON / (HORIZON + tried_K)
        self._stood_K = self._stood_K * left + stood.sum(0)
        self._tried_K = self._tried_K * left + tried_K


class Lengths:
    """Hands out drafts.

    most: drafts of a sequence in a step. file: where times are kept, and found by the next engine of the same model on
    the same machine; None: nowhere.
    """

    def __init__(self, most: int, file: Path | None = None) -> None:
        self.most = most
        self.steps, self.drafting = Times(COLD_ROWS), Times()  # seconds of forward passes, at pace 1, and of drafters
        self.chances = Chances(most)
        self.why = ""  # of tally.UNDRAFTED
        self.pace = 1.0  # of the machine now: what a step takes over what it took when it was timed
        self.file = file
        self.unkept = 0  # times since they were
        self._asleep = self._probing = self._fresh = False
        self._bucket = 0  # of sequences, when it fell asleep
        self._turn = 0  # whose turn it is in a try
        self._plain = 0  # steps since the last without drafts
        self._run_s = self._spent_s = 0.0  # asleep, and of that in tries
        if file is not None:
            self._find(file)

    @property
    def on(self) -> bool:
        """Whether the next step may have drafts."""
        return not self._asleep or self._probing

    def ask(self, names: Sequence[int], most: Sequence[int], rows: int) -> list[int]:
        """How many drafts each sequence that runs one token is to get in a step that has `rows` without; where they are
        none, `why` says why. names: numbers of the sequences; most: of each at most."""
        count = len(names)
        self._plain += 1
        if self.steps.known(count) < LEAST or self._plain > PLAIN:
            self.chances.rows(names)
            self._plain, self.why = 0, "untimed"
            return [0] * count
        if self._probing:
            self._turn += max(1, count // 8)
            tried = {(self._turn + i) % count for i in range(max(1, count // 8))}
            return [min(PROBE_TOKENS, one) if i in tried else 0 for i, one in enumerate(most)]
        chance_SK = self.chances.all_stand(self.chances.rows(names))
        chance_SK[self.chances.positions >= np.array(most)[:, None]] = 0.0
        chosen = self._hand_out(chance_SK.ravel(), count, rows)
        if not len(chosen):
            self._asleep, self._bucket = True, count.bit_length()
            self._probing, self._fresh, self.why = self._fresh, False, "unpaid"
            return [0] * count
        return np.bincount(chosen // self.most, minlength=count).tolist()  # type: ignore[no-any-return]

    def _hand_out(self, chance_N: NDArray[Any], count: int, rows: int) -> NDArray[np.int64]:
        """Places of the drafts that are worth it, the likeliest to stand first; of a sequence the first ones."""
        order_N = np.argsort(-chance_N, kind="stable")
        known = int(2 * self.steps.reach(count)) - count  # beyond them times are guessed: no further than twice as far
        order_N = order_N[: min(int(np.count_nonzero(chance_N)), max(1, known))]
        if not len(order_N):
            return order_N
        given_N = self.chances.given()[order_N % self.most]
        tokens_N = count + np.cumsum(given_N * chance_N[order_N])
        rows_N = np.concatenate([[0.0], np.cumsum(given_N)]) + rows
        took_N = self.steps.at(count, rows_N)
        plain_s = self.steps.at(count, np.array([count]))[0]
        more_N = took_N[1:] - took_N[0] + self.drafting.at(count, np.arange(1, len(order_N) + 1)) / self.pace
        rate_N = tokens_N / (plain_s + more_N)
        best = int(np.argmax(rate_N))
        return order_N[: best + 1] if rate_N[best] * plain_s > (1 + MARGIN) * count else order_N[:0]

    def drafted(self, asked: Sequence[int], given: Sequence[int], seconds: float) -> None:
        """A drafter was asked, and took so long."""
        self.chances.offered(asked, given)
        self.drafting.add(len(asked), sum(asked), seconds)
        if self._probing:
            self._spent_s += seconds

    def stood(self, names: Sequence[int], drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """As Chances."""
        self.chances.stood(names, drafted, accepted)

    def took(self, sequences: int, rows: int, seconds: float, draws_alone: bool) -> None:
        """A step was run: so many sequences, of which each drew; its forward pass's seconds, without those of drafting.

        draws_alone: no row of it was of a prompt."""
        if draws_alone and seconds > 0:
            self._time(sequences, rows, seconds)
        if not self._asleep:
            return
        self._run_s += seconds
        if self._probing:
            extra = self.steps.at(sequences, np.array([rows])) - self.steps.at(sequences, np.array([sequences]))
            self._spent_s += self.pace * float(extra[0])
            self._probing, self._asleep = False, False  # what it found decides
        elif sequences.bit_length() != self._bucket:
            self._asleep = False
        elif self._spent_s < PROBED * self._run_s:
            self._probing = True

    def _time(self, sequences: int, rows: int, seconds: float) -> None:
        known = float(self.steps.at(sequences, np.array([rows]))[0])
        if known > 0 and self.steps.known(sequences) >= LEAST:
            now = min(2.0, max(0.5, seconds / known / self.pace))
            self.pace *= now**PACE
        self.steps.add(sequences, rows, seconds / self.pace)
        self.unkept += 1
        if self.unkept >= 512:
            self.keep()

    def forget(self, name: int) -> None:
        """A sequence ended. With the last that was asked for other texts begin."""
        self.chances.forget(name)
        if not len(self.chances):
            self.chances.renew()
            self._asleep, self._probing, self._fresh = False, False, True

    def _find(self, file: Path) -> None:
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["form"] == FORM:
                self.steps.take(kept["steps"])
        except (OSError, ValueError, KeyError, TypeError):
            return

    def keep(self) -> Path | None:
        """Writes the times, whole or not at all; where that cannot be they are not kept."""
        self.unkept = 0
        if self.file is None:
            return None
        kept = {"form": FORM, "steps": self.steps.kept()}
        scratch = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps(kept, indent=1), encoding="utf-8")
            scratch.replace(self.file)
        except OSError:
            return None
        return self.file
