"""Memory that runs out, faked as PyTorch says it: fewer rows at a time and the same result, or one line and exit 10."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, tensor
from two import together

from attention_guided_rl import cli, runs, trainer
from attention_guided_rl.checkpoint import RunState, latest_checkpoint
from attention_guided_rl.distributed import Processes
from attention_guided_rl.errors import MemoryLimitError
from attention_guided_rl.memory import RowLimit, out_of_memory, ran_out
from attention_guided_rl.oracle import oracle_rows
from attention_guided_rl.pickers import replay, simple_pickers
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.session import Session
from attention_guided_rl.trainer import learn, read, train
from attention_guided_rl.update import make_optimizer

SHORT = {"training.micro_batch_rows": 4, "model.lora_dropout": 0.3, "training.updates": 3}
"""Six rows in micro-batches of 4 and 2; the dropout depends on the number of a micro-batch."""


def no_memory(*_: object) -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 1 GiB."
    )


@contextmanager
def short_of_memory(session: Session, place: str, rows: int = 2, *, after: int = 0) -> Iterator[list[int]]:
    """Let memory run out at a place where more than so many rows are taken at once; not the first `after` times."""
    model, tries = session.model, []

    def allocate(at_once: int) -> None:
        if at_once > rows:
            tries.append(at_once)
            if len(tries) > after:
                no_memory()

    def watched(name: str, applies):
        real = getattr(model, name)

        def call(*arguments, **options):
            if applies():
                allocate(session.rollout_batch.rows if place == "rollout" else session.micro_batch_rows)
            return real(*arguments, **options)

        setattr(model, name, call)
        return lambda: delattr(model, name)

    names = {"rollout": "extend", "scoring": "hidden", "priors": "token_logprobs", "update forward": "hidden"}
    if place == "update backward":
        weight = next(iter(model.named_trainable().values()))
        undo = weight.register_hook(lambda gradient: allocate(session.micro_batch_rows)).remove
    else:
        with_gradient = place == "update forward"
        undo = watched(names[place], lambda: torch.is_grad_enabled() == with_gradient)
    try:
        yield tries
    finally:
        undo()


PLACES = ("rollout", "scoring", "priors", "update forward", "update backward")


def at_update(monkeypatch, update: int, prepare) -> None:
    """Call `prepare(session)` before the trajectories of an update are written; it may return what to call after it."""
    afterwards: list = []

    def prepared_read(session, stream, number, share):
        if number == update:
            afterwards.append(prepare(session))
        return read(session, stream, number, share)

    def prepared_learn(session, *arguments):
        learned = learn(session, *arguments)
        for done in filter(None, afterwards):
            done()
        afterwards.clear()
        return learned

    monkeypatch.setattr(trainer, "read", prepared_read)
    monkeypatch.setattr(trainer, "learn", prepared_learn)


def begin(config, folder: Path, **options) -> Session:
    folder.mkdir(exist_ok=True)
    session = Session(config, Processes("cpu"))
    train(session, folder, **options)
    return session


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def results(folder: Path, *, remembering: bool = True) -> tuple:
    """Everything of a run but the clock, to the bit; not `remembering`: nor that memory ran out."""
    mute = ("time/",) if remembering else ("time/", "memory/")
    metrics = [{k: v for k, v in m.items() if not k.startswith(mute)} for m in lines(folder / "metrics.jsonl")]
    newest = latest_checkpoint(folder)
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    if not remembering:
        state = {k: v for k, v in state.items() if k not in ("micro_batch_rows", "rollout_rows")}
    tensors = [path.read_bytes() for path in sorted(newest.rglob("*.safetensors"))]
    return metrics, (folder / "trajectories.jsonl").read_bytes(), state, tensors


def run_short(config, folder: Path, place: str, update: int) -> Session:
    """Train with too little memory at a place from one update on, until it has been noticed in that update."""
    with pytest.MonkeyPatch.context() as patch:
        tries: list[list[int]] = []

        def prepare(session):
            after = 0 if place == "priors" else 1  # in the second micro-batch, if there are two
            short = short_of_memory(session, place, after=after)
            tries.append(short.__enter__())
            return lambda: short.__exit__(None, None, None)

        at_update(patch, update, prepare)
        session = begin(config, folder)
        assert len(tries[0]) > (place != "priors")  # it ran out
    return session


@pytest.fixture(scope="module")
def of_two_rows(make_config, tmp_path_factory) -> Path:
    """A run with the smaller micro-batch from the start."""
    folder = tmp_path_factory.mktemp("memory") / "two"
    begin(make_config({**SHORT, "training.micro_batch_rows": 2}), folder)
    return folder


@pytest.mark.parametrize("place", PLACES[1:])
def test_running_out_in_the_first_update_is_the_smaller_micro_batch_configured(
    make_config, tmp_path, of_two_rows, place, caplog
):
    session = run_short(make_config(SHORT), tmp_path / "run", place, 0)
    assert session.micro_batch_rows == 2
    assert results(tmp_path / "run", remembering=False) == results(of_two_rows, remembering=False)
    assert [m["memory/micro_batch_rows"] for m in lines(tmp_path / "run" / "metrics.jsonl")] == [2, 2, 2]
    (said,) = [record.getMessage() for record in caplog.records if "memory" in record.getMessage()]
    assert said.endswith(": 4 rows × 31 tokens at a time; going on with 2")


@pytest.mark.parametrize("place", ["rollout", "update backward"])
def test_running_out_later_is_the_smaller_micro_batch_from_that_update_on(make_config, tmp_path, monkeypatch, place):
    """And a resume remembers it."""
    run_short(make_config(SHORT), tmp_path / "run", place, 1)

    def fewer(session: Session) -> None:
        limit, rows = (session.rollout_batch, 1) if place == "rollout" else (session.micro_batch, 2)
        limit.lower(rows)

    at_update(monkeypatch, 1, fewer)
    begin(make_config({**SHORT, "training.updates": 2}), tmp_path / "other")
    monkeypatch.undo()
    begin(make_config(SHORT), tmp_path / "other", resume=True)
    assert results(tmp_path / "run") == results(tmp_path / "other")
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    if place == "rollout":
        assert [m["memory/rollout_rows"] for m in metrics] == [None, 1, 1]
    else:
        assert [m["memory/micro_batch_rows"] for m in metrics] == [4, 2, 2]


def test_an_interrupted_update_begins_with_its_scoring(make_session):
    session = make_session(SHORT)
    stream = session.stream(session.config.corpus, num_probes=0, purpose=Purpose.POOL)
    reading = read(session, stream, 0, slice(0, 2))
    real, passes = session.model.hidden, []

    def hidden(ids, *others):
        passes.append(("update" if torch.is_grad_enabled() else "scoring", len(ids)))
        return real(ids, *others)

    session.model.hidden = hidden
    state = RunState(temperature=0.5, embedder=session.embedder.identity)
    with short_of_memory(session, "update backward"):
        learn(session, make_optimizer(session, session.config.optimizer), reading, state)
    before = [("scoring", n) for n in (4, 2, 10)] + [("update", 4)]  # 10 values alone, in rows of 11 tokens, not 31
    assert passes == before + [("scoring", n) for n in (2, 2, 2, 5, 5)] + [("update", 2)] * 3


@pytest.mark.parametrize("place", PLACES)
def test_where_one_row_is_too_much_one_line_says_so(make_config, tmp_path, monkeypatch, place):
    kept = []

    def prepare(session: Session) -> None:
        kept.append(short_of_memory(session, place, rows=0))
        kept[-1].__enter__()

    at_update(monkeypatch, 1, prepare)
    with pytest.raises(MemoryLimitError) as caught:
        begin(make_config(SHORT), tmp_path / "run")
    doing = {"rollout": "writing queries", "scoring": "scoring", "priors": "scoring"}.get(place, "learning")
    assert str(caught.value).startswith(
        f"out of memory while {doing}: 1 rows × 31 tokens at a time; lower rollout.steps"
    )
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 10
    assert latest_checkpoint(tmp_path / "run").name in ("update-000000", "update-000001")


def test_two_processes_go_on_with_what_the_smaller_one_can(make_config, tmp_path):
    """Memory runs out on the second in the gradient, on the first in the scoring; nobody waits for anybody."""
    config = make_config({**SHORT, "rollout.trajectories": 4, "model.lora_dropout": 0.0})
    begin(config, tmp_path / "one")
    (tmp_path / "two").mkdir()

    def work(rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            place, update, rows = ("update backward", 1, 2) if rank else ("scoring", 2, 1)

            def prepare(session):
                short = short_of_memory(session, place, rows)
                short.__enter__()
                return lambda: short.__exit__(None, None, None)

            at_update(patch, update, prepare)
            train(Session(config, Processes("cpu")), tmp_path / "two")

    assert together(work) == [0, 0]
    one, two = (lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [m["memory/micro_batch_rows"] for m in two] == [4, 2, 1]
    for ours, theirs in zip(one, two, strict=True):
        for name in ("reward/mean", "loss/total", "loss/kl", "optimizer/gradient_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name


def test_two_processes_end_together_where_one_row_is_too_much_for_one(make_config, tmp_path):
    (tmp_path / "run").mkdir()

    def work(rank: int) -> None:
        session = Session(make_config(SHORT), Processes("cpu"))
        with short_of_memory(session, "update forward", rows=0 if rank else 99):
            train(session, tmp_path / "run")

    assert together(work) == [10, 10]


# -- evaluation ----------------------------------------------------------------------------------------------------


def evaluated(make_session, how: str) -> dict[str, Tensor]:
    """What the parts of an evaluation give: `whole`, or with fewer rows at a time, `set` or `forced`."""
    session = make_session({"training.micro_batch_rows": 4, "evaluation.num_probes": 2})
    pool = session.stream(session.config.corpus, num_probes=2, purpose=Purpose.EVALUATION_POOL).next_pool(4)
    numbers = session.uniforms(Purpose.EVALUATION, 0, range(4), 1)

    def run(place: str, rows: int, work):
        limit = session.rollout_batch if place == "rollout" else session.micro_batch
        if how == "forced":
            with short_of_memory(session, place, rows) as tries:
                found = work()
            assert tries
            assert limit.rows == rows
            return found
        if how == "set":
            limit.lower(rows)
        return work()

    written = run("rollout", 2, lambda: session.rollout(pool, numbers))
    paid = run("scoring", 2, lambda: session.pay_for_evaluation(written, pool))
    prior = run("priors", 1, lambda: session.prior(pool))
    oracle = run("rollout", 1, lambda: oracle_rows(session, pool, prior))
    return {
        "ids": written.ids,
        "logprobs": written.sampled_logprobs,
        "rewards": paid.rewards.rewards,
        "probes": paid.scores.probe_logprobs,
        "prior": prior,
        "oracle": oracle.picks,
    }


def test_an_evaluation_goes_on_too(make_session):
    found, expected, whole = (evaluated(make_session, how) for how in ("forced", "set", "whole"))
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=0)


def test_rows_written_apart_are_those_written_together(make_session):
    """Whoever picks: each pick is that of the row's own article and numbers, whichever rows are beside it."""
    session = make_session()
    pool = session.stream(session.config.corpus, num_probes=0, purpose=Purpose.EVALUATION_POOL).next_pool(3)
    pool = replace(pool, subject=tensor([[0, 1, 0, 1, 2], [2, 2, 1, 1, 0], [0, 0, 0, 1, 1]]))
    numbers = session.uniforms(Purpose.EVALUATION, 0, range(3), 2)
    pickers = simple_pickers(pool, session.prior(pool), session.config.corpus.variant)
    assert {"random", "article_order", "easy_to_hard", "nearest_key", "planted"} < set(pickers)
    whole = {name: session.rollout(pool, numbers, picker) for name, picker in pickers.items()}
    session.rollout_batch.lower(4)
    for name, expected in whole.items():
        found = session.rollout(pool, numbers, pickers[name])
        assert torch.equal(found.ids, expected.ids), name
        assert torch.equal(found.picks, expected.picks), name
        torch.testing.assert_close(found.sampled_logprobs, expected.sampled_logprobs, atol=1e-5, rtol=0)
    assert torch.equal(session.rollout(pool, numbers, replay(expected.picks)).ids, expected.ids)


