"""Replay decisions of the gate on recorded sessions: ``decide.py`` prints its error rates.

A decision draws one recorded session and presents its rounds to the gate in order, with their
durations. The processes of a round are permuted each time: within a side, and across sides in
sessions without a slowdown. A decision that needs more rounds than were recorded is inconclusive.
Decisions on one session are correlated, so bounds are also given over sessions.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from llmopt.benchmark.gate.checking import GateSession
from llmopt.benchmark.gate.decisions import Evidence, Question, ask
from llmopt.benchmark.gate.pairs import GATED, CheckRequest
from llmopt.benchmark.gate.rounds import BASELINE, CANDIDATE, Measured, metrics_of

HERE: Final = Path(__file__).parent
Session = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A required accuracy of the gate.

    Args:
        name: Description.
        spin: Share by which the candidate was slowed.
        allowance: Value of ``--max-regression``.
        right: Correct verdicts.
        least: Required share of correct decisions.
    """

    name: str
    spin: float
    allowance: float
    right: tuple[str, ...]
    least: float


GOALS: Final = (
    Goal("nothing changed, 2 % allowed: no alarm", 0.0, 0.02, ("pass", "open"), 0.99),
    Goal("5 % slower, 2 % allowed: found", 0.05, 0.02, ("fail",), 0.95),
    Goal("10 % slower, 5 % allowed: found", 0.10, 0.05, ("fail",), 0.99),
    Goal("2 % slower, 5 % allowed: not failed", 0.02, 0.05, ("pass", "open"), 0.99),
)


@dataclass(frozen=True)
class Decision:
    """The outcome of one replay.

    Args:
        session: Number of the session.
        verdict: ``"pass"``, ``"fail"`` or ``"open"``.
        time_s: Duration until the verdict.
    """

    session: int
    verdict: str
    time_s: float


class NoMoreRoundsError(Exception):
    """The session has no further rounds."""


class Replayed:
    """Recorded rounds, presented to the gate as if measured now.

    Args:
        measured: Measurements of each process.
        durations_s: Duration of each round.
    """

    def __init__(self, measured: Sequence[Measured], durations_s: Sequence[float]) -> None:
        self._every = measured
        self._durations_s = durations_s
        self.durations_s: list[float] = []

    @property
    def count(self) -> int:
        """The number of presented rounds."""
        return len(self.durations_s)

    @property
    def measured(self) -> list[Measured]:
        """The measurements of the presented rounds."""
        return [each for each in self._every if each.round < self.count]

    def measure(self) -> None:
        """Present the next round.

        Raises:
            NoMoreRoundsError: The session has ended.
        """
        if self.count == len(self._durations_s):
            raise NoMoreRoundsError
        self.durations_s.append(self._durations_s[self.count])


class Replay:
    """A pair of artifacts as the gate sees it, replayed from a session.

    Args:
        session: Recorded session.
        rng: Source of the permutations.
    """

    def __init__(self, session: Session, rng: random.Random) -> None:
        measured = [Measured(**each) for each in session["measured"]]
        measured = shuffled(measured, rng, sides=not session["spin"])
        self.name = "recorded"
        self.rounds = Replayed(measured, session["rounds_s"])
        self._metrics = [metric for metric in GATED if metric in metrics_of(measured)]

    def questions(self, request: CheckRequest) -> list[Question]:
        """Return the default questions of a check."""
        return [Question(self.name, m, request.allowed(self.name, m)) for m in self._metrics]

    def ask(self, question: Question) -> Evidence:
        """Return the current evidence for a question."""
        return ask(question, self.rounds.measured)


def shuffled(measured: Sequence[Measured], rng: random.Random, *, sides: bool) -> list[Measured]:
    """Return the measurements with the processes of each round permuted, across sides if asked."""
    permuted = []
    for number in range(measured[-1].round + 1):
        rows = [
            [m for m in measured if m.round == number and m.side == side]
            for side in (BASELINE, CANDIDATE)
        ]
        for row in rows:
            rng.shuffle(row)
        for index, pair in enumerate(zip(*rows, strict=True)):
            ordered = rng.sample(pair, 2) if sides else pair
            permuted.append(replace(ordered[0], side=BASELINE, number=index))
            permuted.append(replace(ordered[1], side=CANDIDATE, number=index))
    return permuted


