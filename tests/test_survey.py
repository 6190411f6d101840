"""Survey: every count by hand on small files, what it promises about splits and overlap, and the command."""

import bz2
import itertools
import json
import re
import time
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from fake_mediawiki import FakeMediaWiki, Page

from attention_guided_rl.cli import main
from attention_guided_rl.config import CorpusConfig, NetworkConfig, PairsConfig
from attention_guided_rl.data.pairs import CutArticle, CutPair
from attention_guided_rl.errors import ConfigError, CorpusError
from attention_guided_rl.network import Network
from attention_guided_rl.records import Article
from attention_guided_rl.report.survey import facts, prospects
from attention_guided_rl.survey import require_usable, survey, survey_corpus
from attention_guided_rl.survey_counts import Need, Overlap, Spread, num_with_residue

WORDS = [a + b for a in "bdfgklmn" for b in "aeiouy"]  # each one token of the word tokenizer
SHARED = Path(__file__).parents[2] / "shared"


def words(count: int, step: int) -> str:
    """Words in an order of their own: a prime below 48 as step."""
    return " ".join(WORDS[i * step % 47] for i in range(1, count + 1))


def write(path: Path, texts: dict[str, str]) -> Path:
    rows = [json.dumps({"title": title, "text": text}) for title, text in texts.items()]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


# pairs of 3 + 4 tokens: 35 words are 5 pairs, 34 are 4, 42 are 6
SMALL = {"five": words(35, 5), "four": words(34, 7), "six": words(42, 11), "five again": words(35, 5)}


@pytest.fixture
def small(make_config, tmp_path):
    """Return the factory of configurations that read SMALL with N = 5 and P = 1, or other texts."""

    def make(overrides: dict | None = None, texts: dict[str, str] = SMALL):
        path = write(tmp_path / "small.jsonl", texts)
        return make_config({"corpus.path": str(path), "evaluation.articles": 3, **(overrides or {})})

    return make


def test_articles_and_pairs_are_counted(small):
    found = survey(small())
    assert (found.places.read, found.places.whole_pass, found.places.articles) == (3, True, 3)
    assert (found.places.empty, found.places.near_duplicates, found.places.near_duplicates_on_opening) == (0, 0, 1)
    assert found.pairs.pairs_per_article == Spread(min=4, median=5.0, mean=5.0, max=6, total=15)
    assert found.pairs.tokens_per_article == Spread(min=34, median=35.0, mean=37.0, max=42, total=111)
    assert (found.pairs.key_len, found.pairs.value_len) == (3.0, 4.0)
    assert (found.pairs.enough_to_train, found.pairs.enough_to_evaluate) == (2, 1)
    assert (found.pairs.repeated_values, found.pairs.repeated_pairs, found.pairs.with_residue) == (0, 0, 0)
    assert (found.need.training_articles, found.need.evaluation_articles) == (4 * 2, 3)
    assert found.held_out is None


def test_without_an_evaluation_no_probes_are_needed(small):
    found = survey(small({"evaluation.articles": 0}))
    assert (found.pairs.enough_to_train, found.pairs.enough_to_evaluate) == (2, 2)
    assert found.need.num_probes == 0


def test_ready_pairs_are_counted_with_their_real_lengths(make_config):
    """Of conftest: keys of 3 words; values of article a, pair p: 2 + (a + p) % 3 words; the third has 2 pairs.

    Value words by article: 20, 21, 6, 20, 21, 22, 20, 21 = 151 of 51 pairs; with keys: 41, 42, 12, 41, 42, 43, 41, 42.
    """
    found = survey(make_config())
    assert found.pairs.pairs_per_article == Spread(min=2, median=7.0, mean=51 / 8, max=7, total=51)
    assert found.pairs.tokens_per_article == Spread(min=12, median=41.5, mean=38.0, max=43, total=304)
    assert found.pairs.key_len == 3.0
    assert found.pairs.value_len == pytest.approx(151 / 51)
    assert found.pairs.enough_to_train == 7


