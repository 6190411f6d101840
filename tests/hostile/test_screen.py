"""Text from strangers in the page about a run and on the terminal: it is shown, and does nothing."""

import html.parser
import itertools
import json
import shutil
import unicodedata
from pathlib import Path

import pytest
import yaml

from attention_guided_rl.cli import main
from attention_guided_rl.config_files import config_to_yaml
from attention_guided_rl.report.html import write_report

DEEDS = [  # what would be seen if any of it were more than text
    "<script>window.hit=1</script>", "<script src=//evil.example/x.js></script>", "<SCRIPT>alert(1)</SCRIPT>",
    "<img src=x onerror=window.hit=1>", "<img src=https://evil.example/pixel.gif>", "<svg onload=window.hit=1>",
    "<svg><script>window.hit=1</script></svg>", "<svg><animate onbegin=alert(1) attributeName=x dur=1s>",
    "<svg><use href='https://evil.example/x.svg#a'/></svg>", "<iframe src=javascript:alert(1)></iframe>",
    "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>", "<object data=https://evil.example/x></object>",
    "<embed src=https://evil.example/x>", "<link rel=stylesheet href=https://evil.example/x.css>",
    "<style>*{background:url(https://evil.example/x)}</style>", "<style>@import 'https://evil.example/x.css';</style>",
    "<base href=https://evil.example/>", "<meta http-equiv=refresh content='0;url=https://evil.example/'>",
    "<form action=https://evil.example/><input autofocus onfocus=window.hit=1></form>",
    "<a href=javascript:window.hit=1 autofocus>x</a>", "<body onload=window.hit=1>", "<details open ontoggle=alert(1)>",
    "<video><source onerror=window.hit=1></video>", "<audio src=x onerror=alert(1)>", "<marquee onstart=alert(1)>",
    "<math><mtext></mtext><mglyph><style><img src=x onerror=window.hit=1>", "<template><script>alert(1)</script>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>", "<textarea autofocus onfocus=window.hit=1>",
    "<div style='background:url(https://evil.example/x)'>", "{{ 7 * 7 }}{% include '/etc/passwd' %}",
    "{{ cycler.__init__.__globals__.os.system('id') }}", "${window.hit=1}", "`;window.hit=1;//",
    "\\u003cscript>alert(1)",
    "&lt;script&gt;window.hit=1&lt;/script&gt;", "javascript:window.hit=1", "url(https://evil.example/x)",
    "\u202e>tpircs<\u2066", "\ufeff\u200b<scr\u0000ipt>window.hit=1</script>",
]  # fmt: skip
BREAKOUTS = ["", "\"'>", "</script>", "--></style></title></textarea></pre>]]>", '\\"}];\u2028\n']
PAYLOADS = [breakout + deed for breakout, deed in itertools.product(BREAKOUTS, DEEDS)]
POOL = 25  # pairs, and steps, of an article


def test_there_are_200_payloads():
    assert len(set(PAYLOADS)) == 200


