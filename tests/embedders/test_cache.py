"""The vector store and the ledger: what is stored stays, nothing is computed twice, no cap is passed."""

import gc
import itertools
import logging
import os
import random
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import attention_guided_rl
from attention_guided_rl.config import NetworkConfig
from attention_guided_rl.embedders import text as text_module
from attention_guided_rl.embedders.cache import NANO, Ledger, VectorStore
from attention_guided_rl.embedders.text import CANARIES, STORE, TextEmbedder
from attention_guided_rl.errors import ConfigError, SpendError, StorageError
from attention_guided_rl.network import Network

PRELUDE = f"""
import os, sys, time, types
from pathlib import Path
package = types.ModuleType("attention_guided_rl.embedders")  # without the embedders that load models: they take seconds
package.__path__ = [{str(Path(attention_guided_rl.__file__).parent / "embedders")!r}]
sys.modules[package.__name__] = package
from attention_guided_rl.embedders.cache import *

def say(word):
    print(word, flush=True)

def wait_for_go():
    say("ready")
    while not Path("go").exists():
        time.sleep(0.001)
"""


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "vectors.sqlite"


@pytest.fixture
def start(tmp_path):
    """Return what starts a script in the test's folder, and kills it at the end if it still runs."""
    started: list[subprocess.Popen] = []

    def run(script: str, *arguments: object, under: tuple[str, ...] = ()) -> subprocess.Popen:
        command = [*under, sys.executable, "-c", PRELUDE + script, *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def together(tmp_path: Path, processes: list[subprocess.Popen]) -> list[str]:
    """Let processes go at once; return what each says in the end."""
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return said


def kill_after(process: subprocess.Popen, word: str) -> None:
    assert process.stdout.readline() == f"{word}\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def vector(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


def plain(vectors: dict[str, np.ndarray]) -> dict[str, list[float]]:
    return {text: found.tolist() for text, found in vectors.items()}


# ---- vectors ----


def test_what_was_stored_is_found_and_nothing_else(path):
    store = VectorStore(path)
    assert store.get("model", ["ant"]) == {}
    assert plain(store.put("model", {"ant": vector(0.5, -2), "bee": vector(1, 3)})) == {"ant": [0.5, -2], "bee": [1, 3]}
    assert plain(VectorStore(path).get("model", ["bee", "seal", "bee"])) == {"bee": [1, 3]}
    assert store.get("model", []) == {}


def test_a_vector_is_there_although_the_process_is_killed_right_behind_put(path, start):
    script = """
import numpy as np
store = VectorStore(Path("vectors.sqlite"))
store.put("model", {"ant": np.array([0.1, 0.2], np.float32)})
say("stored")
time.sleep(60)
"""
    kill_after(start(script), "stored")
    (found,) = VectorStore(path).get("model", ["ant"]).values()
    assert found.tobytes() == vector(0.1, 0.2).tobytes()


def test_reserve_and_put_return_when_the_disk_has_it(path, start, tmp_path):
    """A killed process proves nothing about the disk, so the order of its system calls is read."""
    trace = tmp_path / "trace"
    under = ("strace", "-f", "-s", "8", "-e", "trace=openat,write,pwrite64,fsync,fdatasync", "-o", str(trace))
    if not shutil.which("strace") or subprocess.run([*under, "true"], capture_output=True).returncode:
        pytest.skip("strace cannot be used here")
    script = """
import numpy as np
store = VectorStore(Path("vectors.sqlite"))
ledger = Ledger(store, "run", None)
ledger.reserve(5)
os.write(1, b"claim\\n")
store.claim("model", ["ant"], 60)
os.write(1, b"reserve\\n")
entry = ledger.reserve(100)
os.write(1, b"settle\\n")
ledger.settle(entry, 50)
os.write(1, b"put\\n")
store.put("model", {"ant": np.zeros(1536, np.float32)})
os.write(1, b"end\\n")
"""
    process = start(script, under=under)
    steps = ["claim", "reserve", "settle", "put", "end"]
    assert process.communicate(timeout=60)[0].split() == steps
    calls = [line.split(maxsplit=1)[1] for line in trace.read_text(encoding="utf-8").splitlines()]
    begins = [next(i for i, call in enumerate(calls) if call.startswith(f'write(1, "{step}')) for step in steps]
    (log,) = {m[1] for call in calls if (m := re.match(r'openat\(.*vectors\.sqlite-wal".*= (\d+)', call))}
    flushes = {}
    for step, first, last in zip(steps, begins, begins[1:], strict=False):
        writes = [i for i in range(first, last) if calls[i].startswith(f"pwrite64({log},")]
        found = [i for i in range(first, last) if re.match(rf"(fsync|fdatasync)\({log}\) += 0", calls[i])]
        assert writes
        flushes[step] = len([i for i in found if i > writes[-1]])
    assert flushes == {"claim": 0, "reserve": 1, "settle": 0, "put": 1}  # two a call, which are all that matter


def test_the_first_vector_of_a_text_is_the_only_one(path):
    one, other = VectorStore(path), VectorStore(path)
    assert plain(one.put("model", {"ant": vector(1, 2)})) == {"ant": [1, 2]}
    assert plain(other.put("model", {"ant": vector(9, 9), "bee": vector(3, 4)})) == {"ant": [1, 2], "bee": [3, 4]}
    assert plain(one.get("model", ["ant", "bee"])) == {"ant": [1, 2], "bee": [3, 4]}


def test_texts_and_encoders_are_told_apart_to_the_last_byte(path):
    store = VectorStore(path)
    alike = [
        *("ant", "ant ", " ant", "Ant", "ant\n", "ant\0", "", " "),
        *("\u00e9", "e\u0301", "\u212b", "\u00c5", "\ufb01", "fi"),  # equal after Unicode normalisation
    ]
    for number, text in enumerate(alike):
        assert store.get("model", [text]) == {}
        store.put("model", {text: vector(number)})
    found = store.get("model", alike)
    assert [found[text].item() for text in alike] == list(range(len(alike)))
    assert store.get("model ", alike) == store.get("mode", alike) == store.get("model/512", alike) == {}


def test_five_thousand_texts_in_one_look(path):
    texts = [f"text {i}" for i in range(5000)]
    store = VectorStore(path)
    store.put("model", {text: vector(i, -i) for i, text in enumerate(texts) if i % 5})
    found = store.get("model", texts)
    assert len(found) == 4000
    assert all(found[f"text {i}"].tolist() == [i, -i] for i in range(5000) if i % 5)
    assert set(store.claim("model", texts, 60)) == {f"text {i}" for i in range(0, 5000, 5)}


def flip(blob: bytes, bit: int) -> bytes:
    return blob[: bit // 8] + bytes([blob[bit // 8] ^ 1 << bit % 8]) + blob[bit // 8 + 1 :]


@pytest.mark.parametrize("column", ["vector", "checksum"])
@pytest.mark.parametrize("bit", [0, 31, 63])
def test_a_flipped_bit_is_noticed_and_the_vector_is_stored_anew(path, column, bit, caplog):
    VectorStore(path).put("model", {"ant": vector(1, 2), "bee": vector(3, 4)})
    database = sqlite3.connect(path)
    (blob,) = database.execute(f"SELECT {column} FROM vectors ORDER BY rowid").fetchone()
    database.execute(f"UPDATE vectors SET {column} = ? WHERE rowid = 1", (flip(blob, bit),))
    database.commit()
    database.close()

    store = VectorStore(path)
    with caplog.at_level(logging.WARNING):
        assert plain(store.get("model", ["ant", "bee"])) == {"bee": [3, 4]}
    assert "damaged" in caplog.text
    assert store.claim("model", ["ant", "bee"], 60) == ["ant"]
    assert plain(store.put("model", {"ant": vector(5, 6)})) == {"ant": [5, 6]}


def test_a_damaged_vector_does_not_keep_its_place_from_a_new_one(path):
    store = VectorStore(path)
    store.put("model", {"ant": vector(1, 2)})
    database = sqlite3.connect(path)
    database.execute("UPDATE vectors SET checksum = x'00'")
    database.commit()
    database.close()
    assert plain(store.put("model", {"ant": vector(5, 6)})) == {"ant": [5, 6]}  # nobody has looked in between


def test_vectors_in_each_other_s_places_are_noticed(path):
    VectorStore(path).put("model", {"ant": vector(1, 2), "bee": vector(3, 4)})
    database = sqlite3.connect(path)
    rows = database.execute("SELECT key, vector, checksum FROM vectors").fetchall()
    for (key, _, _), (_, blob, checksum) in zip(rows, reversed(rows), strict=True):
        database.execute("UPDATE vectors SET vector = ?, checksum = ? WHERE key = ?", (blob, checksum, key))
    database.commit()
    database.close()
    assert VectorStore(path).get("model", ["ant", "bee"]) == {}


def test_damage_anywhere_in_the_file_never_gives_a_wrong_vector(path, tmp_path):
    texts = {f"text {i}": vector(*np.random.default_rng(i).standard_normal(64)) for i in range(60)}
    VectorStore(path).put("model", texts)
    database = sqlite3.connect(path)
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    whole, chance = path.read_bytes(), random.Random(0)
    outcomes = {"whole": 0, "missing": 0, "refused": 0}
    for trial in range(50):
        damaged = tmp_path / f"{trial}.sqlite"
        damaged.write_bytes(flip(whole, chance.randrange(8 * len(whole))))
        try:
            found = VectorStore(damaged).get("model", texts)
        except StorageError:
            outcomes["refused"] += 1
            continue
        assert all(found[text].tobytes() == texts[text].tobytes() for text in found), trial
        outcomes["whole" if len(found) == len(texts) else "missing"] += 1
    assert outcomes["missing"] > 12


# ---- claims ----


def test_a_text_is_claimed_by_one_at_a_time(path):
    one, other = VectorStore(path), VectorStore(path)
    assert one.claim("model", ["ant", "bee"], 60) == ["ant", "bee"]
    assert one.claim("model", ["bee", "seal"], 60) == ["bee", "seal"]  # again, and one more
    assert other.claim("model", ["ant", "bee", "cat"], 60) == ["cat"]
    assert other.claim("another model", ["ant"], 60) == ["ant"]
    one.put("model", {"ant": vector(1)})
    assert other.claim("model", ["ant", "bee", "seal"], 60) == []  # stored, claimed, claimed
    one.release()
    assert other.claim("model", ["ant", "bee", "seal"], 60) == ["bee", "seal"]


def test_a_claim_ends_with_its_time(path):
    one, other = VectorStore(path), VectorStore(path)
    one.claim("model", ["ant"], 0.2)
    assert other.claim("model", ["ant"], 60) == []
    time.sleep(0.25)
    assert other.claim("model", ["ant"], 60) == ["ant"]
    assert one.claim("model", ["ant"], 60) == []


WORKER = """
import numpy as np, torch
from attention_guided_rl.config import NetworkConfig
from attention_guided_rl.embedders.text import TextEmbedder
from attention_guided_rl.network import Network

name, seed = sys.argv[1], int(sys.argv[2])

class Slow:
    query_prompt, key_prompt = "", ""

    def __init__(self, identity, pause_s):
        self.identity, self._pause_s = identity, pause_s

    def batches(self, texts):
        return [texts[i : i + 10] for i in range(0, len(texts), 10)]

    def encode(self, texts):
        with open(f"{name}.{self.identity}.log", "a") as log:
            log.writelines(text + "\\n" for text in texts)
        say("encoding")
        time.sleep(self._pause_s)
        return np.random.default_rng(seed).standard_normal((len(texts), 4)).astype(np.float32)

def embed(identity, deadline_s, pause_s):
    network = Network(NetworkConfig(cache=Path("cache"), deadline_s=deadline_s))
    embedder = TextEmbedder(Slow(identity, pause_s), network, lambda ids: f"text {ids[0]}")
    ids = torch.from_numpy(np.random.default_rng(seed).permutation(120))[:, None]
    vectors = embedder.embed_keys(ids, torch.ones_like(ids, dtype=torch.bool))
    np.save(f"{name}.{identity}", vectors[ids[:, 0].argsort(), 0].numpy())

wait_for_go()
"""


class Known:
    """An encoder that counts, of the identity that the killed process had."""

    identity, query_prompt, key_prompt = "killed", "", ""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def batches(self, texts):
        return [texts] if texts else []

    def encode(self, texts):
        self.texts += texts
        return np.eye(len(texts), 4, dtype=np.float32)


@pytest.fixture
def answered(tmp_path) -> Path:
    """The cache folder when the canaries of all workers' encoders are in it."""
    store = VectorStore(Network(NetworkConfig(cache=tmp_path / "cache")).cache(STORE))
    for identity in ("short", "long", "killed"):
        store.put(f"{identity}/canaries", {text: vector(1, 0, 0, 0) for text in CANARIES})
    return tmp_path / "cache"


def test_two_processes_that_need_the_same_texts_compute_each_once(tmp_path, start, answered):
    """Once in less time than a claim lasts (120 s), once in more (0.2 s for work of 0.48 s)."""
    script = f"""{WORKER}
embed("short", deadline_s=60, pause_s=0.005)
embed("long", deadline_s=0.1, pause_s=0.04)
os._exit(0)
"""
    together(tmp_path, [start(script, name, seed) for seed, name in enumerate("ab")])
    for identity in ("short", "long"):
        a, b = np.load(tmp_path / f"a.{identity}.npy"), np.load(tmp_path / f"b.{identity}.npy")
        assert a.shape == (120, 4)
        assert a.tobytes() == b.tobytes()
        logs = [log.read_text(encoding="utf-8").splitlines() for log in tmp_path.glob(f"*.{identity}.log")]
        assert sorted(itertools.chain(*logs)) == sorted(f"text {i}" for i in range(120)), identity


def claims(path: Path) -> int:
    database = sqlite3.connect(path)
    try:
        return database.execute("SELECT COUNT(*) FROM claims").fetchone()[0]
    finally:
        database.close()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("moment", ["before the store is opened", "while its texts are waited for"])
def test_the_texts_of_a_killed_process_are_taken_over_at_once(start, answered, moment, monkeypatch, caplog):
    """Its claims last an hour, and its other process lives on."""
    script = """
store = VectorStore(Path(sys.argv[1]))
store.claim("killed", [f"text {i}" for i in map(int, sys.argv[2:])], seconds=3600)
say("claimed")
time.sleep(60)
"""
    alive, killed = start(script, answered / STORE, 4), start(script, answered / STORE, 0, 1, 2, 3)
    assert alive.stdout.readline() == killed.stdout.readline() == "claimed\n"
    if moment == "before the store is opened":
        killed.kill()
        killed.wait()
    encoder = Known()
    embedder = TextEmbedder(encoder, Network(NetworkConfig(cache=answered)), lambda ids: f"text {ids[0]}")
    monkeypatch.setattr(text_module, "QUIET_WAIT", 0.1)
    timer = threading.Timer(0.3, killed.kill)
    timer.start()
    began = time.monotonic()
    embedder.embed_keys(torch.arange(4)[:, None], torch.ones(4, 1, dtype=torch.bool))
    assert time.monotonic() - began < 2.0
    assert encoder.texts == ["text 0", "text 1", "text 2", "text 3"]
    waited = ["waiting for 4 texts that another process is having embedded"]
    assert [record.getMessage() for record in caplog.records] == (waited if moment.startswith("while") else [])
    assert claims(answered / STORE) == 1
    assert VectorStore(answered / STORE).claim("killed", ["text 4"], 60) == []  # who lives keeps his
    timer.join()


def test_what_is_left_of_the_dead_is_removed_when_a_store_is_opened(path, start, tmp_path):
    script = """
store = VectorStore(Path("vectors.sqlite"))
store.claim("model", ["ant", "bee"], 3600)
say("claimed")
time.sleep(60)
"""
    kill_after(start(script), "claimed")
    assert claims(path) == 2
    VectorStore(path)
    assert claims(path) == 0
    assert list((tmp_path / "vectors.owners").iterdir()) == []


def test_a_claim_whose_owner_has_no_file_is_free(path):
    """As after the removal of all but the store itself; and a name of an owner never leads out of the folder."""
    store = VectorStore(path)
    store.claim("model", ["ant", "bee"], 3600)
    victim = path.with_name("victim")
    victim.touch()
    names = ("gone", "../victim")
    for text, name in zip(("ant", "bee"), names, strict=True):
        key = store._db.execute("SELECT key FROM claims WHERE owner = ?", (store._owner,)).fetchone()
        store._db.execute("UPDATE claims SET owner = ? WHERE key = ?", (name, *key))
        assert text in VectorStore(path).claim("model", ["ant", "bee"], 3600)
    assert victim.exists()


def test_a_store_that_is_let_go_leaves_no_claim_behind(path, tmp_path):
    one = VectorStore(path)
    one.claim("model", ["ant"], 3600)
    assert len(list((tmp_path / "vectors.owners").iterdir())) == 1
    del one
    gc.collect()
    assert VectorStore(path).claim("model", ["ant"], 60) == ["ant"]


# ---- the file ----


def test_the_cache_is_for_its_user_only(tmp_path):
    network = Network(NetworkConfig(cache=tmp_path / "new" / "cache"))
    before = os.umask(0o022)
    try:
        store = VectorStore(network.cache(STORE))
        store.put("model", {"ant": vector(1)})
        store.claim("model", ["bee"], 60)
    finally:
        os.umask(before)
    folder = tmp_path / "new" / "cache"
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert modes.pop("embeddings.owners") == 0o700
    assert modes == dict.fromkeys((STORE, f"{STORE}-wal", f"{STORE}-shm", "embeddings.lock"), 0o600)
    assert [stat.S_IMODE(file.stat().st_mode) for file in (folder / "embeddings.owners").iterdir()] == [0o600]


def write_text(path: Path) -> None:
    path.write_text("Dear diary, " * 100, encoding="utf-8")


def make_folder(path: Path) -> None:
    path.mkdir()


def make_newer(path: Path) -> None:
    VectorStore(path)
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 7")
    database.close()


@pytest.mark.parametrize("make", [write_text, make_folder, make_newer])
def test_a_file_that_is_no_store_is_refused(path, make: Callable[[Path], None]):
    make(path)
    with pytest.raises(StorageError, match=re.escape(str(path))) as caught:
        VectorStore(path)
    assert caught.value.exit_code == 8
    assert "network.cache" in str(caught.value)


def test_processes_that_make_the_file_at_the_same_time(tmp_path, start):
    script = """
wait_for_go()
for i in range(6):
    VectorStore(Path(f"{i}.sqlite")).put("model", {str(os.getpid()): np.zeros(2, np.float32)})
"""
    together(tmp_path, [start(script) for _ in range(4)])
    for i in range(6):
        database = sqlite3.connect(tmp_path / f"{i}.sqlite")
        assert database.execute("SELECT COUNT(*) FROM vectors").fetchone() == (4,)
        database.close()


def test_a_full_disk_loses_nothing_and_is_forgiven(start):
    """On a file system of 2 MB, of which a ballast takes 1; when that is gone, the same store goes on."""
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    script = """
import subprocess
import numpy as np
from attention_guided_rl.errors import StorageError

Path("disk").mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", "disk"], check=True)
Path("disk/ballast").write_bytes(bytes(2**20))
store = VectorStore(Path("disk/vectors.sqlite"))
stored = 0
try:
    while stored < 1000:
        store.put("model", {f"text {stored}": np.full(1536, stored, np.float32)})
        stored += 1
except StorageError as error:
    say(error)
assert 20 < stored < 1000

def check(store):
    found = store.get("model", [f"text {i}" for i in range(stored)])
    assert len(found) == stored
    assert all((found[f"text {i}"] == i).all() for i in range(stored))

check(store)
check(VectorStore(Path("disk/vectors.sqlite")))
try:
    store.release()
except StorageError as error:
    say(error)
Path("disk/ballast").unlink()
store.put("model", {f"text {stored}": np.full(1536, stored, np.float32)})
stored += 1
check(store)
say("whole")
"""
    process = start(script, under=("unshare", "-Urm"))
    *errors, last = process.communicate(timeout=60)[0].splitlines()
    assert last == "whole"
    assert 1 <= len(errors) <= 2
    assert all(re.search("disk is full|disk I/O error", error) for error in errors), errors
    assert "free some space" in errors[0]


def test_a_store_that_may_not_grow_says_why_and_keeps_what_it_has(path):
    store = VectorStore(path)
    store.put("model", {"ant": vector(1, 2)})
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageError, match="full") as caught:
        store.put("model", {"bee": np.zeros(4096, np.float32)})
    assert caught.value.exit_code == 8
    store._db.execute("PRAGMA max_page_count = 1000")
    assert plain(store.put("model", {"bee": vector(3)})) == {"bee": [3]}
    assert plain(VectorStore(path).get("model", ["ant", "bee"])) == {"ant": [1, 2], "bee": [3]}


# ---- the ledger ----


def test_reserving_stops_before_the_cap(path):
    ledger = Ledger(VectorStore(path), "run", max_usd=1e-6)  # 1,000 billionths
    first = ledger.reserve(600)
    ledger.reserve(400)
    assert ledger.spent_usd == pytest.approx(1e-6)
    with pytest.raises(SpendError):
        ledger.reserve(1)
    ledger.settle(first, 150)  # less than feared
    assert ledger.spent_usd == pytest.approx(550e-9)
    ledger.reserve(450)
    with pytest.raises(SpendError):
        ledger.reserve(1)


def test_the_error_names_the_amounts_and_the_way_on(path):
    ledger = Ledger(VectorStore(path), "run", max_usd=0.25)
    ledger.reserve(int(0.2 * NANO))
    with pytest.raises(SpendError, match=r"0\.200000 of 0\.250000 USD.*0\.075000.*raise it") as caught:
        ledger.reserve(int(0.075 * NANO))
    assert caught.value.exit_code == 6
    assert "embedder.max_usd" in str(caught.value)
    assert ledger.spent_usd == pytest.approx(0.2)  # what was refused is not counted


def test_a_cap_of_nothing_allows_what_is_free(path):
    ledger = Ledger(VectorStore(path), "run", max_usd=0.0)
    ledger.reserve(0)
    with pytest.raises(SpendError):
        ledger.reserve(1)


def test_an_account_that_was_opened_elsewhere_is_refused(path):
    Ledger(VectorStore(path), "run", max_usd=None)  # which has spent nothing so far
    assert Ledger(VectorStore(path), "run", max_usd=None, opened_before=True).spent_usd == 0
    with pytest.raises(ConfigError, match=r"network\.cache.*does not know what this run has spent") as caught:
        Ledger(VectorStore(path), "other", max_usd=None, opened_before=True)
    assert caught.value.exit_code == 2


def test_spending_outlives_the_process_and_accounts_are_apart(path):
    Ledger(VectorStore(path), "run", max_usd=None).reserve(700)
    Ledger(VectorStore(path), "other", max_usd=None).reserve(50)
    assert Ledger(VectorStore(path), "run", max_usd=None).spent_usd == pytest.approx(700e-9)
    assert Ledger(VectorStore(path), "other", max_usd=None).spent_usd == pytest.approx(50e-9)
    assert Ledger(VectorStore(path), "third", max_usd=None).spent_usd == 0
    with pytest.raises(SpendError):
        Ledger(VectorStore(path), "run", max_usd=1e-6).reserve(301)
    Ledger(VectorStore(path), "run", max_usd=1e-6).reserve(300)


def test_what_a_killed_process_had_reserved_counts(path, start):
    script = """
Ledger(VectorStore(Path("vectors.sqlite")), "run", max_usd=1e-6).reserve(600)
say("reserved")
time.sleep(60)
"""
    kill_after(start(script), "reserved")
    ledger = Ledger(VectorStore(path), "run", max_usd=1e-6)
    with pytest.raises(SpendError):
        ledger.reserve(401)
    ledger.reserve(400)


def test_no_number_of_processes_passes_the_cap(path, start, tmp_path):
    script = """
import random
from attention_guided_rl.errors import SpendError
chance = random.Random(int(sys.argv[1]))
ledger = Ledger(VectorStore(Path("vectors.sqlite")), "run", max_usd=5_000e-9)
wait_for_go()
total = 0
try:
    while True:
        amount = chance.randrange(1, 200)
        entry = ledger.reserve(amount)
        if chance.random() < 0.5:
            billed = chance.randrange(amount + 1)
            ledger.settle(entry, billed)
            amount = billed
        total += amount
        time.sleep(0.001)  # a request takes its time, in which others have their turn
except SpendError:
    say(total)
"""
    totals = [int(said) for said in together(tmp_path, [start(script, seed) for seed in range(4)])]
    spent = Ledger(VectorStore(path), "run", max_usd=None).spent_usd * NANO
    assert sum(total > 0 for total in totals) >= 2  # SQLite does not serve them in turn
    assert sum(totals) == pytest.approx(spent)
    assert 5_000 - 200 < spent <= 5_000
