"""Configuration: what wins over what, and what is refused with the field's name."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from attention_guided_rl.config import (
    Config,
    CorpusConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
)
from attention_guided_rl.config_files import PRESETS, config_to_yaml, dotted_fields, load_config
from attention_guided_rl.errors import ConfigError


def write(path: Path, **sections: object) -> Path:
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


# -- precedence --------------------------------------------------------------------------------------------------------


def test_later_sources_win_field_by_field(tmp_path):
    """Of five fields, each source sets one fewer than the source before it."""
    preset = yaml.safe_load((PRESETS / "demo.yaml").read_text(encoding="utf-8"))
    first = write(tmp_path / "first.yaml", training={"updates": 11, "seed": 12, "checkpoint_every": 13})
    second = write(tmp_path / "second.yaml", training={"seed": 22, "checkpoint_every": 23})
    config = load_config("demo", [first, second], {"training.checkpoint_every": 33})

    assert config.training.micro_batch_rows is None  # default
    assert config.optimizer.learning_rate == preset["optimizer"]["learning_rate"] != OptimizerConfig().learning_rate
    assert (config.training.updates, config.training.seed, config.training.checkpoint_every) == (11, 22, 33)


def test_a_file_without_a_preset_builds_on_the_defaults(tmp_path):
    path = write(tmp_path / "a.yaml", pairs={"num_pairs": 12})
    assert load_config(files=[path]) == replace(Config(), pairs=replace(Config().pairs, num_pairs=12))


def test_with_nothing_given_the_preset_is_demo():
    assert load_config() == load_config("demo")


def test_every_preset_loads():
    presets = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    assert "demo" in presets
    for name in presets:
        own = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8")).get("corpus", {})
        left_to_the_user = {"text": {"corpus.path": "texts"}, "original": {"corpus.title": "Elm"}}.get(name, {})
        assert not own.keys() & {key.partition(".")[2] for key in left_to_the_user}
        config = load_config(name, overrides=left_to_the_user)
        assert config != Config()


def test_demo_is_evaluated_on_articles_of_another_seed():
    config = load_config("demo")
    assert config.evaluation.corpus is not None
    assert config.evaluation.corpus.seed != config.corpus.seed
    assert replace(config.evaluation.corpus, seed=config.corpus.seed) == config.corpus


def test_a_later_source_can_take_an_optional_section_away_and_give_it_back(tmp_path):
    gone = write(tmp_path / "gone.yaml", evaluation={"corpus": None})
    back = write(tmp_path / "back.yaml", evaluation={"corpus": {"seed": 9}})
    assert load_config("demo", [gone]).evaluation.corpus is None
    assert load_config("demo", [gone, back]).evaluation.corpus == CorpusConfig(seed=9)


def test_an_optional_section_is_merged_and_not_replaced(tmp_path):
    demo = load_config("demo").evaluation.corpus
    changed = load_config("demo", overrides={"evaluation.corpus.seed": 9}).evaluation.corpus
    assert demo is not None
    assert changed == replace(demo, seed=9)


# -- types -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [("3e-5", 3e-5), ("3.0e-5", 3e-5), ("1", 1.0), (".5", 0.5)])
def test_a_number_in_yaml_is_a_float_however_it_is_written(tmp_path, text, value):
    path = tmp_path / "a.yaml"
    path.write_text(f"optimizer: {{learning_rate: {text}}}", encoding="utf-8")
    rate = load_config(files=[path]).optimizer.learning_rate
    assert isinstance(rate, float)
    assert rate == value


def test_paths_become_paths(tmp_path):
    path = write(tmp_path / "a.yaml", corpus={"kind": "files", "path": "texts/a.txt"})
    assert load_config(files=[path]).corpus.path == Path("texts/a.txt")


def test_an_empty_file_changes_nothing(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("# nothing yet\n", encoding="utf-8")
    assert load_config(files=[path]) == Config()


WRONG_TYPES = {
    "training.updates": "ten",
    "training.seed": 1.5,
    "training.micro_batch_rows": [1],
    "log.tensorboard": "perhaps",
    "optimizer.learning_rate": "fast",
    "model.name": ["tiny"],
    "model.dtype": "float64",
    "model.adapter": "prefix",
    "template.kind": "jinja",
    "corpus.variant": "thread",
    "pairs.cut": "words",
    "rollout.steps": "all",
    "selection.heads": "max",
    "reward.scorer": "critic",
    "objective.kl.estimator": "k4",
    "objective.returns": "togo",
    "objective.advantage_baseline": "critic",
    "objective.filter.kind": "zscore",
    "training.device": "tpu",
    "evaluation.oracle": 7,
}


@pytest.mark.parametrize("key", WRONG_TYPES)
def test_a_value_of_the_wrong_kind_is_refused_with_source_key_and_value(tmp_path, key):
    section, _, field = key.rpartition(".")
    nested: dict[str, object] = {field: WRONG_TYPES[key]}
    for name in reversed(section.split(".")):
        nested = {name: nested}
    path = write(tmp_path / "wrong.yaml", **nested)
    with pytest.raises(ConfigError) as error:
        load_config(files=[path])
    assert f"{path}: {key}: " in str(error.value)
    assert repr(WRONG_TYPES[key]) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_value_is_blamed_on_the_source_that_gave_it(tmp_path):
    path = write(tmp_path / "a.yaml", training={"updates": 3})
    with pytest.raises(ConfigError, match=r"^command line: training\.updates: "):
        load_config(files=[path], overrides={"training.updates": "ten"})


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "key", "nearest"),
    [
        ({"optimizer": {"lerning_rate": 1}}, "optimizer.lerning_rate", "optimizer.learning_rate"),
        ({"optimiser": {"learning_rate": 1}}, "optimiser", "optimizer"),
        ({"objective": {"kl": {"coefficent": 1}}}, "objective.kl.coefficent", "objective.kl.coefficient"),
        ({"evaluation": {"corpus": {"sed": 1}}}, "evaluation.corpus.sed", "evaluation.corpus.seed"),
    ],
)
def test_an_unknown_key_names_file_key_and_nearest(tmp_path, sections, key, nearest):
    path = write(tmp_path / "mine.yaml", **sections)
    with pytest.raises(ConfigError) as error:
        load_config("demo", [path])
    assert str(path) in str(error.value)
    assert f"'{key}'" in str(error.value)
    assert f"'{nearest}'" in str(error.value)


def test_an_unknown_key_of_the_command_line_says_so():
    with pytest.raises(ConfigError, match=r"command line.*'rollout\.step'.*'rollout\.steps'"):
        load_config(overrides={"rollout.step": 3})


def test_an_unknown_preset_lists_the_presets():
    with pytest.raises(ConfigError, match=r"'dmo'.*demo"):
        load_config("dmo")


def test_a_section_that_is_given_a_value_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"a\.yaml.*'training' is a section"):
        load_config(files=[write(tmp_path / "a.yaml", training=3)])


def test_a_key_cannot_be_both_section_and_value_on_the_command_line():
    with pytest.raises(ConfigError, match=r"training"):
        load_config(overrides={"training": 3, "training.updates": 4})


@pytest.mark.parametrize("content", [b"training: {updates: 3", b"- a\n- b", b"\xff\xfe\x00", b"a: \x00", b"\tx: 1"])
def test_a_file_that_is_not_a_yaml_mapping_is_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config(files=[path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_broken_yaml_names_the_line(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("training:\n  updates: 3\n  seed: [1\nlog: {}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.yaml: line 4"):
        load_config(files=[path])


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(files=[tmp_path / "absent.yaml"])


# -- what is out of range or contradicts itself ------------------------------------------------------------------------

INFINITE, NAN = float("inf"), float("nan")
REFUSED: list[tuple[str, dict[str, object]]] = [
    ("model.lora_rank", {"model.lora_rank": 0}),
    ("model.lora_dropout", {"model.lora_dropout": 1.0}),
    ("model.lora_dropout", {"model.lora_dropout": -0.1}),
    ("model.lora_alpha", {"model.lora_alpha": NAN}),
    ("model.lora_alpha", {"model.lora_alpha": INFINITE}),
    ("model.adapter", {"model.adapter": "full", "model.dtype": "bfloat16"}),
    ("corpus.subjects", {"corpus.subjects": 0}),
    ("corpus.pairs_per_subject", {"corpus.pairs_per_subject": 0}),
    ("corpus.pairs_per_subject", {"corpus.pairs_per_subject": 9}),
    ("corpus.seed", {"corpus.seed": -1}),
    ("corpus.path", {"corpus.kind": "files"}),
    ("corpus.path", {"corpus.kind": "dump"}),
    ("corpus.path", {"corpus.path": "texts"}),
    ("corpus.title", {"corpus.title": "Tides"}),
    ("pairs.num_pairs", {"pairs.num_pairs": 0}),
    ("pairs.key_tokens", {"pairs.key_tokens": 0}),
    ("pairs.value_tokens", {"pairs.value_tokens": -3}),
    ("rollout.articles", {"rollout.articles": 0}),
    ("rollout.trajectories", {"rollout.trajectories": 0}),
    ("rollout.query_tokens", {"rollout.query_tokens": 0}),
    ("rollout.steps", {"rollout.steps": 0}),
    ("rollout.steps", {"rollout.steps": 25, "pairs.num_pairs": 24}),
    ("rollout.context_tokens", {"rollout.context_tokens": 0}),
    ("rollout.context_tokens", {"rollout.context_tokens": -5}),
    ("rollout.temperature", {"rollout.temperature": 0.0}),
    ("rollout.temperature", {"rollout.temperature": INFINITE}),
    ("rollout.temperature", {"rollout.temperature": NAN}),
    ("embedder.dimensions", {"embedder.dimensions": 0}),
    ("selection.target_entropy", {"selection.target_entropy": 0.0}),
    ("selection.target_entropy", {"selection.target_entropy": 1.0}),
    ("selection.temperature", {"selection.temperature": 0.0}),
    ("selection.temperature", {"selection.temperature": INFINITE}),
    ("selection.temperature", {"selection.temperature": NAN}),
    ("selection.calibration_queries", {"selection.calibration_queries": 0}),
    ("objective.kl.coefficient", {"objective.kl.coefficient": -0.01}),
    ("objective.kl.coefficient", {"objective.kl.coefficient": INFINITE}),
    ("objective.filter.warmup", {"objective.filter.warmup": 1}),
    ("objective.filter.min_zscore", {"objective.filter.min_zscore": NAN}),
    ("objective.advantage_baseline", {"rollout.trajectories": 1}),
    ("optimizer.learning_rate", {"optimizer.learning_rate": -1e-4}),
    ("optimizer.learning_rate", {"optimizer.learning_rate": NAN}),
    ("optimizer.learning_rate", {"optimizer.learning_rate": INFINITE}),
    ("optimizer.beta1", {"optimizer.beta1": 1.0}),
    ("optimizer.beta2", {"optimizer.beta2": -0.1}),
    ("optimizer.weight_decay", {"optimizer.weight_decay": -1.0}),
    ("optimizer.weight_decay", {"optimizer.weight_decay": INFINITE}),
    ("optimizer.max_grad_norm", {"optimizer.max_grad_norm": 0.0}),
    ("optimizer.warmup_updates", {"optimizer.warmup_updates": -1}),
    ("training.updates", {"training.updates": -1}),
    ("training.seed", {"training.seed": -1}),
    ("training.seed", {"training.seed": 2**64}),
    ("training.micro_batch_rows", {"training.micro_batch_rows": 0}),
    ("training.checkpoint_every", {"training.checkpoint_every": 0}),
    ("training.shuffled_rewards", {"training.shuffled_rewards": True, "rollout.trajectories": 1,
                                   "objective.advantage_baseline": "none"}),
    ("training.shuffled_rewards", {"training.shuffled_rewards": True, "reward.scorer": "policy",
                                   "reward.gradient_weight": 0.5}),
    ("evaluation.reward", {"evaluation.reward": "counterfactual", "reward.query_in_context": False}),
    ("reward.pick", {"reward.pick": "expected", "embedder.kind": "attention", "embedder.trained": True}),
    ("log.trajectories_every", {"log.trajectories_every": -1}),
    ("evaluation.articles", {"evaluation.articles": -1}),
    ("evaluation.num_probes", {"evaluation.num_probes": -1}),
    ("evaluation.batch_articles", {"evaluation.batch_articles": 0}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "overrides"), REFUSED, ids=lambda x: x if isinstance(x, str) else str(list(x.values()))
)
def test_a_setting_out_of_range_is_refused_by_name(field, overrides):
    with pytest.raises(ConfigError) as error:
        load_config("demo", overrides=overrides)
    assert field in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        ({}, False),
        ({"corpus.seed": 5}, True),
        ({"corpus.seed": 5, "evaluation.corpus.seed": 5}, False),
        ({"corpus.seed": 5, "corpus.shuffle": False, "evaluation.corpus.shuffle": False}, False),
        ({"evaluation.corpus.shuffle": False}, True),
        ({"corpus.seed": 5, "evaluation.corpus.name": "another/one"}, False),
        ({"corpus.seed": 5, "evaluation.corpus.split": "train"}, False),
    ],
    ids=str,
)
def test_two_splits_of_one_stream_are_read_in_one_order(overrides, refused):
    """In another order the other of two near-duplicates would stay: one trained on, one held out."""
    if not refused:
        load_config("wikipedia", overrides=overrides)
        return
    with pytest.raises(ConfigError, match=r"evaluation\.corpus\.shuffle and seed must be those of corpus"):
        load_config("wikipedia", overrides=overrides)


def test_all_settings_out_of_range_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        load_config(overrides={"rollout.articles": 0, "pairs.num_pairs": 0})
    assert "rollout.articles" in str(error.value)
    assert "pairs.num_pairs" in str(error.value)


def test_the_dataclasses_refuse_the_same_from_python():
    with pytest.raises(ValueError, match=r"rollout\.temperature"):
        RolloutConfig(temperature=0.0)
    with pytest.raises(ValueError, match=r"model\.adapter"):
        ModelConfig(adapter="full", dtype="bfloat16")


# -- writing -----------------------------------------------------------------------------------------------------------

UNUSUAL: dict[str, object] = {
    "model.name": "some/model",
    "model.revision": "0123",  # a number to a careless reader of YAML
    "template.prompt": 'Ask: "what?" # no comment\n\n – ünïcode\t',
    "template.query_prefix": "\n",
    "template.value_prefix": " |",
    "template.date_string": "2026-01-01",
    "corpus.kind": "files",
    "corpus.path": "a folder/tides: no.txt",
    "corpus.title": "null",
    "rollout.steps": "auto",
    "optimizer.learning_rate": 3e-5,
    "selection.temperature": 1e-300,
    "evaluation.corpus.kind": "encyclopedia",
    "evaluation.corpus.path": None,
    "evaluation.corpus.title": None,
    "evaluation.corpus.variant": "chain",
}


@pytest.mark.parametrize("overrides", [{}, UNUSUAL, {"evaluation.corpus": None}], ids=["demo", "unusual", "no corpus"])
def test_what_is_written_reads_back_equal(tmp_path, overrides):
    config = load_config("demo", overrides=overrides)
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config), encoding="utf-8")
    assert load_config(files=[path]) == config


def test_every_field_is_written_under_its_name():
    written = yaml.safe_load(config_to_yaml(Config(evaluation=EvaluationConfig(corpus=CorpusConfig()))))
    names = list(dotted_fields())
    assert len(names) == len(set(names)) > 50
    for name in names:
        place = written
        for part in name.split("."):
            assert part in place, name
            place = place[part]


def test_a_configuration_cannot_be_changed_after_it_was_checked():
    with pytest.raises(AttributeError):
        Config().training.updates = 3  # type: ignore[misc]


@pytest.mark.parametrize("field", ["embedder.base_url", "corpus.site"])
@pytest.mark.parametrize(
    "address",
    [
        *("https://a.example/v1?api-key=hunter2", "https://a.example/v1#hunter2", "a.example?a@hunter2"),
        *("https://me:hunter2@a.example/v1", "me:hunter2@a.example"),
    ],
)
def test_an_address_that_may_hold_a_key_never_becomes_part_of_a_configuration(field, address):
    """Which is printed, and stored with a run."""
    with pytest.raises(ConfigError, match=field) as caught:
        load_config(overrides={field: address, "corpus.kind": "files", "corpus.path": "a"})
    assert "hunter2" not in str(caught.value)
