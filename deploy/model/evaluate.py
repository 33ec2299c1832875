"""Measure a checkpoint on held-out text and rewrite its model card: `python -m deploy.model.evaluate`."""

import argparse
import json
import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from deploy.model.card import card
from deploy.model.measure import answer, complete, held_out_windows, load, measure
from deploy.model.recipe import CHECKPOINT, RECORD
from deploy.model.tokenizer import CONTEXT

PROMPTS = (
    "def __init__(self, ",
    "import os\n\ndef main():\n",
    "for i in range(",
    "class Stack:\n",
    "The return value",
)
QUESTIONS = ("Who are you?", "What does str.join do?", "Write a function that adds two numbers.", "Explain lists.")
SAMPLE_TOKENS = 60


def describe(folder: Path) -> None:
    """Measure the checkpoint in a folder and write and print its model card."""
    model, tokenizer = load(folder)
    measurement = measure(model, held_out_windows(tokenizer, count=8, length=CONTEXT))
    completions = {prompt: complete(model, tokenizer, prompt, SAMPLE_TOKENS) for prompt in PROMPTS}
    answers = {question: answer(model, tokenizer, question, SAMPLE_TOKENS) for question in QUESTIONS}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    record = json.loads((folder / RECORD).read_text())
    text = card(measurement, record, parameters, completions, answers)
    (folder / "README.md").write_text(text)
    print(text)


def parse(arguments: list[str]) -> Path:
    """Read the command line: the checkpoint's folder; exits with status 2 where there is none."""
    parser = argparse.ArgumentParser(prog="python -m deploy.model.evaluate", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=CHECKPOINT, help="checkpoint (default: the shipped)")
    folder: Path = parser.parse_args(arguments).folder
    for name in ("model.safetensors", RECORD):
        if not (folder / name).is_file():
            parser.error(f"{folder} has no {name}; train one with `python -m deploy.model.train --out {folder}`")
    return folder


def main() -> None:
    """Describe the checkpoint the command line names."""
    folder = parse(sys.argv[1:])
    disable_progress_bar()
    describe(folder)


if __name__ == "__main__":
    main()
