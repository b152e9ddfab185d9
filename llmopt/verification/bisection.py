"""Find the pass that changes what a Program computes, and the one of its changes that does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from llmopt.errors import LlmoptError, PassError
from llmopt.frontend.base import Source
from llmopt.interface.arrays import Array, Arrays
from llmopt.ir.difference import Difference, difference
from llmopt.ir.fingerprints import origin
from llmopt.ir.program import Program
from llmopt.passes.base import Pass
from llmopt.passes.hits import run_hits
from llmopt.passes.pipeline import Pipeline, Ran
from llmopt.verification import Compared, compare
from llmopt.verification.checks import BEFORE, STEP, Checked, Finding
from llmopt.verification.components import FaultyComponent, broken, changed, moved, unrunnable
from llmopt.verification.each import Watch
from llmopt.verification.neighbourhood import marked_text, rewired
from llmopt.verification.trials import Trial, caches, trial_of
from llmopt.verification.values import evaluated, first_difference

SAME: Final = "same"
UNTRACED: Final = "source"
GUILTY: Final = "pass"


@dataclass(frozen=True)
class Rewrite:
    """One change of a pass, and the Program around it.

    Args:
        number: Number of the change among those of the pass, from 1; 0 where they cannot be made
            one by one.
        of: The number of changes that the pass made.
        node: The node that says best where it is.
        difference: The change of the graph.
        rewired: The nodes that only read other values than before.
        first: The first value that is another after it, and how far off, if one is.
        before: The Program without it.
        after: The Program with it.
    """

    number: int
    of: int
    node: str
    difference: Difference
    rewired: tuple[str, ...]
    first: Compared | None
    before: Program
    after: Program

    @property
    def nodes_before(self) -> set[str]:
        """The nodes of the Program without it that it concerns."""
        return {*self.difference.nodes_before, *self.rewired}

    @property
    def text_before(self) -> str:
        """The nodes that it removed or changed, and their neighbours, as text."""
        return marked_text(self.nodes_before, self.before)

    @property
    def text_after(self) -> str:
        """The nodes that it added or changed, and their neighbours, as text."""
        return marked_text({*self.difference.nodes_after, *self.rewired}, self.after)


@dataclass(frozen=True, kw_only=True)
class Culprit:
    """A pass that changes what a Program computes.

    Args:
        item: The pass.
        before: The Program before it.
        rewrite: The change that is wrong, as closely as it can be singled out.
        finding: The comparison that shows it, the smallest case; None where nothing can be run.
        problem: The reason why the Program cannot be run after it, if it cannot.
        exact: Whether what is rounded was computed in float32.
        component: The component it is in, of several, which the rest is about; empty where there
            is one alone, None where it does not show in one alone.
    """

    item: Pass
    before: Program
    rewrite: Rewrite
    finding: Finding | None
    problem: str = ""
    exact: bool = False
    component: str | None = ""


@dataclass(frozen=True)
class Bisection:
    """The result of a bisection.

    Args:
        status: ``SAME`` (nothing is wrong), ``UNTRACED`` (the source computes something else than
            its Program, before any pass) or ``GUILTY``.
        checks: Every comparison: before any pass, then after each.
        ran: The result of each pass.
        culprit: The pass, if one is guilty.
    """

    status: str
    checks: tuple[Checked, ...]
    ran: tuple[Ran, ...]
    culprit: Culprit | None = None


def bisect(
    source: Source,
    pipeline: Pipeline,
    inputs: Mapping[str, Array] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Bisection:
    """Run a pipeline on a source's Program in place, and stop at the first pass that is wrong.

    Args:
        source: The source, whose Program is changed.
        pipeline: The passes.
        inputs: Inputs by name to compare on; None for the matrix.
        progress: A function that shows what is being done.
    """
    program = source.program
    trial = None if inputs is None else [trial_of(program, inputs)]
    progress("comparing with the source")
    watch = Watch.started(source.reference, program, trial)
    if watch.checks[0].wrong:
        return Bisection(UNTRACED, tuple(watch.checks), ())
    ran: list[Ran] = []
    for item in pipeline.passes:
        progress(item.name)
        before = program.clone()
        checked = _step(item, program, watch, ran)
        if checked.wrong or checked.problem:
            progress(f"taking the changes of {item.name} apart")
            culprit = _blamed(item, before, program, checked, exact=watch.exact)
            return Bisection(GUILTY, tuple(watch.checks), tuple(ran), culprit)
    return Bisection(SAME, tuple(watch.checks), tuple(ran))


def _step(item: Pass, program: Program, watch: Watch, ran: list[Ran]) -> Checked:
    try:
        Pipeline((item,)).run(program, lambda _, __, done: ran.append(done))
    except PassError as error:
        watch.checks.append(Checked(item.name, problem=error.problem))
        return watch.checks[-1]
    return watch.judge(item, program)


def _blamed(
    item: Pass, before: Program, after: Program, checked: Checked, *, exact: bool
) -> Culprit:
    """Return the change of a guilty pass that shows first what the pass does wrong."""
    finding = _smallest(checked.wrong)
    faulty = _component(item, before, after, checked, exact=exact)
    if faulty is None:
        unknown = Rewrite(0, 0, "", Difference(), (), None, before, before)
        return Culprit(
            item=item,
            before=before,
            rewrite=unknown,
            finding=finding,
            problem=checked.problem,
            exact=exact,
            component=None,
        )
    trial = faulty.trial
    if finding is not None and faulty.component:
        finding = replace(finding, trial=trial)
    states = _States(faulty.before, item, trial, exact=exact)
    number, good, bad = 0, faulty.before, faulty.after
    if trial is not None or checked.problem:
        number, good, bad = states.first_wrong(faulty.after)
    change = difference(good.components, bad.components, origin)
    first = None if trial is None else first_difference(good, bad, trial, exact=exact)
    readers = rewired(change, good, bad)
    node = _node(change, readers, bad, first)
    rewrite = Rewrite(number, states.count, node, change, readers, first, good, bad)
    return Culprit(
        item=item,
        before=faulty.before,
        rewrite=rewrite,
        finding=finding,
        problem=checked.problem,
        exact=exact,
        component=faulty.component,
    )


def _component(
    item: Pass, before: Program, after: Program, checked: Checked, *, exact: bool
) -> FaultyComponent | None:
    """Return the component in which a pass goes wrong; None if it does not show in one alone."""
    finding = _smallest(checked.wrong)
    trial = None if finding is None or finding.against != BEFORE else finding.trial
    if len(before.components) == 1:
        return FaultyComponent("", before, after, trial)
    if trial is not None:
        return moved(before, after, trial, exact=exact)
    if checked.problem:
        return broken(item, before, after, exact=exact)
    return changed(before, after)


def _smallest(wrong: Sequence[Finding]) -> Finding | None:
    """Return the failure that is easiest to look at: of one pass against itself, few numbers."""
    order = {id(each): index for index, each in enumerate(wrong)}

    def ease(each: Finding) -> tuple[bool, bool, int, int]:
        padded, numbers = each.trial.size if each.trial is not None else (True, 0)
        return each.against != BEFORE, padded, numbers, order[id(each)]

    return min(wrong, key=ease, default=None)


class _States:
    """A Program after each number of a pass's changes.

    Args:
        before: The Program before the pass.
        item: The pass.
        trial: The inputs that show what is wrong; None if it cannot be run at all.
        exact: Whether what is rounded is computed in float32.
    """

    def __init__(self, before: Program, item: Pass, trial: Trial | None, *, exact: bool) -> None:
        self._before = before
        self._item = item
        self._trial = trial
        self._exact = exact
        self._expected: Arrays = {}
        self.count = run_hits(item, before.clone())
        if trial is not None:
            self._expected = evaluated(before, exact=exact)(trial.feeds)

    def at(self, changes: int) -> Program:
        """Return the Program after a number of changes."""
        program = self._before.clone()
        run_hits(self._item, program, changes)
        return program

    def first_wrong(self, after: Program) -> tuple[int, Program, Program]:
        """Return which change is the first that shows, and the Program without and with it.

        By halves. A state that cannot be run, in the midst of a change, is passed over.
        """
        good, bad, end = 0, self.count + 1, self.count + 1
        while good + 1 < end:
            at = middle = (good + end) // 2
            while (right := self._is_right(self.at(at))) is None and at + 1 < end:
                at += 1
            if right is None:
                end = middle
            elif right:
                good = at
            else:
                bad = end = at
        if bad > self.count:  # what the pass does after its last change, or all at once
            return 0, self.at(good), after
        return bad, self.at(good), self.at(bad)

    def _is_right(self, program: Program) -> bool | None:
        if self._trial is None:
            return not unrunnable(program, exact=self._exact)
        try:
            outputs = evaluated(program, exact=self._exact)(self._trial.feeds)
        except LlmoptError:
            return None
        names = [*caches(program)]
        return compare("", outputs, self._expected, self._trial.tokens, names).error_rel <= STEP


def _node(
    change: Difference, readers: Sequence[str], after: Program, first: Compared | None
) -> str:
    """Return the node that says best where a change is.

    That is a node that changed; else the end of what was replaced; else what reads other values
    now: of these the maker of the first value that is off, or the last.
    """
    names = change.nodes("changed") or change.nodes("removed") or readers or change.nodes("added")
    if not names:
        return ""
    makers = {str(v.name): str(n.name) for n in after.graph for v in n.outputs}
    maker = makers.get(first.output, "") if first is not None else ""
    return maker if maker in names else names[-1]
