"""How long a command takes to start: `agrl --help`, and the demo until its first update is done and written down.

    python benchmarks/start.py [--repeats 3]

Each is a process of its own, as a user starts it; what of it the imports of the libraries take is measured apart.
`make bench` has it in its tables.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from machine import describe
from tables import OUT, Report, spread

PROGRAM = (sys.executable, "-m", "attention_guided_rl")
IMPORTS = (sys.executable, "-c", "import torch, transformers, peft, attention_guided_rl.trainer")


def seconds_of(command: Sequence[str]) -> float:
    """Return how long a command takes."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def seconds_to_first_update() -> float:
    """Return how long the demo takes from the command to the first line of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*PROGRAM, "train", "--preset", "demo", "--runs-folder", folder, "--run", "start"]
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            metrics = Path(folder) / "start" / "metrics.jsonl"
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None:
                    raise RuntimeError(f"ended with {process.returncode} before its first update: {' '.join(command)}")
                time.sleep(0.01)
            seconds = time.perf_counter() - start
            process.kill()
    return seconds


def add_start(report: Report, repeats: int) -> None:
    """Add the table, after one round that fills the caches of the file system."""
    found: dict[str, list[float]] = {"agrl --help": [], "imports alone": [], "the demo's first update": []}
    for repeat in range(repeats + 1):
        seconds = (seconds_of([*PROGRAM, "--help"]), seconds_of(IMPORTS), seconds_to_first_update())
        for name, one in zip(found, seconds, strict=True):
            found[name] += [one] if repeat else []
    report.table(f"start ({repeats} repeats)", ["", "seconds"], [[name, spread(s)] for name, s in found.items()])
    report.numbers["start"] = found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    report = Report("start", describe(torch.device("cpu")))
    add_start(report, options.repeats)
    report.write(options.out)


if __name__ == "__main__":
    main()
