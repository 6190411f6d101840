"""The command line: exit codes, one line for everything that is wrong, and nothing left behind."""

import contextlib
import gzip
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from verified import main

from attention_guided_rl.cli import parse_overrides
from attention_guided_rl.config import Config
from attention_guided_rl.config_files import load_config
from attention_guided_rl.errors import ConfigError
from attention_guided_rl.loading import BUNDLED_MODEL

SMALL = {
    "template": {"kind": "plain", "query_prefix": "\n", "value_prefix": " |"},
    "pairs": {"num_pairs": 4},
    "rollout": {"articles": 2, "trajectories": 2, "steps": 2, "query_tokens": 3},
    "selection": {"calibration_queries": 4},
    "training": {"updates": 2, "checkpoint_every": 1, "device": "cpu"},
    "evaluation": {"articles": 0, "num_probes": 1, "oracle": False},
}


class Agrl:
    """Runs the command line in this process, with a configuration of small updates and a runs folder of its own."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self.runs, self._capfd = folder, folder / "runs", capfd
        self.small = folder / "small.yaml"
        self.small.write_text(yaml.safe_dump(SMALL), encoding="utf-8")

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self._capfd.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as exit:  # as the console command would
            code = exit.code if isinstance(exit.code, int) else 1
        out, err = self._capfd.readouterr()
        return code, out, err

    def train(self, *arguments: object, name: str = "a") -> tuple[int, str, str]:
        return self("train", "--config", self.small, "--runs-folder", self.runs, "--run", name, *arguments)


@pytest.fixture
def agrl(tmp_path, capfd) -> Agrl:
    return Agrl(tmp_path, capfd)


def only_line(err: str) -> str:
    """The one line on stderr, warnings apart."""
    lines = [line for line in err.splitlines() if not line.startswith("agrl: warning:")]
    assert len(lines) == 1, err
    assert lines[0].startswith("agrl: error: ")
    return lines[0]


def left_in(runs: Path) -> list[str]:
    return sorted(p.name for p in runs.iterdir()) if runs.exists() else []


# -- what works --------------------------------------------------------------------------------------------------------


def test_version_is_that_of_the_package(agrl):
    assert agrl("--version")[:2] == (0, f"agrl {metadata.version('attention-guided-rl')}\n")


def test_config_prints_yaml_of_the_resolved_configuration(agrl, tmp_path):
    code, out, _ = agrl("config", "--preset", "demo", "--config", agrl.small, "--optimizer.learning_rate", "3e-5")
    (tmp_path / "printed.yaml").write_text(out, encoding="utf-8")
    printed = load_config(files=[tmp_path / "printed.yaml"])
    assert code == 0
    assert printed.optimizer.learning_rate == 3e-5  # command line
    assert printed.rollout.articles == 2  # file
    assert printed == load_config("demo", [agrl.small], {"optimizer.learning_rate": 3e-5})


def test_overrides_are_yaml_values_in_either_spelling():
    assert parse_overrides(["--a.b", "3", "--c.d-e=true", "--f.g", "x=y", "--h.i=", "--j.k", "-1"]) == {
        "a.b": 3, "c.d_e": True, "f.g": "x=y", "h.i": None, "j.k": -1,
    }  # fmt: skip


@pytest.mark.parametrize("rest", [["updates", "3"], ["--updates", "3"], ["--training.updates"], ["-x"], ["3"]])
def test_what_is_not_a_field_and_a_value_is_refused(rest):
    with pytest.raises(ConfigError, match="command line"):
        parse_overrides(rest)


@pytest.mark.parametrize("title", ["1984", "Star Wars: A New Hope", "null", "No", "2001-01-01", "[dead] #1"])
def test_a_title_on_the_command_line_is_text_whatever_yaml_makes_of_it(agrl, title):
    code, out, _ = agrl("config", "--corpus.kind", "files", "--corpus.path", "x", "--corpus.title", title)
    assert code == 0
    assert yaml.safe_load(out)["corpus"]["title"] == title


def test_help_of_train_names_every_section_and_says_what_a_field_is_for(agrl):
    code, out, _ = agrl("train", "--help")
    assert code == 0
    assert "--resume" in out
    assert "--optimizer.learning-rate" in out or "--optimizer.learning_rate" in out
    assert "never read" in " ".join(out.split())  # from the docstring of evaluation.num_probes


def test_a_finished_run_has_its_files_and_resuming_it_does_nothing(agrl):
    assert agrl.train()[0] == 0
    run = agrl.runs / "a"
    before = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    names = {str(p.relative_to(run)) for p in before}
    logs = {"config.yaml", "environment.json", "prompt.txt", "metrics.jsonl", "trajectories.jsonl", "pairs.jsonl"}
    assert logs <= names
    assert "checkpoints/update-000002/adapter/adapter_model.safetensors" in names

    code, _, err = agrl("train", "--resume", "--run", "a", "--runs-folder", agrl.runs)
    assert (code, err) == (0, "")
    assert {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()} == before


def test_resume_without_a_name_goes_on_with_the_newest_run_to_more_updates(agrl):
    assert agrl.train()[0] == 0
    assert agrl("train", "--resume", "--runs-folder", agrl.runs, "--training.updates", 3)[0] == 0
    lines = (agrl.runs / "a" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["update"] for line in lines] == [1, 2, 3]


def test_rollout_shows_a_trajectory_and_writes_orders(agrl, tmp_path):
    orders = tmp_path / "orders.jsonl"
    code, out, _ = agrl("rollout", "--config", agrl.small, "--articles", 2, "--out", orders)
    assert code == 0
    assert "step  2" in out
    records = [json.loads(line) for line in orders.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 2
    for record in records:
        assert len(set(record["picks"])) == len(record["pairs"]) == 2
        assert all(pair.startswith(record["hash"]) for pair in record["pairs"])


# -- what is refused: files and settings -------------------------------------------------------------------------------


def texts(folder: Path, name: str, content: bytes) -> list[object]:
    path = folder / name
    path.write_bytes(content)
    return ["--corpus.kind", "files", "--corpus.path", path]


PROSE = ("The sea rises twice a day and falls again. " * 60).encode()

BAD_INPUT = {
    "missing config file": (2, lambda d: ["--config", d / "absent.yaml"], "absent.yaml"),
    "config file is a folder": (2, lambda d: ["--config", d], ""),
    "broken YAML": (2, lambda d: ["--config", file(d, "b.yaml", b"training: {updates")], "b.yaml"),
    "deeply nested YAML": (2, lambda d: ["--config", file(d, "b.yaml", b"[" * 20_000)], "b.yaml"),
    "file name with a line break": (2, lambda d: ["--config", d / "a\nb.yaml"], "b.yaml"),
    "unknown key in a file": (2, lambda d: ["--config", file(d, "k.yaml", b"training: {update: 3}")], "k.yaml"),
    "unknown key": (2, lambda d: ["--training.update", "3"], "training.updates"),
    "unknown preset": (2, lambda d: ["--preset", "dmo"], "demo"),
    "field without a value": (2, lambda d: ["--training.updates"], "needs a value"),
    "stray word": (2, lambda d: ["fast"], "fast"),
    "option without a value": (2, lambda d: ["--preset"], "--preset"),
    "negative learning rate": (2, lambda d: ["--optimizer.learning_rate", "-0.1"], "optimizer.learning_rate"),
    "more steps than pairs": (2, lambda d: ["--rollout.steps", "5"], "rollout.steps"),
    "window longer than the context": (2, lambda d: ["--rollout.context_tokens", "2000"], "rollout.context_tokens"),
    "steps that do not fit the window": (2, lambda d: ["--rollout.context_tokens", "30"], "rollout.steps"),
    "unknown corpus": (2, lambda d: ["--corpus.kind", "encyclopaedia"], "'encyclopedia'"),
    "unknown reward": (2, lambda d: ["--reward.kind", "value_priors"], "'value_prior'"),
    "unknown embedder": (2, lambda d: ["--embedder.kind", "hash"], "'hashing'"),
    "module that is not there": (2, lambda d: ["--reward.kind", "no.such.module:x"], "reward.kind"),
    "plain template without prefix": (2, lambda d: ["--template.query_prefix="], "template.query_prefix"),
    "articles of too few pairs": ((2, 3), lambda d: ["--corpus.subjects=3", "--corpus.pairs_per_subject=1"], ""),
    "missing corpus file": (3, lambda d: ["--corpus.kind", "files", "--corpus.path", d / "absent.txt"], "absent.txt"),
    "empty corpus file": (3, lambda d: texts(d, "a.txt", b""), "a.txt"),
    "whitespace corpus file": (3, lambda d: texts(d, "a.txt", b" \n \n"), "a.txt"),
    "corpus file that is not text": (3, lambda d: texts(d, "a.txt", b"\xff\xfe\x00\x80"), "a.txt"),
    "article too short": (3, lambda d: texts(d, "a.txt", b"The sea rises."), "pairs"),
    "unknown title": (3, lambda d: [*texts(d, "Tides.txt", PROSE), "--corpus.title", "Tide"], "'Tides'"),
    "short evaluation articles": (
        3,
        lambda d: ["--evaluation.articles", "1", "--evaluation.corpus.kind", "files",
                   "--evaluation.corpus.path", file(d, "a.txt", b"The sea rises.")],
        "pairs",
    ),
    "archive": (3, lambda d: texts(d, "a.zip", b"PK"), "unpack it"),
    "truncated gzip": (3, lambda d: texts(d, "a.txt.gz", gzip.compress(PROSE)[:-9]), "a.txt.gz"),
    "entities in a dump": (
        3,
        lambda d: ["--corpus.kind", "dump", "--corpus.path", file(d, "d.xml", b'<!DOCTYPE a [<!ENTITY b "c">]><a/>')],
        "entities may expand",
    ),
    "damaged dump": (
        3, lambda d: ["--corpus.kind", "dump", "--corpus.path", file(d, "d.xml.bz2", b"BZh91AY&SY no")], "d.xml.bz2"
    ),
}  # fmt: skip


def file(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gives_one_line_the_right_code_and_leaves_nothing(agrl, tmp_path, case):
    expected, arguments, hint = BAD_INPUT[case]
    code, _, err = agrl.train(*arguments(tmp_path))
    line = only_line(err)
    assert code in (expected if isinstance(expected, tuple) else (expected,))
    assert hint in line
    assert left_in(agrl.runs) == []


@pytest.mark.parametrize("arguments", [["frobnicate"], ["evaluate"], ["rollout", "--articles", "x"]])
def test_a_wrong_command_gives_one_line(agrl, arguments):
    code, _, err = agrl(*arguments)
    assert code == 2
    only_line(err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(agrl):
    code, _, err = agrl.train("--training.device", "cuda")
    assert code == 2
    assert "training.device" in only_line(err)
    assert left_in(agrl.runs) == []


def test_a_failure_of_ours_exits_with_70(agrl, tmp_path, monkeypatch):
    file(tmp_path, "broken_corpus.py", b"def make(config):\n    return 1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, _, _ = agrl.train("--corpus.kind", "broken_corpus:make")
    assert code == 70
    assert left_in(agrl.runs) == []


# -- what is refused: run folders --------------------------------------------------------------------------------------


def test_an_existing_run_folder_is_not_touched(agrl):
    (agrl.runs / "a").mkdir(parents=True)
    (agrl.runs / "a" / "notes.txt").write_text("mine", encoding="utf-8")
    code, _, err = agrl.train()
    assert code == 12
    assert "--resume" in only_line(err)
    assert [p.name for p in (agrl.runs / "a").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["..", "../b", "a/../../b", "/b", "a/b", "", ".hidden", "a..b", "a\n"])
def test_a_run_name_that_could_leave_the_runs_folder_is_refused(agrl, name):
    code, _, err = agrl.train(name=name)
    assert code == 13
    only_line(err)
    assert left_in(agrl.runs) == []


@pytest.mark.parametrize("name", ["../runs/a", "../../runs/a", "{absolute}"])
def test_a_run_outside_the_runs_folder_cannot_be_resumed(agrl, name):
    """Whether there is a run or not: `..` and paths are refused before anything is read."""
    (agrl.folder / "other").mkdir()
    name = name.replace("{absolute}", str(agrl.runs / "a"))
    code, _, err = agrl("train", "--resume", "--run", name, "--runs-folder", agrl.folder / "other")
    assert code == 13
    only_line(err)


def test_there_must_be_a_run_to_resume(agrl):
    code, _, err = agrl("train", "--resume", "--runs-folder", agrl.runs)
    assert code == 2
    assert "no run" in only_line(err)
    code, _, err = agrl("train", "--resume", "--run", "absent", "--runs-folder", agrl.runs)
    assert code == 2
    assert "absent" in only_line(err)
    assert left_in(agrl.runs) == []


def test_resume_refuses_changed_settings_and_shows_the_difference(agrl):
    assert agrl.train()[0] == 0
    code, _, err = agrl("train", "--resume", "--run", "a", "--runs-folder", agrl.runs, "--rollout.temperature", "0.5")
    assert code == 2
    assert "rollout.temperature: 1.0 → 0.5" in only_line(err)


def test_resume_refuses_a_run_without_a_usable_checkpoint(agrl):
    assert agrl.train()[0] == 0
    for path in (agrl.runs / "a" / "checkpoints").glob("*/state.json"):
        path.write_text("{}", encoding="utf-8")
    code, _, err = agrl("train", "--resume", "--run", "a", "--runs-folder", agrl.runs, "--training.updates", 3)
    assert code == 7
    assert "state.json" in err.splitlines()[-1]

    shutil.rmtree(agrl.runs / "a" / "checkpoints")
    code, _, err = agrl("train", "--resume", "--run", "a", "--runs-folder", agrl.runs, "--training.updates", 3)
    assert code == 7
    assert "checkpoint" in only_line(err)


def test_resume_refuses_a_corpus_that_has_changed(agrl, tmp_path):
    corpus = texts(tmp_path, "a.txt", PROSE)
    assert agrl.train(*corpus)[0] == 0
    texts(tmp_path, "a.txt", PROSE.replace(b"sea", b"tide"))
    code, _, err = agrl("train", "--resume", "--run", "a", "--runs-folder", agrl.runs, "--training.updates", 3)
    assert code == 7
    assert "corpus has changed" in err.splitlines()[-1]


def test_evaluate_and_rollout_refuse_what_is_not_a_run(agrl, tmp_path):
    for command in ("evaluate", "rollout"):
        code, _, err = agrl(command, tmp_path)
        assert code == 2
        assert "config.yaml" in only_line(err)
    assert not (tmp_path / ".lock").exists()


def test_evaluate_refuses_to_change_what_was_trained(agrl):
    assert agrl.train()[0] == 0
    code, _, err = agrl("evaluate", agrl.runs / "a", "--rollout.steps", "1")
    assert code == 2
    assert "rollout.steps" in only_line(err)


# -- what is refused: models -------------------------------------------------------------------------------------------


def bundled_copy(folder: Path, *, without: tuple[str, ...] = ()) -> Path:
    target = folder / "model"
    shutil.copytree(BUNDLED_MODEL, target, ignore=shutil.ignore_patterns(*without))
    return target


def broken_config(folder: Path, content: bytes) -> Path:
    model = bundled_copy(folder)
    (model / "config.json").write_bytes(content)
    return model


def pickled_weights(folder: Path) -> Path:
    model = bundled_copy(folder, without=("*.safetensors",))
    torch.save({"model.embed_tokens.weight": torch.zeros(2, 2)}, model / "pytorch_model.bin")
    return model


def cut_weights(folder: Path) -> Path:
    model = bundled_copy(folder)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    return model


def remote_code(folder: Path, name: str, section: str = "auto_map") -> Path:
    model = bundled_copy(folder)
    contents = json.loads((model / name).read_text(encoding="utf-8"))
    contents[section] = {
        "AutoConfig": "code.Evil",
        "AutoModelForCausalLM": "code.Evil",
        "AutoTokenizer": ["code.E", None],
    }
    (model / name).write_text(json.dumps(contents), encoding="utf-8")
    (model / "code.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\nE = Evil\n", encoding="utf-8"
    )
    return model


BAD_MODELS = {
    "missing folder": (2, lambda d: d / "absent", "absent"),
    "missing relative folder": (2, lambda d: "./absent/model", "absent"),
    "no config.json": (2, lambda d: bundled_copy(d, without=("config.json",)), "config.json"),
    "broken config.json": (2, lambda d: broken_config(d, b'{"model_type": '), "config.json"),
    "config.json is a number": (2, lambda d: broken_config(d, b"3"), "config.json"),
    "config.json is a list": (2, lambda d: broken_config(d, b"[]"), ""),
    "config.json is not text": (2, lambda d: broken_config(d, b"\xff\xfe"), "config.json"),
    "config.json without a known model": (2, lambda d: broken_config(d, b'{"model_type": "eliza"}'), "eliza"),
    "config.json of a model that writes no text": (2, lambda d: broken_config(d, b'{"model_type": "vit"}'), ""),
    "quantised weights": (
        2,
        lambda d: broken_config(d, b'{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}'),
        "quantised",
    ),
    "no tokenizer": (2, lambda d: bundled_copy(d, without=("tokenizer*",)), "model.name"),
    "no weights": (2, lambda d: bundled_copy(d, without=("*.safetensors",)), "model.name"),
    "pickle-only weights": (2, pickled_weights, "model.name"),
    "truncated weights": (2, cut_weights, "model.name"),
    "remote code for the model": (13, lambda d: remote_code(d, "config.json"), "code"),
    "remote code for the tokenizer": (13, lambda d: remote_code(d, "tokenizer_config.json"), "code"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_model_that_cannot_be_used_gives_one_line_the_right_code_and_leaves_nothing(agrl, tmp_path, case):
    expected, make, hint = BAD_MODELS[case]
    code, _, err = agrl.train("--model.name", make(tmp_path))
    line = only_line(err)
    assert code == expected
    assert hint in line
    assert left_in(agrl.runs) == []
    assert not (tmp_path / "ran").exists()


HUB_ANSWERS = {
    "absent": (404, "RepoNotFound"),
    "gated": (403, "GatedRepo"),
    "gated-401": (401, "GatedRepo"),
    "no-config": (404, "EntryNotFound"),
    "down": (503, ""),
}
HUB_FILES = {
    "code": json.dumps({"model_type": "llama", "auto_map": {"AutoConfig": "code.Evil"}}).encode(),
    "page": b"<html>busy</html>",
}
HUB_ASKED: list[str] = []


class Hub(BaseHTTPRequestHandler):
    """A hub with one repository of every kind of trouble."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        HUB_ASKED.append(self.path)
        repository = self.path.split("/")[2]
        body = HUB_FILES.get(repository, b"")
        status, code = (200, "") if body else HUB_ANSWERS.get(repository, (404, "RepoNotFound"))
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if body:
            self.send_header("ETag", f'"{repository}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serve_hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


MANY = """
import contextlib, io, json, sys
from attention_guided_rl.cli import main
answers = []
for arguments in json.loads(sys.argv[1]):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = main(arguments)
    answers.append([code, err.getvalue()])
print(json.dumps(answers))
"""


def start_many(names: list[str], endpoint: str, folder: Path) -> subprocess.Popen[str]:
    """Train with each of these models in a process that knows another hub: its address is read at import."""
    small = folder / "small.yaml"
    small.write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    commands = [
        ["train", "--config", str(small), "--runs-folder", str(folder / "runs"), "--model.name", name] for name in names
    ]
    hidden = ("HF_", "HUGGING_FACE", "TRANSFORMERS_", "XDG_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden) and "proxy" not in k.lower()}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / endpoint[-5:]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", MANY, json.dumps(commands)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


HUB_CASES = {
    "some/absent": (2, "no model 'some/absent'"),
    "some/gated": (4, "HF_TOKEN"),
    "some/gated-401": (4, "HF_TOKEN"),
    "some/no-config": (2, "some/no-config"),
    "some/code": (13, "code"),
    "some/page": (2, "config.json"),
    "some/down": (5, "some/down"),
}


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module", autouse=True)
def hub_commands(hub_folder) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Started before the first test of this file, because they mostly wait: the hub's client tries six times."""
    with serve_hub() as hub:
        started = {
            "reachable": start_many(list(HUB_CASES), hub, hub_folder),
            "unreachable": start_many(["some/model"], f"http://127.0.0.1:{closed_port()}", hub_folder),
        }
        yield started
        for process in started.values():
            process.kill()
            process.communicate()


def answers_of(process: subprocess.Popen[str]) -> list[tuple[int, str]]:
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return [(code, said) for code, said in json.loads(out)]


# -- interruption ------------------------------------------------------------------------------------------------------


def test_ctrl_c_saves_says_how_to_go_on_and_resuming_completes(agrl):
    code = "import sys; from attention_guided_rl.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", "--config", str(agrl.small), "--runs-folder", str(agrl.runs)]
    command += ["--run", "a", "--training.updates", "100000", "--training.checkpoint_every", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = agrl.runs / "a" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while process.poll() is None and not (metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)

    assert process.returncode == 130, err
    assert "Traceback" not in err
    done = metrics.read_text(encoding="utf-8").count("\n")
    assert f"interrupted after update {done}" in out
    line = next(line for line in out.splitlines() if "to go on:" in line)
    _, *resume = shlex.split(line.partition("to go on:")[2])
    code, _, err = agrl("verify", agrl.runs / "a")
    assert code == 7
    assert f"unfinished: {done} of 100000 updates; to go on: agrl train --run a --resume" in only_line(err)

    code, _, err = agrl(*resume, "--training.updates", done + 1)
    assert (code, err) == (0, "")
    updates = [json.loads(line)["update"] for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert updates == list(range(1, done + 2))
    assert sorted(p.name for p in (agrl.runs / "a" / "checkpoints").iterdir()) == [
        "update-000000", f"update-{done:06d}", f"update-{done + 1:06d}",
    ]  # fmt: skip


def test_config_is_what_an_empty_file_stands_for(agrl, tmp_path):
    code, out, _ = agrl("config", "--config", file(tmp_path, "empty.yaml", b""))
    (tmp_path / "printed.yaml").write_text(out, encoding="utf-8")
    assert code == 0
    assert load_config(files=[tmp_path / "printed.yaml"]) == Config()


# -- what is refused: the hub, asked by processes started above --------------------------------------------------------


def test_what_the_hub_refuses_gives_one_line_and_the_right_code(hub_commands, hub_folder):
    for (name, (expected, hint)), (code, said) in zip(
        HUB_CASES.items(), answers_of(hub_commands["reachable"]), strict=True
    ):
        assert (name, code) == (name, expected)
        assert hint in said.splitlines()[-1]
        if name != "some/down":  # see the next test
            only_line(said)
    assert {path.split("/")[2] for path in HUB_ASKED} >= {name.split("/")[1] for name in HUB_CASES}
    assert left_in(hub_folder / "runs") == []


def test_a_hub_that_cannot_be_reached_gives_one_line_and_code_5(hub_commands, hub_folder):
    ((code, said),) = answers_of(hub_commands["unreachable"])
    assert code == 5
    assert "cannot be reached" in said
    only_line(said)
    assert left_in(hub_folder / "runs") == []