# -- the limit itself ----------------------------------------------------------------------------------------------


def test_a_limit_is_halved_until_one_row_is_too_much():
    limit, tried = RowLimit(100, row_len=30), []

    def work() -> None:
        tried.append(limit.rows)
        with limit.watch("adding up", 13):
            no_memory()

    with pytest.raises(MemoryLimitError, match="adding up: 1 rows × 30 tokens"):
        limit.fit(13, work)
    assert tried == [100, 6, 3, 1]  # 13 rows were all there were
    assert limit.lowered_to == 1


def test_other_errors_and_results_pass():
    limit = RowLimit(8, row_len=30)
    assert limit.fit(8, lambda: "done") == "done"
    with pytest.raises(ZeroDivisionError), limit.watch("dividing", 8):
        limit.fit(8, lambda: 1 // 0)
    assert (limit.rows, limit.lowered_to) == (8, None)
    limit.lower(None)
    limit.lower(9)
    assert limit.lowered_to is None


def test_short_rows_go_more_at_a_time():
    limit = RowLimit(4, row_len=30)
    assert [limit.forward_rows_of(length) for length in (10, 30, 31, 500)] == [12, 4, 3, 1]


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    [(7, [(8, 2), (2, 2), (1, 1)]), (2, [(8, 2), (1, 1)]), (1, [(8, 2)])],
)
def test_scoring_takes_more_rows_until_memory_runs_out(num_rows, expected):
    limit, tries = RowLimit(2, row_len=30, forward_rows=8), []

    def work() -> None:
        tries.append((limit.forward_rows, limit.rows))
        with limit.watch("scoring", num_rows, forward=True):
            no_memory()

    with pytest.raises(MemoryLimitError, match="scoring: 1 rows × 30 tokens at a time; lower"):
        limit.fit(num_rows, work)
    assert tries == expected


