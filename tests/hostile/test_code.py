"""Files from strangers that would run code if they were read in the wrong way: none of it runs.

Every payload would make the file MARK. That the payloads are live is a test too.
"""

import ast
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from attention_guided_rl import confined
from attention_guided_rl.cli import main
from attention_guided_rl.config import CorpusConfig, NetworkConfig, TemplateConfig
from attention_guided_rl.config_files import config_to_yaml
from attention_guided_rl.data import open_corpus
from attention_guided_rl.errors import AgrlError, ConfigError
from attention_guided_rl.loading import BUNDLED_MODEL
from attention_guided_rl.network import Network
from attention_guided_rl.template import build_template

SOURCE = Path(confined.__file__).parent


class Live:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "MARK"


@pytest.fixture
def payload(mark) -> bytes:
    return pickle.dumps(Live(mark))


def source(mark: Path) -> str:
    return f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"


def tag(mark: Path) -> str:
    return f"!!python/object/apply:os.mkdir [{str(mark)!r}]"


def test_the_payloads_are_live(mark, payload, tmp_path):
    for run in (
        lambda: pickle.loads(payload),
        lambda: yaml.unsafe_load(tag(mark)),
        lambda: exec(source(mark)),
        lambda: np.load(numpy_file(tmp_path, mark), allow_pickle=True),
    ):
        run()
        assert mark.exists()
        mark.rmdir() if mark.is_dir() else mark.unlink()


def numpy_file(folder: Path, mark: Path) -> Path:
    np.save(folder / "x.npy", np.array([Live(mark)], dtype=object), allow_pickle=True)
    return folder / "x.npy"


# -- model folders -----------------------------------------------------------------------------------------------------


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _pickled_weights(folder, mark, payload):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(payload)


def _pickled_shards(folder, mark, payload):
    (folder / "model.safetensors").unlink()
    (folder / "part.bin").write_bytes(payload)
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "part.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _pickle_named_safetensors(folder, mark, payload):
    (folder / "model.safetensors").write_bytes(payload)


def _index_of_safetensors_names_a_pickle(folder, mark, payload):
    (folder / "model.safetensors").unlink()
    (folder / "part.bin").write_bytes(payload)
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "part.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _pickled_adapter(folder, mark, payload):
    (folder / "adapter_model.bin").write_bytes(payload)
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(folder)}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))


def _gguf_alone(folder, mark, payload):
    (folder / "model.safetensors").unlink()
    (folder / "model.gguf").write_bytes(b"GGUF\x03\0\0\0" + payload)


def _numpy_weights(folder, mark, payload):
    (folder / "model.safetensors").write_bytes(numpy_file(folder, mark).read_bytes())


def _code_of_a_model(folder, mark, payload):
    (folder / "modeling.py").write_text(source(mark))
    change(folder / "config.json", model_type="custom", auto_map={"AutoModelForCausalLM": "modeling.Model"})


def _code_of_a_known_model(folder, mark, payload):
    (folder / "modeling.py").write_text(source(mark))
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "other/place--modeling.Model"})


def _code_of_a_tokenizer(folder, mark, payload):
    (folder / "tok.py").write_text(source(mark))
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tok.Tokenizer", None]})


def _code_of_attention(folder, mark, payload):
    change(folder / "config.json", attn_implementation="stranger/kernel")


def _code_of_attention_in_private(folder, mark, payload):
    change(folder / "config.json", _attn_implementation="stranger/kernel:flash")


def _code_of_generation(folder, mark, payload):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(source(mark))
    (folder / "generation_config.json").write_text('{"custom_generate": "custom_generate", "trust_remote_code": true}')


def _class_of_a_tokenizer(folder, mark, payload):
    change(folder / "tokenizer_config.json", tokenizer_class="os.system", processor_class="subprocess.Popen")


def _pickled_vocabulary(folder, mark, payload):
    (folder / "tokenizer.json").unlink()
    for name in ("vocab.pkl", "vocab.bin", "tokenizer.model", "tokenizer.json"):
        (folder / name).write_bytes(payload)


MODELS = {  # exit codes: 2 cannot be loaded, 13 wants to run code, 0 what is asked is not done and harms nothing
    _pickled_weights: 2, _pickled_shards: 2, _pickle_named_safetensors: 2, _index_of_safetensors_names_a_pickle: 13,
    _pickled_adapter: 2, _gguf_alone: 2, _numpy_weights: 2, _code_of_a_model: 13, _code_of_a_known_model: 13,
    _code_of_a_tokenizer: 13, _code_of_attention: 13, _code_of_attention_in_private: 13, _code_of_generation: 0,
    _class_of_a_tokenizer: 0, _pickled_vocabulary: 2,
}  # fmt: skip


