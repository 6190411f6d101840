"""The command line: parse, call, turn errors into one line and an exit code. No logic of its own.

Exit codes: 0 done · 2 usage or configuration, or one that failed its audit · 3 corpus · 4 credentials · 5 remote
service · 6 spending cap or quota · 7 checkpoint, or a run that does not verify · 8 storage · 9 non-finite numbers ·
10 memory · 11 another process lost · 12 run folder in use · 13 refused for safety · 70 a bug of ours · 129/130/143
interrupted by SIGHUP, SIGINT, SIGTERM, saved.
"""

import argparse
import contextlib
import logging
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from attention_guided_rl.errors import AgrlError, ConfigError, MemoryLimitError, StorageError
from attention_guided_rl.interruption import outliving_readers, stopping_at_once
from attention_guided_rl.secrets import redact

# Everything heavy (torch, transformers) is imported by the command that needs it, so that --help stays fast.

DESCRIPTION = "A language model learns to direct its own reading."
MAX_MESSAGE = 2000  # characters; a message may quote a file that somebody else wrote


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    with outliving_readers():
        logging.basicConfig(format="agrl: %(message)s", level=logging.WARNING)
        for handler in logging.getLogger().handlers:
            handler.addFilter(_redact_record)
        warnings.simplefilter("ignore")  # what libraries deprecate is not for the person who reads a run
        warnings.filterwarnings("always", module=r"attention_guided_rl\.")
        warnings.showwarning = _show_warning
        return _exit_code(list(sys.argv[1:] if arguments is None else arguments))


