"""The sentence-transformers embedder over a tiny model made here, in this process and behind a service."""

import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_embeddings import ModelServer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from attention_guided_rl import runs
from attention_guided_rl.cli import main
from attention_guided_rl.config import EmbedderConfig, NetworkConfig
from attention_guided_rl.embedders.openai import OpenAIEmbedder
from attention_guided_rl.embedders.sentence_transformers import (
    SentenceTransformersEmbedder,
    SentenceTransformersEncoder,
)
from attention_guided_rl.errors import AgrlError, CheckpointError, ConfigError, UnsafeError
from attention_guided_rl.model import LanguageModel
from attention_guided_rl.network import Network

library = pytest.importorskip("sentence_transformers")

WIDTH = 32
TEXTS = ["the red mill", "A boat on the river, at dusk", "seven silver seals", "x" * 40]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A BERT of width 32 that reads letters, its mean over the positions, and prompts."""
    folder = tmp_path_factory.mktemp("sentence-transformers")
    alphabet = [chr(i) for i in range(32, 127)]
    tokenizer = Tokenizer(
        models.WordLevel({c: i for i, c in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *alphabet])}, "[UNK]")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)
    fast.save_pretrained(folder / "bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(fast), max_position_embeddings=512, initializer_range=0.3, **sizes)
    BertModel(config).save_pretrained(folder / "bert")

    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    layers = [Transformer(str(folder / "bert"), max_seq_length=512), Pooling(WIDTH)]
    prompts = {"query": "find: ", "document": "text: "}
    library.SentenceTransformer(modules=layers, prompts=prompts, device="cpu").save(str(folder / "tiny"))
    return folder / "tiny"


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "tiny"))


@pytest.fixture
def network(tmp_path) -> Network:
    return Network(NetworkConfig(cache=tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(make_model, byte_tokenizer) -> LanguageModel:
    return make_model("llama", tokenizer=byte_tokenizer(), vocab_size=272)


def settings(folder: Path, **options) -> EmbedderConfig:
    return EmbedderConfig(kind="sentence_transformers", model=str(folder), device="cpu", **options)


def load(folder: Path, **options) -> SentenceTransformersEncoder:
    return SentenceTransformersEncoder(settings(folder, **options), offline=True)


def tokens(model: LanguageModel, *texts: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = [model.encode(text) for text in texts]
    length = max(map(len, ids))
    mask = [[i < len(row) for i in range(length)] for row in ids]
    return torch.tensor([row + [0] * (length - len(row)) for row in ids]), torch.tensor(mask)


def by_hand(folder: Path, text: str) -> np.ndarray:
    """The mean of the last hidden states over all positions, of unit length, without the library."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    with torch.no_grad():
        states = BertModel.from_pretrained(folder)(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0]
    mean = states.mean(0).numpy()
    return mean / np.linalg.norm(mean)


def test_vectors_are_the_model_s_of_unit_length(original):
    vectors = load(original).encode(TEXTS)
    assert vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert vector.tolist() == pytest.approx(by_hand(original, text).tolist(), abs=1e-5)


def test_the_first_dimensions_have_unit_length_too(original):
    vectors, whole = load(original, dimensions=5).encode(TEXTS), load(original).encode(TEXTS)
    assert vectors.shape == (4, 5)
    cut = whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True)
    assert vectors.tolist() == [pytest.approx(row, abs=1e-5) for row in cut.tolist()]


def test_more_dimensions_than_the_model_has_are_refused(original):
    with pytest.raises(ConfigError, match=r"embedder\.dimensions.*32"):
        load(original, dimensions=64)


def test_prompts_are_the_model_s_own_unless_given(original):
    own, given = load(original), load(original, query_prompt="", key_prompt="passage: ")
    assert (own.query_prompt, own.key_prompt) == ("find: ", "text: ")
    assert (given.query_prompt, given.key_prompt) == ("", "passage: ")


def test_queries_and_keys_carry_their_prompts_once(original, network, model):
    embedder = SentenceTransformersEmbedder(settings(original), network, model)
    ids, mask = tokens(model, "the red mill", " ")
    queries, keys = embedder.embed_queries(ids, mask)[:, 0], embedder.embed_keys(ids, mask)[:, 0]
    assert queries[0].tolist() == pytest.approx(by_hand(original, "find: the red mill").tolist(), abs=1e-5)
    assert keys[0].tolist() == pytest.approx(by_hand(original, "text: the red mill").tolist(), abs=1e-5)
    assert not queries[1].any()


