"""Verification: a real run verifies, every planted falsification is caught and named, what is unfinished says so."""

import ast
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import verified
import yaml
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

from attention_guided_rl import cli, runs, verification
from attention_guided_rl.errors import AgrlError, CheckpointError, ConfigError
from attention_guided_rl.verification import verify_run
from attention_guided_rl.verification.reading import read_tensors

ADAPTER = "adapter/adapter_model.safetensors"
NEWEST = "checkpoints/update-000004"


@pytest.fixture(scope="module")
def whole(make_config, tmp_path_factory) -> Path:
    """Four updates of 2 × 3 trajectories, of which the first and third are logged; three articles evaluated."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    settings = {"training.checkpoint_every": 2, "log.trajectories_every": 2, "evaluation.articles": 3}
    runs.train(make_config(settings), folder)
    return folder


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of it that a test may falsify."""
    return Path(shutil.copytree(whole, tmp_path / "runs" / "a"))


# -- real runs ---------------------------------------------------------------------------------------------------------


def test_a_real_run_verifies_and_says_what_was_found(whole):
    found = {finding.check: finding.found for finding in verify_run(whole)}
    assert found["config.yaml"] == "4 updates of 2 × 3 trajectories"
    assert found["checkpoints/update-000004"].endswith(" tensors finite, 4 optimiser steps")
    assert found["metrics.jsonl"] == "updates 1 to 4, 24 episodes"
    # two logged updates of six; six arms of three articles with text of their own
    assert found["trajectories.jsonl"] == "12 of training, 18 of the evaluation; rewards of 30 computed again"
    assert found["evaluation"].startswith("12 arms on 3 articles")
    assert found.keys() == {*found, "pairs.jsonl", "log_bytes", "report.html"}


OTHER_RUNS = {
    "held-out probes and all weights": {"reward.kind": "held_out", "reward.num_probes": 1, "model.adapter": "full"},
    "a moving average, expected picks, shuffled rewards": {
        "reward.scorer": "ema", "reward.pick": "expected", "training.shuffled_rewards": True,
    },
    "no updates": {"training.updates": 0},
}  # fmt: skip
"""Beside those of test_golden.py and of law 10, which are verified there."""


@pytest.mark.parametrize("settings", OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_other_real_runs_verify(make_config, tmp_path, settings):
    runs.train(make_config({"training.updates": 2, **settings}), tmp_path / "run")
    assert list(verify_run(tmp_path / "run")), "nothing was looked at"


def test_another_evaluation_verifies_as_what_it_was_asked_to_be(run):
    runs.evaluate(run, {"evaluation.articles": 2})  # all arms
    assert len(list(verify_run(run, {"evaluation.articles": 2}))) == 8
    with pytest.raises(CheckpointError, match=r"2 articles of arm 'trained'; evaluation\.articles asks for 3"):
        list(verify_run(run))
    with pytest.raises(ConfigError, match=r"training\.updates cannot be set"):
        list(verify_run(run, {"training.updates": 4}))


# -- falsifications ----------------------------------------------------------------------------------------------------

Edit = Callable[[Path], None]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def lines(name: str, change: Callable[[list[bytes]], object]) -> Edit:
    """Change the list of a file's lines in place."""

    def edit(run: Path) -> None:
        found = (run / name).read_bytes().splitlines(keepends=True)
        change(found)
        (run / name).write_bytes(b"".join(found))

    return edit


def record(name: str, number: int, change: Callable[[dict[str, Any]], object]) -> Edit:
    """Change one line's record in place."""

    def edit(run: Path) -> None:
        found = records(run / name)
        change(found[number])
        (run / name).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in found), encoding="utf-8")

    return edit


def content(name: str, change: Callable[[bytes], bytes]) -> Edit:
    """Change a file's bytes."""

    def edit(run: Path) -> None:
        (run / name).write_bytes(change((run / name).read_bytes()))

    return edit