def _exit_code(arguments: list[str]) -> int:
    try:
        with stopping_at_once():
            code = _dispatch(arguments)
            sys.stdout.flush()
            return code
    except AgrlError as error:
        print(f"agrl: error: {_line(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stopped:
        print("agrl: interrupted", file=sys.stderr)
        return 128 + getattr(stopped, "number", signal.SIGINT)
    except Exception as error:
        memory = sys.modules.get("attention_guided_rl.memory")  # nothing runs out before it is there
        if memory is not None and memory.ran_out(error):
            print(
                "agrl: error: out of memory; lower evaluation.batch_articles, or take a smaller model", file=sys.stderr
            )
            return MemoryLimitError.exit_code
        for line in traceback.format_exc().splitlines():
            print(_line(line), file=sys.stderr)
        print("agrl: error: a bug of ours; please report the lines above", file=sys.stderr)
        return AgrlError.exit_code


def entry_point() -> None:
    """Run as the console command `agrl`."""
    sys.exit(main())


def _dispatch(arguments: list[str]) -> int:
    parser = _parser()
    fields, arguments = _split_fields(arguments)
    if empty := next((word for word in arguments if word.endswith("=--")), None):  # which argparse takes apart
        raise ConfigError(f"command line: '--' is no value, in {empty!r}")
    options, rest = parser.parse_known_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    if options.command in ("train", "corpus", "headroom", "doctor", "config") and ("--help" in rest or "-h" in rest):
        _print_config_help(options.command)
        return 0
    overrides = parse_overrides([*fields, *rest])
    if options.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by the hub's library when it is imported
        overrides["network.offline"] = True
    _require_working_folder()
    return int(options.run_command(options, overrides))


def _require_working_folder() -> None:
    """Raise StorageError if the working folder has been removed: relative paths lead nowhere, and torch aborts."""
    try:
        os.getcwd()
    except OSError:
        raise StorageError("the working folder has been removed; change to one that exists") from None


def _split_fields(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take `--section.field VALUE` out, so that no value is mistaken for a positional argument."""
    fields, others, waiting = [], [], list(arguments)
    while waiting:
        word = waiting.pop(0)
        if word.startswith("--") and "." in word.partition("=")[0]:
            fields += [word] if "=" in word or not waiting else [word, waiting.pop(0)]
        else:
            others.append(word)
    return fields, others


def parse_overrides(rest: Sequence[str]) -> dict[str, Any]:
    """Turn `--section.field VALUE` and `--section.field=VALUE` into {"section.field": value}; values are YAML.

    Raises:
        ConfigError: something is not of that form.
    """
    overrides: dict[str, Any] = {}
    waiting = list(rest)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--") or "." not in name:
            raise ConfigError(f"command line: unexpected {word!r}; fields are set with --section.field VALUE")
        if not equals:
            if not waiting:
                raise ConfigError(f"command line: {name} needs a value")
            value = waiting.pop(0)
        dotted = name[2:].replace("-", "_")
        overrides[dotted] = _parse_value(dotted, value)
    return overrides


def _parse_value(dotted: str, value: str) -> Any:
    """Read a value as YAML, but a title, name or path as it is typed (`null` is no path)."""
    from attention_guided_rl.config_files import text_type
    from attention_guided_rl.plain_data import parse_yaml

    kind = text_type(dotted)
    if kind is str or (kind is Path and value != "null"):
        return value
    try:
        return parse_yaml(value)
    except ValueError:
        return value


class _Parser(argparse.ArgumentParser):
    """A parser that reports as everything else does: one line."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"command line: {message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="agrl", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"agrl {metadata.version('attention-guided-rl')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, run: Any, summary: str, *, configurable: bool) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary, add_help=not configurable)
        command.set_defaults(run_command=run)
        command.add_argument("--offline", action="store_true", help="open no connection: local files and caches only")
        if configurable:
            command.add_argument("--preset", metavar="NAME", help="demo, or a file name in configs/")
            command.add_argument("--config", metavar="FILE", type=Path, action="append", default=[])
        return command

    train = add("train", _train, "train a query policy and evaluate it", configurable=True)
    train.add_argument("--run", metavar="NAME", help="name of the run folder; default: <preset>-<UTC time>")
    train.add_argument("--resume", action="store_true", help="go on with --run NAME, or with the newest run")
    train.add_argument("--dry-run", action="store_true", help="show what an embedding service would get, and stop")
    train.add_argument("--runs-folder", metavar="FOLDER", type=Path, default=Path("runs"))

    evaluate = add("evaluate", _evaluate, "measure a run against simple readers", configurable=False)
    evaluate.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folder; several: seeds of one setting")
    evaluate.add_argument(
        "--arms", metavar="file:FILE", action="append", default=[], help="also measure the orders of an orders.jsonl"
    )

    compare = add("compare", _compare, "compare evaluated runs article by article", configurable=False)
    compare.add_argument(
        "runs", metavar="RUN", nargs="+", help="RUN RUN, or RUN … vs RUN … (the seeds of two settings)"
    )

    report = add("report", _report, "write one page to look at about a run", configurable=False)
    report.add_argument("run", metavar="RUN", type=Path, help="run folder")
    report.add_argument("--out", metavar="FILE", type=Path, help="where to write it; default: RUN/report.html")

    verify = add("verify", _verify, "derive again from a run's files that it is complete", configurable=False)
    verify.add_argument("run", metavar="RUN", type=Path, help="run folder")

    rollout = add("rollout", _rollout, "show one trajectory as a person reads it", configurable=False)
    rollout.add_argument("run", metavar="RUN", type=Path, nargs="?", help="run folder; without: the untrained model")
    rollout.add_argument("--preset", metavar="NAME", help="without RUN: the preset to show untrained")
    rollout.add_argument("--config", metavar="FILE", type=Path, action="append", default=[])
    rollout.add_argument("--out", metavar="FILE", type=Path, help="also write the orders as orders.jsonl")
    rollout.add_argument("--articles", metavar="N", type=int, default=1, help="articles to read (the first is shown)")

    corpus = add("corpus", _corpus, "show what a corpus holds before training on it", configurable=True)
    corpus.add_argument("--articles", metavar="N", type=int, default=1000, help="places to read; 0: a whole pass")
    corpus.add_argument("--sample", metavar="N", type=int, default=3, help="pairs to show of the first article")
    corpus.add_argument("--json", action="store_true", help="print the figures as JSON")

    add("headroom", _headroom, "measure what there is to win before training", configurable=True)
    add("doctor", _doctor, "audit a configuration on its real model before training", configurable=True)
    add("config", _config, "print the resolved configuration", configurable=True)
    return parser


def _train(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from attention_guided_rl import runs
    from attention_guided_rl.checkpoint import checkpoints
    from attention_guided_rl.config_files import load_config
    from attention_guided_rl.dry_run import dry_run
    from attention_guided_rl.errors import RunInUseError
    from attention_guided_rl.run_settings import load_run_config
    from attention_guided_rl.screen import make_console

    if options.resume:
        if options.run is not None:
            folder = runs.run_folder(options.run, None, options.runs_folder)
        else:
            folder = runs.newest_run(options.runs_folder)
        config = load_run_config(folder, options.config, overrides)
    else:
        preset = options.preset or (None if options.config else "demo")
        folder = runs.run_folder(options.run, preset, options.runs_folder)
        if folder.exists():
            raise RunInUseError(f"{folder} exists; choose another --run, or add --resume to go on with it")
        config = load_config(options.preset, options.config, overrides)
    if options.dry_run:
        dry_run(config, make_console())
        return 0
    resume_command = f"agrl train --run {folder.name} --resume"
    if options.runs_folder != Path("runs"):
        resume_command += f" --runs-folder {shlex.quote(str(options.runs_folder))}"
    try:
        result = runs.train(config, folder, resume=options.resume)
    except (AgrlError, KeyboardInterrupt) as error:
        saved = checkpoints(folder)
        if saved and not isinstance(error, ConfigError | RunInUseError):
            print(_line(f"agrl: saved: {saved[0]}; to go on: {resume_command}"), file=sys.stderr)
        raise
    if result.trained.interrupted_by is not None:
        print(_line(f"agrl: interrupted after update {result.trained.state.update}; saved; to go on: {resume_command}"))
        return 128 + result.trained.interrupted_by
    print(_line(f"run folder: {result.folder}"))
    return 0


def _evaluate(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from attention_guided_rl import runs

    if any(not arm.startswith("file:") for arm in options.arms):
        raise ConfigError("command line: --arms takes file:FILE; the arms of ours are chosen with --evaluation.arms")
    runs.evaluate_seeds(options.runs, overrides, [Path(arm.removeprefix("file:")) for arm in options.arms])
    return 0


def _compare(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from attention_guided_rl.compare import compare_runs, read_evaluation, split_groups
    from attention_guided_rl.report.tables import print_comparison
    from attention_guided_rl.screen import make_console

    if overrides:
        raise ConfigError(f"command line: compare reads finished evaluations; --{next(iter(overrides))} has no effect")
    ours, theirs = split_groups(options.runs)
    comparison = compare_runs([read_evaluation(run) for run in ours], [read_evaluation(run) for run in theirs])
    print_comparison(make_console(), comparison)
    return 0


def _report(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from attention_guided_rl.report.html import write_report

    if overrides:
        raise ConfigError(f"command line: --{next(iter(overrides))} cannot be set for a report of what has been run")
    print(_line(str(write_report(options.run, options.out))))
    return 0


def _verify(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from attention_guided_rl.verification import verify_run

    print(f"{'check':<28}{'found':<80}ok")
    for finding in verify_run(options.run, overrides):
        print(_line(f"{finding.check:<28}{finding.found:<80}ok"))
    return 0


def _rollout(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from attention_guided_rl import runs
    from attention_guided_rl.config_files import load_config

    if options.articles < 1:
        raise ConfigError(f"command line: --articles must be at least 1, got {options.articles}")
    if options.run is not None:
        session, _ = runs.open_run(options.run, overrides)
    else:
        session = runs.open_untrained(load_config(options.preset, options.config, overrides))
    runs.rollout(session, num_articles=options.articles, out=options.out)
    return 0


def _corpus(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from attention_guided_rl.config_files import load_config
    from attention_guided_rl.report.survey import show

    for name in ("articles", "sample"):
        if getattr(options, name) < 0:
            raise ConfigError(f"command line: --{name} must not be negative, got {getattr(options, name)}")
    config = load_config(options.preset, options.config, overrides)
    show(config, num_places=options.articles, num_sample=options.sample, as_json=options.json)
    return 0


def _headroom(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from attention_guided_rl import headroom, runs
    from attention_guided_rl.config_files import load_config

    config = load_config(options.preset, options.config, overrides)
    headroom.measure_headroom(runs.open_untrained(config))
    return 0


def _doctor(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from attention_guided_rl import doctor, runs
    from attention_guided_rl.config_files import load_config

    doctor.examine(runs.open_untrained(load_config(options.preset, options.config, overrides)))
    return 0


def _config(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    from attention_guided_rl.config_files import config_to_yaml, load_config

    print(config_to_yaml(load_config(options.preset, options.config, overrides)), end="")
    return 0


def _print_config_help(command: str) -> None:
    """Print the command's own options, then every configuration field with type, default and meaning."""
    import tyro

    from attention_guided_rl.config import Config
    from attention_guided_rl.config_files import load_config

    subparser = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)).choices[command]
    print(subparser.format_help())
    print(
        "Configuration fields. Defaults shown are those of the preset demo, used without --preset and --config;\n"
        "with --config alone, fields that it leaves out have the defaults of config.py (agrl config prints them).\n"
    )
    shape = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    with contextlib.suppress(SystemExit):
        tyro.cli(Config, args=["--help"], default=load_config(), prog=f"agrl {command}", description="", config=shape)


def _redact_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = _line(record.getMessage()), ()
    return True


def _show_warning(message: Warning | str, *rest: Any, **options: Any) -> None:
    print(f"agrl: warning: {_line(str(message))}", file=sys.stderr)


def _line(message: str) -> str:
    """Return a message as one line of bounded length without secrets, in which nothing can control the terminal."""
    text = redact(" ".join(message.splitlines()))
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE // 2]} … {text[-MAX_MESSAGE // 2 :]}"  # what to do about it comes last
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