def test_control_tokens_in_a_text_are_read_as_text(original):
    """The tokenizer above has [CLS] and [SEP] at 2 and 3, and letters, which it makes small, from 4 on."""
    encoder = SentenceTransformersEncoder(settings(original), offline=True)
    ids = encoder._model.preprocess(["a[SEP]b[PAD][CLS]"])["input_ids"][0].tolist()
    letters = [4 + ord(letter) - 32 for letter in "a[sep]b[pad][cls]"]
    assert ids == [2, *letters, 3]
    assert not np.allclose(encoder.encode(["a[SEP]b"]), encoder.encode(["a[CLS]b"]))


def test_texts_are_divided_by_the_batch_size(original):
    texts = [str(i) for i in range(150)]
    assert list(map(len, load(original).batches(texts))) == [64, 64, 22]
    assert list(load(original, batch_texts=100).batches(texts)) == [texts[:100], texts[100:]]


def test_encoders_are_told_apart(original, folder):
    """Where a folder lies is not part of its name: a moved model keeps its vectors."""
    names = {load(original).identity, load(original, dimensions=5).identity, load(original, dimensions=6).identity}
    assert len(names) == 3
    assert load(folder).identity == load(original).identity
    assert load(folder.rename(folder.with_name("other"))).identity not in names


def test_a_second_start_encodes_nothing_but_the_canaries(folder, network, model, monkeypatch):
    first = SentenceTransformersEmbedder(settings(folder), network, model).embed_keys(*tokens(model, *TEXTS))
    second = SentenceTransformersEmbedder(settings(folder), network, model)
    monkeypatch.setattr(library.SentenceTransformer, "encode", None)  # a call would end in a TypeError
    assert torch.equal(second.embed_keys(*tokens(model, *TEXTS)), first)
    with pytest.raises(TypeError):
        second.embed_keys(*tokens(model, "something new"))


def change(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"].fill_(value)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_texts_that_are_cut_are_counted_and_said_once(original):
    """500 letters and two marks: 512 tokens; the model's prompt is part of the text by then."""
    encoder = load(original)
    with pytest.warns(UserWarning, match="2 texts are longer than 512 tokens"):
        vectors = encoder.encode(["x" * 510, "x" * 511, "é" * 300, "y" * 600])  # 300 é: 600 bytes, but 302 tokens
    assert not np.allclose(vectors[0], vectors[3])
    assert np.allclose(vectors[0], vectors[1])  # cut to the same
    encoder.encode(["x" * 700])  # another warning would be an error
    assert encoder._cut_texts.count == 3


def test_a_preflight_notices_what_the_embedder_would(folder, network, tmp_path):
    SentenceTransformersEmbedder.preflight(settings(folder), network)
    with pytest.raises(ConfigError, match=r"embedder\.model: cannot load"):
        SentenceTransformersEmbedder.preflight(settings(tmp_path / "missing"), network)
    change(folder, 0.1)
    with pytest.raises(CheckpointError, match="has changed"):
        SentenceTransformersEmbedder.preflight(settings(folder), network)


def test_a_bad_folder_is_noticed_before_the_language_model_loads(model_folder, tmp_path, capfd):
    """The language model has no weights, which would be said if it came first."""
    language_model = shutil.copytree(model_folder("llama"), tmp_path / "model")
    (language_model / "model.safetensors").unlink()
    options = ("--model.name", str(language_model), "--runs-folder", str(tmp_path), "--embedder.device", "cpu")
    wrong = ("--embedder.kind", "sentence_transformers", "--embedder.model", str(tmp_path / "encoder"))
    assert main(["train", "--preset", "demo", "--run", "a", *wrong, *options]) == 2
    assert "embedder.model" in capfd.readouterr().err
    assert main(["train", "--preset", "demo", "--run", "a", *options]) == 2
    assert "model.name" in capfd.readouterr().err


def test_other_weights_under_the_same_name_are_noticed(folder, network, model):
    SentenceTransformersEmbedder(settings(folder), network, model)
    change(folder, 0.1)
    with pytest.raises(CheckpointError, match="has changed") as caught:
        SentenceTransformersEmbedder(settings(folder), network, model)
    assert caught.value.exit_code == 7


def test_weights_that_are_not_finite_are_noticed_at_the_first_start(folder, network, model):
    change(folder, float("nan"))
    with pytest.raises(AgrlError, match="not finite"):
        SentenceTransformersEmbedder(settings(folder), network, model)


def test_a_missing_package_is_named_with_the_command_that_installs_it(original, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'attention-guided-rl\[sentence-transformers\]'") as caught:
        load(original)
    assert caught.value.exit_code == 2


def test_a_folder_without_a_model_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "modules.json").write_text("{", encoding="utf-8")
    for name in ("empty", "broken", "missing"):
        with pytest.raises(ConfigError, match=r"embedder\.model: cannot load") as caught:
            load(tmp_path / name)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(original):
    config = EmbedderConfig(kind="sentence_transformers", model=str(original), device="cuda")
    with pytest.raises(ConfigError, match=r"embedder\.device"):
        SentenceTransformersEncoder(config, offline=True)


# ---- code in a model's folder ----


@pytest.fixture
def code(folder):
    """A file in the folder that leaves a trace when it is run."""
    trace = folder / "was-run"
    source = f"open({str(trace)!r}, 'w').close()\nclass Evil:\n    load = classmethod(lambda cls, *a, **k: cls())\n"
    (folder / "evil.py").write_text(source, encoding="utf-8")
    yield
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["evil.Evil", "os.system", "sentence_transformers_evil.Evil"])
def test_a_model_that_names_a_foreign_class_is_refused(folder, code, kind):
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    modules[1]["type"] = kind
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    with pytest.raises(UnsafeError, match=kind) as caught:
        load(folder)
    assert caught.value.exit_code == 13


