"""Compare: runs against runs, on evaluations typed by hand."""

import json
import re
from pathlib import Path

import pytest
import yaml

from attention_guided_rl.cli import main
from attention_guided_rl.compare import RunEvaluation, compare_runs, read_evaluation, split_groups, summarise_seeds
from attention_guided_rl.errors import ConfigError


def run(
    name: str, trained: list[float], *, seed: int = 0, pool: str = "p", reward_kind: str = "value_prior",
    update: int = 60, scoring: str = "s", arms: tuple[str, ...] = ("trained", "untrained"), **settings: object,
):  # fmt: skip
    """A run with one trained trajectory per article a, b, c …, and an untrained arm that is the same for all."""
    records = tuple(
        {
            "arm": arm, "article": "abcdefgh"[i], "pool": f"{pool}{i}", "index": i, "seed": seed, "reward": reward,
            "update": update, "scoring": scoring, "reward_kind": reward_kind, "subjects": None, "probe_curve": None,
        }
        for arm in arms
        for i, reward in enumerate(trained if arm == "trained" else [0.5] * len(trained))
    )  # fmt: skip
    named = {key.replace("__", "."): value for key, value in settings.items()}
    return RunEvaluation(name, records, held_out=True, settings={"training.seed": seed, **named})


def test_runs_are_paired_by_article():
    result = compare_runs([run("a", [2.0, 5.0])], [run("b", [1.0, 2.0])])  # 1, 3
    contrast = result["contrasts"]["trained"]
    assert {k: contrast[k] for k in ("mean", "low", "high", "p")} == {"mean": 2.0, "low": 1.0, "high": 3.0, "p": 0.5}
    assert contrast["smallest_detectable"] == pytest.approx(2.8)  # SD √2, SE 1
    assert result["identical"] == ["untrained"]
    assert (result["articles"], result["seeds"]) == (2, 1)


def test_seeds_of_a_group_are_averaged_within_an_article():
    ours = [run("a0", [2.0, 5.0]), run("a1", [4.0, 5.0], seed=1)]  # 3, 5
    theirs = [run("b0", [1.0, 2.0]), run("b1", [3.0, 2.0], seed=1)]  # 2, 2
    contrast = compare_runs(ours, theirs)["contrasts"]["trained"]
    assert (contrast["mean"], contrast["low"], contrast["high"]) == (2.0, 1.0, 3.0)
    summary = summarise_seeds(ours)
    assert summary["seeds"] == [0, 1]
    assert summary["arms"]["trained"] == {"mean": 4.0, "low": 3.0, "high": 5.0}


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (run("b", [1.0]), "not evaluated on the same articles and pools"),
        (run("b", [1.0, 2.0], pool="q"), "not evaluated on the same articles and pools"),
        (run("b", [1.0, 2.0], reward_kind="plain"), "differ in the reward of their evaluations: value_prior and plain"),
    ],
)
def test_what_cannot_be_compared_is_refused(other, complaint):
    with pytest.raises(ConfigError, match=complaint):
        compare_runs([run("a", [1.0, 2.0])], [other])


def test_rewards_that_mean_different_things_are_not_subtracted():
    ours, other = run("a", [1.0, 2.0], pairs__value_tokens=10), {"pairs__value_tokens": 12, "scoring": "t"}
    with pytest.raises(ConfigError, match=r"a and b were scored in different ways.*pairs\.value_tokens is 10 and 12"):
        compare_runs([ours], [run("b", [1.0, 2.0], **other)])
    with pytest.raises(ConfigError, match=r"same evaluation\.\* settings"):
        compare_runs([ours], [run("b", [1.0, 2.0], scoring="t", pairs__value_tokens=10)])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"optimizer__learning_rate": 0.01},
            "a and b are not seeds of one setting: optimizer.learning_rate is None and",
        ),
        ({"training__updates": 90}, "training.updates is None and 90"),
        ({"update": 40}, "evaluated at update 60 and 40"),
        ({"seed": 0}, "a and b both have training.seed 0"),
        ({"scoring": "t"}, "a and b were scored in different ways"),
        ({"arms": ("trained",)}, "b lacks the arm untrained, which a has"),
        ({"arms": ("trained", "untrained", "random")}, "a lacks the arm random, which b has"),
    ],
)
def test_a_group_is_the_seeds_of_one_setting(change, complaint):
    group = [run("a", [1.0, 2.0]), run("b", [1.0, 2.0], **{"seed": 1, **change})]
    for refused in (lambda: summarise_seeds(group), lambda: compare_runs(group, [run("c", [0.0, 0.0])])):
        with pytest.raises(ConfigError, match=re.escape(complaint)):
            refused()


