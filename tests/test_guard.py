"""Numbers that are not finite: noticed wherever they appear, named, skipped, counted, and never in a checkpoint."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, tensor
from two import together

from attention_guided_rl import objective, rl_agent, trainer
from attention_guided_rl.checkpoint import RunState, latest_checkpoint, load_checkpoint, save_checkpoint
from attention_guided_rl.config import ModelConfig
from attention_guided_rl.distributed import Processes
from attention_guided_rl.environment import sampled_pick
from attention_guided_rl.errors import CheckpointError, NumericError
from attention_guided_rl.loading import load_model
from attention_guided_rl.model import LOGPROB_FLOOR
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.records import Rewards
from attention_guided_rl.selection import draw_tokens, selection_logprobs
from attention_guided_rl.session import Session
from attention_guided_rl.trainer import learn, read, train
from attention_guided_rl.update import WEIGHT_METRICS, Outcome, make_optimizer

NAN, INF = float("nan"), float("inf")


# -- a bad number at each place ------------------------------------------------------------------------------------


def set_first(values: Tensor, bad: float) -> Tensor:
    values = values.clone()
    values.view(-1)[0] = bad
    return values


def of(owner, name: str):
    """Make one number of a function's first result bad."""

    @contextmanager
    def plant(session: Session, bad: float) -> Iterator[None]:
        target = owner(session)
        real, calls = getattr(target, name), []

        def poisoned(*arguments, **options):
            result = real(*arguments, **options)
            calls.append(None)
            return set_first(result, bad) if len(calls) == 1 else result

        had = name in vars(target)
        setattr(target, name, poisoned)
        try:
            yield
        finally:
            setattr(target, name, real) if had else delattr(target, name)
        assert calls

    return plant


@contextmanager
def in_logits(session: Session, bad: float) -> Iterator[None]:
    """Of the sampler: at one token that a query may contain."""
    real, calls = session.model._logits, []

    def poisoned(states, weights=None):
        logits = real(states, weights)
        calls.append(None)
        if len(calls) == 1:
            logits = logits.clone()
            logits[0, 5] = INF if bad == -INF else bad  # −∞ is a token that is never drawn
        return logits

    session.model._logits = poisoned
    try:
        yield
    finally:
        del session.model._logits


@contextmanager
def in_reward(session: Session, bad: float) -> Iterator[None]:
    real = session.reward

    def pay(inputs) -> Rewards:
        paid = real(inputs)
        return Rewards(raw=set_first(paid.raw, bad), baseline=paid.baseline)

    session.reward = replace(real, pay=pay)
    try:
        yield
    finally:
        session.reward = real


@contextmanager
def in_gradient(session: Session, bad: float) -> Iterator[None]:
    parameter = list(session.model.named_trainable().values())[-1]
    hook = parameter.register_hook(lambda gradient: set_first(gradient, bad))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def in_weight(session: Session, bad: float) -> Iterator[None]:
    """Of the adapter; put back afterwards, as going on from a checkpoint does."""
    name, parameter = list(session.model.named_trainable().items())[-1]
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.copy_(set_first(parameter, bad))
    try:
        yield
        assert not bool(session.model.named_trainable()[name].isfinite().all())
    finally:
        with torch.no_grad():
            parameter.copy_(before)


PLANTED = {
    "logits": in_logits,
    "embedding of a query": of(lambda session: session.embedder, "embed_queries"),
    "embedding of a key": of(lambda session: session.embedder, "embed_keys"),
    "value log-probability": of(lambda session: session.model, "logprobs_of"),
    "reward": in_reward,
    "KL": of(lambda _: objective, "full_kl"),
    "advantage": of(lambda _: rl_agent, "leave_one_out"),
    "loss": of(lambda _: objective, "policy_loss"),
    "gradient": in_gradient,
    "weight": in_weight,
}
AFTER_READING = {"value log-probability", "reward", "KL", "advantage", "loss", "gradient"}
NULL = {
    "logits": "loss/kl",
    "embedding of a query": "selection/entropy",
    "embedding of a key": "selection/entropy",
    "value log-probability": "reward/raw",
    "reward": "reward/mean",
    "KL": "loss/kl",
    "advantage": "advantage/effective_sample_size",
    "loss": "loss/total",
    "gradient": "optimizer/gradient_norm",
    "weight": "loss/total",
}
"""A metric of each that would otherwise hold the number, or a mean over the rest."""