def test_sentences_are_counted_without_the_one_that_has_no_partner(small):
    text = "Ba be bi bo. Da de di do du. Fa fe. Ga ge gi go gu gy. Ka."
    found = survey(small({"pairs.cut": "sentences", "pairs.num_pairs": 2, "rollout.steps": 2}, {"a": text}))
    assert found.pairs.pairs_per_article == Spread(min=2, median=2.0, mean=2.0, max=2, total=2)
    assert found.pairs.tokens_per_article == Spread(min=17, median=17.0, mean=17.0, max=17, total=17)  # 4 + 5 + 2 + 6
    assert found.pairs.key_len == (3 + 2) / 2  # 4 words are cut to 3
    assert found.pairs.value_len == 4.0  # 5 and 6 are cut to 4


def test_repetitions_inside_an_article_are_counted(small):
    first, other, value, last = "ba be bi", "da de di", "fa fe fi fo", "ga ge gi go"
    text = f"{first} {value} {other} {value} {first} {value} {first} {last} {other} {last}"
    found = survey(small({"corpus.drop_near_duplicates": False}, {"a": text, "b": f"{text} {first} {value}"}))
    # a: the second, third and fifth value stood before, the third with its key; b: one more of both
    assert (found.pairs.repeated_values, found.pairs.repeated_pairs) == (3 + 4, 1 + 2)


def cut(pairs: list[tuple[str, str]], text: str | None = None) -> CutArticle:
    text = " ".join(itertools.chain(*pairs)) if text is None else text
    whole = Article(id="a", title="a", text=text, source="", revision="", url="", licence="")
    return CutArticle(
        whole, tuple(CutPair(list(k.encode()), list(v.encode()), i) for i, (k, v) in enumerate(pairs)), ""
    )


def of_bytes(ids: list[int]) -> str:
    return bytes(ids).decode()


@pytest.mark.parametrize("mark", ["{{", "}}", "[[", "]]", "<ref", "|-", "&nbsp;", "thumb|"])
def test_pairs_with_wikitext_are_counted_once(mark):
    pairs = [("clean", "clean"), (f"a {mark} b", "clean"), ("clean", f"a{mark}"), (mark, mark), ("{", "ref | -")]
    assert num_with_residue(cut(pairs), of_bytes) == 3
    assert num_with_residue(cut(pairs[:1] + pairs[4:]), of_bytes) == 0
    assert num_with_residue(cut(pairs[:1], text=f"{mark} behind the last pair"), of_bytes) == 0


# -- splits and what is held out ---------------------------------------------------------------------------------------

TITLED = {"Anarchism": words(35, 5), "Animation": words(42, 7), "Ada": words(42, 11), "Achilles": words(35, 13)}


def held_out(path: Path, **options) -> dict:
    return {f"evaluation.corpus.{k}": v for k, v in {"kind": "files", "path": str(path), **options}.items()}


def test_splits_are_counted_and_only_one_is_read(small):
    found = survey(small({"corpus.split": "train"}, TITLED))
    assert found.places.by_split == {"train": 2, "dev": 1, "test": 1}  # the hashes are in tests/data/test_hygiene.py
    assert (found.places.read, found.places.articles) == (4, 2)
    assert found.pairs.pairs_per_article.total == 10
    assert found.source == "files small.jsonl, split train"


def test_two_splits_of_one_corpus_do_not_overlap(small, tmp_path):
    config = small({"corpus.split": "train", **held_out(tmp_path / "small.jsonl", split="dev")}, TITLED)
    found = survey(config)
    assert found.held_out.places.articles == 1
    assert found.held_out.pairs.enough_to_evaluate == 1
    assert found.overlap == Overlap(articles=0, same_id=0, titles=(), compared=1)


