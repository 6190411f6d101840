"""The page about a run: what it says, that no text can break out of it, that it stays small, and that it works."""

import html.parser
import json
import re
import time
from pathlib import Path

import pytest
import yaml

from attention_guided_rl import runs
from attention_guided_rl.cli import main
from attention_guided_rl.errors import CheckpointError, ConfigError
from attention_guided_rl.report.drawing import heat_map, shade, smooth, ticks
from attention_guided_rl.report.html import render, write_report
from attention_guided_rl.report.run_files import MAX_POINTS, read_run
from attention_guided_rl.report.trajectories import NUM_ARTICLES
from attention_guided_rl.report.verdict import contrast_arms, sentences, verdict

PAYLOADS = (
    "</script><script>window.hit = 1</script>",
    "<!--<script>",
    "<img src=https://evil.example/x onerror='window.hit = 1'>",
    '"><svg onload="window.hit = 1">',
    "{{ 7 * 7 }}{% raw %}",
    "\u2028\u2029\x00]]>&lt;/script&gt;",
)
CONFIG = {
    "model": {"name": "tiny", "adapter": "lora", "dtype": "float32"},
    "corpus": {"kind": "encyclopedia", "variant": "threads", "seed": 1},
    "reward": {"kind": "value_prior"},
    "training": {"updates": 4, "seed": 3},
    "network": {"contact": "someone@example.org"},
}
STEPS, PAIRS, TOKENS = 3, 4, 2


def contrast(mean: float, low: float, high: float, p_holm: float) -> dict:
    return {"mean": mean, "low": low, "high": high, "p": p_holm, "p_holm": p_holm, "smallest_detectable": 0.1}


SUMMARY = {
    "unit": "nats per value token",
    "resampled": "article",
    "held_out": True,
    "articles": 30,
    "trajectories": 30,
    "seeds": [3],
    "arms": {
        "trained": {"mean": 0.5, "low": 0.4, "high": 0.6, "subjects": 2.5},
        "untrained": {"mean": 0.2, "low": 0.1, "high": 0.3},
        "random": {"mean": 0.45, "low": 0.3, "high": 0.6},
        "trained/key": {"mean": 0.9, "low": 0.8, "high": 1.0},
        "untrained/key": {"mean": 0.95, "low": 0.9, "high": 1.0},
    },
    "contrasts": {
        "trained-untrained": contrast(0.3, 0.2, 0.4, 0.001),
        "trained-random": contrast(0.05, -0.1, 0.2, 0.6),
        "trained/key-untrained/key": contrast(-0.05, -0.11, 0.02, 0.2),
    },
    "choice_gain": {"mean": -0.05, "low": -0.11, "high": 0.02, "p": 0.2},
    "oracle_gap_closed": 0.25,
}


def trajectory(phase: str, arm: str, update: int, index: int, number: int = 0, article: str = "a") -> dict:
    """A line of trajectories.jsonl in which step t reads pair t, and the unread ones were equally likely."""
    pool = f"{phase}{index}"
    return {
        "schema": 1, "phase": phase, "arm": arm, "update": update, "scorer": "reference", "index": index,
        "article": article, "trajectory": number, "pairs": [f"{pool}-{j}" for j in range(PAIRS)],
        "queries": [f" query {t} of {arm}" for t in range(STEPS)], "picks": list(range(STEPS)),
        "selection_logprobs": [[None] * t + [-0.6931] * (PAIRS - t) for t in range(STEPS)],
        "rewards": [0.5, -0.25, None], "value_token_logprobs": [[-1.0, -3.0]] * STEPS, "kept": number == 0,
    }  # fmt: skip


def pair(phase: str, index: int, j: int, **changes: object) -> dict:
    return {
        "pair": f"{phase}{index}-{j}", "title": f"Mills, volume {index}", "subject": j % 2, "value_ids": [5, 6],
        "key": f" key {j}", "value": f" value{j}.", "value_tokens": [f" value{j}", "."], "prior": -6.0, **changes,
    }  # fmt: skip


