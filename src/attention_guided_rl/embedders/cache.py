"""Vector store: every embedding once computed, by whom the missing ones are being computed, and what was spent.

One SQLite file serves all encoders, runs and processes of a user. A vector is on the disk before anybody uses it, and
the first one stored for a text is the only one ever used: so a run that is killed and resumed sees the same numbers
and pays for nothing twice, even if the service answers a little differently each time. SQLite's write-ahead log needs
a local disk, not a network file system.

Two things have to be on the disk before the next step: what is reserved, and vectors. The rest (claims, settlements,
releases) is seen by other processes at once, but a power failure may undo it: that frees claims, whose owners are gone,
and leaves a larger sum reserved, which is safe.
"""

import contextlib
import hashlib
import logging
import sqlite3
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Float32

from attention_guided_rl.errors import ConfigError, SpendError, StorageError
from attention_guided_rl.storage import io_step

SCHEMA = 1
LOCK_TIMEOUT = 60.0  # seconds to wait for another process's write
NANO = 10**9  # spending is added up in whole billionths of a dollar
_MAX_VARIABLES = 500  # of one statement; SQLite's own limit is larger
_TABLES = """
CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB NOT NULL, checksum BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS claims (key BLOB PRIMARY KEY, owner TEXT NOT NULL, expires REAL NOT NULL);
CREATE TABLE IF NOT EXISTS spending (id INTEGER PRIMARY KEY, account TEXT NOT NULL, nano_usd INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS spending_account ON spending (account);
"""

logger = logging.getLogger(__name__)
Vectors = dict[str, Float32[np.ndarray, " _"]]


