"""The benchmarks count right, refuse comparators that do other work, and run at their smallest setting."""

import json
import re
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

import gpu
import growth
import host
import long
import pytest
import short
import torch
from cases import Sizes, library_layers, own_layers, random_case, with_layers
from compare import OutputsDifferError, check
from flops import (
    Flops,
    Shape,
    Trajectories,
    Work,
    cache_bytes,
    causal_pairs,
    decode_bytes,
    flops,
    naive_flops,
    our_flops,
    phase_flops,
    trl_flops,
)
from naive import summed
from ours import next_pool, our_step
from peft.tuners.lora import Linear
from phases import PHASES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attention_guided_rl import onednn
from attention_guided_rl.adapter import InPlaceLinear
from attention_guided_rl.errors import MemoryLimitError
from attention_guided_rl.memory import RowLimit
from attention_guided_rl.onednn import OneDnnLinear

SHAPE = Shape(layers=2, hidden=4, heads=2, kv_heads=1, head_dim=3, intermediate=5, vocabulary=7, lora_rank=1)
# q 4→6, k and v 4→3, o 6→4, gate and up 4→5, down 5→4: 24 + 12 + 12 + 24 + 20 + 20 + 20 = 132 weights a layer,
# adapters 10 + 7 + 7 + 10 + 9 + 9 + 9 = 61


def test_a_forward_counted_by_hand():
    assert (SHAPE.body_weights, SHAPE.lora_weights, SHAPE.head_weights) == (264, 122, 28)
    work = Work(tokens=3, pairs=6, head=2)  # three tokens see 1, 2 and 3; attention: 2 products × 2 × 6 wide × 2 layers
    assert flops(SHAPE, work) == Flops(body=2 * (264 + 122) * 3, attention=48 * 6, head=2 * 28 * 2)
    assert flops(SHAPE, Work(tokens=3, pairs=6, adapter=False)) == Flops(1584, 288, 0)


def test_pairs_of_rows_and_of_continuations():
    assert causal_pairs(3) == 1 + 2 + 3
    assert causal_pairs(2, cached=5) == 6 + 7


@pytest.mark.parametrize("backward", [False, True])
def test_counts_agree_with_pytorchs_counter(make_model, monkeypatch, backward):
    monkeypatch.setattr(onednn, "MIN_WEIGHTS", 0)
    model = make_model("llama")
    causal_lm = model.peft_model.get_base_model()
    causal_lm.config._attn_implementation = "eager"  # the counter knows no other attention of the CPU
    ids = torch.arange(10).view(2, 5)
    counted = {torch.ops.aten.addmm_: lambda _, a, b, **options: 2 * a[0] * a[1] * b[1]}  # addmm alone is known to it
    if onednn.available():
        counted[torch.ops.mkldnn._linear_pointwise] = lambda x, w, *rest, **options: 2 * prod(x) * w[0]
    with FlopCounterMode(display=False, custom_mapping=counted) as counter, torch.set_grad_enabled(backward):
        logits = causal_lm(input_ids=ids, use_cache=False, logits_to_keep=3).logits
        if backward:
            logits.sum().backward()
    model.peft_model.zero_grad()
    dense = 2 * 5 * 5  # eager attention computes what it then masks away
    work = Work(tokens=10, pairs=dense, head=6, backward=backward)
    assert counter.get_total_flops() == flops(Shape.of(model.config, lora_rank=3), work).total


TASK = Trajectories(
    rows=2, articles=1, num_pairs=3, num_steps=2, prompt_len=3, before_query_len=1, query_len=2, before_value_len=1,
    value_len=2,
)  # fmt: skip


def test_phases_add_up_to_each_token_once():
    # a step is 6 tokens, a row 15; per row the rollout encodes all but the last [query token, template, value]: 11
    counted = phase_flops(SHAPE, TASK)
    dense = 2 * 264  # the adapter is folded into the weights
    # decoded: one token a step, seeing 3 + 1 + 1 = 5 and 11 places
    assert counted["decode"] == Flops(dense * 4, 48 * 2 * (5 + 11), 56 * 8)
    assert counted["value prefill"] == Flops(dense * 2 * 9, 48 * 2 * (sum(range(1, 12)) - 16), 0)
    assert counted["frozen pass"] == Flops(528 * 30, 48 * 2 * sum(range(1, 16)), 56 * 8)
    assert counted["value priors"] == Flops(528 * 3 * 7, 48 * 3 * sum(range(1, 8)), 56 * 6)
    assert counted["update"].head == 2 * 56 * 8 + 56 * 8


