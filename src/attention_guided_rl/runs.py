"""Runs: the folder of a run from its creation to its evaluation. The Python surface behind the command line.

`runs/NAME/` holds config.yaml (resolved), environment.json, prompt.txt, the logs, checkpoints/, and, after the
evaluation, evaluation.jsonl, evaluation.json, figures/ and report.html. Nothing is written before the configuration,
the model and the corpora have been shown to work.
"""

import contextlib
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from attention_guided_rl.checkpoint import (
    check_fingerprints,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    updates_of,
    verify,
)
from attention_guided_rl.compare import read_evaluation, summarise_seeds
from attention_guided_rl.config import Config
from attention_guided_rl.config_files import config_to_dict, config_to_yaml
from attention_guided_rl.diagnostics import STEERABILITY_WARNING
from attention_guided_rl.distributed import Processes
from attention_guided_rl.errors import CheckpointError, ConfigError, RunInUseError, StorageError, UnsafeError
from attention_guided_rl.evaluation import evaluate_run
from attention_guided_rl.order_files import match_orders
from attention_guided_rl.plain_data import parse_json
from attention_guided_rl.randomness import Purpose
from attention_guided_rl.report.tables import print_summary
from attention_guided_rl.report.terminal import print_trajectory
from attention_guided_rl.run_settings import (
    MAY_CHANGE_ON_RESUME,
    differences,
    flatten,
    load_run_config,
    read_settings,
    require_seeds_of_one_setting,
)
from attention_guided_rl.screen import make_console, visible
from attention_guided_rl.session import PREPARED_ARTICLES, Session
from attention_guided_rl.storage import io_step, remove_folder, remove_leftovers, run_config, sync, write_text
from attention_guided_rl.tracking import environment_record
from attention_guided_rl.trainer import Trained
from attention_guided_rl.trainer import train as train_session

MAX_NAME = 100  # characters of a run's name


@dataclass(frozen=True, slots=True)
class RunResult:
    """Where a run is and how it ended."""

    folder: Path
    trained: Trained
    summary: dict[str, Any] | None


def train(config: Config, folder: Path, *, resume: bool = False) -> RunResult:
    """Train in a run folder and evaluate when all updates are done.

    Raises:
        AgrlError: of the kind that fits; a run folder that had been started can be resumed.
    """
    processes = Processes(config.training.device)
    folder = processes.broadcast(folder)  # a default name has the time of one clock
    if not resume and folder.exists():
        raise RunInUseError(f"{folder} exists; choose another name with --run, or add --resume to go on with it")
    has_checkpoint = resume and _check_resume(folder, config)
    console = make_console()
    account = processes.broadcast(_account(folder) if resume else uuid.uuid4().hex)
    session = Session(config, processes, account=account, goes_on=resume)
    if not has_checkpoint:
        with processes.meeting(), processes.main_first():
            _prepare(session, console if processes.is_main else Console(quiet=True))
    if not resume:
        if processes.is_main:
            _create(folder, session)
        processes.wait()
    with _lock(folder) if processes.is_main else contextlib.nullcontext():
        if resume and processes.is_main:
            remove_leftovers(folder)
            write_text(folder / "config.yaml", config_to_yaml(config))  # what may change, say the number of updates
        trained = train_session(session, folder, resume=has_checkpoint)
        num_cut = _num_cut_texts(session)
        num_cut_elsewhere = sum(processes.gather_objects([num_cut])) - num_cut
        summary = None
        if trained.interrupted_by is None and processes.is_main and config.evaluation.articles > 0:
            summary = evaluate_run(session, folder, trained.state.update, console)
        if processes.is_main and (spent := getattr(session.embedder, "spent_usd", 0)):
            console.print(f"embeddings of this run: {spent:.6f} USD spent", highlight=False)
        if processes.is_main and (num_cut := num_cut_elsewhere + _num_cut_texts(session)):
            console.print(f"texts of which only the beginning was embedded: {num_cut}", highlight=False)
    return RunResult(folder, trained, summary)


