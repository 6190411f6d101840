"""Where output goes: nowhere, to a reader that has gone, to a full disk, to a terminal that has not every sign."""

import io
import os
import sys

import pytest

from attention_guided_rl.cli import main
from attention_guided_rl.interruption import outliving_readers

CONFIG = ["config", "--preset", "demo"]


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_output_that_was_closed_before_we_began_goes_nowhere(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, name, None)
    assert main(CONFIG) == 0
    assert main(["train", "--nothing.here", "1"]) == 2


def test_a_terminal_that_has_gone_ends_nothing(monkeypatch, capsys):
    """As after `disown`: writing to it fails with EIO."""
    master, terminal = os.openpty()
    os.close(master)
    with os.fdopen(terminal, "w", encoding="utf-8") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(CONFIG) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_on_a_full_disk_is_not_taken_for_written(monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(CONFIG) == 8
    assert capsys.readouterr().err == "agrl: error: cannot write the output: No space left on device\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_messages_on_a_full_disk_leave_the_exit_code(monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert main(["train", "--nothing.here", "1"]) == 2


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "a ? ? b"), ("latin-1", "a ? é b"), ("utf-8", "a → é b")])
def test_a_sign_that_the_terminal_has_not_is_a_question_mark(monkeypatch, encoding, shown):
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    with outliving_readers():
        print("a → é b")
    assert written.getvalue().decode(encoding) == shown + "\n"


def test_a_working_folder_that_has_been_removed_is_named(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(CONFIG) == 8
    assert capsys.readouterr().err.startswith("agrl: error: the working folder has been removed")