def make_run(folder: Path, texts: list[str]) -> Path:
    """Write a run with the texts wherever a corpus, a model, a configuration or a stranger's file could put some."""
    folder.mkdir(parents=True)
    some = itertools.cycle(texts)
    yaml_has_no_nul = [text.replace("\0", "") for text in texts]
    plain = itertools.cycle(yaml_has_no_nul)
    fields = {
        "model": ("name", "adapter", "dtype"), "corpus": ("kind", "variant", "title", "path"), "reward": ("kind",),
        "training": ("updates", "seed"), "embedder": ("kind", "model", "base_url"),
    }  # fmt: skip
    config = {section: {name: next(plain) for name in names} for section, names in fields.items()}
    config["texts"] = yaml_has_no_nul
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = {"python": next(some), "platform": next(some), "cuda": next(some), "packages": {"torch": next(some)}}
    (folder / "environment.json").write_text(json.dumps(environment))
    numbers = {"mean": 0.1, "low": 0.0, "high": 0.2, "p_holm": 0.5, "p": 0.5, "smallest_detectable": 0.1}
    summary = {
        "unit": next(some), "resampled": next(some), "seeds": [next(some)],
        "held_out": True, "articles": 3, "trajectories": 3,
        "arms": dict.fromkeys(("trained", "untrained", *texts), numbers),
        "contrasts": {f"trained-{arm}": numbers for arm in ("untrained", *texts)}, "choice_gain": None,
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(summary))
    write = {"metrics.jsonl": [{"update": 1, "reward/mean": 0.1} | {f"alarm/{text}": True for text in texts}]}
    write["evaluation.jsonl"] = [{"arm": text, "probe_curve": [0.1, i]} for i, text in enumerate(texts)]
    pools = [texts[i : i + POOL] for i in range(0, len(texts), POOL)]
    write["trajectories.jsonl"] = [
        {
            "schema": 1, "phase": "evaluation", "arm": "trained", "update": 1, "scorer": "reference", "index": i,
            "article": pool[i % POOL], "trajectory": 0, "pairs": [f"{i}-{j}" for j in range(POOL)], "queries": pool,
            "picks": list(range(POOL)), "selection_logprobs": [[-3.2] * POOL] * POOL, "rewards": [0.1] * POOL,
            "value_token_logprobs": [[-1.0, -1.0]] * POOL, "kept": True,
        }
        for i, pool in enumerate(pools)
    ]  # fmt: skip
    write["pairs.jsonl"] = [
        {
            "pair": f"{i}-{j}", "title": pool[0], "subject": None, "value_ids": [1, 2], "key": text, "value": text,
            "value_tokens": [text[:9], text[9:]], "prior": -1.0, "source": text, "url": text, "licence": text,
        }
        for i, pool in enumerate(pools)
        for j, text in enumerate(pool)
    ]  # fmt: skip
    for name, lines in write.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Structure(html.parser.HTMLParser):
    """The elements of a page with the names of their attributes, texts left out."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, ...]] = []
        self.values: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, *(name for name, _ in attributes)))
        self.values += [str(value) for name, value in attributes if name not in ("aria-label", "content")]

    def handle_endtag(self, tag):
        self.found.append(("/", tag))

    def handle_comment(self, data):
        self.found.append(("comment",))

    def handle_decl(self, decl):
        self.found.append(("declaration",))


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory) -> Path:
    name = "x<img src=x onerror=window.hit=1>{{7*7}}\u202e"
    return write_report(make_run(tmp_path_factory.mktemp("hostile") / name, PAYLOADS))


def test_payloads_change_no_element_of_the_page(hostile_page, tmp_path):
    texts = [f"{i:03d}" + "".join(c if c == "/" else "w" for c in text) for i, text in enumerate(PAYLOADS)]
    tame = Structure(write_report(make_run(tmp_path / "tame", texts)).read_text(encoding="utf-8"))
    page = hostile_page.read_text(encoding="utf-8")
    seen = Structure(page)
    assert seen.found == tame.found
    assert seen.found.count(("comment",)) == 0
    assert not [value for value in seen.values if "evil" in value or "hit" in value or "alert" in value]
    assert not [c for c in page if unicodedata.category(c) in ("Cc", "Cs") and c != "\n"]


WALK = """(() => {
    const list = document.getElementById('article'), next = document.getElementById('next'), seen = new Set();
    for (const details of document.querySelectorAll('details')) details.open = true;
    for (let i = 0; i < list.options.length; i++) {
        list.value = i;
        list.dispatchEvent(new Event('change'));
        do {
            for (const e of document.querySelectorAll('#panels .query')) seen.add(e.textContent);
            if (next.disabled) break;
            next.click();
        } while (true);
    }
    return [...seen];
})()"""


def test_200_payloads_do_nothing_in_a_browser(browser, hostile_page):
    browser.look()
    browser.open(hostile_page)
    seen = browser.run(WALK)
    assert len(seen) == len(PAYLOADS)
    assert sum(deed in text for deed in DEEDS for text in seen if "\0" not in deed) >= len(BREAKOUTS) * (len(DEEDS) - 1)
    browser.run("new Promise(done => setTimeout(done, 300))")
    assert browser.run("[window.hit, document.title.includes('49'), document.URL]") == [
        None,
        False,
        hostile_page.as_uri(),
    ]
    foreign = (
        "img, iframe, object, embed, link, base, form, video, audio, template, math, meta[http-equiv=refresh], use"
    )
    assert browser.run(f"document.querySelectorAll('{foreign}').length") == 0
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.requests() == [hostile_page.as_uri()]
    assert [e for e in browser.events if e["method"] == "Page.javascriptDialogOpening"] == []
    assert browser.complaints() == []


# -- the terminal ------------------------------------------------------------------------------------------------------

ESCAPES = (
    *("\x1b[2J\x1b[H", "\x1b]0;owned\x07", "\x1b]8;;https://evil.example\x1b\\x\x1b]8;;\x1b\\", "\x1b[31mred", "\x1bc"),
    *("\x9b2J", "\x08\x08\x08", "\x07", "\x7f", "\x0e", "\u202eevil", "\u2066", "\u200b", "\x1bP+q\x1b\\", "\x05"),
    *("[bold red]", "[/]", "[link=https://evil.example]x[/link]", ":skull:", "\u2028", "\x85", "\x1b[?1049h"),
)


def control(text: str) -> list[str]:
    return [c for c in text if not (c.isprintable() or c == "\n")]


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Articles with escapes everywhere, in a file whose name has some, with bad lines among them."""
    path = tmp_path / "corpus\x1b[2J[bold]" / "articles\x1b]0;owned\x07.jsonl"
    path.parent.mkdir()
    with path.open("w", encoding="utf-8") as file:
        for i in range(12):
            title = f"title {i} {ESCAPES[i % len(ESCAPES)]}"
            about = {"article": title, "source": f"s{ESCAPES[0]}", "url": f"u{ESCAPES[1]}", "licence": f"l{ESCAPES[2]}"}
            for j in range(7):
                text = f"{ESCAPES[(7 * i + j) % len(ESCAPES)]} ba be {i} {j}"
                file.write(json.dumps({"key": f"key {text}", "value": f"value {text} {ESCAPES[i]}", **about}) + "\n")
        file.write('{"\x1b[2J": \n')
    return path