def evaluate(
    folder: Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    order_files: Sequence[Path] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run; `overrides` may change the `evaluation` section and the device.

    All arms are run unless `evaluation.arms` says otherwise. `order_files`: orders.jsonl files, each a further picker.
    """
    for key in overrides or {}:
        if not key.startswith(("evaluation.", "network.", "embedder.max_usd")) and key != "training.device":
            raise ConfigError(f"command line: --{key} cannot change for an evaluation; only evaluation.* can")
    with _lock(folder):
        session, update = open_run(folder, {"evaluation.arms": "all", **(overrides or {})})
        orders = match_orders(session, order_files)
        return evaluate_run(session, folder, update, console or make_console(), orders)


def evaluate_seeds(
    folders: Sequence[Path], overrides: Mapping[str, Any] | None = None, order_files: Sequence[Path] = ()
) -> dict[str, Any]:
    """Evaluate runs that differ by their seed, each in its folder, and print one table with seeds nested in articles.

    Raises:
        ConfigError: they differ in more than their seed, or do not have the same arms on the same articles.
    """
    if len(folders) == 1:
        return evaluate(folders[0], overrides, order_files=order_files)
    require_seeds_of_one_setting(
        [(str(f), {**read_settings(f), "checkpoint": latest_checkpoint(f).name}) for f in folders]
    )
    for folder in folders:
        evaluate(folder, overrides, order_files=order_files, console=Console(quiet=True))
    summary = summarise_seeds([read_evaluation(folder) for folder in folders])
    print_summary(make_console(), summary)
    return summary


def rollout(session: Session, *, num_articles: int = 1, out: Path | None = None) -> None:
    """Print the first of some held-out trajectories of the session's policy; write the orders of all to `out`."""
    evaluation = session.config.evaluation
    corpus = evaluation.corpus or session.config.corpus
    stream = session.stream(corpus, num_probes=evaluation.num_probes, purpose=Purpose.EVALUATION_POOL)
    pool = stream.next_pool(num_articles).to(session.model.device)
    rows = session.rollout(pool, session.uniforms(Purpose.EVALUATION, 0, range(num_articles), 1))
    q0 = session.counterfactual_uniforms(Purpose.EVALUATION_COUNTERFACTUAL, 0, range(num_articles), 1)
    paid = session.pay_for_evaluation(rows, pool, q0)
    print_trajectory(make_console(), session, paid, pool)
    if out is None:
        return
    records = [
        {
            "article": article.id,
            "source": article.source,
            "revision": article.revision,
            "hash": pool.pair_ids[a][0].rpartition("-")[0],
            "picks": rows.picks[a].tolist(),
            "pairs": [pool.pair_ids[a][pick] for pick in rows.picks[a].tolist()],
            "reward": float(paid.rewards.rewards[a].mean()),
        }
        for a, article in enumerate(pool.articles)
    ]
    write_text(out, "".join(json.dumps(r, allow_nan=False) + "\n" for r in records))


def open_run(folder: Path, overrides: Mapping[str, Any] | None = None) -> tuple[Session, int]:
    """Load a run's newest checkpoint; return the session and the number of updates it has had."""
    config = load_run_config(folder, overrides=overrides)
    checkpoint = latest_checkpoint(folder)
    session = Session(config, Processes(config.training.device), account=_account(folder), goes_on=True)
    check_fingerprints(checkpoint, verify(checkpoint)["fingerprints"], session.fingerprints)
    state = load_checkpoint(checkpoint, session.model, None, session.ema)
    session.temperature = state.temperature
    return session, state.update


def open_untrained(config: Config) -> Session:
    """Load a configuration as it is before training, with τ calibrated."""
    session = Session(config, Processes(config.training.device), account=uuid.uuid4().hex)
    _prepare(session, make_console())
    return session


def run_folder(name: str | None, preset: str | None, root: Path) -> Path:
    """Return the folder of a run: `root/NAME`, or for a new one without a name `root/<preset>-<UTC time>`.

    Raises:
        UnsafeError: the name would leave `root`.
        StorageError: it is too long.
    """
    if name is None:
        name = f"{preset or 'run'}-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or ".." in name:
        raise UnsafeError(f"--run {name[:100]!r}: a run name is letters, digits, '.', '_' and '-', without '..'")
    if len(name) > MAX_NAME:
        raise StorageError(f"--run: the name has {len(name)} characters; at most {MAX_NAME} make a folder everywhere")
    folder = root / name
    try:
        folder.exists()
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror}") from None
    return folder