@pytest.mark.parametrize("spoil", MODELS, ids=lambda spoil: spoil.__name__.strip("_"))
def test_no_model_folder_runs_code(model_folder, tmp_path, mark, payload, make_config, capsys, spoil):
    folder = Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))
    spoil(folder, mark, payload)
    config = tmp_path / "config.yaml"
    config.write_text(config_to_yaml(make_config({"model.name": str(folder)})))
    assert main(["rollout", "--offline", "--config", str(config)]) == MODELS[spoil], capsys.readouterr().err
    assert not mark.exists()


# -- run folders -------------------------------------------------------------------------------------------------------


def _pickle_beside_the_moments(checkpoint, mark, payload):
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "random_states_0.pkl"):
        (checkpoint / name).write_bytes(payload)


def _pickled_moments(checkpoint, mark, payload):
    (checkpoint / "optimizer.safetensors").write_bytes(payload)


def _pickled_adapter_of_a_run(checkpoint, mark, payload):
    (checkpoint / "adapter" / "adapter_model.safetensors").unlink()
    (checkpoint / "adapter" / "adapter_model.bin").write_bytes(payload)


def _pickled_adapter_by_the_right_name(checkpoint, mark, payload):
    (checkpoint / "adapter" / "adapter_model.safetensors").write_bytes(payload)


def _pickled_state(checkpoint, mark, payload):
    (checkpoint / "state.json").write_bytes(payload)


CHECKPOINTS = (
    *(_pickle_beside_the_moments, _pickled_moments, _pickled_adapter_of_a_run, _pickled_adapter_by_the_right_name),
    _pickled_state,
)


@pytest.mark.parametrize("spoil", CHECKPOINTS, ids=lambda spoil: spoil.__name__.strip("_"))
def test_no_checkpoint_runs_code_even_if_its_manifest_agrees(run, sign, mark, payload, capsys, spoil):
    shutil.rmtree(run / "checkpoints" / "update-000000", ignore_errors=True)
    spoil(run / "checkpoints" / "update-000001", mark, payload)
    sign(run / "checkpoints" / "update-000001")
    resume = ["train", "--run", "run", "--resume", "--runs-folder", str(run.parent), "--evaluation.articles", "0"]
    for command in (["rollout", str(run)], resume):
        code, said = main(command), capsys.readouterr().err
        assert code == 7 or spoil in (_pickle_beside_the_moments, _pickled_moments), said
        assert "Traceback" not in said
        assert not mark.exists()


