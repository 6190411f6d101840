"""No key, token or password of a proxy is shown or written, by any command, whatever fails."""

import base64
import re
from pathlib import Path

import pytest
from fake_embeddings import TRANSIENT, EmbeddingServer

from attention_guided_rl.cli import main
from attention_guided_rl.config_files import config_to_yaml
from attention_guided_rl.secrets import redact

KEY, TOKEN, PASSWORD = "sk-canary-4f1d09", "hf_canary7c2be8", "proxy-canary-90ab3d"
VARIABLE, DATABASE, IN_ADDRESS = "canary-of-a-variable-55e1", "canary-of-a-database-8d1c", "canary-in-an-address-3c9a"
SENT = base64.b64encode(f"reader:{PASSWORD}".encode()).decode()  # in a header, which a service may repeat
SECRETS = (KEY, TOKEN, PASSWORD, SENT, VARIABLE, DATABASE, IN_ADDRESS)
QUICK = tuple(sorted(set(TRANSIENT) - {"black_hole", "slow_drip", "rate_limit_seconds", "rate_limit_date"}))


@pytest.fixture(scope="module")
def proxy():
    """A service that is a proxy with a password as well, and repeats the key in every error."""
    with EmbeddingServer(key=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def outside(proxy):
    """The secrets, where the commands find them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
            patch.delenv(name, raising=False)
        address = re.search(r"127.*:\d+", proxy.url)[0]
        patch.setenv("http_proxy", f"http://reader:{PASSWORD}@{address}")
        patch.setenv("OPENAI_API_KEY", KEY)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("A_PRIVATE_VARIABLE", VARIABLE)
        patch.setenv("DATABASE_URL", f"postgres://me:{DATABASE}@localhost/x")
        yield


@pytest.fixture(scope="module")
def config(proxy, make_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("secrets")
    overrides = {
        "embedder.kind": "openai",
        "embedder.base_url": proxy.url,
        "embedder.max_usd": 1.0,
        "embedder.usd_per_million_tokens": 0.1,
        "network.cache": str(folder / "cache"),
        "network.backoff_s": 0.001,
        "network.timeout_s": 1.0,
        "training.updates": 1,
        "evaluation.articles": 1,
        "selection.temperature": None,
        "selection.calibration_queries": 4,
    }
    file = folder / "config.yaml"
    file.write_text(config_to_yaml(make_config(overrides)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def run(config, outside) -> Path:
    """A run of an update and its evaluation."""
    assert main(["train", "--config", str(config), "--run", "a", "--runs-folder", str(config.parent)]) == 0
    return config.parent / "a"


OUTSIDE = ("--embedder.base-url", "http://embeddings.example/v1", "--embedder.send-local-text", "true")
COMMANDS = {  # arguments, what is wrong with the service, exit code
    "train, with faults": (("train", "CONFIG", "--run", "c", "NEW", "--evaluation.articles", "0"), QUICK, 0),
    "train, key refused": (("train", "CONFIG", "--run", "d"), ("key",), 4),
    "train, forbidden": (("train", "CONFIG", "--run", "d"), ("forbidden",), 4),
    "train, quota used up": (("train", "CONFIG", "--run", "d"), ("insufficient_quota",), 6),
    "train, nonsense": (("train", "CONFIG", "--run", "d"), ("html",), 5),
    "train, key in an address": (("train", "CONFIG", "--run", "d", "ADDRESS"), (), 2),
    "config, key in an address": (("config", "CONFIG", "ADDRESS"), (), 2),
    "corpus, key in an address": (
        ("corpus", "CONFIG", "--corpus.site", f"https://me:{IN_ADDRESS}@wiki.example"),
        (),
        2,
    ),
    "train --dry-run": (("train", "CONFIG", "--dry-run"), (), 0),
    "train, through the proxy": (("train", "CONFIG", "--run", "e", *OUTSIDE), (), 4),  # which the key must not pass
    "corpus": (("corpus", "CONFIG"), (), 0),
    "corpus, no wiki": (("corpus", "--preset", "text", "--model.name", "tiny", "WIKI", "NEW"), (), 5),
    "headroom": (("headroom", "CONFIG"), (), 0),
    "doctor": (("doctor", "CONFIG"), (), 0),
    "config": (("config", "CONFIG"), (), 0),
    "evaluate": (("evaluate", "RUN"), (), 0),
    "rollout": (("rollout", "RUN", "--out", "orders.jsonl"), (), 0),
    "report": (("report", "RUN"), (), 0),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_secret_is_shown_or_written(run, config, proxy, tmp_path, monkeypatch, capfd, caplog, command):
    monkeypatch.chdir(tmp_path)
    arguments, faults, expected = COMMANDS[command]
    wiki = ("--corpus.kind", "wikipedia", "--corpus.title", "Mill", "--corpus.site", "http://wiki.example/w/api.php")
    words = {
        "CONFIG": ("--config", str(config)),
        "RUN": (str(run),),
        "WIKI": wiki,
        "ADDRESS": ("--embedder.base-url", f"https://me:{IN_ADDRESS}@service.example/v1?key={IN_ADDRESS}"),
        "NEW": ("--network.cache", str(tmp_path / "cache"), "--network.deadline-s", "5"),
    }
    proxy.key = "another" if faults == ("key",) else KEY
    proxy.faults, proxy.probability = faults, {0: 0.0, 1: 1.0}.get(len(faults), 0.4)
    try:
        code = main([part for word in arguments for part in words.get(word, (word,))])
    finally:
        proxy.probability = 0.0
    out, err = capfd.readouterr()
    assert code == expected, err
    assert "do not compare" not in err  # an evaluation of the same text is the same
    written = [path for folder in (tmp_path, config.parent) for path in folder.rglob("*") if path.is_file()]
    shown = {str(path): path.read_bytes() for path in written}
    shown |= {"output": out.encode(), "errors": err.encode(), "log": caplog.text.encode()}
    for secret in SECRETS:
        assert [where for where, text in shown.items() if secret.encode() in text] == []


def test_the_secrets_were_there(run, proxy):
    """So that the test above has something to find."""
    headers = {name.lower(): value for request in proxy.requests for name, value in request.headers.items()}
    assert headers["authorization"] == f"Bearer {KEY}"
    assert headers["proxy-authorization"] == f"Basic {SENT}"
    assert redact(f"{KEY} {TOKEN} http://reader:{PASSWORD}@a") == "[OPENAI_API_KEY] [HF_TOKEN] http://[password]@a"
    assert redact(f"Basic {SENT}, {PASSWORD}, {DATABASE}") == "Basic [http_proxy], [http_proxy], [DATABASE_URL]"
