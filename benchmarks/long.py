"""`make bench-long`: on the CPU, N = 32 with the 30 M model and N = 100 with a 3 M model in its stead.

    python benchmarks/long.py [--repeats 3] [--only 32 100] [--toy]

The naive loop is timed at its first, middle and last step (the loss of that step included), each `--repeats` times, at
its own best batch; the sum over all steps is by the parabola through the three. Queries, picks and rewards of each step
timed are checked against ours.
"""

import argparse
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
from cases import Case, Sizes, random_case
from compare import sampled_naive
from flops import naive_flops, our_flops
from machine import default_limits, describe, measure_limits, release_memory
from measure import COMPARED, add_numbers, compared_row, limits_row, memory_table, micro_batch, phase_table, size_of
from naive import best_batch, summed
from ours import Step, next_pool, our_step, warm_up
from tables import OUT, Report, spread

from attention_guided_rl.memory import peak_bytes, reset_peak

CPU = torch.device("cpu")
MODELS = {32: "30 M", 100: "3 M"}
ARTICLES = {32: 1, 100: 2}
"""Of eight rows each. With a small model more rows pay on both sides; the naive loop's last step takes minutes then."""


def run_case(report: Report, case: Case, repeats: int, before: int, toy: bool) -> None:
    """Add a case's tables."""
    report.remark(size_of(case))
    warm_up(case)
    sizes = {"sizes": (64,), "copy_bytes": 2**20}
    limits = measure_limits(CPU, torch.float32, **sizes) if toy else default_limits(CPU, torch.float32)
    num_steps = case.task.num_steps
    ours: list[Step] = []
    sampled: list[dict[int, float]] = []
    batch = 0
    for repeat in range(repeats):
        pool, uniforms = next_pool(case), case.uniforms(repeat)
        ours.append(our_step(case, pool, uniforms))
        batch = batch or best_batch(case, pool, uniforms, ours[0].paid.rows)
        sampled.append(sampled_naive(case, pool, uniforms, batch, ours[-1]))
    naive = [summed(list(seconds.values()), num_steps) for seconds in sampled]
    by_step = {number: [seconds[number] for seconds in sampled] for number in sampled[0]}
    whole = [step.seconds for step in ours]
    rows = [
        compared_row(case, "this package", str(micro_batch(case)), whole, whole, our_flops(case.shape, case.task), ""),
        compared_row(
            case,
            "naive loop, its own best batch, summed",
            str(batch),
            naive,
            whole,
            naive_flops(case.shape, case.task),
            "equal",
        ),
    ]
    report.table(f"{case.name}, N = {case.task.num_pairs}: one update ({repeats} repeats)", COMPARED, rows)
    steps = [[str(number + 1), spread(values)] for number, values in by_step.items()]
    report.table("naive loop: seconds of single steps, all rows", ["step", "seconds"], steps)
    limits_row(report, {"before": limits})
    phase_table(report, case, ours, limits)
    memory_table(report, case, ours[0], before)  # the others hold what the naive loop left in the allocator
    add_numbers(
        report, case, "naive", {"summed": statistics.median(naive), "steps": {str(k): v for k, v in by_step.items()}}
    )


def main(arguments: list[str] | None = None) -> Report:
    """Run the lengths asked for."""
    warnings.simplefilter("ignore")  # what libraries deprecate
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", type=int, default=[32, 100], metavar="N")
    parser.add_argument("--articles", type=int, help="of 8 rows each; by default one, or two where N = 100")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    report = Report("long", describe(CPU))
    for num_pairs in [5] if options.toy else options.only:
        release_memory()
        reset_peak(CPU)
        before = peak_bytes(CPU) or 0
        name = "toy" if options.toy else MODELS[num_pairs]
        if options.toy:
            sizes = Sizes(num_pairs=num_pairs, trajectories=2, query_len=2, key_len=3, value_len=4)
        else:
            sizes = Sizes(num_pairs=num_pairs, articles=options.articles or ARTICLES[num_pairs])
        if name == "3 M":
            report.remark("N = 100: a 3 M model stands in, so that the naive loop's last steps can be timed at all")
        with tempfile.TemporaryDirectory() as folder:
            run_case(report, random_case(name, sizes, Path(folder)), options.repeats, before, options.toy)
    report.write(options.out)
    return report


if __name__ == "__main__":
    main()
