"""What the finished model says to held-out prompts: for a person to read, beside the metrics."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from launch.config import OptimSpec
from launch.data import Rows
from launch.engine import Engine


class Sample(NamedTuple):
    """One held-out prompt, with what the model says to it and what the data does."""

    prompt: str
    generated: str
    reference: str


def continued(engine: Engine, tokenizer: PreTrainedTokenizerBase, rows: Rows | None, optim: OptimSpec) -> list[Sample]:
    """Greedy continuations of the first `optim.samples` rows, on rank 0; nothing on the others. All ranks call it.

    Under ZeRO-3, where no rank has a whole weight, all ranks generate the same together.
    """
    together = is_deepspeed_zero3_enabled()
    main = engine.accelerator.is_main_process
    if rows is None or not optim.samples or not (main or together):
        return []
    config = engine.module.config.get_text_config()
    room = getattr(config, "max_position_embeddings", None)
    device = engine.accelerator.device
    engine.module.eval()
    samples = []
    for row in range(min(optim.samples, len(rows))):
        prompt, reference = prompt_of(rows, row)
        if room is not None:
            prompt = prompt[-max(1, room - optim.sample_max_new_tokens) :]
        ids = torch.tensor([prompt], device=device)
        with torch.no_grad():
            whole: Any = engine.module.generate(  # type: ignore[operator]  # a method of the class transformers mixes in
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=generation_config(engine, tokenizer, optim.sample_max_new_tokens),
                synced_gpus=together,
            )
        said = whole[0, len(prompt) :].tolist()
        texts = [tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, said, reference)]
        samples.append(Sample(*(str(text).strip() for text in texts)))
    engine.module.train()
    return samples if main else []


def prompt_of(rows: Rows, row: int) -> tuple[list[int], list[int]]:
    """Token ids before the row's first answer, and of that answer. A row that is learned whole is cut in the middle."""
    here = slice(rows.offsets[row], rows.offsets[row + 1])
    ids, learned = rows.tokens[here], rows.target_mask[here]
    first = int(learned.argmax())
    if first <= 1:
        first = max(1, len(ids) // 2)
    end = first + int(np.append(~learned[first:], True).argmax())
    return ids[:first].tolist(), ids[first:end].tolist()


def generation_config(engine: Engine, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Greedy, to the model's own end tokens or the tokenizer's."""
    own = engine.module.generation_config
    ends = own.eos_token_id if own is not None else None
    known = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    if tokenizer.eos_token_id is not None:
        known.add(int(tokenizer.eos_token_id))
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=int(tokenizer.pad_token_id),
        eos_token_id=sorted(known) or None,
        use_cache=True,
    )