def summary(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(run: Path) -> None:
        found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
        change(found)
        (run / "evaluation.json").write_text(json.dumps(found), encoding="utf-8")

    return edit


def sealed(*edits: Edit, log_bytes: dict[str, int] | None = None) -> Edit:
    """Make the newest checkpoint's manifest fit what the edits have made of its files."""

    def edit(run: Path) -> None:
        for other in edits:
            other(run)
        path = run / NEWEST / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        del manifest["manifest_sha256"]
        manifest["log_bytes"] |= log_bytes or {}
        files = [p for p in (run / NEWEST).rglob("*") if p.is_file() and p != path]
        manifest["sha256"] = {
            p.relative_to(run / NEWEST).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
        }
        digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(manifest | {"manifest_sha256": digest}), encoding="utf-8")

    return edit


def tensors(name: str, change: Callable[[dict[str, np.ndarray]], object]) -> Edit:
    def edit(run: Path) -> None:
        found = {key: value.copy() for key, value in load_file(run / NEWEST / name).items()}
        change(found)
        save_file(found, run / NEWEST / name)

    return edit


def state(**changes: Any) -> Edit:
    def edit(run: Path) -> None:
        path = run / NEWEST / "state.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return edit


def config(key: str, value: Any) -> Edit:
    def edit(run: Path) -> None:
        settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        section, name = key.split(".")
        settings[section][name] = value
        (run / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")

    return edit


def swap(items: list[Any], i: int, j: int) -> None:
    items[i], items[j] = items[j], items[i]


def first_nan(found: dict[str, np.ndarray]) -> None:
    next(iter(found.values())).flat[0] = math.nan


def drop_a_moment(found: dict[str, np.ndarray]) -> None:
    del found[next(name for name in found if name.endswith("|exp_avg_sq"))]


def drop_a_parameter(found: dict[str, np.ndarray]) -> None:
    parameter = next(iter(found)).rpartition("|")[0]
    for name in [name for name in found if name.startswith(f"{parameter}|")]:
        del found[name]


def lose_a_step(found: dict[str, np.ndarray]) -> None:
    for name in found:
        if name.endswith("|step"):
            found[name] = np.asarray(found[name] - 1)


def raise_reward(r: dict[str, Any], *names: str) -> None:
    for name in names:
        r[name][1] += 0.01


def move_probability(r: dict[str, Any]) -> None:
    """Another distribution, of as much probability, in which the pick of step 0 is as probable as before."""
    row, pick = r["selection_logprobs"][0], r["picks"][0]
    row[pick] += 0.001


def read_the_same_again(r: dict[str, Any]) -> None:
    r["picks"][1] = r["picks"][0]


def read_in_another_order(r: dict[str, Any]) -> None:
    swap(r["picks"], 0, 1)
    for row in r["selection_logprobs"]:
        row[:] = [-math.log(len(row))] * len(row)
    for step, row in enumerate(r["selection_logprobs"]):
        for pick in r["picks"][:step]:
            row[pick] = None
        unread = sum(x is not None for x in row)
        row[:] = [None if x is None else -math.log(unread) for x in row]


def without(name: str, keep: Callable[[dict[str, Any]], bool]) -> Edit:
    def edit(run: Path) -> None:
        kept = [r for r in records(run / name) if keep(r)]
        (run / name).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept), encoding="utf-8")

    return edit


def both(*edits: Edit) -> Edit:
    def edit(run: Path) -> None:
        for other in edits:
            other(run)

    return edit


