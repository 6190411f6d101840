"""The command line, with what an exit code claims held against the run's files: in place of `cli.main` in tests.

0 means that the run is complete and consistent; any other code that it has not become so.
"""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from attention_guided_rl import cli
from attention_guided_rl.errors import AgrlError
from attention_guided_rl.verification import verify_run


def main(arguments: Sequence[str]) -> int:
    """Run a command; of `agrl train --run NAME`, check the exit code against facts derived again from the files."""
    run = run_of(arguments)
    if run is None:
        return cli.main(arguments)
    complete_before = is_complete(run)
    code = cli.main(arguments)
    if code == 0:
        list(verify_run(run))
    else:
        assert complete_before or not is_complete(run), f"exit {code}, but {run} is complete"
    return code


def run_of(arguments: Sequence[str]) -> Path | None:
    """Return the folder that this process is to leave complete."""
    if arguments[:1] != ["train"] or "--run" not in arguments or {"--dry-run", "--help"} & set(arguments):
        return None
    if os.environ.get("RANK", "0") != "0":
        return None
    values = dict(itertools.pairwise(arguments))
    return Path(values.get("--runs-folder", "runs")) / values["--run"]


def is_complete(run: Path) -> bool:
    try:
        list(verify_run(run))
    except AgrlError:
        return False
    return True
