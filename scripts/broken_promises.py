"""Mistakes that break a promise of docs/reliability.md, for break_laws.py: what is replaced where, who must see it."""

KILL = "survival/test_kill: any_file_operation"
SIGNALS = "survival/test_signals: "
STORAGE = "survival/test_storage: "
FORGETTING = (
    'does not fit the model") from None\n'
    "    return RunState(**{{**{{name: getattr(state, name) for name in RunState.__slots__}}, {}}})\n"
)

# name, tests, (file, text that occurs exactly once, replacement) ...
BROKEN_PROMISES = (
    # checkpoints
    (
        "an optimiser moment is dropped",
        "test_checkpoint: moments_come_back",
        (
            "checkpoint.py",
            '            flat[f"{name}|{key}"] = value',
            '            if key != "exp_avg_sq":\n                flat[f"{name}|{key}"] = value',
        ),
    ),
    (
        "the running statistics are not restored",
        "test_checkpoint: moments_come_back",
        (
            "checkpoint.py",
            'does not fit the model: {_first_line(error)}") from None\n    return state\n',
            FORGETTING.format('"agent": AgentState()'),
        ),
    ),
    (
        "the place in the data is not restored",
        "test_checkpoint: moments_come_back",
        (
            "checkpoint.py",
            'does not fit the model: {_first_line(error)}") from None\n    return state\n',
            FORGETTING.format('"position": Position()'),
        ),
    ),
    (
        "the stream begins at the beginning",
        "survival/test_resume: any_update",
        ("trainer.py", "        stream.resume(state.position)\n", ""),
    ),
    (
        "digests are not compared",
        "test_checkpoint: damage_anywhere",
        ("checkpoint.py", "if _sha256(path / name) != digest:", "if False:"),
    ),
    (
        "the manifest vouches for itself",
        "test_checkpoint: flipped_bit",
        ("checkpoint.py", "if own_digest != _manifest_digest(manifest):", "if False:"),
    ),
    (
        "a file too many is not seen",
        "test_checkpoint: extra_file",
        ("checkpoint.py", "sorted(present ^ set(listed))", "sorted(set(listed) - present)"),
    ),
    (
        "a damaged checkpoint counts as good",
        "test_checkpoint: does_not_count",
        ("checkpoint.py", "                verify(path)\n                good += 1", "                good += 1"),
    ),
    (
        "one too few is kept",
        "test_checkpoint: newest_are_kept",
        ("checkpoint.py", "if good < keep:", "if good < keep - 1:"),
    ),
    (
        "the last without an alarm is removed",
        "test_checkpoint: newest_are_kept",
        ("checkpoint.py", "elif spared is None or path != checkpoint_path(run, spared):", "else:"),
    ),
    (
        "a copy under another name counts as a checkpoint",
        "test_checkpoint: copies_and_notes",
        ("checkpoint.py", " if updates_of(path) >= 0 and path.is_dir()]", "]"),
    ),
    (
        "the oldest checkpoint is used",
        "test_checkpoint: newest_checkpoint_is_used",
        ("checkpoint.py", "key=updates_of, reverse=True)", "key=updates_of)"),
    ),
    (
        "checkpoints that are left over stay after a resume",
        KILL,
        (
            "trainer.py",
            "        remove_old_checkpoints(run, session.config.training.keep_checkpoints, state.last_good)\n"
            "        return",
            "        return",
        ),
    ),
    (
        "another base model is not noticed",
        "test_trainer: base_model",
        ("checkpoint.py", "if then[name] != now[name]:", "if False:"),
    ),
    (
        "an edited configuration is not noticed",
        "test_trainer: edited_by_hand",
        (
            "runs.py",
            "        then = latest_checkpoint(folder)\n",
            "        then = latest_checkpoint(folder) and folder\n",
        ),
    ),
    (
        "logs without checkpoints are begun anew",
        "test_trainer: begun_anew",
        ("runs.py", 'elif any(path.stat().st_size for path in folder.glob("*.jsonl")):', "elif False:"),
    ),
    (
        "less than is done counts as done",
        "survival/test_resume: fewer_updates",
        ("runs.py", "if done > config.training.updates:", "if False:"),
    ),
    # order and durability of what is written
    (
        "a file of a checkpoint is not synced",
        STORAGE + "before_it_has_its_name",
        ("checkpoint.py", "for target in [*files, path,", "for target in [*files[1:], path,"),
    ),
    (
        "a checkpoint's folder is not synced",
        STORAGE + "before_it_has_its_name",
        ("checkpoint.py", "if p.is_dir()), staged]:", "if p.is_dir())]:"),
    ),
    (
        "a new name is not synced",
        STORAGE + "before_it_has_its_name",
        ("storage.py", "    os.rename(old, new)\n    sync(new.parent)\n", "    os.rename(old, new)\n"),
    ),
    (
        "a checkpoint is written in its place",
        KILL,
        ("checkpoint.py", 'staged = final.parent / f".staged-{final.name}"', "staged = final.parent / final.name"),
    ),
    (
        "a run folder is made step by step",
        KILL,
        ("runs.py", 'staged = folder.with_name(f".staged-{folder.name}.{uuid.uuid4().hex}")', "staged = folder"),
    ),
    (
        "two processes prepare a run in the same place",
        "test_run_folder: takes_nothing_from_one",
        ("runs.py", ".{uuid.uuid4().hex}", ""),
    ),
    ("what is half done stays", KILL, ("runs.py", "            remove_leftovers(folder)\n", "")),
    ("logs are not cut back", KILL, ("tracking.py", "    os.truncate(path, length)\n", "")),
    (
        "a killed transaction holds the store",
        SIGNALS + "before_training",
        (
            "embedders/cache.py",
            '                yield\n                io_step("commit vectors" if durable else "commit claims")\n'
            '                self._db.execute("COMMIT")\n            except',
            "                yield\n            except",
        ),
        (
            "embedders/cache.py",
            '                    self._db.execute("ROLLBACK")\n                raise\n',
            '                    self._db.execute("ROLLBACK")\n                raise\n            io_step("commit")\n'
            '            self._db.execute("COMMIT")\n',
        ),
    ),
    (
        "a full disk is a bug",
        STORAGE + "full_from",
        (
            "checkpoint.py",
            "    except (OSError, SafetensorError) as error:  # safetensors",
            "    except SafetensorError as error:  # safetensors",
        ),
    ),
    # randomness that a resume must find again
    (
        "dropout goes on from wherever it was",
        "survival/test_resume: any_update",
        (
            "update.py",
            "        torch.manual_seed(_dropout_seed(config.training.seed, update, processes.rank, number))\n",
            "",
        ),
    ),
    # signals and terminals
    (
        "a signal saves nothing",
        "survival/test_resume: any_update",
        (
            "trainer.py",
            "        if saved != checkpoint_path(run, state.update):\n"
            "            save(session, run, state, optimizer, logs)\n    return",
            "    return",
        ),
    ),
    (
        "an interrupted run says that it is done",
        SIGNALS + "saves_and",
        ("cli.py", "return 128 + result.trained.interrupted_by", "return 0"),
    ),
    (
        "SIGTERM ends as SIGINT does",
        SIGNALS + "before_training",
        ("cli.py", 'return 128 + getattr(stopped, "number", signal.SIGINT)', "return 128 + signal.SIGINT"),
    ),
    (
        "the second signal is collected too",
        SIGNALS + "second_signal",
        ("interruption.py", "        if received:\n            raise Stopped(number)\n", ""),
    ),
    (
        "nohup is not respected",
        SIGNALS + "hanging_up",
        ("interruption.py", "if signal.getsignal(number) != signal.SIG_IGN:", "if True:"),
    ),
    (
        "a run ends with the reader of its output",
        SIGNALS + "reader_goes_away",
        ("interruption.py", "except OSError as error:  # what", "except ZeroDivisionError as error:  # what"),
    ),
    (
        "output on a full disk counts as written",
        "test_output: not_taken_for_written",
        ("interruption.py", "if self._must_arrive and error.errno in FULL:", "if False:"),
    ),
    # processes
    (
        "a frozen process is waited for",
        "survival/test_peers: loss_of",
        ("peers.py", "if rank not in self.left() and silent > SILENCE:", "if False:"),
    ),
    (
        "a lost process is not told from a bug",
        "survival/test_peers: loss_of",
        (
            "distributed.py",
            "            if self._peers is None or ran_out(error):\n                raise\n",
            "            raise\n",
        ),
    ),
)