METRICS, ROWS, PAIRS, ARMS = "metrics.jsonl", "trajectories.jsonl", "pairs.jsonl", "evaluation.jsonl"
FALSIFIED: dict[str, tuple[Edit, str]] = {
    # metrics.jsonl
    "an update is missing": (lines(METRICS, lambda x: x.pop(1)), r"metrics.jsonl, line 2: update 3 where update 2"),
    "the last update is missing": (lines(METRICS, lambda x: x.pop()), r"metrics.jsonl: the last update is 3, .* 4"),
    "an update twice": (lines(METRICS, lambda x: x.insert(1, x[1])), r"line 3: update 2 where update 3 belongs"),
    "an update more": (record(METRICS, -1, lambda r: r.update(update=5)), r"line 4: update 5 where update 4 belongs"),
    "updates swapped": (lines(METRICS, lambda x: swap(x, 1, 2)), r"line 2: update 3 where update 2 belongs"),
    "NaN in the metrics": (
        record(METRICS, 2, lambda r: r.update({"loss/total": math.nan})), r"line 3: not strict JSON: NaN is no JSON"
    ),
    "a number that becomes infinite": (
        content(METRICS, lambda b: b.replace(b'"loss/policy": ', b'"loss/policy": 1e999, "x": ', 1)),
        r"line 1: not strict JSON: 1e999 is not finite",
    ),
    "the last byte is cut off": (content(METRICS, lambda b: b[:-1]), r"metrics.jsonl, line 4: cut off"),
    "half of the last line": (content(METRICS, lambda b: b[:-300]), r"metrics.jsonl, line 4: cut off"),
    "not an object": (lines(METRICS, lambda x: x.insert(0, b"[]\n")), r"line 1: not a JSON object"),
    "not text": (lines(METRICS, lambda x: x.insert(0, b"\xff\n")), r"line 1: not strict JSON"),
    "nested without end": (lines(METRICS, lambda x: x.insert(0, b"[" * 99_999 + b"\n")), r"line 1: not strict JSON"),
    "episodes": (record(METRICS, 1, lambda r: r.update(episodes=6)), r"line 2: 6 episodes; 2 × 6 were asked for"),
    "a step without a loss": (
        record(METRICS, 1, lambda r: r.update({"loss/kl": None})), r"line 2: loss/kl is None, and .* counts as done"
    ),
    "a counter falls": (
        both(*(record(METRICS, n, lambda r: r.update({"guard/nonfinite_updates": 1})) for n in (1, 2))),
        r"line 4: guard/nonfinite_updates is 0, after 1",
    ),
    "an update is called empty": (
        both(*(record(METRICS, n, lambda r: r.update({"filter/empty_updates": 1})) for n in (2, 3))),
        r"line 3: the update is counted as empty, and has a loss",
    ),
    "an empty update that the checkpoint does not know": (
        both(
            *(record(METRICS, n, lambda r: r.update({"filter/empty_updates": 1})) for n in (2, 3)),
            record(METRICS, 2, lambda r: r.update({"loss/total": None})),
        ),
        r"filter/empty_updates is 1, in the checkpoint 0",
    ),
    "the mean reward": (
        record(METRICS, 2, lambda r: r.update({"reward/mean": r["reward/mean"] + 1e-3})),
        r"trajectories.jsonl, line 12: reward/mean of update 3 is .*, in metrics.jsonl",
    ),
    "the temperature": (
        record(METRICS, -1, lambda r: r.update({"selection/temperature": 0.6})), r"temperature is 0.6, .* 0.5"
    ),
    "a figure changed without a trace but its length": (
        record(METRICS, 1, lambda r: r.update({"reward/mean": 0.5})), r"metrics.jsonl: \d+ bytes; the checkpoint says"
    ),
    # pairs.jsonl
    "a pair is missing": (lines(PAIRS, lambda x: x.pop(0)), r"trajectories.jsonl, line 1: '\w+-\d+' is missing"),
    "a pair twice": (lines(PAIRS, lambda x: x.append(x[0])), r"pairs.jsonl, line \d+: pair '\w+-\d+' a second time"),
    "a pair of another place": (record(PAIRS, 0, lambda r: r.update(position=99)), r"line 1: pair .* hash and positio"),
    "a pair of another article": (record(PAIRS, 0, lambda r: r.update(article="x")), r"is of another article"),
    "a pair without a value": (record(PAIRS, 0, lambda r: r.pop("value_ids")), r"line 1: no pair \(KeyError"),
    "a prior": (
        both(*(record(PAIRS, n, lambda r: r.update(prior=r["prior"] - 0.1)) for n in range(5))),
        r"trajectories.jsonl, line 1: step \d: baseline is not the prior of the pair / mean value length",
    ),
    "a pair behind what the checkpoint covers": (
        lines(PAIRS, lambda x: x.append(x.pop(0))), r"pairs.jsonl: pairs of training stand behind"
    ),
    # trajectories.jsonl: 6 lines of update 1, 6 of update 3, 18 of the evaluation
    "a trajectory is missing": (
        lines(ROWS, lambda x: x.pop(1)), r"line 2: 'train' update 1, article 0, trajectory 2 where .* trajectory 1 bel"
    ),
    "all trajectories of an update are missing": (
        lines(ROWS, lambda x: x.__delitem__(slice(6, 12))), r"line 7: 'evaluation' update 4, .* where 'train' update 3"
    ),
    "the last trajectories are missing": (
        lines(ROWS, lambda x: x.__delitem__(slice(11, None))), r"it ends where 'train' update 3, article 1, trajectory"
    ),
    "a trajectory twice": (lines(ROWS, lambda x: x.insert(3, x[3])), r"line 5: 'train' update 1, article 1, traj.* 0"),
    "trajectories swapped": (lines(ROWS, lambda x: swap(x, 4, 5)), r"line 5: .* trajectory 2 where .* trajectory 1 be"),
    "a trajectory that nobody asked for": (
        lines(ROWS, lambda x: x.insert(12, x[11])), r"line 13: .* where nothing of training belongs"
    ),
    "a reward": (
        record(ROWS, 1, lambda r: raise_reward(r, "rewards")), r"line 2: step 1: rewards are not raw − baseline"
    ),
    "a reward and its raw part": (
        record(ROWS, 1, lambda r: raise_reward(r, "rewards", "raw")),
        r"line 2: step 1: raw is not the sum of value_token_logprobs / mean value length",
    ),
    "raw and baseline": (
        both(
            record(ROWS, 1, lambda r: raise_reward(r, "raw", "baseline")),
            record(ROWS, 1, lambda r: r["value_token_logprobs"][1].__setitem__(0, 0.0)),
        ),
        r"line 2: step 1: raw is not the sum",
    ),
    "a baseline": (
        record(ROWS, 1, lambda r: (raise_reward(r, "baseline"), r["rewards"].__setitem__(1, r["rewards"][1] - 0.01))),
        r"line 2: step 1: baseline is not the prior of the pair",
    ),
    "a reward that is null": (
        record(ROWS, 1, lambda r: r["rewards"].__setitem__(1, None)), r"line 2: rewards: null, and no update of this is"
    ),
    "a pick repeated": (record(ROWS, 2, read_the_same_again), r"line 3: picks \[.*\]: a pair is read twice"),
    "a pick out of range": (record(ROWS, 2, lambda r: r["picks"].__setitem__(0, 5)), r"line 3: picks .* not in the po"),
    "picks in another order": (record(ROWS, 2, read_in_another_order), r"line 3: step 0: the context does not hold"),
    "a read pair with a probability": (
        record(ROWS, 2, lambda r: r["selection_logprobs"][2].__setitem__(r["picks"][0], -9.0)),
        r"line 3: selection_logprobs, step 2: null is not where it was read",
    ),
    "an unread pair without": (
        record(ROWS, 2, lambda r: r["selection_logprobs"][0].__setitem__(r["picks"][2], None)),
        r"line 3: selection_logprobs, step 0: null is not where it was read",
    ),
    "probabilities that are too many": (
        record(ROWS, 2, move_probability), r"line 3: selection_logprobs, step 0: the probabilities add up to 1\.00"
    ),
    "a probability above 1": (
        record(ROWS, 2, lambda r: r["sampled_logprobs"][0].__setitem__(0, 0.1)), r"sampled_logprobs: a probability abov"
    ),
    "a step missing": (record(ROWS, 2, lambda r: r["picks"].pop()), r"line 3: S is 2, not 3"),
    "a pool of another article": (
        record(ROWS, 1, lambda r: r["pairs"].reverse()), r"line 2: not the pool of the group's first"
    ),
    "another scorer": (record(ROWS, 0, lambda r: r.update(scorer="policy")), r"line 1: arm 'trained', scorer 'policy'"),
    "a row that was kept": (
        record(ROWS, 0, lambda r: r.update(kept=False)), r"line 6: filter/kept_fraction of update 1 is 0.833333, .* 1.0"
    ),
    "a trajectory of the evaluation is missing": (
        lines(ROWS, lambda x: x.pop()), r"2 trajectories of arm 'nearest_key'; evaluation.jsonl has 3"
    ),
    "an arm's trajectories are missing": (
        without(ROWS, lambda r: r["arm"] != "random"), r"trajectories of the arms \['article_order', .* has \[.*'random"
    ),
    "the same line in another spelling": (
        lines(ROWS, lambda x: x.__setitem__(0, x[0].replace(b": ", b":"))), r"trajectories.jsonl: \d+ bytes; the checkp"
    ),
    # the newest checkpoint
    "a byte of the weights": (
        content(f"{NEWEST}/{ADAPTER}", lambda b: b[:-1] + bytes([b[-1] ^ 1])), rf"{ADAPTER}: its SHA-256 differs"
    ),
    "NaN in the weights": (sealed(tensors(ADAPTER, first_nan)), rf"{ADAPTER}: tensor '.*' has a number that is not fi"),
    "NaN in the moments": (
        sealed(tensors("optimizer.safetensors", first_nan)), r"optimizer.safetensors: tensor '.*' .* not finite"
    ),
    "a moment is missing": (
        sealed(tensors("optimizer.safetensors", drop_a_moment)), r"optimizer.safetensors: '.*' has \['exp_avg', 'step'"
    ),
    "a parameter's moments are missing": (
        sealed(tensors("optimizer.safetensors", drop_a_parameter)), r"moments of \d+ parameters where \d+ are trained"
    ),
    "a step fewer": (sealed(tensors("optimizer.safetensors", lose_a_step)), r"3.0 steps of '.*'; the run counts 4"),
    "an update more in the state": (sealed(state(update=5)), r"update-000004/state.json: it is of update 5"),
    "updates that were skipped": (sealed(state(nonfinite_updates=1)), r"4.0 steps of '.*'; the run counts 3"),
    "a state without counters": (sealed(state(update="4")), r"state.json: no usable counters"),
    "NaN in the state": (sealed(state(temperature=math.nan)), r"state.json: not strict JSON: NaN"),
    "a file too many": (lambda run: (run / NEWEST / "a.bin").touch(), r"'a.bin' is not in the manifest"),
    "a file that is missing": (lambda run: (run / NEWEST / ADAPTER).unlink(), rf"update-000004: '{ADAPTER}' is missin"),
    "an edited manifest": (
        content(f"{NEWEST}/manifest.json", lambda b: b.replace(b'"pairs.jsonl": ', b'"pairs.jsonl": 1')),
        r"manifest.json: its own SHA-256 differs",
    ),
    "no manifest": (lambda run: (run / NEWEST / "manifest.json").unlink(), r"manifest.json: missing"),
    "a log length": (sealed(log_bytes={METRICS: 9}), r"metrics.jsonl: \d+ bytes; the checkpoint says 9"),
    "a log that grew": (content("pairs.jsonl", lambda b: b[: b.index(b"\n") + 1]), r"is missing, here or in pairs.jso"),
    # the evaluation
    "a line of the evaluation is missing": (lines(ARMS, lambda x: x.pop(1)), r"line 2: article 2 of arm 'trained' is"),
    "its last line is missing": (lines(ARMS, lambda x: x.pop()), r"2 articles of arm 'nearest_key/key'; .* asks for 3"),
    "a line of the evaluation twice": (lines(ARMS, lambda x: x.insert(1, x[1])), r"line 3: article 1 of arm 'trained'"),
    "an arm is missing": (
        without(ARMS, lambda r: r["arm"] != "easy_to_hard/key"), r"evaluation.jsonl: no lines of arm 'easy_to_hard/key'"
    ),
    "an article is missing": (without(ARMS, lambda r: r["index"] != 2), r"2 articles of arm 'trained'; .* asks for 3"),
    "the oracle is missing": (config("evaluation.oracle", True), r"evaluation.jsonl: no lines of arm 'oracle'"),
    "a reward of the evaluation": (
        record(ARMS, 0, lambda r: r.update(reward=r["reward"] + 0.01)), r"the mean of arm 'trained' is"
    ),
    "a reward that is no number": (record(ARMS, 0, lambda r: r.update(reward=None)), r"line 1: reward None"),
    "a reward in lines and means": (
        both(
            *(record(ARMS, n, lambda r: r.update(reward=1.0)) for n in (0, 1, 2)),
            summary(lambda s: (s["arms"]["trained"].update(mean=1.0), s.update(contrasts={}, choice_gain=None))),
        ),
        r"trajectories.jsonl, line 13: arm 'trained', article 0, .* evaluation.jsonl has article 0",
    ),
    "picks that differ from the arm's own text": (
        record(ARMS, 3, lambda r: r["picks"].reverse()), r"arm 'trained/key' has other picks of article 0 than 'trained"
    ),
    "a pair read twice in the evaluation": (
        record(ARMS, 0, lambda r: r["picks"].__setitem__(0, r["picks"][1])), r"line 1: picks .*: a pair is read twice"
    ),
    "another pool": (record(ARMS, 9, lambda r: r.update(pool="x")), r"arm 'untrained/key' has another article or pool"),
    "another seed": (record(ARMS, 9, lambda r: r.update(seed=1)), r"line 10: seed is 1, not 0"),
    "another reward": (config("evaluation.reward", "plain"), r"baseline of the reward plain is not 0"),
    "an arm's mean": (
        summary(lambda s: s["arms"]["random"].update(mean=0.5)), r"evaluation.json: the mean of arm 'random' is 0.5"
    ),
    "an arm without lines": (summary(lambda s: s["arms"].update(best={"mean": 9.0})), r"evaluation.json: its arms are"),
    "a contrast": (
        summary(lambda s: s["contrasts"]["trained-random"].update(mean=0.5)), r"mean of contrast 'trained-random' is 0."
    ),
    "the choice gain": (summary(lambda s: s["choice_gain"].update(mean=0.5)), r"choice_gain is not the contrast"),
    "the number of articles": (summary(lambda s: s.update(articles=300)), r"articles is 300; the lines have 3"),
    "NaN in the summary": (summary(lambda s: s.update(oracle_gap_closed=math.nan)), r"evaluation.json: not strict JSO"),
    "half of the report": (content("report.html", lambda b: b[: len(b) // 2]), r"report.html: cut off; to make it aga"),
    # config.yaml
    "fewer updates asked for": (config("training.updates", 2), r"update-000004: 4 of 2 updates: more than"),
    "other logging asked for": (config("log.trajectories_every", 1), r"line 7: 'train' update 3, .* where 'train' upd"),
    "other rows asked for": (config("rollout.articles", 3), r"line 1: 6 episodes; 1 × 9 were asked for"),
    "no configuration": (content("config.yaml", lambda b: b"{"), r"config.yaml: cannot be read"),
    "a configuration that is nested without end": (content("config.yaml", lambda b: b"[" * 1_000), r"config.yaml: can"),
    "a list for a configuration": (content("config.yaml", lambda b: b"- 1"), r"config.yaml: not a configuration"),
    "a setting is missing": (content("config.yaml", lambda b: b.replace(b"updates:", b"update:")), r"training.updates"),
    "updates in words": (config("training.updates", "many"), r"config.yaml: no usable training.updates: 'many'"),
}  # fmt: skip


@pytest.mark.parametrize("case", FALSIFIED)
def test_a_falsified_run_is_caught_and_the_difference_named(run, case):
    edit, expected = FALSIFIED[case]
    edit(run)
    with pytest.raises(CheckpointError) as error:
        list(verify_run(run))
    assert re.search(expected, str(error.value)), error.value
    assert "\n" not in str(error.value)
    assert "unfinished" not in str(error.value)


# -- unfinished runs ---------------------------------------------------------------------------------------------------


def lose_the_evaluation(run: Path) -> None:
    """As a run that was killed in its evaluation: some of its trajectories, the last of them cut."""
    (run / "evaluation.json").unlink()
    content(ROWS, lambda b: b[:-100])(run)


def be_killed_after_a_checkpoint(run: Path) -> None:
    """The newest checkpoint is of update 2; the logs go on to the middle of a line."""
    shutil.rmtree(run / NEWEST)
    (run / "evaluation.jsonl").unlink()
    content(METRICS, lambda b: b[:-100])(run)
    content(ROWS, lambda b: b[: 2 * len(b) // 3])(run)
    (run / "checkpoints" / ".staged-update-000004").mkdir()


def begin(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    for name in (METRICS, ROWS, PAIRS):
        (run / name).write_bytes(b"")


UNFINISHED: dict[str, tuple[Edit, str]] = {
    "more updates asked for": (config("training.updates", 60), "4 of 60 updates"),
    "killed between checkpoints": (be_killed_after_a_checkpoint, "2 of 4 updates"),
    "killed in the evaluation": (lose_the_evaluation, "4 of 4 updates, but no evaluation.json"),
    "killed before the report": (lambda run: (run / "report.html").unlink(), "4 of 4 updates, but no report.html"),
    "an evaluation of long ago": (
        both(*(record(ARMS, n, lambda r: r.update(update=2)) for n in range(36))),
        "4 of 4 updates, but the evaluation is of update 2",
    ),
    "killed before the first checkpoint": (begin, "0 of 4 updates"),
}


@pytest.mark.parametrize("case", UNFINISHED)
def test_an_unfinished_run_says_how_far_it_is_and_how_to_go_on(run, monkeypatch, capfd, case):
    edit, expected = UNFINISHED[case]
    edit(run)
    monkeypatch.chdir(run.parents[1])
    assert cli.main(["verify", "runs/a"]) == 7
    said = capfd.readouterr().err
    assert said == f"agrl: error: runs/a: unfinished: {expected}; to go on: agrl train --run a --resume\n"


def test_elsewhere_the_command_names_the_folder_of_runs(run, monkeypatch):
    begin(run)
    monkeypatch.chdir(run)
    with pytest.raises(CheckpointError, match=r"agrl train --run a --resume --runs-folder \.\.$"):
        list(verify_run(Path()))


def test_an_unfinished_run_that_is_falsified_is_not_merely_unfinished(run):
    shutil.rmtree(run / NEWEST)
    record(ROWS, 1, lambda r: raise_reward(r, "rewards"))(run)
    with pytest.raises(CheckpointError, match="rewards are not raw"):
        list(verify_run(run))


def test_logs_that_are_shorter_than_at_the_checkpoint_are_no_merely_unfinished_run(run):
    shutil.rmtree(run / NEWEST)
    lines(METRICS, lambda x: x.__delitem__(slice(1, None)))(run)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: \d+ bytes; it had \d+ when the checkpoint was written"):
        list(verify_run(run))


def test_logs_without_any_checkpoint_cannot_be_gone_on_with(run):
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint, and the logs are not empty; start a new run"):
        list(verify_run(run))


# -- the command, and files --------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_exits_with_0(whole, capfd):
    assert cli.main(["verify", str(whole)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert [line.split()[0] for line in out.splitlines()] == [
        "check", "config.yaml", "checkpoints/update-000004", *(METRICS, PAIRS, ROWS), "log_bytes", "evaluation",
        "report.html",
    ]  # fmt: skip
    assert {line.split()[-1] for line in out.splitlines()} == {"ok"}


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"not a run folder"):
        list(verify_run(tmp_path))


@pytest.mark.parametrize("name", [METRICS, ROWS, PAIRS, f"{NEWEST}/state.json"])
def test_a_missing_file_is_named(run, name):
    (run / name).unlink()
    with pytest.raises(AgrlError, match=f"{Path(name).name}.* missing"):
        list(verify_run(run))


def test_verifying_changes_nothing(run):
    def everything() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}

    before = everything()
    list(verify_run(run))
    assert everything() == before


def test_tensors_are_those_that_the_library_wrote(tmp_path):
    numbers = torch.tensor([[1.5, -2.0, 3e-5]])
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
    written = {str(kind): numbers.abs().to(kind) for kind in kinds} | {"scalar": torch.tensor(3.0)}
    save_torch_file(written, tmp_path / "a.safetensors", {"format": "pt"})
    found = read_tensors(tmp_path / "a.safetensors")
    assert {name: value.tolist() for name, value in found.items()} == {k: v.tolist() for k, v in written.items()}


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_found_in_every_kind(tmp_path, kind, number):
    save_torch_file({"w": torch.tensor([0.0, number]).to(kind)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="tensor 'w' has a number that is not finite"):
        read_tensors(tmp_path / "a.safetensors")


DAMAGED = (
    lambda b: b[:5],
    lambda b: b[:20],
    lambda b: b[:-1],
    lambda b: b + b"\0",
    lambda b: b"",
    lambda b: b"\xff" * 8 + b[8:],
    lambda b: b.replace(b'"F32"', b'"F33"'),
    lambda b: b.replace(b'"shape":[2]', b'"shape":[3]'),
)


@pytest.mark.parametrize("change", DAMAGED)
def test_a_damaged_file_of_tensors_is_refused(tmp_path, change):
    path = tmp_path / "a.safetensors"
    save_torch_file({"w": torch.tensor([0.0, 1.0])}, path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        read_tensors(path)


def test_an_exit_code_that_the_files_belie_is_noticed(whole, tmp_path, monkeypatch):
    """As test_cli.py and test_remote.py hold every `agrl train` against its files."""
    command = ["train", "--run", "a", "--runs-folder", str(tmp_path)]

    def finish_and_fail(arguments: list[str]) -> int:
        shutil.copytree(whole, tmp_path / "a")
        return 9

    monkeypatch.setattr(cli, "main", lambda arguments: 0)
    with pytest.raises(ConfigError, match="not a run folder"):
        verified.main(command)
    monkeypatch.setattr(cli, "main", finish_and_fail)
    with pytest.raises(AssertionError, match=r"exit 9, but .*a is complete"):
        verified.main(command)


def test_the_code_is_independent_of_what_it_checks():
    """It imports of this package the errors, what makes a folder a run, and the reading of its settings; no torch."""
    folder = Path(verification.__file__).parent
    imported = {
        node.module or ""
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
    }
    ours = {name.removeprefix("attention_guided_rl.") for name in imported if name.startswith("attention_guided_rl")}
    assert {name for name in ours if not name.startswith("verification")} == {"errors", "storage", "run_settings"}
    assert not {name for name in imported if name.startswith(("torch", "safetensors"))}
