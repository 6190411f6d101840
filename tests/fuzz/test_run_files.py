"""Files of a run folder that somebody else wrote, or that something damaged: checkpoints, logs, evaluations, orders."""

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fuzzing import INPUTS, agrl, as_json, as_json_lines, damaged, documented, fuzz, mutated
from hypothesis import strategies as st

from attention_guided_rl.checkpoint import (
    RunState,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from attention_guided_rl.config import LogConfig, PairsConfig
from attention_guided_rl.data.pairs import CutArticle, CutPair, Position, whole_pool
from attention_guided_rl.errors import CheckpointError, CorpusError
from attention_guided_rl.order_files import picks_of_orders, read_orders
from attention_guided_rl.records import Article
from attention_guided_rl.rl_agent import AgentState, RunningMoments
from attention_guided_rl.tracking import RunLogs

pytestmark = pytest.mark.timeout(600)
BROKEN = [b"", b"null", b"[]", b"3", b'"x"', b"{}", b"\xff", b"[" * 10**5, b"9" * 5000, b"{" * 10**5, b"\0" * 10**6]


# -- checkpoints -------------------------------------------------------------------------------------------------------

STATE = RunState(
    temperature=0.3,
    embedder="hashing/words/64/unit",
    update=2,
    agent=AgentState(scale=0.5, rewards=RunningMoments(7, 0.1, 3.0), returns=(RunningMoments(7, 0.1, 3.0),) * 2),
    position=Position(epoch=1, offset=5, drawn=9, last_article="00ab"),
)
PLAIN_STATE = json.loads(json.dumps(asdict(STATE)))
FILES = (
    "state.json",
    "manifest.json",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "optimizer.safetensors",
)


@pytest.fixture
def run(make_model, tmp_path) -> Path:
    """A run folder with the checkpoints of two updates."""
    model = make_model("llama")
    optimizer = torch.optim.AdamW(model.named_trainable().values(), lr=0.01)
    for parameter in model.named_trainable().values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for update in (1, 2):
        save_checkpoint(
            tmp_path / "run", RunState(**{**vars_of(STATE), "update": update}), model, optimizer, {"a": 1}, "#"
        )
    return tmp_path / "run"


def vars_of(state: RunState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in RunState.__slots__}


def sign(checkpoint: Path, change: Any = None) -> None:
    """Write the manifest that goes with the files, as anyone can; `change` replaces what it says."""
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != "manifest.json"]
    digests = {p.relative_to(checkpoint).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    manifest = {"schema": 1, "sha256": digests, "log_bytes": {"metrics.jsonl": 3}} if change is None else change
    try:
        own = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        manifest = {**manifest, "manifest_sha256": own}
    except TypeError:  # no object
        pass
    (checkpoint / "manifest.json").write_bytes(as_json(manifest))


@st.composite
def spoiled(draw: st.DrawFn, contents: dict[str, bytes]) -> tuple[str, bytes | Any, bool]:
    """Draw a file of a checkpoint, what it becomes, and whether the manifest vouches for it."""
    name = draw(st.sampled_from((*FILES, "state.json", "manifest.json")))
    if name == "manifest.json":
        return name, draw(mutated([json.loads(contents[name])])), draw(st.booleans())
    if name == "state.json" and draw(st.booleans()):
        return name, as_json(draw(mutated([PLAIN_STATE]))), True
    data = draw(damaged([contents[name]])) if draw(st.booleans()) else draw(st.sampled_from(BROKEN))
    return name, data, draw(st.booleans())


def test_a_checkpoint_is_loaded_or_refused_in_one_line(run, make_model):
    model, newest = make_model("llama"), checkpoint_path(run, 2)
    optimizer = torch.optim.AdamW(model.named_trainable().values(), lr=0.01)
    contents = {name: (newest / name).read_bytes() for name in FILES}

    def check(given: tuple[str, bytes | Any, bool]) -> None:
        name, data, signed = given
        if name == "manifest.json":
            if signed:
                sign(newest, {k: v for k, v in data.items() if k != "manifest_sha256"} if type(data) is dict else data)
            else:
                (newest / name).write_bytes(as_json(data))
        elif data is None:
            (newest / name).unlink()
        else:
            (newest / name).write_bytes(data)
        if signed and name != "manifest.json":
            sign(newest)
        try:
            path = latest_checkpoint(run)
            assert path == newest or not signed or name == "manifest.json"
            state = load_checkpoint(path, model, optimizer)
            assert type(state.update) is int
            assert type(state.position.offset) is int
            assert 0 < state.temperature < math.inf
            assert all(type(moments.count) is int for moments in (state.agent.rewards, *state.agent.returns))
        except CheckpointError as error:
            documented(error)
        for each, good in contents.items():
            (newest / each).write_bytes(good)

    manifest = json.loads(contents["manifest.json"])
    digests = manifest["sha256"]
    found = [
        *((name, data, True) for name in FILES if name != "manifest.json" for data in (*BROKEN, None)),
        *(
            ("manifest.json", {**manifest, "sha256": value}, True)
            for value in ([*digests], "x", 3, None, {**digests, "../x": "0"})
        ),
        *(
            ("manifest.json", {**manifest, "log_bytes": value}, True)
            for value in ([], None, {"metrics.jsonl": "x"}, {"a": -1})
        ),
        *(("manifest.json", value, True) for value in ([], None, 3, {})),
        *(
            ("state.json", as_json({**PLAIN_STATE, key: value}), True)
            for key in PLAIN_STATE
            for value in (None, "x", -1, [], {})
        ),
        ("state.json", as_json({**PLAIN_STATE, "temperature": float("nan")}), True),
    ]
    fuzz("checkpoints", spoiled(contents), check, run, found)


def test_the_logs_of_a_run_are_gone_on_with_or_refused_in_one_line(tmp_path):
    good = b'{"pair": "ab-1", "title": "x"}\n{"pair": "ab-2", "title": "y"}\n'

    def check(data: bytes) -> None:
        (tmp_path / "pairs.jsonl").write_bytes(data)
        try:
            with RunLogs(
                tmp_path, LogConfig(), {"metrics.jsonl": 0, "trajectories.jsonl": 0, "pairs.jsonl": len(data)}
            ):
                pass
        except CheckpointError as error:
            documented(error)

    fuzz(
        "logs",
        damaged([good], [b'{"pair": []}\n', b"[]\n", b"3\n", b"\xff\n"]),
        check,
        tmp_path,
        [b + b"\n" for b in BROKEN],
    )


# -- orders ------------------------------------------------------------------------------------------------------------


def cut(name: str) -> CutArticle:
    pairs = tuple(CutPair([i, 1], [2, i], i) for i in range(4))
    article = Article(id=f"id-{name}", title=name, text="text", source="s", revision="r", url="", licence="")
    return CutArticle(article, pairs, f"hash{name}")


POOL = whole_pool([cut("a"), cut("b")], PairsConfig(num_pairs=4, key_tokens=2, value_tokens=2))
ORDERS = [
    {
        "article": f"id-{name}",
        "hash": f"hash{name}",
        "pairs": [f"hash{name}-{i}" for i in (2, 0, 3)],
        "picks": [2, 0, 3],
    }
    for name in "ab"
]


def test_orders_are_read_or_refused_in_one_line(tmp_path):
    path = tmp_path / "mine.jsonl"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            picks = picks_of_orders(read_orders(path), POOL, 3, "mine.jsonl")
            assert [p.tolist() for p in picks] == [[2, 0, 3]] * 2
        except CorpusError as error:
            documented(error)

    separated = [{**ORDERS[0], "title": "a\u2028b\x85c"}, ORDERS[1]]
    found = [*BROKEN, "".join(json.dumps(o, ensure_ascii=False) + "\n" for o in separated).encode()]
    fuzz(
        "orders",
        st.one_of(mutated([ORDERS]).map(as_json_lines), damaged([as_json_lines(ORDERS)])),
        check,
        tmp_path,
        found,
    )


# -- evaluations and reports -------------------------------------------------------------------------------------------

RECORDS = [
    {
        "arm": arm, "picker": "trained", "text": "trained", "article": f"a{i}", "pool": f"p{i}", "index": i, "seed": 0,
        "update": 4, "reward_kind": "plain", "scoring": "s", "scorer": "reference", "reward": 0.5 * i, "picks": [0, 1],
        "subjects": 2, "probe_curve": [-3.0, -2.5, -2.0],
    }
    for arm in ("trained", "untrained/key")
    for i in range(3)
]  # fmt: skip
CONFIG = {
    "model": {"name": "tiny"},
    "corpus": {"kind": "encyclopedia"},
    "training": {"seed": 0, "updates": 4},
}  # no seed of the corpus


def write_run(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


EVALUATED = {
    "config.yaml": yaml.safe_dump(CONFIG).encode(),
    "evaluation.jsonl": as_json_lines(RECORDS),
    "evaluation.json": b'{"held_out": true}',
}


@st.composite
def spoiled_files(draw: st.DrawFn, files: dict[str, bytes], valid: dict[str, Any]) -> dict[str, bytes]:
    """Draw the files of a run with one that is malformed; `valid`: those that are mutated as values."""
    name = draw(st.sampled_from(sorted(files)))
    how = draw(st.sampled_from(("value", "value", "bytes", "broken")))
    if how == "value" and name in valid:
        value = draw(mutated([valid[name]]))
        data = as_json_lines(value) if name.endswith("l") and name != "config.yaml" else as_json(value)
    else:
        data = draw(st.sampled_from(BROKEN) if how == "broken" else damaged([files[name]]))
    return {**files, name: data}


def test_evaluations_are_compared_or_refused_in_one_line(tmp_path):
    good = write_run(tmp_path / "good", EVALUATED)

    def check(files: dict[str, bytes]) -> None:
        bad = write_run(tmp_path / "bad", files)
        assert agrl("compare", good, bad)[0] in (0, 2)
        assert {path.name for path in bad.iterdir()} == set(files)

    values = {"config.yaml": CONFIG, "evaluation.jsonl": RECORDS, "evaluation.json": {"held_out": True}}
    found = [{**EVALUATED, name: data} for name in EVALUATED for data in BROKEN[::2]]
    found.append({**EVALUATED, "config.yaml": b"training: {seed: [[]]}"})
    odd = (None, [], 1e308, float("nan"))
    changed = [[{**RECORDS[0], name: value}, *RECORDS[1:]] for name in RECORDS[0] for value in odd]
    found += [{**EVALUATED, "evaluation.jsonl": as_json_lines(rows)} for rows in changed]
    found += [
        {**EVALUATED, "evaluation.jsonl": as_json_lines(rows)} for rows in (RECORDS[:4], RECORDS[2:], RECORDS[:1])
    ]
    fuzz("evaluations", spoiled_files(EVALUATED, values), check, tmp_path, found)


TRAJECTORY = {
    "schema": 1, "phase": "evaluation", "arm": "trained", "update": 4, "scorer": "reference", "index": 0,
    "article": "a0", "trajectory": 0, "pairs": ["ab-0", "ab-1"], "queries": ["what", "which"], "picks": [1, 0],
    "selection_logprobs": [[-0.7, -0.7], [0.0, None]], "rewards": [0.5, -0.5],
    "value_token_logprobs": [[-1.0, -2.0], [-1.5, -0.5]], "kept": True,
}  # fmt: skip
PAIRS = [
    {"pair": f"ab-{i}", "title": "Mill", "subject": i, "value_ids": [3, 4], "key": "the mill", "value": "turns round",
     "prior": -3.0, "value_tokens": [" turns", " round"]}
    for i in range(2)
]  # fmt: skip
METRICS = [
    {
        "update": u,
        "reward/mean": 0.1 * u,
        "loss/kl": None,
        "alarm/kl_high": False,
        "filter/kept_fraction": 1.0,
        "episodes": 9,
    }
    for u in range(1, 4)
]
CONTRAST = {"mean": 0.3, "low": 0.2, "high": 0.4, "p": 0.01, "p_holm": 0.02, "smallest_detectable": 0.1}
SUMMARY = {
    "unit": "nats per value token", "resampled": "article", "held_out": True, "articles": 30, "trajectories": 30,
    "seeds": [3], "arms": {"trained": {**CONTRAST, "subjects": 2.5}, "untrained": CONTRAST, "random/key": CONTRAST},
    "contrasts": {"trained-untrained": CONTRAST}, "choice_gain": None, "oracle_gap_closed": 0.5,
}  # fmt: skip
ENVIRONMENT = {"python": "3.11", "packages": {"torch": "2"}, "platform": "Linux", "cuda": None, "account": "ab"}
SHOWN_VALUES = {
    "config.yaml": CONFIG, "environment.json": ENVIRONMENT, "evaluation.json": SUMMARY, "evaluation.jsonl": RECORDS,
    "metrics.jsonl": METRICS, "pairs.jsonl": PAIRS,
    "trajectories.jsonl": [TRAJECTORY, {**TRAJECTORY, "phase": "train"}],
}  # fmt: skip
SHOWN = {
    name: as_json_lines(value) if name.endswith(".jsonl") else as_json(value) for name, value in SHOWN_VALUES.items()
}


def test_a_report_is_written_or_refused_in_one_line(tmp_path):
    def check(files: dict[str, bytes]) -> None:
        run = write_run(tmp_path / "run", files)
        code, _ = agrl("report", run)
        assert code in (0, 2, 7)
        assert {path.name for path in run.iterdir()} == {*files, *(["report.html"] if code == 0 else [])}
        assert [path.name for path in tmp_path.iterdir()] == ["run"]

    found = [{**SHOWN, name: data} for name in SHOWN for data in BROKEN[::3]]
    found += [
        {**SHOWN, "evaluation.json": as_json({**SUMMARY, name: value})} for name in SUMMARY for value in (None, 1e308)
    ]
    fuzz("reports", spoiled_files(SHOWN, SHOWN_VALUES), check, tmp_path, found)


@pytest.mark.parametrize("name", [*SHOWN, "report.html"])
def test_folders_and_links_in_the_place_of_files_are_named(tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    run = write_run(tmp_path / "run", SHOWN)
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    assert agrl("report", run)[0] in (0, 2, 7, 8)
    (run / name).rmdir()
    (run / name).symlink_to(outside)
    assert agrl("report", run)[0] in (2, 7, 13)
    (run / name).unlink()
    (run / name).symlink_to(name)  # in a circle
    assert agrl("report", run)[0] in (0, 2, 7, 13)
    assert outside.read_text() == "mine"


def test_there_are_as_many_malformed_inputs_as_promised():
    assert sum(INPUTS.values()) >= 2000