def test_yaml_tags_are_text_that_is_refused(run, tmp_path, mark, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(f"training:\n  updates: {tag(mark)}\n")
    (run / "config.yaml").write_text(file.read_text())
    commands = {
        ("config", "--config", str(file)): 2,
        ("config", f"--training.updates={tag(mark)}"): 2,
        ("evaluate", str(run)): 2,
        ("rollout", str(run)): 2,
        ("compare", str(run), str(run)): 2,
        ("report", str(run)): 7,
        ("train", "--run", "run", "--resume", "--runs-folder", str(run.parent)): 2,
    }
    for command, expected in commands.items():
        assert main(list(command)) == expected
        assert "Traceback" not in capsys.readouterr().err
        assert not mark.exists()


STANDARD = ("os:system", "subprocess:getoutput", "runpy:run_path", "builtins:exec", "pickle:loads", "antigravity:x")


@pytest.mark.parametrize("key", ["reward.kind", "objective.kind", "embedder.kind", "corpus.kind", "evaluation.reward"])
def test_no_function_of_the_standard_library_is_taken_for_a_part(make_config, tmp_path, capsys, key):
    file = tmp_path / "config.yaml"
    for name in STANDARD:
        file.write_text(config_to_yaml(make_config({key: name})))
        assert main(["rollout", "--config", str(file)]) == 13
        assert f"{name!r} is of Python's standard library" in capsys.readouterr().err
    assert "antigravity" not in sys.modules


def name_code(run: Path, name: str) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["reward"]["kind"] = name
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_code_in_a_run_folder_is_not_imported_wherever_python_looks(run, mark, monkeypatch, capsys):
    (run / "theirs.py").write_text(source(mark))
    (run / "package").mkdir()
    (run / "package" / "__init__.py").write_text(source(mark))
    monkeypatch.syspath_prepend(str(run))  # as `python -m attention_guided_rl` does in that folder
    for name in ("theirs:reward", "package:reward", "package.inner:reward"):
        name_code(run, name)
        for command in (["rollout", str(run)], ["evaluate", str(run)]):
            assert main(command) == 13
            assert "would be imported from the run folder" in capsys.readouterr().err
    assert not mark.exists()


def test_code_of_ours_that_a_run_asks_for_is_named_before_it_runs(run, tmp_path, monkeypatch, caplog):
    (tmp_path / "reward_of_ours.py").write_text("def reward(inputs):\n    raise SystemExit(99)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    name_code(run, "reward_of_ours:reward")
    with pytest.raises(SystemExit, match="99"):
        main(["rollout", str(run)])
    assert (
        f"{run} asks for code of yours: reward.kind reward_of_ours:reward, from {tmp_path / 'reward_of_ours.py'}"
        in caplog.text
    )


# -- chat templates ----------------------------------------------------------------------------------------------------

ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "attr": "{{ (lipsum|attr('__globals__'))['os'].popen('touch MARK').read() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "function": "{{ raise_exception.__globals__['os'].system('touch MARK') }}",
    "self": "{{ self.__init__.__globals__ }}",
    "import": "{% import '/etc/passwd' as x %}{{ x }}",
    "include": "{% include '/etc/passwd' %}",
    "namespace": "{% set n = namespace(__class__=1) %}{{ n.__class__ }}",
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "memory": "{{ 'a' * 10 ** 11 }}",
    "output": "{{ 'a' * 10 ** 7 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "syntax": "{% for %}",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_no_chat_template_leaves_its_box_or_takes_more_than_it_is_given(byte_tokenizer, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(confined, "MAX_SECONDS", 0.5)
    with pytest.raises(ConfigError, match=r"template\.kind: the chat template fails"):
        build_template(byte_tokenizer((), ESCAPES[name]), TemplateConfig(kind="chat"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_confined_answers_or_says_why_not():
    assert confined.confined(lambda: "ünï\ud800") == "ünï?"
    with pytest.raises(ValueError, match="ends without an answer"):
        confined.confined(lambda: sys.exit(3))
    with pytest.raises(ValueError, match="KeyError: 'x'"):
        confined.confined(lambda: {}["x"])


# -- corpora and orders ------------------------------------------------------------------------------------------------


def test_no_file_of_a_corpus_runs_code(tmp_path, mark, payload):
    script, card, arrays = (tmp_path / name for name in ("scripted", "carded", "arrays"))
    for folder in (script, card, arrays):
        folder.mkdir()
    (script / "scripted.py").write_text(source(mark))
    (card / "README.md").write_text(f"---\nlicense: {tag(mark)}\n---\n")
    (card / "data.jsonl").write_text('{"text": "a b c"}\n')
    numpy_file(arrays, mark)
    pickled = tmp_path / "articles.jsonl"
    pickled.write_bytes(payload)
    corpora = {
        CorpusConfig(kind="files", path=arrays): 3,
        CorpusConfig(kind="files", path=pickled): 3,
        CorpusConfig(kind="dump", path=pickled): 3,
        CorpusConfig(kind="hub", name=str(script)): 13,
        CorpusConfig(kind="hub", name=str(card)): 3,
    }
    network = Network(NetworkConfig(cache=tmp_path / "cache", offline=True))
    for config, code in corpora.items():
        with pytest.raises(AgrlError) as found:
            list(open_corpus(config, network).articles(0, 0))
        assert found.value.exit_code == code
        assert not mark.exists()


def test_no_file_of_orders_runs_code(run, tmp_path, mark, payload, capsys):
    orders = tmp_path / "orders.pkl"
    orders.write_bytes(payload)
    assert main(["evaluate", str(run), "--arms", f"file:{orders}"]) == 3
    assert "Traceback" not in capsys.readouterr().err
    assert not mark.exists()


# -- the source --------------------------------------------------------------------------------------------------------

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {  # of whatever it is called on
    *("torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "os.system", "os.popen"),
    *("numpy.load", "np.load", "pd.read_pickle", "pandas.read_pickle", "connection.recv", "receiver.recv"),
}


def unsafe(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").partition(".")[0] in MODULES else []
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in CALLS | METHODS or name.endswith(".import_module") else []
            found += [
                f"{name}({k.arg}={ast.unparse(k.value)})"
                for k in node.keywords
                if (k.arg in ("trust_remote_code", "allow_pickle", "shell") and ast.unparse(k.value) != "False")
                or (
                    k.arg in ("weights_only", "use_safetensors", "safe_serialization")
                    and ast.unparse(k.value) != "True"
                )
            ]
    return found


def test_the_source_has_no_path_to_a_pickle_or_to_code_in_data():
    found = {str(path.relative_to(SOURCE)): unsafe(ast.parse(path.read_text())) for path in SOURCE.rglob("*.py")}
    assert len(found) > 60
    by_name = ["importlib.import_module"]  # of modules of ours, and of `package.module:name`
    assert {name: what for name, what in found.items() if what} == {"__init__.py": by_name, "tables.py": by_name}
    assert not [path for path in BUNDLED_MODEL.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".npy", ".py")]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from marshal import loads", "import joblib.numpy_pickle", "torch.load(f)", "yaml.load(f, X)",
        "eval(x)", "f(trust_remote_code=True)", "f(trust_remote_code=allowed)", "np.load(f, allow_pickle=True)",
        "subprocess.run(x, shell=True)", "torch.load(f, weights_only=False)", "importlib.import_module(x)",
    ],
)  # fmt: skip
def test_what_the_search_of_the_source_would_find(line):
    assert unsafe(ast.parse(line))
