"""Token streams, one per kind of text, and the batches that mix them."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch
from transformers import PreTrainedTokenizerFast

from deploy.model.corpus import Document, Kind
from deploy.model.tokenizer import END_OF_TEXT

# Share of each kind among the training tokens.
MIXTURE: Mapping[Kind, float] = {"code": 0.45, "docs": 0.2, "chat": 0.27, "data": 0.08}


def token_streams(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, generator: torch.Generator
) -> dict[Kind, torch.Tensor]:
    """Join the documents of each kind, in shuffled order, into one stream of token ids: kind -> [tokens] int64.

    Every document is followed by the end-of-text token.
    """
    texts: defaultdict[Kind, list[str]] = defaultdict(list)
    for document in documents:
        texts[document.kind].append(document.text)
    return {kind: _stream(parts, tokenizer, generator) for kind, parts in texts.items()}


def _stream(texts: list[str], tokenizer: PreTrainedTokenizerFast, generator: torch.Generator) -> torch.Tensor:
    order = torch.randperm(len(texts), generator=generator).tolist()
    encoded = tokenizer.backend_tokenizer.encode_batch([texts[i] + END_OF_TEXT for i in order])
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