class Lane:
    """A run, update by update."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.optimizer = make_optimizer(session, session.config.optimizer)
        self.state = RunState(temperature=session.temperature, embedder=session.embedder.identity)

    def read(self) -> tuple[trainer.Reading, RunState]:
        """Write the next update's trajectories; return them with the state that goes with them."""
        stream = self.session.stream(self.session.config.corpus, num_probes=0, purpose=Purpose.POOL)
        stream.resume(self.state.position)
        reading = read(self.session, stream, self.state.update, slice(0, 2))
        return reading, replace(self.state, position=stream.position)

    def update(self, written: tuple[trainer.Reading, RunState] | None = None) -> trainer.Learned:
        """Do the next update, without going on to the one after."""
        reading, state = written or self.read()
        return learn(self.session, self.optimizer, reading, state)

    def tensors(self) -> dict[str, Tensor]:
        found = {name: p.detach().clone() for name, p in self.session.model.named_trainable().items()}
        for name, parameter in self.session.model.named_trainable().items():
            found |= {f"{name}|{key}": value.clone() for key, value in self.optimizer.state[parameter].items()}
        return found


def assert_bit_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_that_meets_a_bad_number_changes_nothing_but_its_count(make_session, dtype):
    """At ten places in five updates, NaN and infinities; afterwards each update is that of a run without."""
    options = {"model.dtype": dtype, "model.lora_dropout": 0.2, "rollout.steps": 2}
    clean, poisoned = Lane(make_session(options)), Lane(make_session(options))
    for update, bad in enumerate((NAN, INF, -INF, NAN, INF)):
        before, written = poisoned.tensors(), poisoned.read()
        skipped = replace(written[1], update=update + 1, nonfinite_updates=1, nonfinite_in_a_row=1)
        for place, plant in PLANTED.items():
            with plant(poisoned.session, bad):
                learned = poisoned.update(written if place in AFTER_READING else None)
                if place != "weight":
                    assert_bit_equal(poisoned.tensors(), before)
            assert learned.state == skipped
            assert learned.metrics["guard/place"].startswith(place.split(" of a ")[0]), (update, place)
            assert learned.metrics["guard/nonfinite_updates"] == 1
            assert learned.metrics[NULL[place]] is None, (update, place)
            json.dumps(learned.metrics, allow_nan=False)
        assert_bit_equal(poisoned.tensors(), before)
        ours, theirs = poisoned.update(written), clean.update()
        assert ours.metrics == theirs.metrics
        assert ours.metrics["guard/place"] is None
        assert ours.state == theirs.state
        assert_bit_equal(poisoned.tensors(), clean.tensors())
        poisoned.state, clean.state = ours.state, theirs.state


def test_the_penalty_in_the_reward_is_watched_too(make_session):
    lane = Lane(make_session({"objective.kl.place": "reward", "objective.kl.estimator": "k1"}))
    with of(lambda session: session, "kl_of_queries")(lane.session, NAN):
        assert lane.update().metrics["guard/place"] == "KL"


# -- whole runs ----------------------------------------------------------------------------------------------------


def at_updates(monkeypatch, updates: set[int], plant, bad: float = NAN) -> None:
    """Plant a bad number in these updates of any run, from reading on."""
    with_bad: list = []

    def poisoned_read(session, stream, update, share):
        if update in updates:
            with_bad.append(plant(session, bad))
            with_bad[-1].__enter__()
        return read(session, stream, update, share)

    def poisoned_learn(*arguments):
        try:
            return learn(*arguments)
        finally:
            if with_bad:
                with_bad.pop().__exit__(None, None, None)

    monkeypatch.setattr(trainer, "read", poisoned_read)
    monkeypatch.setattr(trainer, "learn", poisoned_learn)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def begin(config, folder: Path) -> None:
    folder.mkdir()
    train(Session(config, Processes("cpu")), folder)


