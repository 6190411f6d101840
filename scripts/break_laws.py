"""Break the laws and promises on purpose, one at a time, and require that their tests notice.

    python scripts/break_laws.py            every mutation, a few seconds each
    python scripts/break_laws.py shift kl   those whose name contains one of the words
    python scripts/break_laws.py --list     names only

Source, tests and configurations are copied to a temporary folder. First the named tests must pass there unchanged; then
each mutation is applied to a fresh copy (every `old` text must occur exactly once in its file, or the script fails:
a mutation that no longer applies proves nothing), and the tests named for it must fail. Exits 1 if one survives.

What takes long is importing torch and transformers. So they are imported once, here, and every run of pytest is a fork;
the package itself is first imported in the fork, from its own copy.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from broken_promises import BROKEN_PROMISES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("src") / "attention_guided_rl"
COPIED = ("src", "tests", "configs", "pyproject.toml")


@dataclass(frozen=True)
class Mutation:
    """One mistake: what is replaced where, and the tests (a file, an expression for pytest -k) that must see it."""

    name: str
    file: str
    tests: str
    edits: tuple[tuple[str, str, str], ...]
    """File in the package, text that occurs exactly once, replacement."""


def mistake(name: str, tests: str, *edits: tuple[str, str, str]) -> Mutation:
    """Describe a mutation; `tests` is the expression, behind `file: ` where that is not test_laws.py."""
    file, _, expression = tests.rpartition(": ")
    return Mutation(name, f"tests/{file or 'test_laws'}.py", expression, edits)


MUTATIONS = (
    # the adapter
    mistake(
        "adapter not scaled", "test_model: in_place",
        ("adapter.py", "up, alpha=self.scaling[name])", "up)"),
    ),
    mistake(
        "adapter's dropout left out", "test_model: drops",
        ("adapter.py", "self.lora_dropout[name](flat)", "flat"),
    ),
    mistake(
        "adapter lost in 16 bits", "test_model: folding",
        ("adapter.py", "self._merges = dtype == torch.float32", "self._merges = True"),
        ("adapter.py", "layer.get_delta_weight(self._adapter).detach()",
         "layer.get_delta_weight(self._adapter).detach().to(base.weight.dtype)"),
    ),
    mistake(
        "adapter computed by the library's own layers", "test_model: in_place",
        ("loading.py", "get_peft_model(causal_lm, in_place(lora))", "get_peft_model(causal_lm, lora)"),
    ),
    mistake(
        "frozen layers pass no gradient on", "test_onednn: gradient or update",
        ("onednn.py", "_linear(gradient, weight.t(), None, *_ALONE)", "0.0 * (gradient @ weight)"),
    ),
    mistake(
        "weights packed without their adapter", "test_onednn: packs or update",
        ("adapter.py", 'pack(weight)) if isinstance(base', 'pack(base.weight)) if isinstance(base'),
    ),
    # a device that is not the CPU
    mistake(
        "random numbers left on the CPU", "test_device: counterfactual",
        ("session.py", "return numbers.to(self.model.device)", "return numbers"),
    ),
    mistake(
        "a synchronisation at every text", "test_device: synchronises",
        ("model.py", "in zip(ids.cpu(), real.cpu(), strict=True)", "in zip(ids, real, strict=True)"),
    ),
    mistake(
        "a synchronisation at every token", "test_device: synchronises",
        ("rollouts.py", "self._model.extend(self.cache, ids, self.role, self.padded)",
         "self._model.extend(self.cache, ids, self.role)"),
    ),
    # mistakes that earlier attempts at the method made, or nearly
    mistake(
        "shift off by one", "law_01",
        ("model.py", "states[:, positions.to(states.device) - 1]", "states[:, positions.to(states.device)]"),
    ),
    mistake(
        "KL to a fresh copy", "law_04",
        ("objective.py", "    logprobs = distribution.gather(",
         "    reference = distribution.detach()\n    logprobs = distribution.gather("),
    ),
    mistake(
        "row 0's pick for all rows", "law_07",
        ("environment.py", "picks = picker(self, logprobs, uniform)",
         "picks = picker(self, logprobs, uniform)[:1].repeat(len(uniform))"),
    ),
    mistake(
        "double softmax", "law_06",
        ("selection.py", "logprobs = (scores / temperature).masked_fill",
         "logprobs = (scores / temperature).softmax(-1).masked_fill"),
    ),
    mistake(
        "context dropped from the query's log-probability", "law_05",
        ("objective.py", "states = model.hidden(rows.ids, rows.role, wanted)",
         "states = model.hidden(rows.ids, torch.where(rows.step == 0, rows.role, 4), wanted)"),
    ),
    mistake(
        "leave-one-out over the steps", "law_03",
        ("rl_agent.py", "return leave_one_out(returns, group_size)",
         "return (returns.sum(1, keepdim=True) - returns) / max(1, returns.shape[1] - 1)"),
    ),
    mistake(
        "leave-one-out over rows of different articles", "law_03",
        ("rl_agent.py", "groups = returns.unflatten(0, (-1, group_size))",
         "groups = returns.unflatten(0, (group_size, -1)).transpose(0, 1)"),
    ),
    mistake(
        "template token in the action mask", "law_03 or law_05",
        ("records.py", "self._slots(self.before_query_len, self.query_len)",
         "self._slots(self.before_query_len - 1, self.query_len)"),
        ("records.py", "(self.role[:, positions] == role)", "(self.role[:, positions] != PADDING)"),
    ),
    mistake(
        "adapter on in the reference", "law_04",
        ("model.py", "with self._using(None), self.peft_model.disable_adapter():", "with contextlib.nullcontext():"),
    ),
    mistake(
        "KL unmasked over the vocabulary", "law_04",
        ("rl_agent.py", "difference = (logprobs - reference).masked_fill(logprobs == -torch.inf, 0.0)",
         "difference = logprobs - reference"),
    ),
    mistake(
        "KL unmasked over padded query tokens", "law_04",
        ("objective.py", "(torch.where(real, term.view(shape), 0.0) for term in terms)",
         "(torch.where(real | (i == 1), t.view(shape), 0.0) for i, t in enumerate(terms))"),
    ),
    mistake(
        "mean of micro-batch means", "law_09",
        ("update.py", "num_query_tokens=denominator,",
         "num_query_tokens=len(index) * rows.num_steps * rows.layout.query_len"
         " * len(keep.split(session.micro_batch_rows)),"),
    ),
    mistake(
        "query left out of its own reward", "law_02",
        ("scorer.py", "    def _score(self, rows: TrajectoryBatch, request: BranchRequest) -> Scores:\n",
         "    def _score(self, rows: TrajectoryBatch, request: BranchRequest) -> Scores:\n"
         "        every = [self._blind(rows, request, step) for step in range(rows.num_steps)]\n"
         "        seeing = self._see(rows, request)\n"
         "        values = torch.stack([every[t].value_logprobs[:, t] for t in range(rows.num_steps)], 1)\n"
         "        return replace(seeing, value_logprobs=values)\n\n"
         "    def _blind(self, rows: TrajectoryBatch, request: BranchRequest, step: int) -> Scores:\n"
         "        hide = (rows.step == step) & (rows.role == 2)\n"
         "        return self._see(replace(rows, role=torch.where(hide, PADDING, rows.role)), request)\n\n"
         "    def _see(self, rows: TrajectoryBatch, request: BranchRequest) -> Scores:\n"),
    ),
    mistake(
        "LoRA B randomised", "law_03 or law_04",
        ("loading.py", '            task_type="CAUSAL_LM",\n',
         '            task_type="CAUSAL_LM",\n            init_lora_weights=False,\n'),
    ),
    # others worth fearing
    mistake(
        "to_go summed from the wrong side", "law_03",
        ("rl_agent.py", "rewards.flip(1).cumsum(1).flip(1)", "rewards.cumsum(1)"),
    ),
    mistake(
        "filter judged by statistics that include this update", "law_09",
        ("rl_agent.py", "    trajectory_rewards = rewards.mean(1)\n    if config.kind",
         "    trajectory_rewards = rewards.mean(1)\n"
         "    state = AgentState(rewards=state.rewards.including(trajectory_rewards))\n    if config.kind"),
    ),
    mistake(
        "filter statistics of kept rows only", "law_09",
        ("rl_agent.py", "rewards=state.rewards.including(rewards.mean(1)),",
         "rewards=state.rewards.including(rewards.mean(1)[keep]) if state.rewards.count > 2"
         " else state.rewards.including(rewards.mean(1)),"),
    ),
    mistake(
        "scale that includes this update", "law_09",
        ("rl_agent.py", "scale = state.scale if state.scale is not None else rms",
         "scale = rms if state.scale is None or rms == 0 else SCALE_DECAY * state.scale + (1 - SCALE_DECAY) * rms"),
    ),
    mistake(
        "prior of another article's pool", "law_02",
        ("reward.py", "baseline=slot(prior, inputs.picks)", "baseline=slot(prior.roll(1, 0), inputs.picks)"),
    ),
    mistake(
        "pairs read again", "law_07",
        ("environment.py", "        self.unread[rows, picks] = False\n", ""),
    ),
    mistake(
        "temperature missing in the learner", "law_03 or law_05",
        ("objective.py", "distribution = model.policy_logprobs(states, temperature)",
         "distribution = model.policy_logprobs(states, 1.0)"),
    ),
    mistake(
        "temperature missing in the reference's side of the KL", "law_04",
        ("objective.py", "reference = model.reference_logprobs(reference_states, temperature)",
         "reference = model.reference_logprobs(reference_states, 1.0)"),
    ),
    mistake(
        "padding takes position ids", "law_01",
        ("records.py", "((role != PADDING).long().cumsum(-1) - 1)", "(torch.ones_like(role).cumsum(-1) - 1)"),
    ),
    mistake(
        "cached tokens take the first position ids", "law_01",
        ("model.py", "position_ids(role)[:, -ids.shape[1] :]", "position_ids(role)[:, : ids.shape[1]]"),
    ),
    mistake(
        "each value divided by its own length", "law_02",
        ("reward.py", "return per_value_token(self.value_logprobs.sum(-1), self.pool)",
         "return self.value_logprobs.sum(-1) / (self.value_logprobs != 0).sum(-1).clamp_min(1)"),
    ),
    mistake(
        "query heads on the wrong key heads", "law_08",
        ("selection.py", "keys.repeat_interleave(queries.shape[1] // keys.shape[2], dim=2)",
         "keys.repeat(1, 1, queries.shape[1] // keys.shape[2], 1)"),
    ),
    mistake(
        "keys through the query projection", "law_08",
        ("embedders/attention.py", "_, keys, keep = self._project(ids, mask)",
         "keys, _, keep = self._project(ids, mask)"),
    ),
    mistake(
        "embedding by the policy", "law_08",
        ("embedders/attention.py", "frozen.enter_context(self._model.reference())", "pass"),
    ),
    # branches, rewards and estimators
    mistake(
        "branches see each other", "test_scorer: probes or candidates",
        ("branching.py", "(own[:, :, :, None, :] & self._same[:, None, :, None])",
         "(own[:, :, :, None, :] | ~self._same[:, None, :, None])"),
    ),
    mistake(
        "counterfactual queries by the policy", "test_scorer: counterfactual and policy",
        ("scorer.py", "        with self.model.reference():\n            if self.live:",
         "        with contextlib.nullcontext():\n            if self.live:"),
    ),
    mistake(
        "counterfactual after the step's own query", "test_scorer: counterfactual",
        ("scorer.py", "        starts = query.view(rows.num_steps, -1)[:, 0]\n",
         "        starts = query.view(rows.num_steps, -1)[:, 0] + layout.query_len\n"),
    ),
    mistake(
        "probes scored one step late", "test_scorer: probes",
        ("scorer.py", "layout.prompt_len + layout.step_len * torch.arange(times)",
         "layout.prompt_len + layout.step_len * (torch.arange(times) - 1).clamp_min(0)"),
    ),
    mistake(
        "held_out without its start", "test_reward: held_out",
        ("reward.py", "baseline=curve[:, :1].expand_as(curve[:, 1:])", "baseline=torch.zeros_like(curve[:, 1:])"),
    ),
    mistake(
        "levels summed as if they were increments", "test_rl_agent: levels",
        ("rl_agent.py", "    return returns - left * before\n", "    return returns\n"),
    ),
    mistake(
        "expectation with the weights of the wrong step", "law_03 and expectation",
        ("reward.py", "rows.selection_logprobs[row, candidates.steps, candidates.pairs]",
         "rows.selection_logprobs[row, 0 * candidates.steps, candidates.pairs]"),
    ),
    mistake(
        "candidates that were read already", "test_scorer: candidates",
        ("reward.py", "        unread.scatter_(1, picks_of_step, False)\n", ""),
    ),
    mistake(
        "KL in the reward with its sign turned", "law_03 and penalty",
        ("rl_agent.py", "returns = returns - config.kl.coefficient * compute_returns(kl, config.returns)",
         "returns = returns + config.kl.coefficient * compute_returns(kl, config.returns)"),
    ),
    mistake(
        "KL in the reward and in the loss", "law_03 and penalty",
        ("objective.py", 'kl.coefficient if kl.place == "loss" else 0.0', "kl.coefficient"),
    ),
    mistake(
        "a trained selection left out of the loss", "law_03 and trained",
        ("objective.py", "loss = loss + selection_loss(batch.selection_logprobs, batch.advantages, "
         "batch.num_query_tokens)", "pass"),
    ),
    mistake(
        "the gradient through the reward turned round", "law_03 and whole",
        ("rl_agent.py", "return -(weights[:, None] * value_logprobs)", "return (weights[:, None] * value_logprobs)"),
    ),
    mistake(
        "a group filter with the SD of all rows", "test_rl_agent: group_filter",
        ("rl_agent.py", "min_zscore * groups.std(1, keepdim=True)", "min_zscore * groups.std()"),
    ),
    mistake(
        "an average that never moves", "test_scorer: average",
        ("ema.py", "self._average[name].lerp_(parameter, 1 - self._decay)", "pass"),
    ),
    mistake(
        "control tokens in queries", "law_12",
        ("model.py", "        allowed[[i for i in control_ids(self.tokenizer) if i < len(allowed)]] = False\n", ""),
    ),
    mistake(
        "control strings of articles become control tokens", "law_12",
        ("model.py", "split_special_tokens=True", "split_special_tokens=False"),
    ),
    mistake(
        "step for the KL alone when there is nothing to learn", "law_09",
        ("update.py", "if not bool((kept_advantages != 0).any()):", "if kept_advantages.numel() == 0:"),
    ),
    mistake(
        "stream starts over after a resume", "law_10 and interrupted",
        ("trainer.py", "        stream.resume(state.position)\n", ""),
    ),
    mistake(
        "optimizer moments lost in a resume", "law_10 and interrupted",
        ("checkpoint.py", "        if optimizer is not None:\n            _restore",
         "        if False:\n            _restore"),
    ),
    mistake(
        "dropout not reseeded", "law_10 and interrupted",
        ("update.py",
         "torch.manual_seed(_dropout_seed(config.training.seed, update, processes.rank, number))", "pass"),
    ),
    mistake(
        "random numbers by rank, not by article", "law_10 and two_processes",
        ("trainer.py", "session.uniforms(Purpose.TRAINING, update, indices, rollout.trajectories)",
         "session.uniforms(Purpose.TRAINING, update, range(len(indices)), rollout.trajectories)"),
    ),
    mistake(
        "advantages of the process's own rows only", "law_10 and two_processes",
        ("update.py", "start = processes.rank * rows.num_rows\n", "start = 0\n"),
    ),
    mistake(
        "a field that nothing reads", "law_13",
        ("update.py", "weight_decay=config.weight_decay", "weight_decay=0.0"),
    ),
    # promises about what leaves this machine, what comes back and what is paid
    mistake(
        "vectors in the order of the reply, not of its indices", "embedders/test_openai: survived and shuffled",
        ("embedders/openai.py", "np.stack([items[i] for i in range(num_texts)])", "np.stack(list(items.values()))"),
    ),
    mistake(
        "the last vector of a text wins", "embedders/test_cache: first_vector",
        ("embedders/cache.py", "INSERT OR IGNORE INTO vectors", "INSERT OR REPLACE INTO vectors"),
    ),
    mistake(
        "a vector is used and not stored", "embedders/test_text: second_look",
        ("embedders/text.py", "self._store.put(self.identity, _encoded(self._encoder, mine, self._dimensions))",
         "_encoded(self._encoder, mine, self._dimensions)"),
    ),
    mistake(
        "a damaged vector is believed", "embedders/test_cache: flipped_bit",
        ("embedders/cache.py", "if checksum == _checksum(key, vector):", "if True:"),
    ),
    mistake(
        "encoders that differ in dimensions share vectors", "embedders/test_openai: told_apart",
        ("embedders/openai.py", "/{config.dimensions or 'native'}/unit", "/unit"),
    ),
    mistake(
        "another model behind the same name is not noticed", "embedders/test_text: another_model",
        ("embedders/text.py", "if cosine < MIN_CANARY_COSINE:", "if False:"),
    ),
    mistake(
        "white space is sent", "embedders/test_text: whitespace",
        ("embedders/text.py", "prompt + text for text in texts if text.strip()", "prompt + text for text in texts"),
    ),
    mistake(
        "a claim outlives its process", "embedders/test_cache: taken_over_at_once",
        ("embedders/cache.py", "        _give_up(lock)\n        return True\n", "        return False\n"),
    ),
    mistake(
        "a living process is taken for dead", "embedders/test_cache: claimed_by_one",
        ("embedders/cache.py", "        except Timeout:\n            return False\n",
         "        except Timeout:\n            return True\n"),
    ),
    mistake(
        "the cap is not looked at", "embedders/test_cache: reserving_stops",
        ("embedders/cache.py", "if self._cap is not None and spent + nano_usd > self._cap:", "if False:"),
    ),
    mistake(
        "the cap is looked at before the others' turn", "embedders/test_cache: no_number_of_processes",
        ("embedders/cache.py",
         "        with self._store._transaction(durable=True):\n            spent = self._sum()\n",
         "        spent = self._sum()\n        time.sleep(0.01)\n"
         "        with self._store._transaction(durable=True):\n"),
    ),
    mistake(
        "another cache begins a run's sum anew", "embedders/test_cache: opened_elsewhere",
        ("embedders/cache.py", "            if opened_before:", "            if False:"),
    ),
    mistake(
        "a dry run forgets what prepares the run", "test_remote: never_exceeded and calibration",
        ("dry_run.py", "keys, held_out = calibrated * num_pairs + steered,", "keys, held_out = num_pairs,"),
    ),
    mistake(
        "vectors of another length are only nonsense", "embedders/test_openai: another_length",
        ("embedders/openai.py", "error.length == before:", "False:"),
    ),
    mistake(
        "a resumed run reads other revisions", "data/test_wikipedia: goes_on_only",
        ("data/pairs.py", "if position.pinned != pinned:", "if False:"),
    ),
    mistake(
        "a damaged page comes back newer", "data/test_wikipedia: comes_back",
        ("data/wikipedia.py", "            if lost is None:\n                continue\n", "            continue\n"),
    ),
    mistake(
        "a key in the query of an address", "test_network: no_web_address",
        ("network.py", 'if "?" in address or "#" in address:', "if False:"),
    ),
    mistake(
        "money is set aside after the call", "embedders/test_openai: set_aside",
        ("embedders/openai.py", "        entry = self.ledger.reserve(bound)\n", ""),
        ("embedders/openai.py", "        vectors = _checked(reply",
         "        entry = self.ledger.reserve(bound)\n        vectors = _checked(reply"),
    ),
    mistake(
        "a reply that was lost counts as free", "embedders/test_openai: survived and black_hole",
        ("embedders/openai.py", "if isinstance(error.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout):",
         "if True:"),
    ),
    mistake(
        "four bytes are a token", "embedders/test_openai: set_aside",
        ("embedders/openai.py", "return len(_cut(text).encode()) + MARKS",
         "return len(_cut(text).encode()) // 4 + MARKS"),
    ),
    mistake(
        "keys in messages", "embedders/test_openai: key_is_in_no_error",
        ("secrets.py", 'text = text.replace(secret, f"[{name}]")', "pass"),
    ),
    mistake(
        "the key over plain http", "embedders/test_openai: not_sent_in_the_clear",
        ("embedders/openai.py", "    if _is_in_the_clear(url):\n        if key:", "    if False:\n        if key:"),
    ),
    mistake(
        "files of this machine are sent unasked", "embedders/test_openai: only_with_consent",
        ("embedders/openai.py", "if network.private_text and not is_loopback", "if False and not is_loopback"),
    ),
    mistake(
        "private addresses are connected to", "test_network: private_addresses",
        ("network.py", "if not _is_public(address):", "if False:"),
    ),
    mistake(
        "the name is resolved again behind the check", "test_network: checked_address",
        ("network.py", "url.copy_with(host=address)", "url"),
    ),
    mistake(
        "redirects lead anywhere", "test_network: redirect_elsewhere",
        ("network.py", "if not at_home and not (", "if False and not ("),
    ),
    mistake(
        "--offline connects", "test_network: offline_opens_no_connection",
        ("network.py", "        if self._network.config.offline:", "        if False:"),
    ),
    mistake(
        "a reply may drip for ever", "embedders/test_openai: never_ends and slow",
        ("network.py", "if left <= 0:", "if False:"),
        ("network.py", "left if timeout is None else min(timeout, left)", "timeout"),
    ),
    *(mistake(name, tests, *edits) for name, tests, *edits in BROKEN_PROMISES),
    # promises about numbers that are not finite and memory that runs out
    mistake(
        "an update trusts the numbers of its rollout", "test_guard: changes_nothing and float32",
        ("trainer.py", "place = first_place(numbers, processes.gather_rows)", "place = None"),
    ),
    mistake(
        "a bad gradient is stepped along", "test_guard: three_in_a_row",
        ("update.py", "    if place is None:\n        for group", "    if True:\n        for group"),
    ),
    mistake(
        "statistics learn from a skipped update", "test_guard: changes_nothing and float32",
        ("trainer.py", "agent=agent if outcome.finite else state.agent", "agent=agent"),
    ),
    mistake(
        "figures are of the finite rest", "test_guard: changes_nothing and float32",
        ("diagnostics.py", "(selection != -math.inf).sum(-1) >= 2", "(selection > -math.inf).sum(-1) >= 2"),
    ),
    mistake(
        "an endless score passes for a pair that is never picked", "test_guard: no_number_spoils",
        ("selection.py", "return mean.masked_fill(broken, torch.nan)", "return mean"),
    ),
    mistake(
        "an overflow passes for probability 0", "test_guard: probability_0",
        ("model.py", "        total = total.masked_fill(total == torch.inf, torch.nan)", "        total = total"),
    ),
    mistake(
        "a bad weight is skipped like any number", "test_guard: bad_weight_ends",
        ("trainer.py", "if place is not None and place.startswith(WEIGHT):", "if False:"),
    ),
    mistake(
        "bad weights are saved", "test_guard: is_not_written",
        ("checkpoint.py", "if bad := first_tensor([*model", "if False and first_tensor([*model"),
    ),
    mistake(
        "bad weights are loaded", "test_guard: is_not_loaded and adapter",
        ("checkpoint.py", "if bad := first_tensor(model.named_trainable().items()):", "if False:"),
    ),
    mistake(
        "the gradient of an interrupted update stays", "test_memory: first_update and backward",
        ("update.py", "    optimizer.zero_grad()\n    try:", "    try:"),
        ("update.py", "        optimizer.zero_grad()  # what", "        pass  # what"),
    ),
    mistake(
        "only the gradient is computed anew, not the rewards", "test_memory: begins_with_its_scoring",
        ("trainer.py", "return session.micro_batch.fit(reading.rows.num_rows, lambda: _learn(",
         "return (lambda rows, work: work())(0, lambda: _learn("),
        ("trainer.py", "apply_update(session, optimizer, paid, reading.pool, advantages, state.update, place)",
         "session.micro_batch.fit(6, lambda: apply_update("
         "session, optimizer, paid, reading.pool, advantages, state.update, place))"),
    ),
    mistake(
        "a resume forgets that memory ran out", "test_memory: later and backward",
        ("trainer.py", "        session.micro_batch.lower(state.micro_batch_rows)\n", ""),
    ),
    mistake(
        "rows written apart take the picks of others", "test_memory: written_apart",
        ("pickers.py", "picks[env.rows, num_read]", "picks[: len(uniform), num_read]"),
    ),
    mistake(
        "one row too many is a bug of ours", "test_memory: elsewhere",
        ("cli.py", "if memory is not None and memory.ran_out(error):", "if False:"),
    ),
)  # fmt: skip


def copy_tree(target: Path) -> None:
    """Copy what the tests need."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)


