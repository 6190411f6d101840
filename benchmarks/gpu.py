"""`make bench-gpu`: our step with Llama-3.2-3B's exact shape, random weights, bf16, LoRA on all linear maps, N = 10.

    python benchmarks/gpu.py [--articles 32] [--micro-batch 16] [--repeats 3] [--profile]
    python benchmarks/gpu.py --cpu-toy        the same code on a CPU with a tiny shape, to see that it runs

Rows are articles × 8; without `--articles` they are doubled until memory is exhausted, and the last that fitted is
measured. The step as a whole is timed without borders between phases; phases are timed in steps of their own, because
each border waits for the GPU.
"""

import argparse
import gc
import tempfile
import warnings
from pathlib import Path

import torch
from cases import Case, Sizes, random_case
from flops import our_flops, phase_flops
from machine import Limits, default_limits, describe, measure_limits
from measure import COMPARED, compared_row, limits_row, memory_table, micro_batch, phase_table, size_of
from ours import Step, next_pool, our_step, warm_up
from tables import OUT, Report, spread

from attention_guided_rl.errors import MemoryLimitError
from attention_guided_rl.memory import out_of_memory, peak_bytes, reset_peak

MAX_ARTICLES = 256


def fits(case: Case) -> bool:
    """Return whether a whole step fits the memory, all rows written at once."""
    try:
        with out_of_memory("trying a size"):
            our_step(case, next_pool(case), case.uniforms(10**6), phases=False)
    except MemoryLimitError:
        return False
    return case.session.rollout_batch.lowered_to is None


def open_case(name: str, sizes: Sizes, folder: Path) -> Case:
    """Load the model, once the one before has been let go."""
    gc.collect()
    if sizes.device == "cuda":
        torch.cuda.empty_cache()
    return random_case(name, sizes, folder)


def most_articles(name: str, sizes: dict[str, object], folder: Path) -> int:
    """Double the articles until a step no longer fits."""
    articles = 8
    while articles <= MAX_ARTICLES:
        if not fits(open_case(name, Sizes(articles=articles, **sizes), folder)):
            return max(1, articles // 2)
        articles *= 2
    return MAX_ARTICLES


def mismatch(case: Case, step: Step) -> str:
    """Return mean |Δ log p| between sampler and learner over the query tokens of a step, nats."""
    rows = step.paid.rows
    with torch.no_grad():
        parts = []
        for index in torch.arange(rows.num_rows, device=rows.ids.device).split(8):
            part = rows.select(index)
            states = case.session.model.hidden(part.ids, part.role, part.layout.query_positions)
            logprobs = case.session.model.policy_logprobs(states, case.session.config.rollout.temperature)
            ids, _ = part.query_slots()
            chosen = logprobs.gather(-1, ids.flatten(1)[:, :, None]).view(ids.shape)
            parts.append((chosen - part.sampled_logprobs).abs().mean())
    return f"sampler against learner: mean |Δ log p| = {float(torch.stack(parts).mean()):.2g} nats"


def run(report: Report, case: Case, repeats: int, limits: Limits, before: int) -> None:
    """Add the case's tables."""
    report.remark(size_of(case))
    warm_up(case)
    whole, steps = [], []
    for repeat in range(repeats):
        pool, uniforms = next_pool(case), case.uniforms(repeat)
        whole.append(our_step(case, pool, uniforms, phases=False).seconds)
        steps.append(our_step(case, pool, uniforms))
    row = compared_row(
        case,
        "this package",
        str(micro_batch(case)),
        whole,
        whole,
        our_flops(case.shape, case.task),
        "",
    )
    report.table(f"{case.name}: one update ({repeats} repeats)", COMPARED, [row])
    limits_row(report, {"before": limits})
    phase_table(report, case, steps, limits)
    memory_table(report, case, steps[-1], before)
    least = sum(counted.total for name, counted in phase_flops(case.shape, case.task).items() if name != "value priors")
    report.remark(f"whole step, untouched by borders: {spread([least / s / limits.flops_per_s for s in whole])} of 4 U")
    report.remark(mismatch(case, steps[-1]))


def profile(case: Case, out: Path) -> None:
    """Write a trace of one step (chrome://tracing) and show what took longest."""
    from torch.profiler import profile as profiler

    with profiler() as trace:
        our_step(case, next_pool(case), case.uniforms(0), phases=False)
    out.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(out / "gpu-trace.json"))
    print(
        trace.key_averages().table(sort_by="self_cuda_time_total" if torch.cuda.is_available() else None, row_limit=25)
    )


def main(arguments: list[str] | None = None) -> Report | None:
    """Measure, or say why not."""
    warnings.simplefilter("ignore")  # what libraries deprecate
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--articles", type=int)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--num-pairs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--cpu-toy", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    if not options.cpu_toy and not torch.cuda.is_available():
        print("no GPU here: not measured; --cpu-toy runs the same code on the CPU with a tiny shape")
        return None
    device = torch.device("cpu" if options.cpu_toy else "cuda")
    name = "toy" if options.cpu_toy else "Llama-3.2-3B"
    sizes = {
        "num_pairs": options.num_pairs,
        "micro_batch_rows": options.micro_batch,
        "device": device.type,
        "dtype": "bfloat16",
    }
    if options.cpu_toy:
        sizes |= {"num_pairs": 3, "trajectories": 2, "query_len": 2, "key_len": 3, "value_len": 4}
    report = Report("gpu", describe(device))
    reset_peak(device)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else peak_bytes(device) or 0
    dtype = torch.bfloat16
    toy_limits = {"sizes": (64,), "copy_bytes": 2**20}
    limits = measure_limits(device, dtype, **toy_limits) if options.cpu_toy else default_limits(device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        articles = options.articles or (2 if options.cpu_toy else most_articles(name, sizes, Path(folder)))
        case = open_case(name, Sizes(articles=articles, **sizes), Path(folder))
        run(report, case, options.repeats, limits, before)
        if options.profile:
            profile(case, options.out)
    report.write(options.out)
    return report


if __name__ == "__main__":
    main()