def checkpoint_files(folder: Path) -> dict[str, bytes]:
    newest = latest_checkpoint(folder)
    return {
        str(path.relative_to(newest)): path.read_bytes()
        for path in newest.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def test_a_run_goes_on_as_if_the_update_had_been_left_out(make_config, tmp_path, monkeypatch):
    config = make_config()
    with monkeypatch.context() as patch:
        at_updates(patch, {2}, PLANTED["KL"])
        begin(config, tmp_path / "poisoned")
    real = trainer.apply_update

    def left_out(session, optimizer, paid, pool, advantages, update, place=None):
        if update == 2:
            return Outcome(dict.fromkeys(WEIGHT_METRICS), stepped=False, place="left out")
        return real(session, optimizer, paid, pool, advantages, update, place)

    monkeypatch.setattr(trainer, "apply_update", left_out)
    begin(config, tmp_path / "left-out")
    assert checkpoint_files(tmp_path / "poisoned") == checkpoint_files(tmp_path / "left-out")
    assert [m["guard/nonfinite_updates"] for m in lines(tmp_path / "poisoned" / "metrics.jsonl")] == [0, 0, 1, 1]


def test_three_in_a_row_end_the_run_with_the_place_and_a_finite_checkpoint(make_config, tmp_path, monkeypatch):
    at_updates(monkeypatch, {1, 2, 3}, in_gradient)
    with pytest.raises(NumericError, match=r"3 updates in a row.*gradient") as caught:
        begin(make_config({"training.updates": 9, "training.checkpoint_every": 1}), tmp_path / "run")
    assert caught.value.exit_code == 9
    assert [m["guard/place"] for m in lines(tmp_path / "run" / "metrics.jsonl")] == [None] + ["gradient"] * 3
    newest = latest_checkpoint(tmp_path / "run")
    tensors = [t for file in newest.rglob("*.safetensors") for t in load_file(file).values()]
    assert tensors
    assert all(bool(t.isfinite().all()) for t in tensors)


def test_a_bad_weight_ends_the_run_at_once_and_a_resume_undoes_it(make_config, tmp_path, monkeypatch):
    config = make_config({"training.checkpoint_every": 2, "training.updates": 4})
    begin(config, tmp_path / "clean")
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        at_updates(patch, {3}, in_weight)
        with pytest.raises(NumericError, match=r"update 4: the weight .*lora_B.* is not finite") as caught:
            train(Session(config, Processes("cpu")), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "update-000000",
        "update-000002",
    ]
    train(Session(config, Processes("cpu")), tmp_path / "run", resume=True)
    assert checkpoint_files(tmp_path / "run") == checkpoint_files(tmp_path / "clean")
    name = "trajectories.jsonl"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "clean" / name).read_bytes()


def test_two_processes_leave_out_the_same_update(make_config, tmp_path):
    """One of them has a bad reward, the other a bad gradient in the next update."""
    config = make_config({"training.updates": 3})
    (tmp_path / "run").mkdir()

    def work(rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            at_updates(patch, {1} if rank else {2}, in_reward if rank else in_gradient)
            session = Session(config, Processes("cpu"))
            trained = train(session, tmp_path / "run")
            assert trained.state.nonfinite_updates == 2
            weights = {name: p.tolist() for name, p in session.model.named_trainable().items()}
            (tmp_path / f"{rank}.json").write_text(json.dumps(weights))

    assert together(work) == [0, 0]
    assert [m["guard/place"] for m in lines(tmp_path / "run" / "metrics.jsonl")] == [None, "reward", "gradient"]
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()


# -- checkpoints and models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_a_checkpoint_with_a_bad_number_is_not_written(make_session, tmp_path, where):
    lane = Lane(make_session())
    lane.state = lane.update().state
    parameter = next(iter(lane.session.model.named_trainable().values()))
    bad = parameter.data if where == "weight" else lane.optimizer.state[parameter]["exp_avg"]
    bad.view(-1)[0] = INF
    with pytest.raises(NumericError, match=r"not written.*lora_A"):
        save_checkpoint(tmp_path, lane.state, lane.session.model, lane.optimizer, {}, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["adapter/adapter_model.safetensors", "optimizer.safetensors"])
def test_a_checkpoint_with_a_bad_number_is_not_loaded(make_session, tmp_path, file):
    lane = Lane(make_session())
    lane.state = lane.update().state
    path = save_checkpoint(tmp_path, lane.state, lane.session.model, lane.optimizer, {}, "")
    tensors = load_file(path / file)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: set_first(tensors[name], NAN)}, path / file)
    with pytest.raises(CheckpointError, match=f"{file.split('/')[0]}.*lora_A.*not finite"):
        load_checkpoint(path, lane.session.model, lane.optimizer)


