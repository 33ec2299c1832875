"""Train the default model from scratch: `python -m deploy.model.train`."""

import argparse
import ctypes
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM
from transformers.utils.logging import disable_progress_bar

from deploy.model.batches import batches, token_streams
from deploy.model.corpus import documents
from deploy.model.evaluate import describe
from deploy.model.network import EXPERTS, RouterWatch, band_loss, head_loss, new_model
from deploy.model.optimizer import Optimizer, schedule
from deploy.model.recipe import CHECKPOINT, RECORD, Recipe, Record
from deploy.model.tokenizer import CONTEXT, train_tokenizer

QUICK_STEPS = 60


def main() -> None:
    """Train, save and describe the model as the command line asks."""
    recipe, out, threads = parse(sys.argv[1:])
    torch.set_num_threads(threads)
    disable_progress_bar()
    keep_freed_memory()
    train(recipe, out)
    describe(out)


def parse(arguments: list[str]) -> tuple[Recipe, Path, int]:
    """Read the command line: recipe, output folder and number of threads; exits with status 2 where it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m deploy.model.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder for the checkpoint (default: the shipped)")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="seed (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads (default: one per core)")
    parser.add_argument("--quick", action="store_true", help=f"a trial of {QUICK_STEPS} steps, about a minute")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.threads < 1:
        parser.error("--steps and --threads must be at least 1")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is a file, not a folder")
    return (
        Recipe(steps=QUICK_STEPS if options.quick else options.steps, seed=options.seed),
        options.out,
        options.threads,
    )


def keep_freed_memory() -> None:
    """Have glibc keep freed memory instead of returning it; mapping it anew costs a fifth of every step."""
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_threshold, most = -1, -3, 2**30
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_threshold, most)
        mallopt(m_trim_threshold, most)


def train(recipe: Recipe, out: Path) -> None:
    """Train a model and save it with its tokenizer and record; an earlier version is saved every 250 steps."""
    started, torch_generator = time.monotonic(), torch.Generator().manual_seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    texts = list(documents("train"))
    tokenizer = train_tokenizer(texts)
    streams = token_streams(texts, tokenizer, torch_generator, cut=True)
    short = batches(streams, recipe.batch_tokens // recipe.window, recipe.window, torch_generator)
    long = batches(streams, recipe.batch_tokens // CONTEXT, CONTEXT, torch_generator)
    model = new_model(tokenizer)
    optimizer = Optimizer(
        model.named_parameters(),
        muon_rate=recipe.muon_rate,
        adam_rate=recipe.adam_rate,
        weight_decay=recipe.weight_decay,
    )
    losses: list[float] = []
    with RouterWatch(model) as watch:
        for step in range(recipe.steps):
            batch = next(long if step % recipe.long_every == recipe.long_every - 1 else short)
            losses.append(_learn(model, watch, batch, recipe))
            optimizer.step(schedule(step / recipe.steps))
            if step % 50 == 49:
                _report(step + 1, losses[-50:], watch, time.monotonic() - started)
            if step % 250 == 249:
                _save(model, tokenizer, out)
    _save(model, tokenizer, out)
    record = Record(
        recipe=recipe,
        tokens=recipe.steps * recipe.batch_tokens,
        corpus_tokens={kind: len(stream) for kind, stream in streams.items()},
        seconds=round(time.monotonic() - started, 1),
        cpu_seconds=round(time.process_time(), 1),
        final_loss=round(sum(losses[-50:]) / len(losses[-50:]), 4),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        transformers=transformers.__version__,
    )
    (out / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n")


def _learn(model: Qwen3MoeForCausalLM, watch: RouterWatch, batch: torch.Tensor, recipe: Recipe) -> float:
    """Accumulate the gradients of one batch [rows, length + 1]; returns the language loss in nats per token."""
    hidden = model.model(batch[:, :-1], use_cache=False).last_hidden_state
    loss = head_loss(hidden.flatten(0, 1), model.lm_head.weight, batch[:, 1:].flatten())
    bands = [
        band_loss(logits, chosen, low=recipe.lowest_load, high=recipe.highest_load)
        for logits, chosen in zip(watch.logits, watch.chosen, strict=True)
    ]
    torch.autograd.backward(loss + recipe.balance * torch.stack(bands).sum())
    return float(loss.detach())


def _report(step: int, losses: list[float], watch: RouterWatch, seconds: float) -> None:
    loads = [chosen.flatten().bincount(minlength=EXPERTS) * (EXPERTS / chosen.numel()) for chosen in watch.chosen]
    shown = " ".join(f"{load.min():.2f}-{load.max():.2f}" for load in loads)
    print(f"step {step:5d}  loss {sum(losses) / len(losses):.3f}  loads {shown}  {seconds:.0f} s", flush=True)


def _save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
