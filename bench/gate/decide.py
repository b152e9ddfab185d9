"""Replay what the gate would have decided: ``decide.py`` prints how often it was right.

A decision draws one recorded session, whole, and lets the gate look at its rounds as they came,
with the time they took. Which process of a round stands for which is drawn anew each time: of its
side, and of sessions that nothing slowed of both. A decision that wants more rounds than were
recorded is inconclusive. Decisions on one session are alike, so the bounds are of the share of
sessions, too.
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
    """A question to the gate, and how often it has to answer right.

    Args:
        name: What it is about.
        spin: The share that the candidate was slowed by.
        allowance: What ``--max-regression`` said.
        right: Verdicts that are right.
        least: The share of decisions that have to be.
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
    """What one replay came to.

    Args:
        session: Which session it was.
        verdict: ``"pass"``, ``"fail"`` or ``"open"``.
        time_s: How long it took.
    """

    session: int
    verdict: str
    time_s: float


class NoMoreRoundsError(Exception):
    """The session ended here."""


class Replayed:
    """Rounds that were recorded, in the place of those that are measured.

    Args:
        found: What each process measured.
        took_s: How long each round took.
    """

    def __init__(self, found: Sequence[Measured], took_s: Sequence[float]) -> None:
        self._every = found
        self._took = took_s
        self.took_s: list[float] = []

    @property
    def count(self) -> int:
        """How many rounds have been looked at."""
        return len(self.took_s)

    @property
    def found(self) -> list[Measured]:
        """What was measured in them."""
        return [each for each in self._every if each.round < self.count]

    def measure(self) -> None:
        """Look at one round more.

        Raises:
            NoMoreRoundsError: There is none.
        """
        if self.count == len(self._took):
            raise NoMoreRoundsError
        self.took_s.append(self._took[self.count])


class Replay:
    """A pair of artifacts as the gate sees it, made of what was recorded.

    Args:
        session: The record.
        rng: Draws which process stands for which.
    """

    def __init__(self, session: Session, rng: random.Random) -> None:
        found = [Measured(**each) for each in session["measured"]]
        found = shuffled(found, rng, sides=not session["spin"])
        self.name = "recorded"
        self.rounds = Replayed(found, session["rounds_s"])
        self._metrics = [metric for metric in GATED if metric in metrics_of(found)]

    def questions(self, request: CheckRequest) -> list[Question]:
        """Return the questions that a check asks where nothing is asked for."""
        return [Question(self.name, m, request.allowed(self.name, m)) for m in self._metrics]

    def ask(self, question: Question) -> Evidence:
        """Return what is known of one."""
        return ask(question, self.rounds.found)


def shuffled(found: Sequence[Measured], rng: random.Random, *, sides: bool) -> list[Measured]:
    """Return the records, those of each round standing for others of it: of both sides, too."""
    kept = []
    for number in range(found[-1].round + 1):
        rows = [
            [m for m in found if m.round == number and m.side == side]
            for side in (BASELINE, CANDIDATE)
        ]
        for row in rows:
            rng.shuffle(row)
        for place, pair in enumerate(zip(*rows, strict=True)):
            ordered = rng.sample(pair, 2) if sides else pair
            kept.append(replace(ordered[0], side=BASELINE, number=place))
            kept.append(replace(ordered[1], side=CANDIDATE, number=place))
    return kept


def decide(goal: Goal, sessions: Sequence[Session], seed: int) -> Decision:
    """Return one decision on a session that is drawn."""
    rng = random.Random(seed)  # noqa: S311 - a simulation
    number = rng.choice([n for n, s in enumerate(sessions) if s["spin"] == goal.spin])
    replay = Replay(sessions[number], rng)
    seconds = sessions[number]["seconds"]
    request = CheckRequest(
        candidates=(), baseline=Path(), allowances={"": goal.allowance}, max_time_s=seconds
    )
    asking = GateSession([replay], request)  # type: ignore[list-item] # as a Pair is asked
    try:
        asking.measure(lambda _: None)
    except NoMoreRoundsError:
        return Decision(number, "open", seconds)
    verdicts = {answer.verdict for answer in asking.answers}
    verdict = next(v for v in ("fail", "open", "pass") if v in verdicts)
    return Decision(number, verdict, sum(replay.rounds.took_s))


def upper(wrong: int, count: int, tail: float = 0.05) -> float:
    """Return the share that is not exceeded with 95 %, after ``wrong`` of ``count`` were.

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
    """Return the same bound where sessions, not decisions, are what is drawn.

    The shares of wrong decisions of each session are resampled; where no session has any, the
    bound is that of none wrong among as many as there are sessions.
    """
    numbers = sorted({each.session for each in every})
    shares = np.array(
        [sum(w.session == n for w in wrong) / sum(e.session == n for e in every) for n in numbers]
    )
    if not shares.any():
        return upper(0, len(numbers))
    drawn = np.random.default_rng(0).choice(shares, (10_000, len(shares))).mean(axis=1)
    return float(np.quantile(drawn, 0.95))


def row(goal: Goal, made: Sequence[Decision]) -> dict[str, Any]:
    """Return a line of the table."""
    wrong = [each for each in made if each.verdict not in goal.right]
    count = len(made)
    return {
        "goal": goal.name,
        "sessions": len({each.session for each in made}),
        "decisions": count,
        "right": 1 - len(wrong) / count,
        "wanted": goal.least,
        "wrong_at_most": upper(len(wrong), count),
        "wrong_at_most_by_sessions": of_sessions(wrong, made),
        "inconclusive": sum(each.verdict == "open" for each in made) / count,
        "median_time_s": statistics.median(each.time_s for each in made),
    }


def read(folder: Path) -> list[Session]:
    """Return the recorded sessions."""
    found = []
    for place in sorted(folder.glob("*.json.gz")):
        with gzip.open(place, "rt") as file:
            found.append(json.load(file))
    return found


def main() -> None:
    """Print how often the gate was right, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=HERE / "sessions")
    parser.add_argument("--decisions", type=int, default=2000, help="for each goal")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sessions = read(options.folder)
    found = []
    with ProcessPoolExecutor() as pool:
        for goal in GOALS:
            if all(session["spin"] != goal.spin for session in sessions):
                continue
            one: Callable[[int], Decision] = partial(decide, goal, sessions)
            found.append(row(goal, list(pool.map(one, range(options.decisions), chunksize=20))))
            print(told(found[-1]), flush=True)
    if options.json is not None:
        machines = sorted({session["machine"]["processor"] for session in sessions})
        data = {"schema": 1, "sessions": len(sessions), "machines": machines, "goals": found}
        options.json.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def told(found: dict[str, Any]) -> str:
    """Return a line of the table as text."""
    return (
        f"{found['goal']} ({found['sessions']} sessions, "
        f"{found['decisions']} decisions): right {found['right']:.2%} (wanted "
        f"{found['wanted']:.0%}), wrong at most {found['wrong_at_most']:.2%}, by sessions "
        f"{found['wrong_at_most_by_sessions']:.2%}; inconclusive {found['inconclusive']:.2%}; "
        f"median {found['median_time_s']:.0f} s"
    )


if __name__ == "__main__":
    main()
