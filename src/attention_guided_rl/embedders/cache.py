"""Vector store: every embedding once computed, by whom the missing ones are being computed, and what was spent.

One SQLite file serves all encoders, runs and processes of a user. A vector is on the disk before anybody uses it, and
the first one stored for a text is the only one ever used: so a run that is killed and resumed sees the same numbers
and pays for nothing twice, even if the service answers a little differently each time. SQLite's write-ahead log needs
a local disk, not a network file system.
"""

import contextlib
import hashlib
import logging
import os
import sqlite3
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock
from jaxtyping import Float32

from attention_guided_rl.errors import SpendError, StorageError

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
        self._path = path
        self._owner = f"{os.getpid()}-{time.time_ns()}"
        with (
            self._errors(),
            FileLock(path.with_suffix(".lock"), mode=0o600),
        ):  # SQLite does not wait for a change of journal mode
            self._db = sqlite3.connect(path, timeout=LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)
            weakref.finalize(self, self._db.close)
            path.chmod(0o600)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")  # a commit returns when it is on the disk
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA):
                raise StorageError(f"{path}: made by another version (schema {version}); set network.cache elsewhere")
            self._db.executescript(_TABLES + f"PRAGMA user_version = {SCHEMA};")

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
                        logger.warning("%s: a stored vector is damaged; it will be computed again", self._path)
                        self._db.execute("DELETE FROM vectors WHERE key = ?", (key,))
        return found

    def put(self, identity: str, vectors: Mapping[str, Float32[np.ndarray, " _"]]) -> Vectors:
        """Store vectors durably and give up the claims on them; return what is stored: the first of each text."""
        rows = [(_key(identity, text), np.asarray(vector, np.float32).tobytes()) for text, vector in vectors.items()]
        with self._transaction():
            for key, vector in rows:
                values = (key, vector, _checksum(key, vector))
                self._db.execute("INSERT OR IGNORE INTO vectors VALUES (?, ?, ?)", values)
                self._db.execute("DELETE FROM claims WHERE key = ?", (key,))
        stored = self.get(identity, vectors)
        return stored if len(stored) == len(vectors) else self.put(identity, vectors)  # a damaged one had the place

    def claim(self, identity: str, texts: Sequence[str], seconds: float) -> list[str]:
        """Return the texts that this process shall compute: neither stored nor claimed by another, for `seconds`."""
        now, mine = time.time(), []
        with self._transaction():
            for text in texts:
                key = _key(identity, text)
                if self._db.execute("SELECT 1 FROM vectors WHERE key = ?", (key,)).fetchone():
                    continue
                claimed = self._db.execute("SELECT owner, expires FROM claims WHERE key = ?", (key,)).fetchone()
                if claimed is None or claimed[0] == self._owner or claimed[1] < now:
                    values = (key, self._owner, now + seconds)
                    self._db.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", values)
                    mine.append(text)
        return mine

    def release(self) -> None:
        """Give up all claims of this process."""
        with self._transaction():
            self._db.execute("DELETE FROM claims WHERE owner = ?", (self._owner,))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Run statements as one write, alone among all processes, durable at the end."""
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._db.in_transaction:  # after some errors SQLite has gone back by itself
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StorageError(f"{self._path}: {error}; free some space, or set network.cache elsewhere") from error


class Ledger:
    """What an account has spent, under a cap that holds whatever fails: money is reserved before it is spent.

    All processes of a run share the account; what a killed process had reserved counts as spent.
    """

    def __init__(self, store: VectorStore, account: str, max_usd: float | None) -> None:
        self._store, self._account = store, account
        self._cap = None if max_usd is None else int(max_usd * NANO)

    def reserve(self, nano_usd: int) -> int:
        """Set an amount aside and return the number of the entry.

        Raises:
            SpendError: it would pass the cap.
        """
        with self._store._transaction():
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
        with self._store._transaction():
            self._store._db.execute("UPDATE spending SET nano_usd = ? WHERE id = ?", (nano_usd, entry))

    @property
    def spent_usd(self) -> float:
        """Dollars spent or reserved so far."""
        with self._store._errors():
            return self._sum() / NANO

    def _sum(self) -> int:
        query = "SELECT COALESCE(SUM(nano_usd), 0) FROM spending WHERE account = ?"
        return int(self._store._db.execute(query, (self._account,)).fetchone()[0])


def _key(identity: str, text: str) -> bytes:
    return hashlib.sha256(f"{identity}\0{text}".encode()).digest()


def _checksum(key: bytes, vector: bytes) -> bytes:
    return hashlib.sha256(key + vector).digest()[:8]


def _chunks(keys: list[bytes]) -> Iterator[list[bytes]]:
    for start in range(0, len(keys), _MAX_VARIABLES):
        yield keys[start : start + _MAX_VARIABLES]


def _marks(keys: list[bytes]) -> str:
    return ", ".join("?" * len(keys))
