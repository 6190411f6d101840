"""Seconds of each phase of our step, measured from outside: functions of one session are wrapped while it is measured.

On a GPU every border waits for the device, which costs time of its own; so the step as a whole is timed without this.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from machine import synchronise

from attention_guided_rl.memory import peak_bytes, reset_peak
from attention_guided_rl.session import Session

PHASES = ("decode", "value prefill", "selection", "value priors", "frozen pass", "update", "everything else")


class Clock:
    """Adds up seconds and the peak of memory by phase; what runs inside a phase is taken off the phase around it."""

    def __init__(self, session: Session) -> None:
        self._device = session.model.device
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak: dict[str, int] = {}
        self._inside = [0.0]

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        synchronise(self._device)
        start = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            synchronise(self._device)
            elapsed = time.perf_counter() - start
            self.seconds[name] += elapsed - self._inside.pop()
            self._inside[-1] += elapsed

    @contextlib.contextmanager
    def memory(self, name: str) -> Iterator[None]:
        """Note the peak of memory of what runs inside."""
        reset_peak(self._device)
        yield
        self.peak[name] = max(self.peak.get(name, 0), peak_bytes(self._device) or 0)

    def wrap(self, name: str | Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed; `name` may depend on the arguments."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name if isinstance(name, str) else name(*args, **kwargs)):
                return function(*args, **kwargs)

        return timed


class _TimedScorer:
    """A scorer whose two passes are timed."""

    def __init__(self, scorer: Any, clock: Clock) -> None:
        self._scorer, self._clock = scorer, clock
        self.score = clock.wrap("frozen pass", scorer.score)
        self.prior = clock.wrap("value priors", scorer.prior)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)


def _encoding_phase(cache: Any, ids: Any, *rest: Any) -> str:
    """One token at a time is decoding; more at once is the prefill of values and templates."""
    return "decode" if ids.shape[1] == 1 else "value prefill"


@contextlib.contextmanager
def clocked(session: Session) -> Iterator[Clock]:
    """Time the phases of what this session does inside. Sampling and the head while rolling out count as decode."""
    clock = Clock(session)
    model, environment, scorer, rollout = session.model, session.environment, session.scorer, session.rollout
    extend = model.extend

    def timed_environment(*args: Any, **kwargs: Any) -> Any:
        with clock.phase("selection"):
            env = environment(*args, **kwargs)
        env.step = clock.wrap("selection", env.step)
        return env

    def timed_rollout(*args: Any, **kwargs: Any) -> Any:
        with clock.memory("rollout"), clock.phase("decode"):
            return rollout(*args, **kwargs)

    overrides: list[tuple[Any, str, Any]] = [
        (session, "environment", timed_environment),
        (session, "rollout", timed_rollout),
        (session, "scorer", _TimedScorer(scorer, clock)),
        (model, "extend", clock.wrap(_encoding_phase, extend)),
    ]
    for owner, name, replacement in overrides:
        setattr(owner, name, replacement)
    try:
        yield clock
    finally:
        session.scorer = scorer
        for owner, name, _ in overrides:
            if name != "scorer":
                delattr(owner, name)
