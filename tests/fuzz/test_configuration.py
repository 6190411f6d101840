"""Configuration files and overrides, however malformed, are taken or refused in one line."""

from pathlib import Path

import pytest
import yaml
from fuzzing import DEEP, JUNK, RAW, agrl, damaged, documented, fuzz, mutated
from hypothesis import strategies as st

from attention_guided_rl.config_files import config_to_yaml, dotted_fields, load_config
from attention_guided_rl.errors import ConfigError

pytestmark = pytest.mark.timeout(600)  # of the wall, which other work may hold up; each input has its own bound
SECTIONS = {
    "model": {"name": "tiny", "lora_rank": 4, "lora_alpha": 3.5, "adapter": "lora"},
    "corpus": {"kind": "wikipedia", "titles": ["Mill", "Boat"], "seed": 3, "site": "https://wiki.example/api.php"},
    "objective": {"kl": {"coefficient": 0.1}, "filter": {"kind": "group_zscore", "min_zscore": 0.5}},
    "evaluation": {"corpus": {"kind": "files", "path": "here"}, "articles": 3, "oracle": False},
    "template": {"prompt": "Ask."},
    "rollout": {"steps": 3, "trajectories": 4},
}
WRITTEN = yaml.safe_dump(SECTIONS).encode()
TAGS = (
    *(b"!!python/object/apply:os.mkdir ['pwned'] ", b"!!python/name:os.system ", b"!!binary x ", b"!!int x "),
    *(b"!!float x ", b"!!bool x ", b"!!timestamp x ", b"!!set ", b"!!omap ", b"!!str ", b"!!null ", b"!x ", b"&a *a "),
    *(b"2001-99-99 ", b"0b ", b"1:99:99 ", b"<<: ", b"? ", b"| ", b"%YAML 9.9\n", b"--- ", b"\t", b"*a ", b"'", b"{"),
    *(b"[" * 3000, b"9" * 5000, b'"\\ud800" ', b'"\\0" ', b'"\\e[2J" ', b".nan ", b".inf ", b"k" * 50_000),
)


def laughs(levels: int) -> str:
    """A list that is 9 ** levels long when written out."""
    lists = [f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return f"[&a0 [x], {', '.join(lists)}]"


FOUND = [
    *(f"training: {{updates: {value}}}".encode() for value in ("2001-99-99", "9" * 5000, "!!int x", "!!bool x", "1e")),
    *(f"training: {{updates: !!{tag} x}}".encode() for tag in ("float", "timestamp", "python/tuple", "omap", "set")),
    *(f"{key}: {laughs(40)}".encode() for key in ("training", "unknown", "{training: {updates")),
    f"corpus: {{kind: wikipedia, titles: {laughs(40)}}}".encode(),
    b"a: &a {" + b", ".join(b"k%d: 1" % i for i in range(2000)) + b"}\ntraining: {<<: [" + b"*a, " * 900 + b"]}",
    *(b"training: &a {training: *a}", b"evaluation: &a {corpus: *a}", b"training: {updates: &a [*a]}", b"&a [*a]"),
    *(b"training: &a {<<: *a}", b"? " + b"k" * 100_000 + b"\n: 1", b"training: {updates: " + b"k" * 10**6),
    *(b"training: " + b"[" * 20_000, b"{training: " * 5000, b"- " * 50_000, b"# comment\n" * 10**6, b"\0" * 1000),
    b"objective: {filter: {kind: group_zscore}}\nrollout: {trajectories: " + b"9" * 400 + b"}",
    *(b"template: {prompt: %s}" % text for text in (b'"\\ud800"', b'"\\0"', b"'\x1b[31m'", b'"\\e[2J"')),
    b'corpus: {kind: files, path: "\\0"}',
    "training: {}".encode("utf-16"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the command line runs, empty but for what a test gives it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def as_yaml(value: object) -> bytes:
    text = yaml.safe_dump(value)
    for name, raw in {**RAW, DEEP: "[" * 200 + "]" * 200}.items():  # what is too deep takes half a second to refuse
        text = text.replace(f"'{name}'", raw).replace(name, raw)
    return text.encode()


def test_a_configuration_file_is_taken_or_refused_in_one_line(folder):
    assert agrl("train", "--preset", "unknown")[0] == 2  # the first time, libraries make folders of theirs

    def check(text: bytes) -> None:
        (folder / "c.yaml").write_bytes(text)
        if text in FOUND:
            code, _ = agrl("config", "--config", folder / "c.yaml")
            assert code in (0, 2)
            assert code == 0 or agrl("train", "--config", folder / "c.yaml")[0] == 2
        else:
            try:
                config_to_yaml(load_config(files=[folder / "c.yaml"])).encode()
            except ConfigError as error:
                documented(error)
        assert files_in(folder) == {"here", "c.yaml"}

    fuzz("configuration", st.one_of(mutated([SECTIONS]).map(as_yaml), damaged([WRITTEN], TAGS)), check, folder, FOUND)


WORDS = [str(value) for value in JUNK if value != "\0"] + [tag.decode() for tag in TAGS if b"\\0" not in tag]
NAMES = [*dotted_fields(), "", ".", "a.b", "model", "model.name.x", "training..updates", "\ud800.x", "x" * 5000 + ".y"]


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    words = []
    for _ in range(draw(st.integers(1, 3))):
        name, value = draw(st.sampled_from(NAMES)), draw(st.one_of(st.sampled_from(WORDS), st.text(max_size=8)))
        words += draw(
            st.sampled_from(([f"--{name}={value}"], [f"--{name}", value], [f"--{name}"], [f"-{name}", value]))
        )
    return words


def test_overrides_are_taken_or_refused_in_one_line(folder):
    def check(words: list[str]) -> None:
        assert agrl("config", *words)[0] in (0, 2)
        assert files_in(folder) == {"here"}

    found = [["--training.updates", "2001-99-99"], ["--training.updates", "9" * 5000], ["--model.name", "\udcff"]]
    fuzz("overrides", overrides(), check, folder, found)