def newest_run(root: Path) -> Path:
    """Return the run folder whose config.yaml is newest."""
    found = sorted(root.glob("[!.]*/config.yaml"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(f"--resume: there is no run in {root}/")
    return found[-1].parent


def _num_cut_texts(session: Session) -> int:
    return int(getattr(session.embedder, "num_cut_texts", 0))


def _prepare(session: Session, console: Console) -> None:
    """Try both corpora, calibrate τ, and say what is about to happen."""
    config, reached = session.config, True
    if session.temperature is None:
        reached = session.calibrate(config.corpus)
    stream = session.stream(config.corpus, num_probes=0, purpose=Purpose.POOL)
    pool = stream.next_pool(PREPARED_ARTICLES).to(session.model.device)
    if config.evaluation.articles:
        corpus = config.evaluation.corpus or config.corpus
        session.stream(corpus, num_probes=config.evaluation.num_probes, purpose=Purpose.EVALUATION_POOL).next_pool(1)
    steerability = float(session.steerability(pool).mean())
    rollout = config.rollout
    layout = session.template.layout(session.num_steps, rollout.query_tokens, config.pairs.value_tokens)
    console.print(
        f"model {config.model.name} ({config.model.adapter}), corpus {visible(config.corpus.label)}, "
        f"{rollout.articles} × {rollout.trajectories} trajectories of {session.num_steps} steps "
        f"({layout.row_len} tokens) per update\n"
        f"selection temperature {session.temperature:.4g}, steerability {steerability:.2f} nats",
        highlight=False,
    )
    if not reached:
        warnings.warn(
            f"selection.target_entropy {config.selection.target_entropy} cannot be reached with this embedder; "
            f"using temperature {session.temperature:.4g}",
            stacklevel=2,
        )
    if steerability < STEERABILITY_WARNING:
        warnings.warn(
            f"steerability is {steerability:.3f} nats: whatever the query, the choice is nearly the same, so there is "
            "little to learn about order; lower selection.target_entropy or change the embedder",
            stacklevel=2,
        )


def _create(folder: Path, session: Session) -> None:
    """Make the run folder: with all that a resume needs, or not at all. Of several processes one makes it."""
    staged = folder.with_name(f".staged-{folder.name}.{uuid.uuid4().hex}")
    environment = {**environment_record(), "account": session.network.account}
    try:
        try:
            write_text(staged / "config.yaml", config_to_yaml(session.config))
            write_text(staged / "environment.json", json.dumps(environment, indent=1) + "\n")
            write_text(staged / "prompt.txt", session.template.prompt_text)
            io_step(f"rename {folder.name}")
            os.rename(staged, folder)
        except (OSError, StorageError) as error:
            shutil.rmtree(staged, ignore_errors=True)
            if folder.exists():
                raise RunInUseError(f"{folder} exists: another process has just made it") from error
            raise
        sync(folder.parent)
        for left in folder.parent.glob(f".staged-{folder.name}.{'[0-9a-f]' * 32}"):  # by processes that were killed
            remove_folder(left)
    except OSError as error:
        raise StorageError(f"{folder}: cannot create the run folder: {error.strerror}") from error


def _account(folder: Path) -> str:
    """Return what the run's spending is added up under; "", which no run has, where that cannot be read."""
    try:
        return str(parse_json((folder / "environment.json").read_bytes())["account"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _check_resume(folder: Path, config: Config) -> bool:
    """Refuse to go on with a configuration that differs where it must not; return whether there is a checkpoint.

    A run that was killed before its first checkpoint has done nothing yet and begins at the beginning.
    """
    if checkpoints(folder):
        then = latest_checkpoint(folder)
        done = updates_of(then)
        if done > config.training.updates:
            raise ConfigError(
                f"training.updates: {done} updates are done, so {config.training.updates} cannot be asked for"
            )
    elif any(path.stat().st_size for path in folder.glob("*.jsonl")):
        raise CheckpointError(f"{folder}: its checkpoints are gone; start a new run")
    else:
        then = folder
    changed = [
        f"{key}: {old!r} → {new!r}"
        for key, old, new in differences(read_settings(then), flatten(config_to_dict(config)))
        if not key.startswith(MAY_CHANGE_ON_RESUME)
    ]
    if changed:
        raise ConfigError(f"--resume: these cannot change within a run: {'; '.join(changed)}")
    return then != folder


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    run_config(folder)
    try:
        held = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout:
        raise RunInUseError(f"{folder}: another process is working in this run folder") from None
    except OSError as error:
        raise StorageError(f"{folder}: cannot write in the run folder: {error.strerror}") from None
    with held:
        yield