class VectorStore:
    """Vectors by (encoder identity, exact text), with claims that keep two processes from paying for the same text."""

    def __init__(self, path: Path) -> None:
        """Open or create the file; raise StorageError if it cannot be used."""
        self.path = path
        self._owners = path.with_suffix(".owners")
        self._owner = uuid.uuid4().hex
        self._lock: FileLock | None = None
        with (
            self._errors(),
            FileLock(path.with_suffix(".lock"), mode=0o600),
        ):  # SQLite does not wait for a change of journal mode
            self._db = sqlite3.connect(path, timeout=LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)
            weakref.finalize(self, self._db.close)
            path.chmod(0o600)
            self._db.execute("PRAGMA journal_mode = WAL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA):
                raise StorageError(f"{path}: made by another version (schema {version}); set network.cache elsewhere")
            self._db.executescript(_TABLES + f"PRAGMA user_version = {SCHEMA};")
        with self._transaction(durable=False):
            self._forget_the_dead()

    def get(self, identity: str, texts: Iterable[str]) -> Vectors:
        """Return the vectors that are there. A damaged one counts as missing and is dropped."""
        by_key = {_key(identity, text): text for text in texts}
        found: Vectors = {}
        with self._errors():
            for keys in _chunks(list(by_key)):
                query = f"SELECT key, vector, checksum FROM vectors WHERE key IN ({_marks(keys)})"
                for key, vector, checksum in self._db.execute(query, keys).fetchall():
                    if checksum == _checksum(key, vector):
                        found[by_key[key]] = np.frombuffer(vector, np.float32)
                    else:
                        logger.warning("%s: a stored vector is damaged; it will be computed again", self.path)
                        self._db.execute("DELETE FROM vectors WHERE key = ?", (key,))
        return found

    def put(self, identity: str, vectors: Mapping[str, Float32[np.ndarray, " _"]]) -> Vectors:
        """Store vectors durably and give up the claims on them; return what is stored: the first of each text."""
        rows = [(_key(identity, text), np.asarray(vector, np.float32).tobytes()) for text, vector in vectors.items()]
        with self._transaction(durable=True):
            for key, vector in rows:
                values = (key, vector, _checksum(key, vector))
                self._db.execute("INSERT OR IGNORE INTO vectors VALUES (?, ?, ?)", values)
                self._db.execute("DELETE FROM claims WHERE key = ?", (key,))
        stored = self.get(identity, vectors)
        return stored if len(stored) == len(vectors) else self.put(identity, vectors)  # a damaged one had the place

    def claim(self, identity: str, texts: Sequence[str], seconds: float) -> list[str]:
        """Return the texts that this store shall compute: neither stored nor claimed by another.

        A claim ends after `seconds`, or when its owner does: then the operating system gives up the lock on its file.
        """
        now, mine = time.time(), []
        with self._transaction(durable=False):
            self._show_life()
            dead: dict[str, bool] = {}
            for text in texts:
                key = _key(identity, text)
                if self._db.execute("SELECT 1 FROM vectors WHERE key = ?", (key,)).fetchone():
                    continue
                claimed = self._db.execute("SELECT owner, expires FROM claims WHERE key = ?", (key,)).fetchone()
                if claimed is not None and claimed[0] not in dead:
                    dead[claimed[0]] = claimed[0] != self._owner and self._is_dead(claimed[0])
                if claimed is None or claimed[0] == self._owner or claimed[1] < now or dead[claimed[0]]:
                    values = (key, self._owner, now + seconds)
                    self._db.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", values)
                    mine.append(text)
        return mine

    def release(self) -> None:
        """Give up all claims of this store."""
        with self._transaction(durable=False):
            self._db.execute("DELETE FROM claims WHERE owner = ?", (self._owner,))

    # Files of owners are made, looked at and removed within a transaction only, so by one process at a time.

    def _show_life(self) -> None:
        """Hold a lock on this owner's file from the first claim on."""
        if self._lock is None:
            self._owners.mkdir(exist_ok=True, mode=0o700)
            self._lock = _owner_lock(self._owners / self._owner)
            self._lock.acquire(timeout=0)
            weakref.finalize(self, _give_up, self._lock)

    def _is_dead(self, owner: str) -> bool:
        """Return whether nobody holds the lock on an owner's file; if so, remove it."""
        file = self._owners / owner
        if not owner.isalnum() or not file.exists():
            return True
        lock = _owner_lock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        _give_up(lock)
        return True

    def _forget_the_dead(self) -> None:
        """Drop the files of owners that are gone, and all claims but those of the living."""
        for (owner,) in self._db.execute("SELECT DISTINCT owner FROM claims").fetchall():
            if self._is_dead(owner):
                self._db.execute("DELETE FROM claims WHERE owner = ?", (owner,))
        for file in self._owners.glob("*"):
            self._is_dead(file.name)

    @contextlib.contextmanager
    def _transaction(self, *, durable: bool) -> Iterator[None]:
        """Run statements as one write, alone among all processes; `durable`: it is on the disk at the end."""
        with self._errors():
            self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                io_step("commit vectors" if durable else "commit claims")
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # after some errors SQLite has gone back by itself
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StorageError(f"{self.path}: {error}; free some space, or set network.cache elsewhere") from error


class Ledger:
    """What an account has spent, under a cap that holds whatever fails: money is reserved before it is spent.

    All processes of a run share the account; what a killed process had reserved counts as spent.
    """

    def __init__(self, store: VectorStore, account: str, max_usd: float | None, *, opened_before: bool = False) -> None:
        """Open an account, or go on with one.

        Raises:
            ConfigError: it was opened before, and not in this store, so what it has spent stands elsewhere.
        """
        self._store, self._account = store, account
        self._cap = None if max_usd is None else int(max_usd * NANO)
        with store._transaction(durable=True):
            if store._db.execute("SELECT 1 FROM spending WHERE account = ?", (account,)).fetchone():
                return
            if opened_before:
                raise ConfigError(
                    f"network.cache: {store.path.parent} does not know what this run has spent on embeddings; name the "
                    "cache that it began with, or start a new run"
                )
            store._db.execute("INSERT INTO spending (account, nano_usd) VALUES (?, 0)", (account,))

    def reserve(self, nano_usd: int) -> int:
        """Set an amount aside and return the number of the entry.

        Raises:
            SpendError: it would pass the cap.
        """
        with self._store._transaction(durable=True):
            spent = self._sum()
            if self._cap is not None and spent + nano_usd > self._cap:
                raise SpendError(
                    f"embedder.max_usd: {spent / NANO:.6f} of {self._cap / NANO:.6f} USD are spent, and the next "
                    f"request may cost {nano_usd / NANO:.6f}; raise it to go on"
                )
            cursor = self._store._db.execute(
                "INSERT INTO spending (account, nano_usd) VALUES (?, ?)", (self._account, nano_usd)
            )
            return int(cursor.lastrowid or 0)

    def settle(self, entry: int, nano_usd: int) -> None:
        """Replace what was reserved by what was billed."""
        with self._store._transaction(durable=False):
            self._store._db.execute("UPDATE spending SET nano_usd = ? WHERE id = ?", (nano_usd, entry))

    @property
    def spent_usd(self) -> float:
        """Dollars spent or reserved so far."""
        with self._store._errors():
            return self._sum() / NANO

    def _sum(self) -> int:
        query = "SELECT COALESCE(SUM(nano_usd), 0) FROM spending WHERE account = ?"
        return int(self._store._db.execute(query, (self._account,)).fetchone()[0])


def _owner_lock(file: Path) -> FileLock:
    return FileLock(file, mode=0o600, thread_local=False)


def _give_up(lock: FileLock) -> None:
    """Remove an owner's file, then its lock: whoever finds no file takes the owner for dead, which is right by then."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def _key(identity: str, text: str) -> bytes:
    return hashlib.sha256(f"{identity}\0{text}".encode()).digest()


def _checksum(key: bytes, vector: bytes) -> bytes:
    return hashlib.sha256(key + vector).digest()[:8]


def _chunks(keys: list[bytes]) -> Iterator[list[bytes]]:
    for start in range(0, len(keys), _MAX_VARIABLES):
        yield keys[start : start + _MAX_VARIABLES]


def _marks(keys: list[bytes]) -> str:
    return ", ".join("?" * len(keys))