def test_articles_of_both_corpora_are_found_by_id_and_by_text(small, tmp_path):
    longer = words(47 * 3, 17)
    other = write(tmp_path / "other.jsonl", {"Another title": f"{longer} ba be", "Six": words(42, 19)})
    config = small(held_out(other), {"five": words(35, 5), "one": longer, "six": words(42, 11)})
    found = survey(config)
    assert found.overlap == Overlap(articles=1, same_id=0, titles=("one",), compared=2)

    same = survey(small(held_out(tmp_path / "small.jsonl", shuffle=True)))  # the very file
    assert same.overlap.articles == same.overlap.same_id == 3


def test_an_article_with_the_same_id_is_found_whatever_its_text(small, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"title": "a", "id": "page:7", "text": words(42, 19)}), encoding="utf-8")
    config = small(held_out(other))
    with config.corpus.path.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps({"title": "b", "id": "page:7", "text": words(42, 23)}))
    assert survey(config).overlap == Overlap(articles=1, same_id=1, titles=("b",), compared=1)


def test_only_the_first_titles_of_an_overlap_are_named(small, tmp_path):
    texts = {f"article {i}": words(40, step) for i, step in enumerate((5, 7, 11, 13, 17))}
    overlap = survey(small(held_out(tmp_path / "small.jsonl", shuffle=True), texts)).overlap
    assert (overlap.articles, overlap.titles) == (5, ("article 0", "article 1", "article 2"))


def test_the_training_corpus_is_no_held_out_corpus(small, tmp_path):
    config = small(held_out(tmp_path / "small.jsonl", shuffle=False))
    assert config.evaluation.corpus == config.corpus
    assert survey(config).held_out is None


# -- how much is read --------------------------------------------------------------------------------------------------


def test_reading_stops_after_so_many_places(small):
    found = survey(small(), 2)
    assert (found.places.read, found.places.whole_pass) == (2, False)
    assert survey(small(), 0).places == survey(small(), 1000).places


def test_a_whole_pass_of_an_endless_corpus_is_refused(make_config):
    endless = {"corpus.kind": "encyclopedia", "corpus.path": None, "pairs.num_pairs": 5}
    with pytest.raises(ConfigError, match=r"but corpus\.kind: encyclopedia never ends"):
        survey(make_config(endless), 0)
    with pytest.raises(ConfigError, match=r"but evaluation\.corpus\.kind: encyclopedia never ends"):
        survey(make_config({"evaluation.corpus.kind": "encyclopedia", "evaluation.articles": 2}), 0)
    assert survey(make_config(endless), 7).places.read == 7


def test_auto_is_what_the_article_has(small):
    overrides = {"corpus.title": "six", "pairs.num_pairs": "auto", "rollout.steps": "auto", "evaluation.num_probes": 0}
    found = survey(small(overrides))
    assert (found.need.num_pairs, found.pairs.enough_to_train, found.pairs.enough_to_evaluate) == (6, 1, 1)


def test_the_sample_is_the_first_article_with_enough_pairs(small):
    found = survey(small({"pairs.num_pairs": 6}), num_sample=2)
    expected = words(42, 11).split()
    pairs = tuple((" ".join(expected[s : s + 3]), " ".join(expected[s + 3 : s + 7])) for s in (0, 7))
    assert (found.sample.title, found.sample.pairs) == ("six", pairs)
    assert survey(small(), num_sample=0).sample is None


def test_progress_is_announced(small):
    lines: list[str] = []
    survey(small(None, {f"{i}": f"{i} " * 35 for i in range(120)}), announce=lines.append)
    assert lines == ["files small.jsonl", "files small.jsonl: 50 places", "files small.jsonl: 100 places"]


# -- time and memory ---------------------------------------------------------------------------------------------------


class Repeating:
    """A corpus of nothing, an article, nothing, the same article again, and one of another split."""

    def __init__(self, config, network):
        self._texts = {"Anarchism": words(35, 5), "Achilles": words(35, 5), "Ada": words(42, 7)}

    def articles(self, epoch, start):
        for title, text in self._texts.items():
            yield None
            yield Article(id=title, title=title, text=text, source="", revision="", url="", licence="")


