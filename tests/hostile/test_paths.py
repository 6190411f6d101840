"""Names that lead elsewhere: of runs, of files of a corpus, of members of an archive, of links in a run folder."""

import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from attention_guided_rl.cli import main
from attention_guided_rl.config import CorpusConfig
from attention_guided_rl.data.article_cache import ArticleCache, CachedTitles
from attention_guided_rl.data.files import FilesCorpus
from attention_guided_rl.errors import CorpusError

REFUSED = [  # exit 13
    *("..", ".", "../evil", "../../evil", "a/../../evil", "a/..", "/tmp/evil", "//evil", "/", "", " ", "evil/", "a/b"),
    *("~", "~root", "~/evil", "$HOME", "${HOME}", "%TEMP%", "`touch evil`", "$(touch evil)", "a;touch evil", "a|b"),
    *(
        "a\0b",
        "\0",
        "a\nb",
        "a\n",
        "\r",
        "a\x1b[2J",
        "\t",
        "a b",
        "a\\..\\..\\evil",
        "C:\\evil",
        "C:evil",
        "\\\\host\\x",
    ),
    *("..%2fevil", "%2e%2e%2fevil", "a..b", "..a", "a..", "-rf", ".hidden", "_", "a:b", "a*", "?", "<a>", '"'),
    *(
        "\u2215evil",
        "\u2024\u2024/evil",
        "\uff0e\uff0e\uff0fevil",
        "\u2044",
        "\u202eevil",
        "e\u0301vil",
        "\u0430",
        "🦀",
    ),
]
TOO_LONG = ["a" * 101, "a" * 300, "a" * 5000]  # exit 8
HARMLESS = ["CON", "nul.txt", "a.", "a-", "config.yaml", "checkpoints"]  # plain names here, whatever they are elsewhere


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def test_no_name_of_a_run_leads_out_of_the_runs_folder(tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    (home / "runs").mkdir(parents=True)
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    config = home / "none.yaml"  # so that a name that is taken fails there, before anything is written
    before = everything(tmp_path)
    assert len(REFUSED + TOO_LONG) >= 50
    for resume in ([], ["--resume"]):
        for name in [*REFUSED, *TOO_LONG, *HARMLESS]:
            expected = 13 if name in REFUSED else 8 if name in TOO_LONG else 2
            assert main(["train", f"--run={name}", "--config", str(config), *resume]) == expected, name
            said = capsys.readouterr().err
            assert said.count("\n") == 1
            assert len(said) < 500
    assert main(["train", "--preset", "../../evil"]) == 13
    assert main(["train", "--run=--"]) == 2
    assert everything(tmp_path) == before


LINKS = (
    "checkpoints",
    "metrics.jsonl",
    "pairs.jsonl",
    "ATTRIBUTION.md",
    ".lock",
    "figures",
    "checkpoints/update-000009",
)


@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_a_run_folder_is_refused_by_every_command(run, finished, tmp_path, capsys, name):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run / "checkpoints", elsewhere / "folder")
    (elsewhere / "file").write_text("precious\n" * 10_000)
    link = run / name
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(elsewhere / ("file" if "." in name.rpartition("/")[2] else "folder"))
    before = everything(tmp_path)
    resume = ["train", "--run", "run", "--resume", "--runs-folder", str(run.parent), "--training.updates", "2"]
    for command in (["evaluate"], ["report"], ["rollout"], ["verify"], ["compare", str(finished)]):
        assert main([*command, str(run)]) == 13, capsys.readouterr().err
    assert main(resume) == 13
    assert "leads out of the run folder" in capsys.readouterr().err
    assert everything(tmp_path) == before


def test_links_within_a_run_folder_and_to_a_run_folder_are_fine(run, tmp_path):
    (run / "newest").symlink_to("checkpoints/update-000001")
    (tmp_path / "link").symlink_to(run)
    assert main(["report", str(tmp_path / "link")]) == 0


@pytest.mark.parametrize("member", ["../evil", "/evil", "a/../../../evil", "manifest.json/../../../evil"])
def test_a_manifest_cannot_name_files_elsewhere(run, tmp_path, capsys, member):
    shutil.rmtree(run / "checkpoints" / "update-000000")
    path = run / "checkpoints" / "update-000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["sha256"][member] = manifest["sha256"].pop("state.json")
    path.write_text(json.dumps(manifest))
    (tmp_path / "evil").write_text("x")
    assert main(["rollout", str(run)]) == 7
    assert "manifest.json is missing or damaged" in capsys.readouterr().err


MEMBERS = ("../evil.txt", "/evil.txt", "a/../../evil.txt", "~/evil.txt", "..\\evil.txt", "a\nb.txt", "x" * 200 + ".txt")


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
def test_no_member_of_an_archive_is_ever_written(tmp_path, kind):
    folder = tmp_path / "corpus"
    folder.mkdir()
    path = folder / f"articles.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in MEMBERS:
                archive.writestr(name, "text " * 50)
    else:
        with tarfile.open(path, "w:gz" if kind == "tgz" else "w") as archive:
            for name in MEMBERS:
                member = tarfile.TarInfo(name)
                member.size = 250
                archive.addfile(member, io.BytesIO(b"text " * 50))
    before = everything(tmp_path)
    with pytest.raises(CorpusError, match="archives are not read"):
        FilesCorpus(CorpusConfig(kind="files", path=folder))
    assert everything(tmp_path) == before


def test_names_of_files_are_titles_and_nothing_else(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    names = ["..txt", "...md", "a\nb.txt", "\x1b[2J.txt", "-rf.txt", "~.txt", "x" * 250 + ".txt", "\u202etxt.exe.txt"]
    for i, name in enumerate(names):
        (folder / name).write_text(f"{name.encode().hex()} number {i} " * 40)
    before = everything(tmp_path)
    articles = list(FilesCorpus(CorpusConfig(kind="files", path=folder, drop_near_duplicates=False)).articles(0, 0))
    assert len(articles) == len(names)
    assert not any("\n" in article.title for article in articles)
    assert everything(tmp_path) == before


def test_titles_of_a_wiki_never_name_files(tmp_path):
    cache = ArticleCache(tmp_path / "cache" / "articles", "https://example.org/api.php")
    for title in [*REFUSED, *TOO_LONG, *MEMBERS]:
        cache.write(CachedTitles(site="https://example.org/api.php", requested=title, titles=(title,)))
        assert cache.read(CachedTitles, title).titles == (title,)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == len({*REFUSED, *TOO_LONG, *MEMBERS})
    assert all(path.is_relative_to(tmp_path / "cache" / "articles") for path in files)
    assert not any(character in path.name for path in files for character in "~$% \n\\")
