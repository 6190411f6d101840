"""`make bench`: on the CPU, in at most ten minutes: the demo's shape, 30 M and 100 M models, N = 10.

    python benchmarks/short.py [--repeats 3] [--only demo "30 M" "100 M"] [--toy]

The demo is repeated as often as asked, the others at most twice, so that it stays within its minutes. Prints tables and
writes them under runs/benchmarks/. `--toy` runs everything on a toy, to see that it runs.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import torch
from cases import Case, Sizes, demo_case, random_case
from compare import Plan, compare
from machine import default_limits, describe, measure_limits, release_memory
from measure import add_numbers, limits_row, memory_table, phase_table, size_of
from ours import next_pool, our_step, warm_up
from start import add_start
from tables import OUT, Report, spread

from attention_guided_rl.memory import peak_bytes, reset_peak

CPU = torch.device("cpu")


def run_case(report: Report, name: str, case: Case, plan: Plan, folder: Path, before: int, toy: bool) -> None:
    """Add a case's tables, its limits measured right before and after."""
    report.remark(size_of(case))

    def limits():
        return (
            measure_limits(CPU, torch.float32, sizes=(64,), copy_bytes=2**20)
            if toy
            else default_limits(CPU, torch.float32)
        )

    measured = {"before": limits()}
    found = compare(report, case, plan, folder)
    measured["after"] = limits()
    limits_row(report, measured)
    phase_table(report, case, found.steps, max(measured.values(), key=lambda limit: limit.flops_per_s))
    memory_table(report, case, found.steps[0], before)


def counterfactual(report: Report, case: Case, repeats: int) -> None:
    """Add what the counterfactual reward costs on top of the default, in turn on the same pools."""
    other = demo_case("counterfactual")
    warm_up(other)
    extra = []
    for repeat in range(repeats):
        pool, uniforms = next_pool(case), case.uniforms(repeat)
        default = our_step(case, pool, uniforms, phases=False).seconds
        extra.append(our_step(other, pool, uniforms, phases=False).seconds / default - 1)
    report.remark(f"counterfactual reward on top of the default: {spread([100 * e for e in extra])} % more time")
    add_numbers(report, case, "counterfactual_extra", extra)


def main(arguments: list[str] | None = None) -> Report:
    """Run the cases asked for."""
    warnings.simplefilter("ignore")  # what libraries deprecate
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["demo", "30 M", "100 M"], metavar="CASE")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    report, start = Report("short", describe(CPU)), time.perf_counter()
    wanted = ["toy"] if options.toy else options.only
    plans = {
        "demo": Plan(options.repeats, naive_batches=(2, None), with_library_layers=True),
        "30 M": Plan(
            min(2, options.repeats), naive_batches=(None,), naive_in_full=False, trl=True, with_library_layers=True
        ),
        "100 M": Plan(min(2, options.repeats)),
        "toy": Plan(options.repeats, naive_batches=(2, None), trl=True, with_library_layers=True),
    }
    if not options.toy:
        add_start(report, options.repeats)
    sizes = Sizes(num_pairs=3, trajectories=2, query_len=2, key_len=3, value_len=4) if options.toy else Sizes()
    for name in wanted:
        case = None  # or the last model would count as there before this one
        release_memory()
        reset_peak(CPU)
        before = peak_bytes(CPU) or 0
        with tempfile.TemporaryDirectory() as folder:
            case = demo_case() if name == "demo" else random_case(name, sizes, Path(folder))
            run_case(report, name, case, plans[name], Path(folder), before, options.toy)
            if name == "demo":
                counterfactual(report, case, options.repeats + 2)
    report.remark(f"the whole benchmark took {(time.perf_counter() - start) / 60:.1f} minutes")
    report.write(options.out)
    return report


if __name__ == "__main__":
    main()
