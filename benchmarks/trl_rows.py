"""TRL's GRPO trainer at the same task: the same weights, pools, uniform numbers and selection; its own loss and update.

TRL calls `rollout_func(prompts, trainer)` once for all rows of an update, with or without vLLM, and asks it for token
ids, which of them the model wrote (`env_mask`), and any further columns, which it hands to the reward functions. In TRL
1.16 it then runs the reference over all completions, and the loss in micro-batches. Two ways of rolling out:

- `plain`: `generate` of transformers once a step, its cache carried from step to step, so nothing is encoded twice;
  rewards by one frozen pass over the finished rows, with the head at value positions only. The best one gets without
  writing a sampler.
- `ours`: this package's rollout and frozen pass inside TRL, so that only the update side differs.

TRL's advantage is one number a trajectory and its KL a sampled estimate (k3): less work than the package's loss, and
another gradient; so queries, picks and rewards are checked, and gradients are not. The weights are shared with the
package's session. TRL reads "reference = adapter off" from a model without an adapter called "ref", which it adds only
when it is made with beta > 0: beta is set right after.
"""

import importlib.util
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from cases import Case, library_layers, own_layers, shortened, with_layers
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PrinterCallback, TrainerCallback

from attention_guided_rl.records import PairPool
from attention_guided_rl.selection import sample

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
INSTALLED = importlib.util.find_spec("trl") is not None
HOW_TO_INSTALL = "TRL is not installed: not measured; `make bench` installs it in an environment of its own"


