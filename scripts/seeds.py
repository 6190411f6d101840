"""Run one configuration with several seeds; print mean ± standard deviation over seeds, and the table over articles.

    python scripts/seeds.py --name lora --seeds 0 1 2 --jobs 2 -- --training.updates 100
    python scripts/seeds.py --name shuffled --seeds 0 1 2 -- --training.shuffled_rewards true

Everything after `--` is given to `agrl train`. Runs land in runs/<name>-seed<k>; one that is finished is not run again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from attention_guided_rl.compare import read_evaluation, summarise_seeds
from attention_guided_rl.report.tables import print_summary

QUANTITIES = {
    "trained − untrained": lambda s: s["contrasts"]["trained-untrained"]["mean"],
    "choice gain": lambda s: s["choice_gain"]["mean"],
    "trained": lambda s: s["arms"]["trained"]["mean"],
    "untrained": lambda s: s["arms"]["untrained"]["mean"],
    "subjects read, untrained": lambda s: s["arms"]["untrained"].get("subjects"),
    "subjects read, trained": lambda s: s["arms"]["trained"].get("subjects"),
    "agreement": lambda s: s["contrasts"].get("agreement", {}).get("mean"),
    "probe area, trained": lambda s: s["arms"]["trained"].get("probe_area"),
    "probe area, untrained": lambda s: s["arms"]["untrained"].get("probe_area"),
    "oracle gap closed": lambda s: s["oracle_gap_closed"],
    "possible gap closed": lambda s: s["possible_gap_closed"],
}


def run(name: str, seed: int, arguments: list[str], threads: int) -> Path:
    """Train and evaluate one seed unless it is done; return its folder."""
    folder = Path("runs") / f"{name}-seed{seed}"
    if not (folder / "evaluation.json").exists():
        command = [sys.executable, "-m", "attention_guided_rl", "train", "--run", folder.name]
        if folder.exists():
            command.append("--resume")
        command += ["--training.seed", str(seed), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        log = Path("runs") / f"{folder.name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("w") as output:
            subprocess.run(command, check=True, env=environment, stdout=output, stderr=output)
    return folder


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; the cores are shared out")
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with ThreadPoolExecutor(options.jobs) as pool:
        folders = list(pool.map(lambda seed: run(options.name, seed, options.arguments, threads), options.seeds))
    summaries = [json.loads((folder / "evaluation.json").read_text()) for folder in folders]
    seconds = [
        sum(json.loads(line)["time/update_s"] for line in (folder / "metrics.jsonl").read_text().splitlines())
        for folder in folders
    ]
    print(f"{options.name}: seeds {options.seeds}, {summaries[0]['articles']} articles each")
    for quantity, read in QUANTITIES.items():
        values = [read(s) for s in summaries]
        if any(v is None for v in values):
            continue
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"  {quantity:26s} {statistics.mean(values):+.3f} ± {spread:.3f}   {[round(v, 3) for v in values]}")
    print(f"  {'training, seconds':26s} {statistics.mean(seconds):.0f}   {[round(s) for s in seconds]}")
    print_summary(Console(width=120), summarise_seeds([read_evaluation(folder) for folder in folders]))


if __name__ == "__main__":
    main()