def test_what_memory_has_forced_holds_for_scoring_too():
    limit = RowLimit(2, row_len=30, forward_rows=8)
    assert limit.forward_rows_of(60) == 4
    limit.lower(8)
    assert (limit.forward_rows, limit.rows, limit.lowered_to) == (8, 2, None)
    limit.lower(3)
    assert (limit.forward_rows, limit.rows, limit.lowered_to) == (3, 2, 3)
    limit.lower(1)
    assert (limit.forward_rows, limit.rows, limit.lowered_to) == (1, 1, 1)
    with pytest.raises(MemoryLimitError, match="writing: 1 rows"), limit.watch("writing", 7):
        no_memory()


@pytest.mark.parametrize(("other", "agreed"), [((1, 1), (1, 1)), ((2, 2), (2, 2)), ((8, 2), (8, 2)), ((99, 9), (8, 2))])
def test_processes_agree_on_the_rows_of_the_one_with_the_least_memory(make_session, monkeypatch, other, agreed):
    """The other has run out of memory in an evaluation, say, where each is by itself."""
    session = make_session()
    session.micro_batch = RowLimit(2, row_len=30, forward_rows=8)
    others = tensor([[other[0], session.rollout_batch.rows]])
    monkeypatch.setattr(session.processes, "gather_rows", lambda own: torch.cat([own, others]))
    session.agree_on_rows()
    assert (session.micro_batch.forward_rows, session.micro_batch.rows) == agreed


def test_scoring_takes_four_times_the_rows_of_the_update_unless_they_are_given(make_session):
    automatic, given = (make_session({"training.micro_batch_rows": rows}).micro_batch for rows in (None, 3))
    assert automatic.forward_rows == 4 * automatic.rows
    assert (given.forward_rows, given.rows) == (3, 3)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_every_way_of_saying_so_is_understood(error):
    assert ran_out(error)
    with pytest.raises(MemoryLimitError, match="out of memory while reading") as caught, out_of_memory("reading"):
        raise error
    assert not ran_out(caught.value)


def test_memory_that_runs_out_in_a_collective_is_no_lost_process(monkeypatch):
    processes = Processes("cpu")
    monkeypatch.setattr(processes, "_peers", object())  # it would be asked who has gone
    with pytest.raises(torch.OutOfMemoryError), processes._collective():
        no_memory()


def test_elsewhere_it_is_one_line_and_its_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(runs, "open_untrained", no_memory)
    assert cli.main(["doctor"]) == 10
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("agrl: error: out of memory")