def apply(mutation: Mutation, tree: Path) -> None:
    """Make the mistake in a copy; raise ValueError if the text to replace is not there exactly once."""
    for name, old, new in mutation.edits:
        path = tree / PACKAGE / name
        text = path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(f"{mutation.name}: {text.count(old)} occurrences in {name} of {old!r}")
        path.write_text(text.replace(old, new), encoding="utf-8")


def warm_up() -> None:
    """Import everything slow that is not the package, so that forks find it done."""
    import accelerate  # noqa: F401
    import httpx2  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import openai  # noqa: F401
    import peft  # noqa: F401
    import scipy.stats  # noqa: F401
    import syntok.segmenter  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401


def start_tests(tree: Path, file: str, expression: str) -> int:
    """Fork; run selected tests of a file on a copy in the child, its output in a file beside; return the child's id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        output = os.open(output_of(tree), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(tree)
        os.environ |= {"PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(tree / "src"))
        import pytest

        quiet = ["-q", "-x", "--tb=no", "-p", "no:cacheprovider", f"--basetemp={tree}-tmp"]
        quiet += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins may be imported already
        code = int(pytest.main([*quiet, file, "-k", expression]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def output_of(tree: Path) -> Path:
    """Return where the tests on a copy write."""
    return tree.with_name(f"{tree.name}.txt")


def wait_for(children: dict[int, Path]) -> tuple[Path, int, str]:
    """Wait for one of the children; return its tree, pytest's exit code and the first failure or last line."""
    child, status = os.wait()
    tree = children.pop(child)
    text = output_of(tree).read_text(encoding="utf-8")
    failed = re.findall(r"^(?:FAILED|ERROR) \S*::(\S+)", text, re.MULTILINE)
    return tree, os.waitstatus_to_exitcode(status), failed[0] if failed else (text.split("\n")[-2:] or [""])[0]