def rename_arms(run: Path, twin: Path) -> None:
    """Give an arm of a run a name with escapes, and copy the run to one with other rewards."""
    lines = [json.loads(line) for line in (run / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]
    shutil.copytree(run, twin)
    for folder, more in ((run, 0.0), (twin, 0.5)):
        changed = [{**x, "arm": x["arm"].replace("random", ESCAPES[0]), "reward": x["reward"] + more} for x in lines]
        (folder / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))


def test_nothing_that_is_printed_holds_a_control_character_of_a_text(
    corpus, make_config, finished, byte_tokenizer, causal_lm, tmp_path, capfd, caplog
):
    model = tmp_path / "model[bold]\x1b[31m"
    causal_lm("llama", 272).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    capfd.readouterr()
    options = {
        "model.name": str(model), "corpus.path": str(corpus.parent), "pairs.key_tokens": 8, "pairs.value_tokens": 8,
        "training.updates": 1, "evaluation.articles": 2, "rollout.query_tokens": 4, "rollout.temperature": 5.0,
        "rollout.context_tokens": 128,
    }  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text(config_to_yaml(make_config(options)), encoding="utf-8")
    runs_folder, missing = tmp_path / "runs\x1b[2J", str(tmp_path / "no\x1b[2J[/]")
    run, twin = runs_folder / "a", runs_folder / "twin\x1b[2J[/]"
    commands = {
        ("train", "--config", str(config), "--run", "a", "--runs-folder", str(runs_folder)): 0,
        ("rollout", str(run)): 0,
        ("corpus", "--config", str(config), "--sample", "7", "--articles", "3"): 0,
        ("corpus", "--config", str(config), "--json", "--articles", "3"): 0,
        ("compare", str(run), str(twin)): 0,
        ("compare", str(run), str(finished)): 2,
        ("report", str(run)): 0,
        ("corpus", "--config", str(config), "--corpus.title", "title\x1b[2J"): 3,
        ("corpus", "--config", str(config), "--corpus.path", missing): 3,
        ("rollout", "--config", str(config), "--model.name", missing): 2,
        ("rollout", "--config", missing): 2,
        ("evaluate", missing): 2,
        ("evaluate", str(run), "--arms", f"file:{missing}.jsonl"): 2,
        ("train", f"--\x1b[2J.x={missing}"): 2,
        (f"\x1b[2J{missing}",): 2,
    }  # fmt: skip
    for command, expected in commands.items():
        if str(twin) in command:
            rename_arms(run, twin)
        assert main(list(command)) == expected, capfd.readouterr().err
        out, err = capfd.readouterr()
        assert control(out) == [], command
        assert control(err) == [], command
    assert control((run / "ATTRIBUTION.md").read_text(encoding="utf-8")) == []
    assert "lines are unusable" in caplog.text  # the log is what was printed: the file's name is in it


def test_a_bug_of_ours_is_shown_without_control_characters(monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise RuntimeError("\x1b[2J of a text\nand more\x07")

    monkeypatch.setattr("attention_guided_rl.runs.newest_run", fail)
    assert main(["train", "--resume"]) == 70
    said = capsys.readouterr().err
    assert control(said) == []
    assert "RuntimeError: \ufffd[2J of a text\nand more\ufffd" in said
