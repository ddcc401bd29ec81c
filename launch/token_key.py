"""Under which key tokenised data is kept: a hash of all that decides the rows, and of nothing else."""

from __future__ import annotations

import datetime
import hashlib
import json
from importlib.metadata import version

from transformers import PreTrainedTokenizerBase

from launch.config import TrainSpec
from launch.tables import content_hash

FORMAT = 1
"""Goes up whenever this code makes other rows of the same data, or lays an entry out otherwise."""
LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow")
NAMES_OF_FILES = {"train", "validation", "test", "chat_template"}


def corpus_key(spec: TrainSpec, tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal keys mean equal rows, wherever the files lie. The tokenizer is a fast one, called last as for these rows.

    Raises:
        DataError: a dataset of the hub cannot be loaded.
    """
    data = spec.data
    sources = {"train": data.train, "validation": data.validation or (), "test": data.test or ()}
    facts = {
        "format": FORMAT,
        "libraries": {name: version(name) for name in LIBRARIES},
        "task": spec.model.task,
        "data": data.model_dump(mode="json", exclude=NAMES_OF_FILES),
        "seed": spec.train.seed if data.packing else None,
        "sources": {part: [content_hash(source, part) for source in names] for part, names in sources.items()},
        "tokenizer": _told(tokenizer),
    }
    if "strftime_now" in str(tokenizer.chat_template):  # a template may write the date into every dialogue
        facts["day"] = datetime.date.today().isoformat()
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _told(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """What decides the tokens of a text."""
    return {
        "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        "backend": tokenizer.backend_tokenizer.to_str(),
        "chat_template": tokenizer.chat_template,
        "special_tokens": tokenizer.special_tokens_map,
        "sides": (tokenizer.padding_side, tokenizer.truncation_side),
        "split_special_tokens": tokenizer.split_special_tokens,
    }
