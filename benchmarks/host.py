"""What the host does for one token of a deep model, so thin that Python and dispatch are next to all of it.

    python benchmarks/host.py [--layers 28] [--repeats 8]

A GPU that is faster than its host waits for it: decode cannot take less time a token than this, until it is captured in
a graph. CPU seconds of one thread; two rows, 28 layers as Llama-3.2-3B, each 32 wide.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import torch
from cases import LLAMAS, Sizes, random_case
from machine import describe
from ours import next_pool
from tables import OUT, Report, spread


def milliseconds_a_token(dtype: str, layers: int, repeats: int) -> list[float]:
    """Return the CPU time of a query token, value prefill included, once for each repeat."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = Sizes(trajectories=2, num_pairs=3, dtype=dtype)
        case = random_case("toy", sizes, Path(folder), overrides={"model.num_hidden_layers": layers})
        pool, uniforms, found = next_pool(case), case.uniforms(0), []
        for _ in range(repeats + 1):  # the first is to warm up
            start = time.process_time()
            case.session.rollout(pool, uniforms)
            found.append((time.process_time() - start) * 1e3 / (case.task.num_steps * case.task.query_len))
    return found[1:]


def main(arguments: list[str] | None = None) -> Report:
    """Measure and print."""
    warnings.simplefilter("ignore")  # what libraries deprecate
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LLAMAS["Llama-3.2-3B"]["num_hidden_layers"])
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    report = Report("host", describe(torch.device("cpu")))
    names = {"float32": "float32, adapter folded in", "bfloat16": "bfloat16, adapter held in 16 bits"}
    found = {name: milliseconds_a_token(dtype, options.layers, options.repeats) for dtype, name in names.items()}
    rows = [[name, spread(milliseconds)] for name, milliseconds in found.items()]
    report.table(f"host, {options.layers} layers ({options.repeats} repeats)", ["", "ms a token"], rows)
    report.numbers["host"] = found
    report.write(options.out)
    return report


if __name__ == "__main__":
    main()
