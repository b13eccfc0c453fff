"""Where a run is: counted in steps, or on the clock where the plan has a budget of minutes."""

from typing import Any, NamedTuple

from .optimizing import rate
from .run import Plan

UNITS = 10_000.0  # parts of a phase that is told by the clock
WARM = 100  # of them


class When(NamedTuple):
    """What a step depends on, beside the seed."""

    step: int
    tower: bool  # of the first phase
    at: float  # in its phase, of `steps`
    steps: float
    count: int  # rendered pages in use


class Pace:
    """Counts the steps of a run, and the seconds of a phase.

    Args:
        plan: with `minutes` a phase ends when its share of them is over, whatever the number of its
            steps, and every schedule follows the clock.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.done, self.entered, self.seconds = 0, 0, 0.0
        self.tower = plan.tower_steps > 0

    @property
    def steps(self) -> float:
        """Length of the phase: in steps, or in parts of its time."""
        plan = self.plan
        if plan.minutes:
            return UNITS
        return plan.tower_steps if self.tower else plan.reader_steps

    @property
    def at(self) -> float:
        """How much of it is over."""
        if self.plan.minutes:
            return min(UNITS, UNITS * self.seconds / self._budget())
        return self.done - self.entered

    def _budget(self) -> float:
        share = self.plan.tower_share if self.tower else 1 - self.plan.tower_share
        return max(1e-3, 60 * self.plan.minutes * share)

    @property
    def over(self) -> bool:
        """Whether the run has nothing left to do."""
        return not self.tower and self.at >= self.steps

    def rate(self) -> float:
        """Share of the peak learning rate."""
        return rate(self.at, self.steps, WARM if self.plan.minutes else self.plan.warm)

    def when(self, ahead: int, count: int) -> When:
        """What the step depends on that is `ahead` steps away; by the clock its phase and place are
        those of now."""
        step, plan = self.done + ahead, self.plan
        if plan.minutes:
            return When(step, self.tower, self.at, UNITS, count)
        tower = step < plan.tower_steps
        at = step if tower else step - plan.tower_steps
        return When(step, tower, at, plan.tower_steps if tower else plan.reader_steps, count)

    def advance(self, seconds: float) -> bool:
        """A step has been taken in so many seconds; whether the first phase ended with it."""
        self.done += 1
        self.seconds += seconds
        if self.tower and self.at >= self.steps:
            self.tower, self.entered, self.seconds = False, self.done, 0.0
            return True
        return False

    def state(self) -> dict[str, Any]:
        names = ("done", "entered", "seconds", "tower")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Any]) -> None:
        for name in ("done", "entered", "seconds", "tower"):
            setattr(self, name, state[name])
