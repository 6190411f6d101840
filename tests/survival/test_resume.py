"""Stopped after any update and resumed, or asked for more, a run is the one that was never stopped."""

import signal

from trials import LONG, TORTURE, differing_files, metrics_of, newest

UPDATES = LONG["training.updates"]
STOPPED_AFTER = range(1, UPDATES) if TORTURE else (1, 19, UPDATES - 1)


def test_stopped_after_any_update_and_resumed(long):
    written = [number for number, step in enumerate(long.steps) if step == "append metrics.jsonl"]
    assert len(written) == UPDATES
    for done in STOPPED_AFTER:
        run = long.new()
        assert long.train(run, signals=[[written[done - 1], signal.SIGTERM]]) == 143, long.said(run)
        assert len(metrics_of(run)) == done
        assert newest(run / "checkpoints").name == f"update-{done:06d}"
        long.finish(run, done, other_checkpoints=True)


def test_a_run_that_is_asked_for_more_ends_like_one_that_was_asked_for_it_at_once(long):
    run, at_once = long.new(), long.new()
    for updates in (UPDATES, UPDATES + UPDATES // 2):
        assert long.train(run, "--training.updates", str(updates)) == 0, long.said(run)
    assert long.train(at_once, "--training.updates", str(UPDATES + UPDATES // 2)) == 0, long.said(at_once)
    assert differing_files(run, at_once) == []


def test_fewer_updates_than_are_done_is_refused(long):
    """It would end at once, with exit 0, as if what is there had been asked for."""
    run = long.new()
    assert long.train(run, "--training.updates", "3") == 0
    assert long.train(run, "--training.updates", "2") == 2, long.said(run)
    assert "3 updates are done" in long.said(run)