class TrlTrainer:
    """A GRPO trainer around the case's model; `step` takes one optimiser step with it."""

    def __init__(self, case: Case, batch_rows: int, folder: Path, *, rollout: str) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        session, task = case.session, case.task
        self.case, self.batch_rows, self._rollout = (
            case,
            batch_rows,
            {"plain": self._plain, "ours": self._ours}[rollout],
        )
        self._own_layers = own_layers(session)
        self.seconds: list[float] = []
        self.outputs = (torch.zeros(0),) * 3
        config = GRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=batch_rows,
            gradient_accumulation_steps=task.rows // batch_rows,
            num_generations=task.rows // task.articles,
            max_completion_length=task.row_len - task.prompt_len,
            max_steps=1,
            learning_rate=0.0,
            beta=0.0,
            loss_type="dr_grpo",
            temperature=session.config.rollout.temperature,
            adam_beta2=session.config.optimizer.beta2,
            max_grad_norm=session.config.optimizer.max_grad_norm,
            bf16=False,
            use_cpu=session.model.device.type == "cpu",
            gradient_checkpointing=False,
            shuffle_dataset=False,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.trainer = GRPOTrainer(
                model=session.model.peft_model,
                reward_funcs=self._reward,
                args=config,
                train_dataset=Dataset.from_dict({"prompt": [session.template.prompt_text] * task.articles}),
                processing_class=session.model.tokenizer,
                rollout_func=lambda prompts, trainer: self._rollout(),
                callbacks=[_Stopwatch(self.seconds)],
            )
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.beta = session.config.objective.kl.coefficient

    def step(self, pool: PairPool, uniforms: Tensor) -> float:
        """Take a step; return its seconds. `outputs` are then its queries (B, S, Q), picks and rewards (B, S)."""
        self._pool, self._uniforms = pool, uniforms
        with warnings.catch_warnings(), library_layers(self.case.session):
            warnings.simplefilter("ignore")
            self.trainer.train()
        self.case.session.model.peft_model.eval()
        self.case.session.model.peft_model.zero_grad()
        return self.seconds[-1]

    def _ours(self) -> dict[str, Any]:
        session = self.case.session
        session.model.peft_model.eval()
        with with_layers(self._own_layers):
            rows = session.rollout(self._pool, self._uniforms)

        def score() -> Tensor:
            with with_layers(self._own_layers):
                return session.pay(rows, self._pool).rewards.rewards

        self._score = score
        session.model.peft_model.train()
        written = torch.zeros(rows.ids.shape, dtype=torch.long)
        written[:, rows.layout.query_positions] = 1
        logprobs = torch.zeros(rows.ids.shape)
        logprobs[:, rows.layout.query_positions] = rows.sampled_logprobs.flatten(1).cpu()
        return self._answer(rows.ids, rows.picks, written, logprobs)

    @torch.no_grad()
    def _plain(self) -> dict[str, Any]:
        ids, picks, written, logprobs = self._generate_rows()
        self._score = lambda: torch.cat(
            [self._frozen_pass(ids[i], picks[i], i) for i in torch.arange(len(ids)).split(4 * self.batch_rows)]
        )
        return self._answer(ids, picks, written, logprobs)

    def _generate_rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Write all rows with `generate`; return ids, picks, which tokens it wrote, their log-probabilities."""
        session, task, template = self.case.session, self.case.task, self.case.session.template
        model, device = session.model.peft_model, session.model.device
        env = session.environment(self._pool, task.rows // task.articles)
        uniforms = self._uniforms.to(device, torch.float32)
        cache = DynamicCache(config=session.model.config)
        logprobs, picks = [], []
        ids = self._constant(template.prompt, task.rows)
        for t in range(task.num_steps):
            ids = torch.cat([ids, self._constant(template.before_query, task.rows)], 1)
            sampler = _InverseCdf(session, uniforms[:, t, :-1])
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=task.query_len,
                min_new_tokens=task.query_len,
                do_sample=False,
                logits_processor=LogitsProcessorList([sampler]),
                return_dict_in_generate=True,
            )
            cache, query = out.past_key_values, out.sequences[:, -task.query_len :]
            reading = env.step(query, torch.ones_like(query, dtype=torch.bool), uniforms[:, t, -1])
            before_value = self._constant(template.before_value, task.rows)
            ids = torch.cat([out.sequences, before_value, reading.value_ids], 1)
            logprobs.append(torch.stack(sampler.logprobs, 1))
            picks.append(reading.picks)
        layout = template.layout(task.num_steps, task.query_len, task.value_len)
        written = torch.zeros(ids.shape, dtype=torch.long)
        written[:, layout.query_positions] = 1
        sampled = torch.zeros(ids.shape)
        sampled[:, layout.query_positions] = torch.cat(logprobs, 1).cpu()
        return ids, torch.stack(picks, 1), written, sampled

    @torch.no_grad()
    def _frozen_pass(self, ids: Tensor, picks: Tensor, index: Tensor) -> Tensor:
        """Score the values of finished rows, and those of the pool on their own; return rewards (b, S)."""
        task, template = self.case.task, self.case.session.template
        layout = template.layout(task.num_steps, task.query_len, task.value_len)
        raw = self._value_logprobs(ids, layout.value_positions).view(*picks.shape, -1).sum(-1)
        if index[0] == 0:  # once an update
            values = self._pool.value_ids.flatten(0, 1)
            before = self._constant(template.prompt + template.before_query + template.before_value, len(values))
            places = torch.arange(before.shape[1], before.shape[1] + task.value_len)
            prior = self._value_logprobs(torch.cat([before, values], 1), places).sum(-1)
            self._prior = prior.view(task.articles, task.num_pairs)
        group = task.rows // task.articles
        prior_of_rows = self._prior.repeat_interleave(group, 0)[index].gather(1, picks)
        lengths = self._pool.mean_value_len.repeat_interleave(group)[index].to(raw.device)
        return (raw - prior_of_rows) / lengths[:, None]

    def _value_logprobs(self, ids: Tensor, places: Tensor) -> Tensor:
        model, places = self.case.session.model.peft_model, places.to(ids.device)
        with model.disable_adapter():
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=places - 1).logits.float()
        return logits.gather(-1, ids[:, places, None])[:, :, 0] - logits.logsumexp(-1)

    def _answer(self, ids: Tensor, picks: Tensor, written: Tensor, logprobs: Tensor) -> dict[str, Any]:
        start = self.case.task.prompt_len
        self._written = ids[written.bool()].view(*picks.shape, -1), picks
        return {
            "prompt_ids": ids[:, :start].tolist(),
            "completion_ids": ids[:, start:].tolist(),
            "logprobs": logprobs[:, start:].tolist(),
            "env_mask": written[:, start:].tolist(),
        }

    def _reward(self, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        rewards = self._score()
        self.outputs = (*self._written, rewards)
        return rewards.mean(1).tolist()

    def _constant(self, piece: tuple[int, ...], rows: int) -> Tensor:
        return torch.tensor(piece, device=self.case.session.model.device).expand(rows, -1)


def best_batch(case: Case, pool: PairPool, folder: Path) -> int:
    """Try batches of 1, 2, 4, … rows at full length, with our rollout inside; return the fastest.

    It is the update that depends on it, and that is the same in both rows.
    """
    sizes = [1 << i for i in range(case.task.rows.bit_length()) if case.task.rows % (1 << i) == 0]
    with shortened(case, 2) as short:  # so that libraries have loaded what they load at first use
        TrlTrainer(short, 1, folder, rollout="ours").step(pool, short.uniforms(0))
    return min(sizes, key=lambda size: TrlTrainer(case, size, folder, rollout="ours").step(pool, case.uniforms(0)))


class _InverseCdf(LogitsProcessor):
    """Samples with given uniform numbers, as the package does, and leaves `generate` nothing to choose."""

    def __init__(self, session: Any, uniforms: Tensor) -> None:
        self._vocabulary, self._temperature = session.model.query_vocabulary, session.config.rollout.temperature
        self._uniforms = uniforms
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        masked = (scores.float() / self._temperature).masked_fill(~self._vocabulary, -torch.inf)
        logprobs = masked.log_softmax(-1)
        token = sample(logprobs, self._uniforms[:, len(self.logprobs)])[:, None]
        self.logprobs.append(logprobs.gather(1, token)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


class _Stopwatch(TrainerCallback):
    """Times a step from its beginning, generation included, until after the optimiser."""

    def __init__(self, seconds: list[float]) -> None:
        self._seconds = seconds

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._seconds.append(time.perf_counter() - self._start)