def main() -> int:
    """Run the mutations and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutations whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutations at a time")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.words or any(w in m.name for w in options.words)]
    if options.list:
        print("\n".join(m.name for m in chosen))
        return 0

    survivors, started = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        pristine = Path(folder) / "pristine"
        pristine.mkdir()
        copy_tree(pristine)
        trees = {}
        for number, mutation in enumerate(chosen):
            tree = Path(folder) / str(number)
            shutil.copytree(pristine, tree)
            apply(mutation, tree)
            trees[tree] = mutation

        warm_up()
        for file in sorted({m.file for m in chosen}):
            needed = " or ".join(f"({tests})" for tests in sorted({m.tests for m in chosen if m.file == file}))
            _, code, said = wait_for({start_tests(pristine, file, needed): pristine})
            print(f"{'unchanged ' + file:55} {'passes' if code == 0 else 'FAILS'}   {said}", flush=True)
            if code != 0:
                return 1
        waiting, children = list(trees), {}
        while waiting or children:
            while waiting and len(children) < options.jobs:
                tree = waiting.pop(0)
                children[start_tests(tree, trees[tree].file, trees[tree].tests)] = tree
            tree, code, said = wait_for(children)
            mutation = trees[tree]
            if code != 1:  # 1: tests ran and some failed; anything else is not a verdict
                survivors.append(mutation.name)
            verdict = "caught" if code == 1 else "SURVIVES" if code == 0 else f"BROKEN (pytest exit {code})"
            print(f"{mutation.name:55} {verdict}   {said}", flush=True)
            shutil.rmtree(tree)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught in {time.perf_counter() - started:.0f} s")
    print("".join(f"not caught: {name}\n" for name in survivors), end="")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