def test_a_model_with_a_bad_weight_is_refused_by_file_and_tensor(causal_lm, word_tokenizer, tmp_path):
    model = causal_lm("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = NAN
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    word_tokenizer().save_pretrained(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    (file,) = [file.name for file in tmp_path.glob("*.safetensors") if name in load_file(file)]
    with pytest.raises(CheckpointError, match=rf"{file}: the tensor {name} is not finite") as caught:
        load_model(ModelConfig(name=str(tmp_path)), torch.device("cpu"))
    assert caught.value.exit_code == 7


# -- what has a probability of 0 -----------------------------------------------------------------------------------


def test_a_value_of_probability_0_has_a_floor_and_an_overflow_has_none(make_model):
    model = make_model("llama")
    rows = tensor([[0.0, -INF, 0.0], [0.0, INF, 0.0], [0.0, NAN, 0.0], [200.0, 0.0, 0.0]])
    model._logits = lambda states: states
    found = model.logprobs_of(rows[:, None], tensor([[1], [0], [0], [1]]), torch.ones(4, 1, dtype=torch.bool))
    assert LOGPROB_FLOOR == -100.0
    assert found[0, 0] == found[3, 0] == -100.0  # impossible, and e^−200
    assert math.isnan(found[1, 0])
    assert math.isnan(found[2, 0])


def test_equal_rewards_have_no_advantage_and_are_counted(make_session):
    lane = Lane(make_session())
    lane.session.reward = replace(
        lane.session.reward, pay=lambda i: Rewards(raw=torch.ones_like(i.raw), baseline=torch.zeros_like(i.raw))
    )
    before = lane.tensors()
    learned = lane.update()
    assert not learned.advantages.advantages.any()
    assert learned.metrics["reward/zero_variance_groups"] == 1.0
    assert learned.metrics["guard/place"] is None
    assert (learned.state.empty_updates, learned.state.nonfinite_updates) == (1, 0)
    assert_bit_equal(lane.tensors(), before)


def test_a_score_that_is_no_number_spoils_its_row_and_no_other():
    scores = tensor([[[0.0, -INF, 1.0]], [[0.0, INF, 1.0]], [[0.0, NAN, 1.0]], [[0.0, 0.0, 9.0]]])
    unread = tensor([[True, True, True]] * 3 + [[True, True, False]])
    for heads in ("mean_score", "mean_softmax"):
        logprobs = selection_logprobs(scores, unread, 1.0, heads)
        assert logprobs[:3].isnan().all()
        torch.testing.assert_close(logprobs[3], tensor([0.5, 0.5, 0.0]).log())


def test_where_nothing_can_be_drawn_something_allowed_is():
    logprobs = tensor([[NAN, -INF, NAN, -INF]] * 3)
    assert sampled_pick(None, logprobs, tensor([0.0, 0.4999, 0.9999])).tolist() == [0, 0, 2]
    distribution = tensor([[0.0, NAN, 1.0, -INF], [0.0, 0.0, -INF, -INF]]).log_softmax(-1)
    ids, drawn = draw_tokens(distribution, tensor([0.9, 0.9]), tensor([False, True, True, True]))
    assert ids.tolist() == [1, 1]
    assert drawn.isfinite().tolist() == [False, True]


def test_an_evaluation_with_bad_numbers_says_so(make_session):
    session = make_session()
    pool = session.stream(session.config.corpus, num_probes=0, purpose=Purpose.POOL).next_pool(2)
    numbers = session.uniforms(Purpose.EVALUATION, 0, range(2), 1)
    with in_weight(session, NAN):
        rows = session.rollout(pool, numbers)
        with pytest.raises(NumericError, match="logits"):
            session.pay_for_evaluation(rows, pool)
    real = session.embedder.embed_keys
    session.embedder.embed_keys = lambda ids, mask: set_first(real(ids, mask), INF)
    with pytest.raises(NumericError, match="calibrated"):
        session.calibrate(session.config.corpus)
