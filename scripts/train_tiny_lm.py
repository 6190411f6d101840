"""Train the bundled tiny language model on the generated encyclopedia, from nothing.

    python scripts/train_tiny_lm.py --out src/attention_guided_rl/assets/tiny-lm

Documents have the form a rollout has: prompt, then steps of query and value in a random reading order. Of the steps
5 % have an empty query; of the rest 70 % ask with the pair's own key, 15 % with another pair's, 15 % about an invented
name. So the untrained policy writes sensible queries, and the scorer knows good, misleading and missing ones.
The loss is plain next-token cross-entropy over whole documents, which grow from 4 to 12 steps (every eighth batch 24):
copying is found within short documents about one or two subjects long before it is found in long ones.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attention_guided_rl.data.encyclopedia import MAX_PAIRS_PER_SUBJECT, generate_article, invented_key, vocabulary

PROMPT = "Ask for what to read next."  # the text of configs/demo.yaml, as are the two prefixes
QUERY_PREFIX, VALUE_PREFIX = "\n", " |"
TRAIN_SEED, DEV_SEED = 1_000, 1_001  # encyclopedia seeds that no reinforcement learning uses
VARIANT_MIX = {"threads": 0.76, "needle": 0.08, "chain": 0.08, "null": 0.08}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the generator is one token and any other text is still representable."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # never reached: training ends when every word is one token
        special_tokens=["<|pad|>", "<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [" " + word for word in vocabulary()] + PROMPT.replace(".", "").split(" ", 1)[:1]
    words += [" " + word for word in PROMPT.replace(".", "").split(" ")[1:]] + [" |"]
    tokenizer.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def sample_document(rng: np.random.Generator, seed: int, index: int, num_steps: int) -> list[str]:
    """Return the pieces of one document: prompt, then for each step prefix, query, prefix, value."""
    variant = str(rng.choice(list(VARIANT_MIX), p=list(VARIANT_MIX.values())))
    while True:
        subjects = int(rng.integers(1 if num_steps == 4 else 2, min(8, 2 * num_steps // 3) + 1))
        pairs_per_subject = int(rng.integers(3, MAX_PAIRS_PER_SUBJECT + 1))
        if num_steps <= subjects * pairs_per_subject <= 40:
            break
    pairs = generate_article(seed, index, variant=variant, subjects=subjects, pairs_per_subject=pairs_per_subject).pairs
    pieces = [PROMPT]
    for pick in rng.permutation(len(pairs))[:num_steps]:
        kind = rng.choice(["empty", "own", "other", "invented"], p=[0.05, 0.95 * 0.7, 0.95 * 0.15, 0.95 * 0.15])
        query = {
            "empty": lambda: "",
            "own": lambda pick=pick: " " + pairs[pick].key,
            "other": lambda: " " + pairs[rng.integers(len(pairs))].key,
            "invented": lambda: " " + invented_key(rng),
        }[str(kind)]()
        pieces += [QUERY_PREFIX, query, VALUE_PREFIX, " " + pairs[pick].value]
    return pieces


class Documents:
    """Batches of documents as token ids; pieces are tokenised apart, as in a rollout, and cached."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._piece_ids: dict[str, list[int]] = {"": []}

    def ids(self, pieces: list[str]) -> list[int]:
        """Return BOS and the ids of the pieces."""
        return [self._tokenizer.bos_token_id, *(token for piece in pieces for token in self._piece(piece))]

    def _piece(self, piece: str) -> list[int]:
        if piece not in self._piece_ids:
            if len(self._piece_ids) > 200_000:
                self._piece_ids = {"": []}
            self._piece_ids[piece] = self._tokenizer.encode(piece, add_special_tokens=False)
        return self._piece_ids[piece]

    def batch(self, rng: np.random.Generator, seed: int, start: int, rows: int, num_steps: int) -> torch.Tensor:
        """Return (rows, T) ids, right-padded with −100."""
        documents = [self.ids(sample_document(rng, seed, start + row, num_steps)) for row in range(rows)]
        length = max(map(len, documents))
        return torch.tensor([ids + [-100] * (length - len(ids)) for ids in documents])


def document_steps(step: int, total_steps: int) -> int:
    """Return how many query/value steps the documents of this batch have."""
    if step < 0.3 * total_steps:
        return 4
    if step < 0.5 * total_steps:
        return 8
    return 24 if step % 8 == 7 else 12


def next_token_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (nats a token) of each id given those before it."""
    logits = model(ids.clamp_min(0), use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-100)


@torch.no_grad()
def copying_loss(model: LlamaForCausalLM, documents: Documents, seed: int) -> float:
    """Mean loss (nats a token) of the last value of 8-step `threads` documents about two subjects, own-key queries.

    Without any use of the context it would be about 1.8 nats (six attributes and a detail a value); the detail alone
    is 0.32.
    """
    rows = []
    for index in range(64):
        pairs = generate_article(seed, 10_000_000 + index, subjects=2, pairs_per_subject=4).pairs
        pieces = [PROMPT]
        for pair in pairs:
            pieces += [QUERY_PREFIX, " " + pair.key, VALUE_PREFIX, " " + pair.value]
        rows.append(documents.ids(pieces))
    ids = torch.tensor(rows)
    logits = model(ids, use_cache=False).logits[:, -11:-1]
    return float(F.cross_entropy(logits.flatten(0, 1), ids[:, -10:].flatten()))


def main() -> None:
    """Train, report every 50 steps, and write model, tokenizer and training.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--stop", type=int, default=1951, help="end here, before the schedule of --steps does")
    parser.add_argument("--rows", type=int, default=64, help="documents a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    documents = Documents(tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=0.08,  # about 1/√width; with 0.02 the model had not found copying after 300 steps
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens in the vocabulary")

    rng, dev_rng = np.random.default_rng(args.seed), np.random.default_rng(args.seed + 1)
    dev = [documents.batch(dev_rng, DEV_SEED, 64 * i, 64, 12) for i in range(4)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1.0, (k + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * k / args.steps)))
    )
    start, log = time.perf_counter(), []
    for step in range(min(args.steps, args.stop)):
        num_steps = document_steps(step, args.steps)
        rows = args.rows if num_steps <= 12 else args.rows // 2
        loss = next_token_loss(model, documents.batch(rng, TRAIN_SEED, step * args.rows, rows, num_steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step + 1 in (args.steps, args.stop):
            with torch.no_grad():
                dev_loss = sum(next_token_loss(model, ids).item() for ids in dev) / len(dev)
            seconds = time.perf_counter() - start
            copying = copying_loss(model, documents, DEV_SEED)
            losses = {"loss": loss.item(), "dev_loss": dev_loss, "copying_loss": copying}
            log.append({"step": step, **{name: round(value, 4) for name, value in losses.items()}})
            print(log[-1], f"{seconds:.0f} s", flush=True)
            model.save_pretrained(args.out)

    tokenizer.save_pretrained(args.out)
    training = {
        "command": f"python scripts/train_tiny_lm.py --out {args.out} --steps {args.steps} --stop {args.stop} "
        f"--rows {args.rows} --lr {args.lr} --seed {args.seed}",
        "seconds": round(time.perf_counter() - start),
        "threads": torch.get_num_threads(),
        "losses": log,
    }
    (args.out / "training.json").write_text(json.dumps(training, indent=1) + "\n")


if __name__ == "__main__":
    main()