def test_what_changes_no_training_may_differ_among_seeds_and_anything_between_groups():
    free = {"evaluation.articles": 9, "log.tensorboard": True, "network.offline": True, "training.device": "cpu",
            "training.checkpoint_every": 7, "embedder.max_usd": 1.0}  # fmt: skip
    group = [run("a", [1.0, 2.0]), run("b", [1.0, 2.0], seed=1, **{k.replace(".", "__"): v for k, v in free.items()})]
    assert summarise_seeds(group)["seeds"] == [0, 1]
    other = [run("c", [0.0, 0.0], update=9, optimizer__learning_rate=1.0)]
    assert compare_runs(group[:1], other)["contrasts"]["trained"]["mean"] == 1.5


def test_other_seeds_draw_other_numbers_which_is_said():
    with pytest.warns(UserWarning, match="training seeds 0 minus 1: .* luck of the draw"):
        compare_runs([run("a", [1.0, 2.0])], [run("b", [1.0, 2.0], seed=1)])


def test_groups_are_two_runs_or_what_stands_on_both_sides_of_vs():
    assert split_groups(["a", "b"]) == ([Path("a")], [Path("b")])
    assert split_groups(["a", "b", "vs", "c"]) == ([Path("a"), Path("b")], [Path("c")])


@pytest.mark.parametrize("words", ["a", "a b c", "vs a", "a vs", "a vs b vs c", "a vs a", "a ./a"])
def test_other_groups_are_refused(words):
    with pytest.raises(ConfigError, match="compare"):
        split_groups(words.split())


def write(folder: Path, evaluation: RunEvaluation) -> Path:
    folder.mkdir()
    lines = "".join(json.dumps(r) + "\n" for r in evaluation.records)
    (folder / "evaluation.jsonl").write_text(lines, encoding="utf-8")
    (folder / "evaluation.json").write_text(json.dumps({"held_out": True}), encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump({"training": {"seed": evaluation.settings["training.seed"]}}))
    return folder


def shown(capsys, *words: object) -> tuple[int, str]:
    code = main(["compare", *map(str, words)])
    output = capsys.readouterr()
    return code, " ".join((output.out + output.err).split())


def test_no_verdict_where_the_interval_holds_zero_but_what_could_have_been_seen(tmp_path, capsys):
    a = write(tmp_path / "a", run("a", [2.0, 5.0, 1.0]))
    b = write(tmp_path / "b", run("b", [1.0, 7.0, 1.0]))  # 1, −2, 0: SD 1.53, SE 0.88
    code, text = shown(capsys, a, b)
    assert code == 0
    assert "trained: no difference shown; at least 2.469 nats could have been seen with these 3 articles" in text
    assert "one seed, so this speaks of this adapter only" in text


def test_three_seeds_speak_of_the_method(tmp_path, capsys):
    def group(letter: str, level: float) -> list[Path]:
        return [write(tmp_path / f"{letter}{s}", run("x", [level + i / 8 for i in range(8)], seed=s)) for s in range(3)]

    code, text = shown(capsys, *group("a", 3.0), "vs", *group("b", 1.0))  # 8 equal differences: p = 2/256
    assert code == 0
    assert "trained: better by 2.000 nats per value token (3 seeds, so this speaks of the method)" in text
    assert "trained by seed: +2.000, +2.000, +2.000 (SD 0.000)" in text


def test_the_spread_of_seeds_stands_beside_an_interval_that_leaves_it_out(tmp_path, capsys):
    levels = {0: 1.0, 1: 3.0, 2: 5.0}
    ours = [write(tmp_path / f"a{s}", run("x", [v + i / 8 for i in range(8)], seed=s)) for s, v in levels.items()]
    theirs = [write(tmp_path / f"b{s}", run("x", [1.0 + i / 8 for i in range(8)], seed=s)) for s in levels]
    _, text = shown(capsys, *ours, "vs", *theirs)
    assert "trained by seed: +0.000, +2.000, +4.000 (SD 2.000); the intervals above leave this spread out" in text
    _, text = shown(capsys, ours[0], "vs", theirs[0])
    assert "by seed" not in text


def test_a_run_without_an_evaluation_is_named(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    with pytest.raises(ConfigError, match="has no evaluation"):
        read_evaluation(tmp_path / "a")
    code, text = shown(capsys, tmp_path / "a", tmp_path / "b")
    assert (code, "agrl evaluate" in text) == (2, True)
    with pytest.raises(ConfigError, match="b is not a run folder"):
        read_evaluation(tmp_path / "b")
