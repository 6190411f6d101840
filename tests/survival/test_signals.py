"""A signal, or a reader that goes away, leaves nothing half done: what is finished is saved, the rest can follow."""

import json
import signal

import pytest
from trials import TORTURE, differing_files, metrics_of

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


def moments(steps: list[str]) -> range:
    """Some of the file operations, from the first line of the logs on."""
    first = next(i for i, step in enumerate(steps) if step.startswith("append"))
    return range(first, len(steps), (len(steps) - first) // (20 if TORTURE else 3))


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_at_any_moment_saves_and_resuming_ends_with_the_same_bits(trials, number):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("ignored where the tests were started, by nohup say, and so by what they start")
    for moment in moments(trials.steps):
        run = trials.new()
        code = trials.train(run, signals=[[moment, number]])
        said = trials.said(run)
        if code == 0:  # the last file was being written
            assert moment > len(trials.steps) - 3
        else:
            assert code == CODES[number], (moment, said)
            assert "--run run --resume" in said
            assert "Traceback" not in said
            state = json.loads((sorted(run.glob("checkpoints/update-*"))[-1] / "state.json").read_text())
            assert state["update"] == len(metrics_of(run)), "a finished update was not saved"
        trials.finish(run, moment, other_checkpoints=True)


def test_the_second_signal_ends_at_once(trials):
    for moment in moments(trials.steps):
        run = trials.new()
        steps = run.parent / "steps"
        code = trials.train(run, signals=[[moment, signal.SIGINT], [moment + 1, signal.SIGINT]], steps=str(steps))
        assert code in (0, 130)
        assert "Traceback" not in trials.said(run)
        if len(steps.read_text(encoding="utf-8").splitlines()) > moment + 1:  # else the first had ended it by then
            assert "interrupted after update" not in trials.said(run), "the update was finished all the same"
        trials.finish(run, moment, other_checkpoints=True)


def test_a_signal_before_training_begins_ends_with_its_code(trials):
    for moment in (0, 3, 15):
        run = trials.new()
        assert trials.train(run, signals=[[moment, signal.SIGTERM]]) == 143, trials.said(run)
        trials.finish(run, moment, other_checkpoints=True)


def test_hanging_up_does_not_end_what_was_started_to_outlive_the_terminal(trials):
    run = trials.new()
    assert trials.train(run, signals=[[60, signal.SIGHUP]], ignored=[signal.SIGHUP]) == 0
    trials.finish(run)


def test_a_run_whose_reader_goes_away_at_any_moment_is_finished(trials):
    for moment in moments(trials.steps) if TORTURE else (0, 60):
        run = trials.new()
        assert trials.train(run, unread=moment) == 0
        assert differing_files(run, trials.whole) == [], moment
