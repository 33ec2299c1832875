"""Token streams, one per kind of text, and the batches that mix them."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

import torch
from transformers import PreTrainedTokenizerFast

from deploy.model.corpus import Document, Kind
from deploy.model.tokenizer import END_OF_TEXT

# Share of each kind among the training tokens.
MIXTURE: Mapping[Kind, float] = {"code": 0.45, "docs": 0.2, "chat": 0.27, "data": 0.08}


# Mean distance, in characters, of the places where training text is cut before it is tokenized.
CUT_EVERY = 300


def token_streams(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, generator: torch.Generator, *, cut: bool
) -> dict[Kind, torch.Tensor]:
    """Join the documents of each kind, in shuffled order, into one stream of token ids: kind -> [tokens] int64.

    Every document is followed by the end-of-text token. With `cut`, code and prose are tokenized in pieces that end
    anywhere: the model then knows what follows half a word or a lone space, as people's prompts end (`def f(self, `).
    """
    texts: defaultdict[Kind, list[str]] = defaultdict(list)
    for document in documents:
        texts[document.kind].append(document.text + END_OF_TEXT)
    streams = {}
    for kind, whole in texts.items():
        order = torch.randperm(len(whole), generator=generator).tolist()
        every = CUT_EVERY if cut and kind in ("code", "docs") else None
        streams[kind] = _encode([piece for i in order for piece in _pieces(whole[i], every, generator)], tokenizer)
    return streams


def _pieces(text: str, every: int | None, generator: torch.Generator) -> list[str]:
    if every is None:
        return [text]
    longest = len(text) - len(END_OF_TEXT)  # the marker itself stays whole
    cuts = torch.randint(longest + 1, (longest // every,), generator=generator).tolist()
    return [text[start:end] for start, end in pairwise([0, *sorted(cuts), len(text)])]


def _encode(pieces: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    encoded = tokenizer.backend_tokenizer.encode_batch(pieces)
    return torch.tensor([token for encoding in encoded for token in encoding.ids])


def windows(stream: torch.Tensor, length: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield windows of `length` tokens for ever: each epoch cuts the stream at a new phase and shuffles the cuts.

    Raises ValueError where the stream is shorter than two windows.
    """
    if len(stream) < 2 * length:
        raise ValueError(f"a stream of {len(stream)} tokens is too short for windows of {length}")
    while True:
        phase = int(torch.randint(length, (1,), generator=generator))
        cuts = stream[phase:].unfold(0, length, length)
        for i in torch.randperm(len(cuts), generator=generator).tolist():
            yield cuts[i]


def batches(
    streams: Mapping[Kind, torch.Tensor], rows: int, length: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Yield mixed batches [rows, length + 1] for ever; the kinds of every batch are drawn from the mixture."""
    kinds = list(MIXTURE)
    sources = [windows(streams[kind], length + 1, generator) for kind in kinds]
    shares = torch.tensor([MIXTURE[kind] for kind in kinds])
    while True:
        drawn = torch.multinomial(shares, rows, replacement=True, generator=generator).tolist()
        yield torch.stack([next(sources[i]) for i in drawn])