def decide(goal: Goal, sessions: Sequence[Session], seed: int) -> Decision:
    """Return the decision on a random session."""
    rng = random.Random(seed)  # noqa: S311 - a simulation
    number = rng.choice([n for n, s in enumerate(sessions) if s["spin"] == goal.spin])
    replay = Replay(sessions[number], rng)
    seconds = sessions[number]["seconds"]
    request = CheckRequest(
        candidates=(), baseline=Path(), allowances={"": goal.allowance}, max_time_s=seconds
    )
    gate = GateSession([replay], request)  # type: ignore[list-item] # as a Pair is asked
    try:
        gate.measure(lambda _: None)
    except NoMoreRoundsError:
        return Decision(number, "open", seconds)
    verdicts = {answer.verdict for answer in gate.answers}
    verdict = next(v for v in ("fail", "open", "pass") if v in verdicts)
    return Decision(number, verdict, sum(replay.rounds.durations_s))


def upper(wrong: int, count: int, tail: float = 0.05) -> float:
    """Return the upper 95 % confidence bound of a share, given ``wrong`` of ``count``.

    Source: C. J. Clopper, E. S. Pearson, Biometrika 26 (1934), 404-413.
    """
    low, high = wrong / count, 1.0
    for _ in range(60):
        share = (low + high) / 2
        logs = [
            math.lgamma(count + 1)
            - math.lgamma(k + 1)
            - math.lgamma(count - k + 1)
            + k * math.log(share)
            + (count - k) * math.log1p(-share)
            for k in range(wrong + 1)
        ]
        low, high = (share, high) if sum(map(math.exp, logs)) > tail else (low, share)
    return high


def of_sessions(wrong: Sequence[Decision], every: Sequence[Decision]) -> float:
    """Return the same bound with sessions, not decisions, as the sampling unit.

    The error rates of sessions are resampled; if all are zero, the bound is that of no error among
    as many trials as there are sessions.
    """
    numbers = sorted({each.session for each in every})
    shares = np.array(
        [sum(w.session == n for w in wrong) / sum(e.session == n for e in every) for n in numbers]
    )
    if not shares.any():
        return upper(0, len(numbers))
    drawn = np.random.default_rng(0).choice(shares, (10_000, len(shares))).mean(axis=1)
    return float(np.quantile(drawn, 0.95))


def row(goal: Goal, decisions: Sequence[Decision]) -> dict[str, Any]:
    """Return a row of the table."""
    wrong = [each for each in decisions if each.verdict not in goal.right]
    count = len(decisions)
    return {
        "goal": goal.name,
        "sessions": len({each.session for each in decisions}),
        "decisions": count,
        "right": 1 - len(wrong) / count,
        "wanted": goal.least,
        "wrong_at_most": upper(len(wrong), count),
        "wrong_at_most_by_sessions": of_sessions(wrong, decisions),
        "inconclusive": sum(each.verdict == "open" for each in decisions) / count,
        "median_time_s": statistics.median(each.time_s for each in decisions),
    }


def read(folder: Path) -> list[Session]:
    """Return the recorded sessions."""
    sessions = []
    for path in sorted(folder.glob("*.json.gz")):
        with gzip.open(path, "rt") as file:
            sessions.append(json.load(file))
    return sessions


def main() -> None:
    """Print the accuracy of the gate, and write it as JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=HERE / "sessions")
    parser.add_argument("--decisions", type=int, default=2000, help="for each goal")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sessions = read(options.folder)
    rows = []
    with ProcessPoolExecutor() as pool:
        for goal in GOALS:
            if all(session["spin"] != goal.spin for session in sessions):
                continue
            one: Callable[[int], Decision] = partial(decide, goal, sessions)
            rows.append(row(goal, list(pool.map(one, range(options.decisions), chunksize=20))))
            print(text(rows[-1]), flush=True)
    if options.json is not None:
        machines = sorted({session["machine"]["processor"] for session in sessions})
        data = {"schema": 1, "sessions": len(sessions), "machines": machines, "goals": rows}
        options.json.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def text(row: dict[str, Any]) -> str:
    """Return a row of the table as text."""
    return (
        f"{row['goal']} ({row['sessions']} sessions, "
        f"{row['decisions']} decisions): right {row['right']:.2%} (wanted "
        f"{row['wanted']:.0%}), wrong at most {row['wrong_at_most']:.2%}, by sessions "
        f"{row['wrong_at_most_by_sessions']:.2%}; inconclusive {row['inconclusive']:.2%}; "
        f"median {row['median_time_s']:.0f} s"
    )


if __name__ == "__main__":
    main()