def test_empty_places_and_near_duplicates_are_counted(make_config):
    kind = {"corpus.kind": f"{Path(__file__).stem}:Repeating", "corpus.path": None, "corpus.split": "train"}
    found = survey(make_config(kind))
    assert (found.places.read, found.places.empty, found.places.near_duplicates) == (6, 3, 1)
    assert found.places.by_split == {"train": 1, "dev": 0, "test": 1}
    assert found.places.articles == 1
    assert dict(facts(found))["left out"] == "3 empty, 1 near-duplicates, 1 of other splits"


def test_what_a_wiki_leaves_out_is_counted(agrl, tmp_path):
    pages = {"Oast": Page(words(35, 5)), "Barn": Page(words(42, 11)), "Copy": Page(words(35, 5))}
    pages |= {"Kiln": Page(redirect="Oast"), "Mill": Page("[[Windmill]], [[Watermill]]", disambiguation=True)}
    with FakeMediaWiki(pages) as wiki:
        source = ("--corpus.kind", "wikipedia", "--corpus.path", "null", "--corpus.site", wiki.url)
        titles = ("--corpus.titles", "[Oast, Barn, Copy, Kiln, Mill, Nowhere]", "--corpus.requests-per-second", "100")
        code, out, _ = agrl(*source, *titles, "--network.cache", tmp_path / "cache", "--evaluation.articles", 0)
    assert code == 0
    assert "left out    0 empty, 1 near-duplicates, 3 titles without an article" in out
    assert re.search(r"articles +2 of 2 give", out)


class LongArticles:
    """A corpus of other people: endless articles of 100 kB."""

    def __init__(self, config, network):
        self._pause = config.seed / 1000

    def articles(self, epoch, start):
        for i in itertools.count(start):
            time.sleep(self._pause)
            text = f"{i} " * 50_000
            yield Article(id=f"{i}", title=f"{i}", text=text[:100_000], source="", revision="", url="", licence="")


KIND = f"{Path(__file__).stem}:LongArticles"
NEED = Need(
    tokenizer="", cut="tokens", key_tokens=3, value_tokens=4, num_pairs=5, num_probes=1,
    training_articles=8, evaluation_articles=3,
)  # fmt: skip


def of_long_articles(tokenizer, num_places: int, **options):
    config = CorpusConfig(kind=KIND, **options.pop("corpus", {}))
    pairs = PairsConfig(num_pairs=5, key_tokens=3, value_tokens=4)
    return survey_corpus(config, Network(NetworkConfig()), tokenizer, pairs, NEED, num_places, **options)


class FewTokens:
    """A tokenizer with the first 50 characters' worth of tokens, so that tokenising costs nothing."""

    added_tokens_decoder: ClassVar = {}

    def __call__(self, text, **options):
        return {"input_ids": [ord(c) for c in text[:50]]}


def test_memory_does_not_grow_with_the_articles():
    peaks = []
    for num_places in (5, 5, 60):
        tracemalloc.start()
        of_long_articles(FewTokens(), num_places, corpus={"seed": 0, "drop_near_duplicates": False})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 100_000  # less than one more article


def test_reading_time_is_that_of_the_corpus_alone():
    def slowly(article: Article) -> None:
        time.sleep(0.1)

    found = of_long_articles(FewTokens(), 5, corpus={"seed": 10, "drop_near_duplicates": False}, each=slowly)
    assert 0.05 <= found.speed.reading_s < 0.4
    assert found.speed.tokenising_s < 0.1
    assert (found.speed.bytes_read, found.speed.bare_bytes_per_s) == (None, None)


# -- what is said ------------------------------------------------------------------------------------------------------