def test_the_comparators_counted_by_hand():
    # naive, a row: context and query to its last token 5 and 11, with the value 9 and 15, alone 7 and 7, loss 6 and 12
    with_lora, frozen, head = 2 * (264 + 122), 2 * 264, 56
    forwards = 2 * (with_lora * (5 + 11) + frozen * (9 + 15 + 7 + 7 + 6 + 12)) + 2 * head * (
        2 + 2 + 9 + 15 + 7 + 7 + 2 + 2
    )
    seen = sum(causal_pairs(tokens) for tokens in (5, 11, 9, 15, 7, 7, 6, 12))
    loss = flops(SHAPE, Work(tokens=2 * (6 + 12), pairs=2 * (21 + 78), head=2 * (2 + 2), backward=True)).total
    assert naive_flops(SHAPE, TASK) == forwards + 48 * 2 * seen + loss
    # TRL: in place of our update the whole row with the head everywhere, under the reference and with the gradient
    row = Work(tokens=30, pairs=2 * 120, head=30)
    extra = flops(SHAPE, replace(row, adapter=False)).total + flops(SHAPE, replace(row, backward=True)).total
    update = phase_flops(SHAPE, TASK)["update"].total
    assert trl_flops(SHAPE, TASK, folded=True) == our_flops(SHAPE, TASK) - update + extra
    adapter = 2 * 122 * 2 * 11  # in plain generate, for all that it encodes
    assert trl_flops(SHAPE, TASK, folded=False) - trl_flops(SHAPE, TASK, folded=True) == adapter


def test_bytes_of_decode_and_of_the_cache():
    entry = 2 * 2 * 3  # keys and values, layers, one head of 3
    assert cache_bytes(SHAPE, TASK, 4) == 4 * entry * 30
    # two passes over 264 + 28 weights; two rows read 5 + 11 places and write 2
    assert decode_bytes(SHAPE, TASK, 4) == 4 * (2 * 292 + 2 * entry * (16 + 2))


def test_a_sum_over_steps_is_exact_where_time_is_a_parabola():
    def seconds(t):
        return 1 + 2 * t + 3 * t * t

    assert summed([seconds(0), seconds(5), seconds(9)], 10) == pytest.approx(sum(map(seconds, range(10))))


def test_a_fitted_exponent():
    assert growth.exponent([1, 2, 4], [5, 20, 80]) == pytest.approx(2)


OURS = torch.arange(20, 36).view(4, 2, 2), torch.zeros(4, 2, dtype=torch.long), torch.ones(4, 2)
"""Queries, picks and rewards of four rows of two steps."""


def other(queries=(), picks=(), rewards=()):
    """Our outputs with other numbers at some places."""
    theirs = tuple(tensor.clone() for tensor in OURS)
    for tensor, changes in zip(theirs, (queries, picks, rewards), strict=True):
        for *place, value in changes:
            tensor[tuple(place)] = value
    return theirs


EVERYTHING = {"picks": [(1, 1, 1)], "rewards": [(1, 1, 9.0)]}


def test_a_comparator_may_round_and_draw_on_the_other_side_of_a_border():
    assert check("same", OURS, other(rewards=[(1, 0, 1.0005)])) == 0
    assert check("next id", OURS, other([(1, 1, 0, 27), (1, 1, 1, 55)], **EVERYTHING)) == 1


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (other(rewards=[(1, 0, 1.1)]), "1 rows of 4 differ, 0 in their picks, 0 more from a border on; rewards by 0.1"),
        (other(rewards=[(1, 0, torch.nan)]), "1 rows of 4 differ"),
        (other(picks=[(3, 1, 1)]), "1 rows of 4 differ, 1 in their picks"),
        (other([(1, 1, 0, 28)]), "1 rows of 4 differ, 0 in their picks, 0 more from a border on"),
        (
            other([(1, 1, 1, 28)], picks=[(1, 0, 1)]),
            "1 rows of 4 differ, 1 in their picks, 1 more",
        ),  # before the border
        (other([(n, 0, 0, 4 * n + 21) for n in range(3)]), "0 rows of 4 differ, 0 in their picks, 3 more"),
    ],
)
def test_a_comparator_that_does_other_work_is_refused(theirs, said):
    with pytest.raises(OutputsDifferError, match=re.escape(said)):
        check("other", OURS, theirs)