def metric(update: int, **changes: object) -> dict:
    return {"update": update, "episodes": 64 * update, "reward/mean": 0.1 * update, "loss/kl": None} | changes


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def make_run(folder: Path, *, evaluated: bool = True, text: str = "") -> Path:
    """Write a small run; `text` stands wherever a corpus or a model could put some."""
    folder.mkdir(parents=True)
    config = CONFIG | {"model": CONFIG["model"] | {"name": f"tiny{text}".encode(errors="replace").decode()}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.13.0"}}))
    write_lines(folder / "metrics.jsonl", [metric(u) for u in range(1, 5)])
    lines = [trajectory("train", "trained", u, i, g) for u in (1, 2, 3) for i in (0, 1, 2) for g in (0, 1, 2)]
    pairs = [pair("train", i, j) for i in range(3) for j in range(PAIRS)]
    if evaluated:
        arms = ("trained", "untrained", "random")
        lines += [trajectory("evaluation", arm, 4, i, article=f"a{text}") for arm in arms for i in range(10)]
        pairs += [pair("evaluation", i, j) for i in range(10) for j in range(PAIRS)]
        (folder / "evaluation.json").write_text(json.dumps(SUMMARY))
        record = {"arm": f"trained{text}", "probe_curve": None}
        write_lines(folder / "evaluation.jsonl", [record])
    for line in lines:
        line["queries"] = [query + text for query in line["queries"]]
    for one in pairs:
        one |= {"title": one["title"] + text, "key": one["key"] + text, "value_tokens": [" value" + text, "."]}
    write_lines(folder / "trajectories.jsonl", lines)
    write_lines(folder / "pairs.jsonl", pairs)
    return folder


class Elements(html.parser.HTMLParser):
    """What a parser of HTML sees."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.data: dict[str, str] = {}
        self._inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self._inside = dict(attributes).get("id", tag)

    def handle_data(self, data):
        self.data[self._inside] = self.data.get(self._inside, "") + data

    def all(self, tag: str) -> list[dict]:
        return [attributes for found, attributes in self.found if found == tag]


def embedded(page: str) -> list[dict]:
    return json.loads(Elements(page).data["data"])


def test_verdict_asks_for_the_interval_and_the_adjusted_p():
    assert verdict(contrast(0.2, 0.1, 0.3, 0.01)) == "better"
    assert verdict(contrast(-0.2, -0.3, -0.1, 0.01)) == "worse"
    assert verdict(contrast(0.2, -0.1, 0.3, 0.01)) == "no difference shown"
    assert verdict(contrast(0.2, 0.1, 0.3, 0.06)) == "no difference shown"


def test_sentences_claim_what_is_shown_and_no_more():
    said = sentences(SUMMARY)
    assert said == [
        "On 30 held-out articles, this run’s policy reads better than the untrained model: "
        "+0.300 [+0.200, +0.400] nats per value token.",
        "With the text held equal, so that only the choice of pairs differs: −0.050 [−0.110, +0.020]; "
        "no difference shown.",
        "Beside simple readers, which stand with the untrained model’s text: no difference shown from random.",
        "It closes 25% of the gap between the untrained model and the greedy oracle.",
    ]
    nothing = SUMMARY | {"contrasts": {"trained-untrained": contrast(0.1, -0.1, 0.3, 0.4)}, "held_out": False}
    assert sentences(nothing)[0] == (
        "On 30 articles it was trained on, no difference is shown between this run’s policy and the untrained model "
        "(the interval holds 0): +0.100 [−0.100, +0.300] nats per value token."
    )


def test_choices_are_compared_with_simple_ones_where_the_text_is_equal():
    readers = {"random/key": contrast(0.6, 0.5, 0.7, 0.001), "nearest_key/key": contrast(-0.01, -0.03, 0.01, 0.4),
               "my-order/key": contrast(-0.2, -0.3, -0.1, 0.01)}  # fmt: skip
    contrasts = {**SUMMARY["contrasts"], **{f"trained/key-{b}": c for b, c in readers.items()}}
    said = sentences(SUMMARY | {"arms": dict.fromkeys([*SUMMARY["arms"], *readers]), "contrasts": contrasts})
    assert said[2:4] == [
        "Beside simple readers, which stand with the untrained model’s text: no difference shown from random.",
        "Choices beside those of simple readers, with the text held equal: better than random; no difference shown "
        "from nearest key; worse than my-order.",
    ]


def test_arms_with_hyphens_are_told_apart():
    assert contrast_arms("my-order-random", {"my-order", "random"}) == ("my-order", "random")


def test_ticks_are_round_numbers_inside():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(-0.13, 0.31, 4) == [-0.1, 0, 0.1, 0.2, 0.3]
    assert ticks(2, 2) == [2]


def test_long_curves_are_smoothed_and_short_ones_left_alone():
    short = [(x, x % 2) for x in range(60)]
    assert smooth(short) == short
    long = [(x, 3 * (x % 3)) for x in range(120)]  # 0 3 6 0 3 6 …: with two neighbours on each side
    assert smooth(long)[:4] == [(0, 3.0), (1, 2.25), (2, 2.4), (3, 3.6)]  # (0+3+6)/3 · 9/4 · 12/5 · 18/5


def test_what_a_step_shows_is_worked_out_from_the_files(tmp_path):
    article = read_run(make_run(tmp_path / "run")).articles[0]
    row = article.rows[0]
    assert (article.title, article.keys[1], row.queries[0]) == ("Mills, volume 0", "key 1", "query 0 of trained")
    assert row.probs[1] == [None, 0.5, 0.5, 0.5]  # exp(−0.6931)
    assert row.values[0].tokens == ["value", "."]
    assert row.values[0].gains == [2.0, 0.0]  # −1 and −3, less half of −6 each
    assert [shade(gain) for gain in (2.0, 0.0, -0.7, -9, None)] == ["u4", "u0", "d2", "d5", "u0"]
    drawn = str(heat_map(row, article))
    assert drawn.count('class="cell read"') == 0 + 1 + 2
    assert drawn.count('class="pick"') == STEPS


def test_without_priors_and_token_texts_the_legend_says_so(tmp_path):
    folder = make_run(tmp_path / "run")
    bare = [pair("evaluation", i, j, prior=None) for i in range(10) for j in range(PAIRS)]
    for one in bare:
        del one["value_tokens"]
    write_lines(folder / "pairs.jsonl", bare)
    page = render(read_run(folder))
    assert embedded(page)[0]["rows"][0]["values"][0] == {
        "tokens": ["val", "ue0."], "gains": [-1, -3], "has_prior": False, "exact": False,
    }  # fmt: skip
    assert "log-probability in context, for this run logged no priors" in page
    assert "does not say where tokens end" in page


def test_choice_of_trajectories_is_bounded_and_blind_to_what_came_out(tmp_path):
    articles = read_run(make_run(tmp_path / "run")).articles
    evaluation = [a for a in articles if a.phase == "evaluation"]
    assert [a.index for a in evaluation] == list(range(NUM_ARTICLES))
    assert {tuple(row.name for row in a.rows) for a in evaluation} == {("trained", "untrained")}
    training = [(a.update, a.index, [row.name for row in a.rows]) for a in articles if a.phase == "train"]
    assert training == [(u, i, ["row 1", "row 2"]) for u in (1, 2, 3) for i in (0, 1)]


def test_no_text_breaks_out_of_the_page(tmp_path):
    text = " ".join(PAYLOADS)
    page = render(read_run(make_run(tmp_path / "x<script>hit<script>", text=text)))
    seen = Elements(page)
    assert [script.get("type") for script in seen.all("script")] == ["application/json", None]
    assert not seen.all("img")
    assert not [name for _, attributes in seen.found for name in attributes if name.startswith("on")]
    assert not [a for _, a in seen.found for name in ("src", "href", "style", "action", "srcset") if name in a]
    raw = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert raw.isascii()
    assert not set("<>&") & set(raw)
    assert PAYLOADS[0] in json.loads(raw)[0]["keys"][0]
    page.encode("utf-8")
    assert "49" not in re.search(r"<h3>.*?</h3>", page)[0]


def test_policy_allows_this_script_and_style_and_nothing_else(tmp_path):
    seen = Elements(render(read_run(make_run(tmp_path / "run"))))
    policy = next(a["content"] for a in seen.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert re.findall(r"(\w+)-src 'sha256-", policy) == ["style", "script"]


def test_secrets_and_addresses_of_people_stay_out(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "canary-in-the-page")
    page = render(read_run(make_run(tmp_path / "run", text="canary-in-the-page")))
    assert "canary-in-the-page" not in re.search(r"<header>.*?</header>", page, re.DOTALL)[0]
    assert "canary-in-the-page" not in re.search(r'<section id="settings".*?</section>', page, re.DOTALL)[0]
    assert "someone@example.org" not in page


def test_same_files_give_the_same_bytes_and_the_command_prints_the_path(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    first = write_report(folder).read_bytes()
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_bytes() == first


def test_essentials_stand_without_scripts(tmp_path):
    page = re.sub(r"<script.*?</script>", "", render(read_run(make_run(tmp_path / "run"))), flags=re.DOTALL)
    assert "this run’s policy reads better than the untrained model" in page
    assert "One training seed (3): these numbers are about this run, not about the method." in page
    assert page.count('class="interval"') == 8  # five arms, three contrasts
    assert 'aria-label="Reward: 0.1 at update 1, 0.4 at update 4, between 0.1 and 0.4"' in page
    assert "query 2 of trained" in page
    assert 'class="u4">value</span>' in page
    assert '<div id="explorer" hidden>' in page


def test_without_evaluation_and_without_logs_the_page_says_so(tmp_path):
    page = render(read_run(make_run(tmp_path / "run", evaluated=False)))
    assert "This run has not been evaluated" in page
    assert "update 1</h3>" in page  # the example comes from training
    for name in ("metrics.jsonl", "trajectories.jsonl", "pairs.jsonl"):
        (tmp_path / "run" / name).unlink()
    page = render(read_run(tmp_path / "run"))
    assert "No update has been logged" in page
    assert "No trajectory has been logged" in page


def test_alarms_are_listed_by_name_and_updates(tmp_path):
    folder = make_run(tmp_path / "run")
    rings = {2: True, 3: True, 4: False, 5: True}
    write_lines(
        folder / "metrics.jsonl",
        [metric(u, **{"alarm/entropy_collapse": rings.get(u, False), "alarm/quiet": 0}) for u in range(1, 6)],
    )
    page = render(read_run(folder))
    assert re.search(r"entropy collapse</th><td>2–3, 5</td>", page)
    assert "quiet</th>" not in page


def test_probe_curves_are_averaged_by_arm(tmp_path):
    folder = make_run(tmp_path / "run")
    assert 'id="efficiency"' not in render(read_run(folder))
    curves = {"trained": [[-3, -2], [-3, -1]], "random": [[-3, -2.5], [-3, -2.5]], "random/key": [[-3, -2]]}
    write_lines(
        folder / "evaluation.jsonl", [{"arm": a, "probe_curve": c} for a, found in curves.items() for c in found]
    )
    assert "Learning efficiency: trained from −3 to −1.5; random from −3 to −2.5" in render(read_run(folder))


def test_long_runs_are_thinned_by_averaging(tmp_path):
    folder = make_run(tmp_path / "run")
    write_lines(folder / "metrics.jsonl", [metric(u) for u in range(1, 2 * MAX_POINTS + 1)])
    record = read_run(folder)
    assert (record.updates_per_point, len(record.metrics["reward/mean"])) == (2, MAX_POINTS)
    assert record.metrics["reward/mean"][0] == pytest.approx((1.5, 0.15))


def test_damaged_lines_are_left_out_and_counted(tmp_path):
    folder = make_run(tmp_path / "run")
    good = json.dumps(trajectory("evaluation", "trained", 4, 0))
    broken = [
        "{", "[]", "\xff", good.replace('"picks": [0, 1, 2]', '"picks": [0, 1, 9]').replace('"schema": 1, ', ""),
        good[: len(good) // 2],  # no end of line: being written
    ]  # fmt: skip
    with (folder / "trajectories.jsonl").open("a", encoding="latin-1") as file:
        file.write("\n".join(broken))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"update": null}\n{"update": 5, "reward/mean": NaN}\n' + "[" * 100_000 + "\n")
    with (folder / "pairs.jsonl").open("a") as file:
        file.write('{"pair": "evaluation0-0"\nnothing\n')
    record = read_run(folder)
    assert record.damaged == {"trajectories.jsonl": 5, "metrics.jsonl": 2, "pairs.jsonl": 1}
    assert len(record.articles) == 14
    assert "5 damaged lines of trajectories.jsonl left out" in render(record)


def test_a_damaged_whole_file_is_one_readable_error(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "evaluation.json").write_text('{"arms": []}')
    with pytest.raises(CheckpointError, match=r"evaluation\.json: not as it is written here"):
        write_report(folder)
    unadjusted = {"planted-random": {"mean": 0.1, "low": 0.1, "high": 0.1}}
    (folder / "evaluation.json").write_text(json.dumps(SUMMARY | {"contrasts": unadjusted}))
    with pytest.raises(CheckpointError, match=r"evaluation\.json: not as it is written here \(KeyError"):
        write_report(folder)
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"evaluation\.json: not valid JSON"):
        write_report(folder)
    (folder / "config.yaml").write_text("[1")
    with pytest.raises(CheckpointError, match=r"config\.yaml: not readable"):
        write_report(folder)
    with pytest.raises(ConfigError, match="not a run folder"):
        write_report(tmp_path)


def test_a_run_ends_with_its_page_and_only_what_is_shown_is_parsed(make_config, tmp_path):
    folder = tmp_path / "run"
    runs.train(make_config({"training.updates": 1, "evaluation.articles": 3}), folder)
    record = read_run(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == render(record)
    assert [(a.phase, a.index, len(a.rows)) for a in record.articles] == [
        *(("evaluation", i, 2) for i in range(3)), ("train", 0, 2), ("train", 1, 2),
    ]  # fmt: skip
    assert all(value.exact and value.has_prior for a in record.articles for row in a.rows for value in row.values)
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all("".join(one["value_tokens"]) == one["value"] for one in pairs)
    log = folder / "trajectories.jsonl"
    spoiled = re.sub(r'("arm": "random".*?"pairs": )\[', r"\1nonsense", log.read_text(encoding="utf-8"))
    log.write_text(spoiled, encoding="utf-8")
    assert "nonsense" in spoiled
    assert read_run(folder) == record


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> tuple[Path, float]:
    """The page of 200 updates of 64 rows of the demo's sizes, and the seconds that writing it took."""
    folder = make_run(tmp_path_factory.mktemp("long") / "run")
    write_lines(folder / "metrics.jsonl", [metric(u, **{"loss/kl": 0.01 * u}) for u in range(1, 201)])
    body = {
        "pairs": [f"train0-{j}" for j in range(24)], "ids": list(range(100, 308)), "role": [3] * 208,
        "step": [4] * 208, "queries": ["What the harbor of Tasic Larkby shows:"] * 10, "picks": list(range(10)),
        "selection_logprobs": [[None] * t + [-3.21875] * (24 - t) for t in range(10)], "rewards": [0.5] * 10,
        "value_token_logprobs": [[-1.23456] * 10] * 10, "sampled_logprobs": [[-1.23456] * 8] * 10, "kept": True,
    }  # fmt: skip
    tail = json.dumps(body)[1:] + "\n"
    with (folder / "trajectories.jsonl").open("a") as file:
        for update in range(4, 201):
            for row in range(64):
                head = {
                    "schema": 1, "phase": "train", "arm": "trained", "update": update, "scorer": "reference",
                    "index": row // 8, "article": "a", "trajectory": row % 8,
                }  # fmt: skip
                file.write(json.dumps(head)[:-1] + ", " + tail)
    start = time.perf_counter()
    page = write_report(folder)
    return page, time.perf_counter() - start


def test_a_long_run_gives_a_small_page_quickly(long_run):
    page, seconds = long_run
    assert (page.parent / "trajectories.jsonl").stat().st_size > 50_000_000
    assert seconds < 20
    assert page.stat().st_size < 5_000_000
    assert {(a["phase"], a["update"]) for a in embedded(page.read_text())} == {
        ("evaluation", 4), ("train", 1), ("train", 101), ("train", 200),
    }  # fmt: skip


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_every_ground(tmp_path, mode):
    page = render(read_run(make_run(tmp_path / "run")))
    colours = dict(re.findall(r"--(\w+): (#\w{6});", re.findall(r":root \{(.*?)\}", page, re.DOTALL)[mode]))

    def ratio(a: str, b: str) -> float:
        bright, dim = sorted((luminance(colours[a]), luminance(colours[b])), reverse=True)
        return (bright + 0.05) / (dim + 0.05)

    grounds = ["ground", "raised", *(f"{way}{level}" for way in "ud" for level in range(1, 6))]
    assert min(ratio("text", ground) for ground in grounds) >= 4.5
    assert min(ratio(c, "ground") for c in ("quiet", "trained", "untrained", "other")) >= 4.5
    assert ratio("quiet", "raised") >= 4.5


# -- in a browser -----------------------------------------------------------------------------------------------------


CURRENT = "[...document.querySelectorAll('.panel [aria-current=step]')].map(e => Number(e.dataset.step))"
STEP = "document.getElementById('place').textContent"


def test_hostile_text_is_only_text_in_a_browser(browser, tmp_path):
    browser.look()
    path = write_report(make_run(tmp_path / "run", text=" ".join(PAYLOADS)))
    browser.open(path)
    assert browser.run("window.hit") is None
    assert browser.run("document.querySelectorAll('img, #panels script, iframe, object, link').length") == 0
    assert PAYLOADS[0] in browser.run("document.querySelector('#panels .query').textContent")
    assert browser.requests() == [path.as_uri()]
    assert browser.complaints() == []


def test_what_a_page_should_not_hold_is_refused_by_its_policy(browser, tmp_path):
    browser.look()
    path = write_report(make_run(tmp_path / "run"))
    planted = "<script>window.hit = 1</script><p style='color: red' onclick='window.hit = 1'></p></body>"
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", planted), encoding="utf-8")
    browser.open(path)
    browser.run("document.querySelector('[onclick]').click()")  # newer Chromium looks at a handler only now
    browser.run("new Promise(done => setTimeout(done))")
    assert browser.run("window.hit") is None
    assert len(browser.complaints()) == 3  # of the script, the style and the handler: complaints are heard


def test_a_long_run_opens_quickly(browser, long_run):
    browser.look()
    seconds = browser.open(long_run[0])
    assert browser.run(CURRENT) == [0, 0]
    assert seconds < 2
    assert browser.complaints() == []


def test_explorer_works_by_click(browser, tmp_path):
    browser.look()
    browser.open(write_report(make_run(tmp_path / "run")))
    assert browser.run("[document.getElementById('example').hidden, document.getElementById('explorer').hidden]") == [
        True, False,
    ]  # fmt: skip
    browser.click("#next")
    assert browser.run(STEP) == "step 2 of 3"
    browser.click(".panel.second li:nth-child(3) button")
    assert browser.run(CURRENT) == [2, 2]
    browser.click(".panel.first .target")  # the middle row of the map
    assert browser.run(CURRENT) == [1, 1]
    keys = "[...document.querySelectorAll('.panel.first .keys li')].map(e => e.textContent)"
    assert browser.run(keys) == ["→0.500key 1", "0.500key 2", "0.500key 3"]
    browser.run("(e => { e.value = 8; e.dispatchEvent(new Event('change')); })(document.getElementById('article'))")
    assert browser.run("[...document.querySelectorAll('.panel h3 b')].map(e => e.textContent)") == [
        "row 1", "row 2 (not kept by the filter)",
    ]  # fmt: skip
    assert browser.run(STEP) == "step 1 of 3"
    browser.run("(e => { e.value = 1; e.dispatchEvent(new Event('change')); })(document.getElementById('trajectory'))")
    assert browser.run("document.querySelector('.panel.first h3 b').textContent").startswith("row 2")
    assert browser.complaints() == []


def test_explorer_works_by_keyboard_with_the_focus_in_sight(browser, tmp_path):
    browser.look()
    browser.open(write_report(make_run(tmp_path / "run")))
    reached = []
    for _ in range(40):
        browser.press("Tab")
        reached.append(browser.run("document.activeElement.id || document.activeElement.className"))
        if reached[-1] == "step":
            break
    assert {"article", "trajectory", "next", "order", "scroll map", "step"} <= set(reached)
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for key, steps in {"ArrowRight": [1, 1], "ArrowDown": [2, 2], "ArrowUp": [1, 1], "ArrowLeft": [0, 0]}.items():
        browser.press(key)
        assert browser.run(CURRENT) == steps
        assert browser.run("Number(document.activeElement.dataset.step)") == steps[0]
    browser.run("document.getElementById('article').focus()")
    browser.press("ArrowRight")  # a list has its own use for arrows
    assert browser.run("document.querySelectorAll('.panel').length") == 2
    unnamed = (
        "[...document.querySelectorAll('button, select, [tabindex], svg[role=img]')].filter(e =>"
        "!(e.ariaLabel || e.labels?.length || e.textContent.trim() || e.getAttribute('aria-labelledby'))).length"
    )
    assert browser.run(unnamed) == 0


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_never_scrolls_sideways(browser, tmp_path, dark):
    browser.look(width=360, height=740, dark=dark)
    browser.open(write_report(make_run(tmp_path / "run", text=" " + "w" * 90)))
    assert browser.run("document.documentElement.scrollWidth") == 360
    expected = "rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)"
    assert browser.run("getComputedStyle(document.body).backgroundColor") == expected


CUT = """[...document.querySelectorAll('svg.curve text, svg.efficiency text')].filter(text => {
    const one = text.getBoundingClientRect(), whole = text.ownerSVGElement.getBoundingClientRect();
    return one.left < whole.left || one.right > whole.right;
}).map(text => text.textContent)"""


@pytest.mark.parametrize("width", [500, 1200])
def test_numbers_and_names_of_drawings_are_whole_and_large_enough_to_read(browser, tmp_path, width):
    folder = make_run(tmp_path / "run")
    levels = {"loss/kl": 0.00063, "optimizer/gradient_norm": 2.27e-7, "reward/mean": -12345.0}
    write_lines(folder / "metrics.jsonl", [metric(u, **{k: v * u / 4 for k, v in levels.items()}) for u in range(1, 5)])
    curves = [{"arm": arm, "probe_curve": [-1e-4, -2e-5]} for arm in ("trained", "article_order", "a" * 60)]
    for lines, smallest in ((curves[:2], 11), (curves, 9)):
        write_lines(folder / "evaluation.jsonl", lines)
        browser.look(width=width)
        browser.open(write_report(folder))
        assert browser.run("document.querySelectorAll('svg.curve').length") == 3
        assert browser.run(CUT) == []
        assert browser.run("12 * document.querySelector('.efficiency .name').getScreenCTM().a") >= smallest
    cut_tables = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
    hints = "[...document.querySelectorAll('.sideways')].filter(e => e.offsetHeight).length"
    assert [browser.run(cut_tables), browser.run(hints)] == ([2, 2] if width == 500 else [0, 0])


def test_with_scripts_off_the_essentials_are_seen(browser, tmp_path):
    browser.look(scripts=False)
    browser.open(write_report(make_run(tmp_path / "run")))
    seen = "e => document.getElementById(e).getBoundingClientRect().height > 100"
    assert browser.run(f"['verdict', 'training', 'example'].map({seen})") == [True, True, True]
    assert browser.run("document.getElementById('explorer').getBoundingClientRect().height") == 0
    browser.look()
