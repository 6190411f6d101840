"""A process that is killed, or that freezes, ends the others soon, which say which one it was."""

import contextlib
import os
import signal
import socket
import time

import pytest
from trials import TORTURE, metrics_of

from attention_guided_rl import peers
from attention_guided_rl.peers import SILENCE

LOST = 11
SILENCE_S = SILENCE if TORTURE else 4.0


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("fate", "victim"), [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 1)])
def test_the_loss_of_a_process_ends_the_other_and_is_named(long, fate, victim):
    run = long.new()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    children = [
        long.start(run, rank, silence_s=SILENCE_S, environment={**world, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]
    try:
        while not (run / "metrics.jsonl").exists() or len(metrics_of(run)) < 2:
            time.sleep(0.01)
        os.kill(children[victim], fate)
        begun = time.monotonic()
        code = long.wait(children[1 - victim])
        said = long.said(run, 1 - victim)
        assert code == LOST, said
        assert time.monotonic() - begun < SILENCE_S + 5
        assert f"process {victim}" in said
        assert "Traceback" not in said
    finally:
        for child in children:  # also the one that should have ended
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        long.wait(children[victim])


class Store(dict):
    """A store of two processes; what the other one writes is up to the test."""

    set = dict.__setitem__

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def get(self, key: str) -> bytes:
        return self[key]


def test_processes_that_were_all_stopped_and_go_on_do_not_take_each_other_for_lost(monkeypatch):
    """As by Ctrl-Z and fg: no sign of life has come, but nobody was there to see it either."""
    now, lost, looks = [0.0], [], []
    monkeypatch.setattr(peers.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(peers, "_end", lambda rank, why: lost.append((rank, now[0])))
    monkeypatch.setattr(peers.threading.Thread, "start", lambda thread: None)
    watching = peers.Peers(Store({"agrl/alive/1": b"7"}), 0, 2)

    def wait(seconds: float) -> bool:
        looks.append(now[0])
        now[0] += 10 * peers.SILENCE if len(looks) == 3 else seconds
        return len(looks) > 10 or bool(lost)

    monkeypatch.setattr(watching._over, "wait", wait)
    watching._watch()
    assert lost == []
    looks.clear()
    monkeypatch.setattr(watching._over, "wait", lambda seconds: now.__setitem__(0, now[0] + seconds) or bool(lost))
    watching._watch()
    assert len(lost) == 1, "one that is silent while we are there is lost all the same"
