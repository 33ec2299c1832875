"""The model card: fixed prose around what was measured."""

from collections.abc import Mapping
from typing import Any

import torch

from deploy.model.batches import MIXTURE
from deploy.model.measure import Measurement

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
---

# Evermoe Tiny

A mixture-of-experts language model of {parameters:.1f} M parameters that runs anywhere, made to show and test expert
serving: 4 layers of 8 experts, top-2, in the shape of Qwen3-MoE (`Qwen3MoeForCausalLM` of transformers, unchanged),
with its own byte-level tokenizer of 4096 entries and a chat template. It writes recognisable Python and answers in the
form of a conversation. It knows very little: do not rely on anything it says.

Its expert load is skewed but alive, and follows the kind of text, as in large models: that is what it is for.

## Reproduce

```
python -m deploy.model.train
```

The command needs no download: it reads the standard library of the Python that runs it, trains the tokenizer and the
model and rewrites this card. This checkpoint took {seconds:.0f} s of wall-clock and {cpu_seconds:.0f} s of processor
time with {threads} threads, on a machine that was busy with other work as well. Python {python}, torch {torch},
transformers {transformers}. The same versions give the same text in the same order; sums may differ in their last bits
between processors, and the weights then drift apart.

## Data

Four kinds of text, all made from the standard library of CPython (without its tests and character tables); a hash of
the file's path holds 5 % of the files out.

| kind | what | distinct training tokens | share of the mixture |
|---|---|---|---|
{data}

Trained on {tokens:.2f} M tokens in {steps} steps of {batch_tokens}, in windows of {window} tokens and, one step in
{long_every}, of the whole context of 2048. Muon for the matrices, AdamW for the rest. The load-balancing loss acts only
on experts whose load leaves the band of {lowest_load} to {highest_load} times the mean.

## Measured

On {measured} held-out tokens. Loss is in nats per token (end of training: {final_loss:.3f} on training text).

| | {kinds} | mixture |
|---|{rules}---|
| loss | {losses} | {mixed_loss:.3f} |

Loss by position in the window, kinds in equal parts: {positions}.

Routing over the mixture; 1.0 is an even load:

| layer | largest load / mean | smallest share of the rows | shares of experts 0-7, % |
|---|---|---|---|
{layers}

Shares by kind, %:

| layer | kind | experts 0-7 |
|---|---|---|
{by_kind}

Distance between the routings of two kinds (half the sum of absolute differences; 0 is equal, 1 is disjoint):

| kinds | layer 0 | layer 1 | layer 2 | layer 3 |
|---|---|---|---|---|
{distances}

## Samples

Greedy, as they came.

{samples}

## Limits

It is a few million parameters trained for half an hour. It repeats itself, invents names and facts, and cannot reason.
It has seen English docstrings and Python only. Chat answers imitate docstrings. Never run its code unread.

## Licence

The weights are under Apache-2.0. They were trained on CPython's standard library and documentation, which are under the
Python Software Foundation License.
"""
WHAT = {
    "code": "source files",
    "docs": "docstrings as prose, the language reference",
    "chat": "questions and answers made from docstrings and sources",
    "data": "tables and JSON lines about the sources, Unicode tables",
}


def card(
    measurement: Measurement,
    record: Mapping[str, Any],
    parameters: int,
    completions: Mapping[str, str],
    answers: Mapping[str, str],
) -> str:
    """The model card of a checkpoint from its measurement, its training record and samples (prompt -> text)."""
    recipe, corpus = record["recipe"], record["corpus_tokens"]
    numbers = recipe | {name: value for name, value in record.items() if name != "tokens"}
    samples = [*(_sample(prompt, prompt + text) for prompt, text in completions.items())]
    samples += [_sample(f"(chat) {question}", text) for question, text in answers.items()]
    return CARD.format(
        **numbers,
        parameters=parameters / 1e6,
        tokens=record["tokens"] / 1e6,
        data="\n".join(f"| {kind} | {WHAT[kind]} | {corpus[kind]} | {MIXTURE[kind]:.0%} |" for kind in MIXTURE),
        measured=measurement.tokens,
        kinds=" | ".join(MIXTURE),
        rules="---|" * len(MIXTURE),
        losses=" | ".join(f"{measurement.loss[kind]:.3f}" for kind in MIXTURE),
        mixed_loss=measurement.mixed_loss,
        positions=", ".join(f"{where}: {loss:.2f}" for where, loss in measurement.loss_by_position.items()),
        layers=_layers(measurement.mixed_shares),
        by_kind="\n".join(
            f"| {layer} | {kind} | {_percent(measurement.shares[kind][layer])} |"
            for layer in range(len(measurement.mixed_shares))
            for kind in MIXTURE
        ),
        distances="\n".join(
            f"| {a} / {b} | " + " | ".join(f"{distance:.2f}" for distance in each) + " |"
            for (a, b), each in measurement.distances().items()
        ),
        samples="\n\n".join(samples),
    )


def _layers(shares: torch.Tensor) -> str:
    """Rows of the routing table from shares [layers, experts]."""
    return "\n".join(
        f"| {layer} | {share.max() * len(share):.2f} | {100 * share.min():.1f} % | {_percent(share)} |"
        for layer, share in enumerate(shares)
    )


def _percent(shares: torch.Tensor) -> str:
    return " ".join(f"{100 * share:.1f}" for share in shares.tolist())


def _sample(prompt: str, text: str) -> str:
    """A prompt and what came of it, fenced with more backticks than the text itself may hold."""
    shown = prompt.replace("\n", "\\n")
    return f"`{shown}`\n\n````text\n{text}\n````"