def test_a_model_whose_configuration_names_code_is_refused(folder, code):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UnsafeError) as caught:
        load(folder)
    assert caught.value.exit_code == 13


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="safetensors"):
        load(folder)


# ---- the same model behind a service ----


def test_a_service_around_the_model_gives_the_model_s_vectors(original, network, model):
    """64 texts in one request; the prompts are set here, as a service knows none."""
    local = library.SentenceTransformer(str(original), device="cpu", local_files_only=True)
    texts = [f"number {i} of the {'red mill' if i % 2 else 'old boat'}" for i in range(64)]
    with ModelServer(lambda texts: local.encode(texts, show_progress_bar=False)) as server:
        config = EmbedderConfig(kind="openai", base_url=server.url, model="tiny", key_prompt="text: ")
        OpenAIEmbedder.preflight(config, network)
        embedder = OpenAIEmbedder(config, network, model)
        vectors = embedder.embed_keys(*tokens(model, *texts))[:, 0].numpy()
    assert [len(request.texts) for request in server.requests] == [8, 64]
    expected = load(original).encode([f"text: {text}" for text in texts])
    assert np.abs(vectors - expected).max() < 1e-6
    here = SentenceTransformersEmbedder(settings(original), network, model)
    assert np.abs(vectors - here.embed_keys(*tokens(model, *texts))[:, 0].numpy()).max() < 1e-6


def test_a_run_reads_by_the_vectors_of_a_service_around_the_model(original, make_config, tmp_path):
    """All through HTTP; the picks' probabilities are those of the model's own vectors."""
    local = library.SentenceTransformer(str(original), device="cpu", local_files_only=True)
    with ModelServer(lambda texts: local.encode(texts, show_progress_bar=False)) as server:
        settings = {"kind": "openai", "base_url": server.url, "model": "tiny", "key_prompt": "text: "}
        options = {f"embedder.{name}": value for name, value in settings.items()}
        options |= {"network.cache": str(tmp_path / "cache"), "training.updates": 2, "selection.temperature": 0.005}
        runs.train(make_config(options), tmp_path / "run")
    pairs = {pair["pair"]: pair for pair in lines(tmp_path / "run" / "pairs.jsonl")}
    trajectories = lines(tmp_path / "run" / "trajectories.jsonl")
    asked = {text for request in server.requests for text in request.texts}
    assert len(trajectories) == 2 * 6
    assert {query for t in trajectories for query in t["queries"]} <= asked
    for t in trajectories:
        keys = local.encode([f"text: {pairs[pair]['key']}" for pair in t["pairs"]], show_progress_bar=False)
        first = local.encode(t["queries"][0], show_progress_bar=False)
        scores = (unit(keys) @ unit(first)) / 0.005  # τ
        expected = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
        assert t["selection_logprobs"][0] == pytest.approx(expected.tolist(), abs=5e-3)


def test_how_many_texts_were_cut_is_said_at_the_end(original, make_config, tmp_path, capfd):
    options = {"embedder.kind": "sentence_transformers", "embedder.model": str(original), "training.updates": 1}
    options |= {"embedder.key_prompt": "x" * 600, "network.cache": str(tmp_path / "cache")}
    with warnings.catch_warnings(record=True) as warned:  # and that keys cut to the same cannot be told apart
        warnings.simplefilter("always")
        runs.train(make_config(options), tmp_path / "run")
    assert any("longer than 512 tokens" in str(warning.message) for warning in warned)
    said = int(re.search(r"only the beginning was embedded: (\d+)", capfd.readouterr().out)[1])
    keys = {pair["key"] for pair in lines(tmp_path / "run" / "pairs.jsonl")}
    assert said >= len(keys)  # and those of the preparation


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
