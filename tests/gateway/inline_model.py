"""A gateway's model with its experts computed in the same process, and what transformers says to the same prompts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from experts.ffn import ExpertFFN
from experts.store import ExpertStore, prepare
from gateway.engine import Engine, EngineSettings
from gateway.layer_calls import ExpertsFunction
from gateway.messages import Delta, SamplingParams, Submit
from gateway.model import GatewayModel, load_model
from tests.checkpoints import write_checkpoint


def inline_experts(store: ExpertStore) -> ExpertsFunction:
    """Every expert computed on the spot, summed by the router's weights in fp32."""
    ffn = ExpertFFN(store, "cpu")

    def experts(layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden, dtype=torch.float32)
        for expert in sorted(set(index.flatten().tolist())):
            rows, column = (index == expert).nonzero(as_tuple=True)
            out.index_add_(0, rows, ffn(layer, expert, hidden[rows]).float() * weights[rows, column, None].float())
        return out.to(hidden.dtype)

    return experts


class InlineFamily:
    """A tiny checkpoint of one family: its store, its gateway model, and transformers' own model as the reference."""

    def __init__(self, family: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        checkpoint = write_checkpoint(family, folder / "checkpoint", dtype=dtype, seed=seed)
        self.store = prepare(checkpoint, folder / "store")
        self.experts = inline_experts(self.store)
        self.reference: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
        self.model = self.load()

    def load(self) -> GatewayModel:
        return load_model(self.store, experts=self.experts)

    def engine(self, **settings: Any) -> Engine:
        return Engine(self.model, EngineSettings(**{"kv_cache_gib": 0.001, "block_size": 4, **settings}))

    def generate(self, prompt: Sequence[int], tokens: int, *, use_cache: bool = True) -> list[int]:
        """transformers' greedy answer to `prompt`, alone."""
        ids = torch.tensor([list(prompt)])
        with torch.no_grad():
            out = self.reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                use_cache=use_cache,
            )
        answer: list[int] = out[0, len(prompt) :].tolist()
        return answer


def prompts(*lengths: int, seed: int = 3, vocabulary: int = 128) -> list[list[int]]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def submit(name: str, prompt: Sequence[int], *, emitted: Sequence[int] = (), **params: Any) -> Submit:
    """A request, greedy unless told otherwise."""
    sampling = SamplingParams(**{"max_tokens": 32, "temperature": 0.0, **params})
    return Submit(request_id=name, prompt_token_ids=list(prompt), params=sampling, emitted=list(emitted))


def drain(engine: Engine, between: Callable[[], None] = lambda: None) -> dict[str, list[int]]:
    """Step until nothing is left; the tokens of every request. `between` is called after every step."""
    answers: dict[str, list[int]] = {}
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None, delta.error
            answers.setdefault(delta.request_id, []).extend(delta.token_ids)
        between()
    return answers


def answer_all(engine: Engine, asked: Sequence[Sequence[int]], **params: Any) -> list[list[int]]:
    """Submit all of `asked` at once and return the answers in order."""
    for number, prompt in enumerate(asked):
        engine.add(submit(str(number), prompt, **params))
    answers = drain(engine)
    return [answers[str(number)] for number in range(len(asked))]


def failures(deltas: list[Delta]) -> dict[str, str]:
    """Request -> error sentence of those that ended in an error."""
    return {delta.request_id: str(delta.error) for delta in deltas if delta.finish_reason == "error"}


@contextmanager
def single_threaded() -> Iterator[None]:
    """Tiny products are slower on two threads than on one, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