def test_facts_in_words(small):
    said = dict(facts(survey(small({"evaluation.num_probes": 1}))))
    assert said["places"] == "3 read, a whole pass"
    assert said["left out"] == "0 empty, 1 near-duplicates"
    assert said["articles"] == "1 of 3 give at least 5 + 1 pairs of 3 + 4 tokens"
    assert said[""] == "2 give at least 5, enough to train on"
    assert said["repeats"].startswith("0 of 15 pairs (0.00 %)")
    assert dict(facts(survey(small(), 2)))["places"] == "the first 2 read"


def test_prospects_in_words(small, tmp_path):
    said = dict(prospects(survey(small())))
    assert said["training"] == "8 articles are needed, 2 have enough: 4.0 passes over them"
    assert said["evaluation"].endswith("3 articles are needed, 1 have enough: 3.0 passes over them")
    assert dict(prospects(survey(small({"training.updates": 1}))))["training"].endswith(
        "2 have enough: none is read twice"
    )
    # 1 of the first 2 places has enough, so 8 take about 16
    assert dict(prospects(survey(small({"corpus.shuffle": False}), 2)))["training"].endswith("first 16 places do")
    apart = small({"corpus.split": "train", **held_out(tmp_path / "small.jsonl", split="dev")}, TITLED)
    said = dict(prospects(survey(apart)))
    assert said["evaluation"].startswith("files small.jsonl, split dev: 3 articles are needed, 1 have enough")
    assert said["overlap"] == "0 articles, by id or as near-duplicates"


def test_usable_or_not(small, tmp_path):
    require_usable(survey(small()))
    with pytest.raises(CorpusError, match="of 3 articles none has the 7 pairs needed, of 3 \\+ 4 tokens"):
        require_usable(survey(small({"pairs.num_pairs": 7})))
    with pytest.raises(CorpusError, match="the 7 pairs needed"):  # 6 and a probe
        require_usable(survey(small({"pairs.num_pairs": 6})))
    require_usable(survey(small({"pairs.num_pairs": 6, "evaluation.articles": 0})))
    short = write(tmp_path / "short.jsonl", {"short": words(20, 19)})
    with pytest.raises(CorpusError, match=r"short\.jsonl: of 1 articles none has the 6 pairs"):
        require_usable(survey(small(held_out(short))))


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def agrl(model_folder, tmp_path, capfd):
    """Run `agrl corpus` on SMALL, with a configuration of pairs of 3 + 4 tokens."""
    settings = {
        "model": {"name": str(model_folder("llama"))},
        "corpus": {"kind": "files", "path": str(write(tmp_path / "small.jsonl", SMALL)), "shuffle": False},
        "pairs": {"num_pairs": 5, "key_tokens": 3, "value_tokens": 4},
        "rollout": {"articles": 2, "steps": 3},
        "training": {"updates": 4},
        "evaluation": {"articles": 3, "num_probes": 1},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["corpus", "--config", str(tmp_path / "small.yaml"), *map(str, arguments)])
        out, err = capfd.readouterr()
        return code, out, err

    return run


def test_the_command_prints_what_a_person_reads(agrl):
    code, out, _ = agrl("--sample", 1)
    lines = [line.rstrip() for line in out.splitlines()]
    assert code == 0
    assert lines[0] == "files small.jsonl"
    assert "articles    1 of 3 give at least 5 + 1 pairs of 3 + 4 tokens" in lines
    assert "training    8 articles are needed, 2 have enough: 4.0 passes over them" in lines
    assert re.search(r"pairs of an article +│ +4 │ +5 │ +5\.0 │ +6 │ +15 │", out)
    key, value = words(35, 5).split()[:3], words(35, 5).split()[3:7]
    assert lines[-2:] == ["five", f"{' '.join(key)}    → {' '.join(value)}"]
    assert max(map(len, lines)) <= 100


def test_the_command_prints_strict_json(agrl, small):
    code, out, _ = agrl("--json", "--sample", 2)
    found = json.loads(out, parse_constant=pytest.fail)
    assert code == 0
    assert found["places"]["by_split"] == {"train": 3, "dev": 0, "test": 0}
    assert found["pairs"]["tokens_per_article"] == {"min": 34, "median": 35.0, "mean": 37.0, "max": 42, "total": 111}
    assert found["need"]["training_articles"] == 8
    assert len(found["sample"]["pairs"]) == 2
    assert found.keys() == asdict(survey(small())).keys()