def test_timing_from_outside_leaves_the_session_as_it_was(tmp_path: Path):
    sizes = Sizes(num_pairs=3, trajectories=2, query_len=2, key_len=3, value_len=4)
    case = random_case("toy", sizes, tmp_path)
    before = dict(vars(case.session)), dict(vars(case.session.model))
    step = our_step(case, next_pool(case), case.uniforms(0))
    assert (vars(case.session), vars(case.session.model)) == before
    assert set(step.phases) == set(PHASES)
    assert sum(step.phases.values()) == pytest.approx(step.seconds)
    assert case.task.row_len == step.paid.rows.ids.shape[1]


@pytest.mark.skipif(not onednn.available(), reason="oneDNN is for x86")
def test_comparators_compute_with_the_libraries_own_layers(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(onednn, "MIN_WEIGHTS", 0)
    sizes = Sizes(num_pairs=3, trajectories=2, query_len=2, key_len=3, value_len=4)
    case = random_case("toy", sizes, tmp_path)
    own = own_layers(case.session)

    def kinds() -> dict[type, int]:
        return Counter(type(layer) for layer in own)

    assert kinds() == {InPlaceLinear: 2 * 7, OneDnnLinear: 2 * 7 + 1}
    with library_layers(case.session):
        assert kinds() == {Linear: 2 * 7, nn.Linear: 2 * 7 + 1}
        with with_layers(own):
            assert kinds() == {InPlaceLinear: 2 * 7, OneDnnLinear: 2 * 7 + 1}
    assert kinds() == {InPlaceLinear: 2 * 7, OneDnnLinear: 2 * 7 + 1}


@pytest.mark.parametrize(
    ("benchmark", "options", "holds"),
    [
        (short, ["--toy"], "toy"),
        (long, ["--toy"], "toy"),
        (gpu, ["--cpu-toy"], "toy"),
        (growth, ["--toy", "--only", "S", "corpus"], "corpus"),
        (host, ["--layers", "2"], "host"),
    ],
    ids=["short", "long", "gpu", "growth", "host"],
)
def test_the_smallest_setting_runs(benchmark, options, holds, tmp_path: Path):
    report = benchmark.main([*options, "--repeats", "1", "--out", str(tmp_path)])
    (markdown,), (numbers,) = tmp_path.glob("*.md"), tmp_path.glob("*.json")
    assert all(title in markdown.read_text(encoding="utf-8") for title, _, _ in report.tables)
    assert json.loads(numbers.read_text(encoding="utf-8"))[holds]


@pytest.mark.parametrize("how", ["in the rollout", "in the scoring", "in the update"])
def test_the_largest_size_on_a_gpu_is_the_last_that_fitted_as_a_whole(monkeypatch, tmp_path, how):
    """However memory runs out above 32 articles: a rollout that was divided did not fit either."""

    def our_step(case, pool, uniforms, *, phases):
        if case.articles <= 32:
            return
        if how == "in the scoring":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if how == "in the update":
            raise MemoryLimitError("out of memory while learning")
        case.session.rollout_batch.lower(8)

    def open_case(name, sizes, folder):
        session = SimpleNamespace(rollout_batch=RowLimit(10**6, row_len=10))
        return SimpleNamespace(articles=sizes.articles, session=session, uniforms=lambda repeat: None)

    monkeypatch.setattr(gpu, "our_step", our_step)
    monkeypatch.setattr(gpu, "open_case", open_case)
    monkeypatch.setattr(gpu, "next_pool", lambda case: None)
    assert gpu.most_articles("toy", {}, tmp_path) == 32
