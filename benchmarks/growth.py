"""`make bench-growth`: how time and memory grow with each size, others held; a power is fitted to each.

    python benchmarks/growth.py [--repeats 3] [--only N S B V corpus] [--toy]

N (with S held), S (with N held), B, V and the corpus are doubled three times on a small model. An exponent of 1 is "in
proportion", 2 "quadratic"; below 1 a fixed part is still large. T grows with S: seconds a token of a row are fitted
against T, where 0 is "in proportion". Memory is the peak above that of the libraries, each in a process of its own.
The corpus is a file of articles: seconds to open it and to draw a pool.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from cases import Sizes, random_case
from machine import describe, timed
from ours import next_pool, our_step, warm_up
from tables import OUT, Report, mib, spread

from attention_guided_rl.config import CorpusConfig, NetworkConfig, PairsConfig
from attention_guided_rl.data import open_corpus
from attention_guided_rl.data.pairs import PoolStream
from attention_guided_rl.memory import peak_bytes, reset_peak
from attention_guided_rl.network import Network
from attention_guided_rl.randomness import Purpose

CPU = torch.device("cpu")


def exponent(sizes: list[float], values: list[float]) -> float:
    """Return the slope of log value over log size, by least squares."""
    x, y = [math.log(s) for s in sizes], [math.log(max(v, 1e-12)) for v in values]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def measure(model: str, sizes: Sizes, overrides: dict[str, Any], repeats: int) -> tuple[list[float], float, int]:
    """Return the seconds of steps, the most bytes in use above those of the libraries, and T."""
    warnings.simplefilter("ignore")  # what libraries deprecate
    reset_peak(CPU)
    before = peak_bytes(CPU) or 0
    with tempfile.TemporaryDirectory() as folder:
        case = random_case(model, sizes, Path(folder), overrides=overrides)
        warm_up(case)
        steps = [our_step(case, next_pool(case), case.uniforms(repeat)) for repeat in range(repeats)]
    peak = statistics.median(max(step.peak.values()) for step in steps)
    return [step.seconds for step in steps], max(1.0, peak - before), case.task.row_len


def measure_apart(*what: Any) -> tuple[list[float], float, int]:
    """Measure in a process of its own: what an allocator keeps from one size would hide the memory of the next."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, *what).result()


def grow(
    report: Report,
    label: str,
    points: list[tuple[int, Sizes, dict[str, Any]]],
    model: str,
    repeats: int,
    *,
    apart: bool,
) -> None:
    """Measure a step at every point, and fit."""
    rows, seconds, memory, lengths = [], [], [], []
    for size, sizes, overrides in points:
        took, used, length = (measure_apart if apart else measure)(model, sizes, overrides, repeats)
        seconds.append(min(took))
        memory.append(used)
        lengths.append(length)
        rows.append([f"{label} = {size}", str(length), spread(took), mib(used)])
    values = [float(size) for size, _, _ in points]
    fitted = {f"seconds ∝ {label}": exponent(values, seconds), f"memory ∝ {label}": exponent(values, memory)}
    if label == "S":
        per_token = [s / t for s, t in zip(seconds, lengths, strict=True)]
        fitted["seconds a token ∝ T"] = exponent(lengths, per_token)
    report.table(f"growth with {label}", ["size", "T", "seconds a step", "MiB above libraries"], rows)
    report.remark("fitted: " + ", ".join(f"{name}^{power:.2f}" for name, power in fitted.items()))
    report.numbers[label] = {"sizes": values, "seconds": seconds, "memory": memory, "exponents": fitted}


def grow_corpus(report: Report, counts: list[int], repeats: int) -> None:
    """Time opening a file of so many articles and drawing one pool from it."""
    rows, opened, drawn = [], [], []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "articles.jsonl"
            articles = (
                json.dumps(
                    {"title": f"Article {i}", "text": " ".join(f"word{i * 7919 % 10007 * 400 + j}" for j in range(400))}
                )
                for i in range(count)
            )
            path.write_text("\n".join(articles) + "\n", encoding="utf-8")
            config = CorpusConfig(kind="files", path=path, shuffle=False)
            streams: list[PoolStream] = []
            opening, drawing = [], []
            for _ in range(repeats):
                opening.append(timed(lambda c=config, s=streams: s.append(_stream(c, Path(folder))), CPU))
                drawing.append(timed(lambda s=streams: s[-1].next_pool(4), CPU))
        opened.append(min(opening))
        drawn.append(min(drawing))
        rows.append([str(count), spread(opening), spread(drawing)])
    report.table("growth with the corpus", ["articles", "seconds to open", "seconds a pool of 4"], rows)
    powers = [exponent([float(c) for c in counts], values) for values in (opened, drawn)]
    report.remark(f"fitted: opening ∝ articles^{powers[0]:.2f}, a pool ∝ articles^{powers[1]:.2f}")
    report.numbers["corpus"] = {"sizes": counts, "opening": opened, "pool": drawn, "exponents": powers}


def _stream(config: CorpusConfig, folder: Path) -> PoolStream:
    corpus = open_corpus(config, network=Network(NetworkConfig(cache=folder / "cache", offline=True)))
    pairs = PairsConfig(cut="tokens", num_pairs=8, key_tokens=8, value_tokens=8)
    encode = lambda text: list(range(len(text.split())))  # noqa: E731
    return PoolStream(corpus, encode, pairs, num_pairs=8, num_probes=0, seed=0, purpose=Purpose.POOL)


def main(arguments: list[str] | None = None) -> Report:
    """Grow every size in turn."""
    warnings.simplefilter("ignore")  # what libraries deprecate
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    sizes_to_grow = ["N", "S", "B", "V", "corpus"]
    parser.add_argument("--only", nargs="*", choices=sizes_to_grow, default=sizes_to_grow)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    report = Report("growth", describe(CPU))
    model = "toy" if options.toy else "3 M"
    times = [1, 2] if options.toy else [1, 2, 4, 8]
    base: dict[str, Any] = {"trajectories": 2, "query_len": 2, "key_len": 3, "value_len": 4} if options.toy else {}
    start = 3 if options.toy else 8

    def at(**changes: Any) -> Sizes:
        return Sizes(**{"num_pairs": start, "num_steps": start, **base, **changes})

    most, sizes = start * times[-1], [start * t for t in times]
    words = [64 * t if options.toy else 4_096 * t for t in times]
    points: dict[str, list[tuple[int, Sizes, dict[str, Any]]]] = {
        "N": [(n, at(num_pairs=n), {}) for n in sizes],
        "S": [(s, at(num_pairs=most, num_steps=s), {}) for s in sizes],
        "B": [(a * at().trajectories, at(articles=a), {}) for a in times],
        "V": [(v, at(), {"model.vocab_size": v}) for v in words],
    }
    for label in options.only:
        if label == "corpus":
            grow_corpus(report, [10, 20] if options.toy else [500, 1_000, 2_000, 4_000], options.repeats)
        else:
            grow(report, label, points[label], model, options.repeats, apart=not options.toy)
    report.write(options.out)
    return report


if __name__ == "__main__":
    main()