def test_the_command_warns_of_an_overlap(agrl, tmp_path):
    path = tmp_path / "small.jsonl"
    code, out, _ = agrl("--evaluation.corpus.kind", "files", "--evaluation.corpus.path", path)
    assert code == 0
    assert "overlap     3 articles, by id or as near-duplicates" in out
    assert "warning: evaluation.corpus has articles that are trained on: 'five', 'four', 'six'" in out


def test_control_characters_of_an_article_are_shown(agrl, tmp_path):
    evil = write(tmp_path / "evil.jsonl", {"\x1b[31mred": words(42, 5)})
    code, out, _ = agrl("--corpus.path", evil)
    assert code == 0
    assert "<ESCAPE>" in out or "U+001B" in out
    assert "\x1b" not in out


def test_exit_codes(agrl, tmp_path):
    cases = {
        (2, "never ends"): ["--articles", 0, "--corpus.kind", "encyclopedia", "--corpus.path", "null"],
        (2, "--articles must not be negative"): ["--articles", -1],
        (2, "--sample must not be negative"): ["--sample", -1],
        (2, "absent/model"): ["--model.name", "./absent/model"],
        (2, "nearest is 'files'"): ["--corpus.kind", "file"],
        (3, "no such file"): ["--corpus.path", tmp_path / "absent.jsonl"],
        (3, "none has the 9 pairs"): ["--pairs.num_pairs", 9, "--rollout.steps", 3],
    }
    for (expected, hint), arguments in cases.items():
        code, out, err = agrl(*arguments)
        assert (code, hint in err.splitlines()[-1]) == (expected, True), err
        assert ("Sizes" in out) is ("none has" in hint)  # the table comes before the error
    assert agrl("--help")[0] == 0


def test_control_corpora_of_the_demo_hold_what_they_should(capfd):
    assert main(["corpus", "--articles", "20", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["pairs"]["pairs_per_article"]["min"] == found["pairs"]["pairs_per_article"]["max"] == 28
    assert (found["pairs"]["key_len"], found["pairs"]["value_len"]) == (8.0, 10.0)
    assert found["pairs"]["enough_to_evaluate"] == found["held_out"]["pairs"]["enough_to_evaluate"] == 20
    assert found["overlap"]["articles"] == 0


# -- a real dump -------------------------------------------------------------------------------------------------------

DUMP = SHARED / "data" / "enwiki-pages-articles-slice.xml.bz2"


@pytest.mark.skipif(not DUMP.is_file(), reason="the slice of a dump is not on this machine")
def test_a_real_dump_is_read_in_full_and_nearly_free_of_wikitext(make_config):
    lengths = {"pairs.key_tokens": 16, "pairs.value_tokens": 24}
    found = survey(make_config({"corpus.kind": "dump", "corpus.path": str(DUMP), **lengths}), 0)

    xml = bz2.decompress(DUMP.read_bytes()).decode()
    pages = re.findall(r"<page>.*?</page>", xml, re.DOTALL)
    redirects = [page for page in pages if "<redirect" in page or "#REDIRECT" in page.upper()]
    disambiguations = [page for page in pages if re.search(r"\{\{(?:disambig|hndis|geodis)", page, re.IGNORECASE)]
    assert not set(redirects) & set(disambiguations)
    assert found.places.read == len(pages) == 206
    assert found.places.articles == len(pages) - len(redirects) - len(disambiguations)
    assert found.pairs.pairs_per_article.total > 10_000
    assert found.pairs.with_residue < 0.001 * found.pairs.pairs_per_article.total
    assert found.speed.bytes_read == len(xml.encode())
    assert found.speed.bare_bytes_per_s > 0
