"""A disk that is full or refuses: exit 8 with one line, the checkpoints that are there stay good, and freeing space is
all that a resume needs."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from trials import TORTURE

from attention_guided_rl.checkpoint import verify

FULL = 8
PLACES = 60 if TORTURE else 6


def assert_stopped_well(trials, run: Path, code: int, place: object) -> None:
    said = trials.said(run)
    assert code == FULL, (place, said)
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("agrl: error:")]
    assert len(errors) == 1, said
    for checkpoint in run.glob("checkpoints/update-*"):
        verify(checkpoint)


def test_a_disk_that_is_full_from_any_file_operation_on(trials):
    for place in range(0, len(trials.steps), len(trials.steps) // PLACES):
        run = trials.new()
        code = trials.train(run, full_at=place)
        assert_stopped_well(trials, run, code, (place, trials.steps[place]))
        trials.finish(run, place)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_real_file_system_that_fills_up(trials, small_disk):
    whole = sum(len(path.read_bytes()) for path in trials.whole.parent.rglob("*") if path.is_file())
    for place in range(PLACES):
        run = trials.new(small_disk)
        ballast = small_disk / "ballast"
        free = os.statvfs(small_disk).f_bavail * 4096
        ballast.write_bytes(bytes(max(0, free - whole * place // PLACES)))
        code = trials.train(run)
        assert_stopped_well(trials, run, code, place)
        ballast.unlink()
        trials.finish(run, place)
        shutil.rmtree(run.parent)


def test_a_disk_that_may_only_be_read(trials, small_disk):
    run = trials.new(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert_stopped_well(trials, run, trials.train(run), "read-only")


def test_a_path_that_is_too_long(trials, tmp_path):
    run = trials.new()
    code = trials.train(run, "--runs-folder", str(tmp_path / "/".join(["d" * 200] * 21)))
    assert_stopped_well(trials, run, code, "too long")


def test_what_a_checkpoint_consists_of_is_on_the_disk_before_it_has_its_name(trials):
    """As the kernel saw it: every file and folder of it is synced before the rename, the parent after."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    run = trials.new()
    trace = run.parent / "trace"
    assert trials.train(run, trace=trace) == 0, trials.said(run)
    calls = trace.read_text(encoding="utf-8").splitlines()
    checkpoints = sorted(run.glob("checkpoints/update-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        staged = checkpoint.with_name(f".staged-{checkpoint.name}")
        renamed = next(i for i, call in enumerate(calls) if "rename" in call and f'/{checkpoint.name}"' in call)
        for path in [checkpoint, *checkpoint.rglob("*")]:
            before = [
                call
                for call in calls[:renamed]
                if "fsync(" in call and f"<{staged / path.relative_to(checkpoint)}>" in call
            ]
            assert before, f"{path} was not synced before its checkpoint had its name"
        after = [call for call in calls[renamed:] if "fsync(" in call and f"<{checkpoint.parent}>" in call]
        assert after, "the new name was not synced"
