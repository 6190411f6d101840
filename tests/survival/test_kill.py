"""Killed at any file operation, and at any moment, a run that is resumed ends with the same bits as one left alone."""

import random

from trials import KILLED, TORTURE, contents

POINTS = (  # one of each kind; the last of that name
    *("rename config.yaml", "rename run", "write manifest.json", "sync checkpoints", "remove .removed-update-000002"),
    *("append metrics.jsonl", "commit vectors", "append trajectories.jsonl", "sync evaluation.json", "rename run.png"),
)


def test_two_runs_left_alone_are_equal(trials):
    """What the other tests compare with, and that there is something to compare."""
    run = trials.new()
    trials.finish(run)
    names = contents(run)
    assert len(trials.steps) >= 40
    assert {"metrics.jsonl", "trajectories.jsonl", "pairs.jsonl", "evaluation.jsonl", "ATTRIBUTION.md"} <= set(names)
    assert sorted(p.name for p in (run / "checkpoints").iterdir())[-1] == "update-000004"


def test_killed_before_any_file_operation_and_resumed_ends_with_the_same_bits(trials):
    last = {name: number for number, name in enumerate(trials.steps)}
    for step in range(len(trials.steps)) if TORTURE else sorted(last[name] for name in POINTS):
        run = trials.new()
        assert trials.train(run, kill_at=step) == KILLED, (step, trials.said(run))
        trials.finish(run, (step, trials.steps[step]))


def test_killed_again_while_resuming_ends_with_the_same_bits(trials):
    numbers = random.Random(0)
    for trial in range(100 if TORTURE else 2):
        run = trials.new()
        kills = [trials.train(run, kill_at=numbers.randrange(5, 60)) for _ in range(3)]
        assert kills == [KILLED] * 3
        trials.finish(run, trial)


def test_killed_at_any_moment_ends_with_the_same_bits(trials):
    numbers = random.Random(1)
    for trial in range(100 if TORTURE else 4):
        run = trials.new()
        for _ in range(3 if trial % 3 == 0 else 1):
            assert trials.train(run, kill_after_s=numbers.uniform(0, trials.seconds)) in (0, KILLED), trials.said(run)
        trials.finish(run)
