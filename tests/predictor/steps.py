"""Made-up routing: sequences that come, are prefilled and decode, each token with experts of its own."""

from collections.abc import Iterator

import numpy as np

from predictor.horizon import Horizon
from predictor.records import Records, stack
from predictor.routing import StepRouting
from predictor.shape import ModelShape
from predictor.signals import LoadSignals

SHAPE = ModelShape(fingerprint="f" * 64, layers=(0, 1, 2), experts=6, top_k=2, vocabulary=50)
HORIZON = Horizon(steps=8)


def records(steps: int, *, shape: ModelShape = SHAPE, seed: int = 0, arrivals: float = 0.6) -> Records:
    """What a recording of `routings` holds."""
    signals = LoadSignals(shape)
    return stack(shape, [signals.observe(step) for step in routings(steps, shape=shape, seed=seed, arrivals=arrivals)])


def routings(
    steps: int, *, shape: ModelShape = SHAPE, seed: int = 0, budget: int = 32, arrivals: float = 0.6
) -> Iterator[StepRouting]:
    """A small engine's steps: up to 8 sequences run, prompts of 10 to 40 tokens, answers of 4 to 20."""
    rng = np.random.default_rng(seed)
    liking = np.random.default_rng(99).normal(size=(len(shape.layers), shape.vocabulary, shape.experts)) * 2
    waiting: list[int] = []
    running: list[int] = []
    prompts: dict[int, list[int]] = {}
    left: dict[int, int] = {}
    done: dict[int, int] = {}
    born = 0
    for step in range(steps):
        for _ in range(rng.poisson(arrivals)):
            start = int(rng.integers(shape.vocabulary))
            words = (
                start + rng.integers(0, max(1, shape.vocabulary // 4), size=int(rng.integers(10, 40)))
            ) % shape.vocabulary
            prompts[born], left[born], done[born] = words.tolist(), int(rng.integers(4, 20)), 0
            waiting.append(born)
            born += 1
        while waiting and len(running) < 8:
            running.append(waiting.pop(0))
        tokens: list[int] = []
        owners: list[int] = []
        prefill: list[bool] = []
        for number in list(running):
            prompt = prompts[number]
            if done[number] < len(prompt):
                chunk = prompt[done[number] : done[number] + budget - len(tokens)]
                tokens += chunk
                owners += [number] * len(chunk)
                prefill += [True] * len(chunk)
                done[number] += len(chunk)
            else:
                tokens.append(int(rng.choice(prompt)))
                owners.append(number)
                prefill.append(False)
                left[number] -= 1
            if left[number] == 0:
                running.remove(number)
        ids = np.array(tokens, np.int32)
        scores = liking[:, ids] + rng.gumbel(size=(len(shape.layers), len(ids), shape.experts))
        experts = np.argsort(-scores, axis=2)[:, :, : shape.top_k].astype(np.int16)
        queue = [(n, done[n], len(prompts[n])) for n in running + waiting if done[n] < len(prompts[n])]
        yield StepRouting(
            time_s=0.05 * step,
            token_ids=ids,
            sequences=np.array(owners, np.int64),
            prefill=np.array(prefill, bool),
            experts=experts,
            look_ahead=np.zeros((len(shape.layers), shape.experts), np.int32),
            running=np.array(running, np.int64),
            prompt_left=np.array([len(prompts[n]) - done[n] for n in running], np.int32),
            tokens_left=np.array([left[n] for n in running], np.int32),
            queue=queue,
            prompts={n: np.array(prompts[n], np.int32) for n, _, _ in queue},
            waiting=len(waiting),
            waiting_tokens=sum(len(prompts[n]) for n in waiting),
            token_budget=budget,
            max_sequences=8,
        )
