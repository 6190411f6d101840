"""The run folder: made whole by one process, taken by one at a time, and nothing in it but files and folders."""

import errno
import os

import pytest
from accelerate import PartialState

from attention_guided_rl import runs, storage
from attention_guided_rl.cli import main
from attention_guided_rl.distributed import Processes
from attention_guided_rl.errors import CheckpointError, ConfigError, RunInUseError, StorageError
from attention_guided_rl.storage import write_text
from attention_guided_rl.tracking import RunLogs


@pytest.fixture(scope="module")
def session(make_session):
    return make_session()


@pytest.fixture
def before(monkeypatch):
    """Return what has something done before a file operation, once."""

    def before(step: str, deed) -> None:
        def listen(name: str) -> None:
            if name == step:
                monkeypatch.setattr(storage, "listener", None)
                deed()

        monkeypatch.setattr(storage, "listener", listen)

    return before


FILES = {"config.yaml", "environment.json", "prompt.txt"}


@pytest.mark.parametrize("step", ["write environment.json", "rename run"])
def test_of_two_processes_that_make_the_same_run_folder_one_does_and_it_is_whole(session, tmp_path, before, step):
    """Runs without a name that begin within one second have the same one."""
    run = tmp_path / "runs" / "run"
    before(step, lambda: runs._create(run, session))
    with pytest.raises(RunInUseError, match="another process has just made it"):
        runs._create(run, session)
    assert {path.name for path in run.iterdir()} == FILES
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_a_process_that_cannot_make_a_run_folder_takes_nothing_from_one_that_is_making_it(
    session, tmp_path, before, monkeypatch
):
    run = tmp_path / "run"

    def full(name: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def another_fails() -> None:
        monkeypatch.setattr(storage, "listener", full)
        with pytest.raises(StorageError):
            runs._create(run, session)
        monkeypatch.setattr(storage, "listener", None)

    before("write prompt.txt", another_fails)
    runs._create(run, session)
    assert {path.name for path in run.iterdir()} == FILES


def test_what_a_killed_process_left_of_a_run_folder_is_removed_by_the_next(session, tmp_path):
    (tmp_path / f".staged-run.{'0a' * 16}").mkdir()
    (tmp_path / f".staged-run.b.{'0a' * 16}").mkdir()
    runs._create(tmp_path / "run", session)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".staged-run.b.{'0a' * 16}", "run"]


def test_a_disk_that_is_full_once_the_folder_has_its_name_is_no_other_process(session, tmp_path, before):
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before(f"sync {tmp_path.name}", full)
    with pytest.raises(StorageError, match="No space left"):
        runs._create(tmp_path / "run", session)


def test_a_run_folder_that_cannot_be_locked_is_a_storage_error(session, tmp_path, capsys):
    runs._create(tmp_path / "run", session)
    (tmp_path / "run" / ".lock").mkdir()
    assert main(["evaluate", str(tmp_path / "run")]) == 8
    assert "cannot write in the run folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["environment.json", "metrics.jsonl", "checkpoints/update-000001/manifest.json"])
def test_a_pipe_in_a_run_folder_is_refused_and_not_waited_for(session, tmp_path, capsys, name):
    run = tmp_path / "run"
    runs._create(run, session)
    pipe = run / name
    pipe.parent.mkdir(parents=True, exist_ok=True)
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    resume = ["train", "--run", "run", "--resume", "--runs-folder", str(tmp_path)]
    for command in (*([word, str(run)] for word in ("evaluate", "report", "rollout", "verify")), resume):
        assert main(command) == 13, command
        assert "neither a file nor a folder" in capsys.readouterr().err


def test_a_device_or_pipe_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="pipe: cannot write: not a file"):
        write_text(tmp_path / "pipe", "x")
    assert (tmp_path / "pipe").is_fifo()


def test_a_log_that_was_edited_is_not_cut_in_the_middle_of_a_line(make_config, tmp_path):
    logs = RunLogs(tmp_path, make_config().log)
    logs.write("metrics.jsonl", [{"update": 1}])
    lengths = logs.sync()
    logs.close()
    with (tmp_path / "metrics.jsonl").open("r+", encoding="utf-8") as file:
        file.write('{"update": 1000}\n{"update": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: no line ends where"):
        RunLogs(tmp_path, make_config().log, lengths)


@pytest.mark.parametrize(
    "environment", [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}]
)
def test_half_of_what_torchrun_sets_is_named(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(PartialState, "_shared_state", {})
    with pytest.raises(ConfigError, match="RANK, WORLD_SIZE"):
        Processes("cpu")
