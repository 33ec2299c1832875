"""Tokens become text as they come, and the text is what decoding them all at once gives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gateway.api.detokenizer import Detokenizer

TEXT = "The naïve café costs 5 €. 日本語のテキスト 🙂🙂 👩‍👩‍👧 end  of\n\ttext"


@functools.cache
def byte_level() -> Tokenizer:
    """Byte-level BPE (GPT-2, Qwen, Llama 3): some tokens are several bytes, and cut characters apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@functools.cache
def byte_fallback() -> Tokenizer:
    """SentencePiece style (Mixtral, Llama 2): a space begins a word, unknown characters are spelled in byte tokens."""
    letters = sorted(set("▁Thenaivecafostdx.5"))
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    vocabulary |= {letter: len(vocabulary) + index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_the_pieces_of_a_text_are_the_text(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    assert "".join(pieces(tokenizer.encode(TEXT).ids, tokenizer)) == TEXT


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@given(text=st.text())
def test_so_it_is_for_any_text(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text).ids
    assert "".join(pieces(ids, tokenizer)) == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 299), max_size=60))
def test_even_tokens_that_are_no_text_decode_as_they_do_at_once(ids: list[int]) -> None:
    assert "".join(pieces(ids, byte_level())) == byte_level().decode(ids)


@given(garbage=st.lists(st.integers(2, 257), max_size=30))
def test_a_text_after_stray_bytes_is_whole(garbage: list[int]) -> None:
    tokenizer = byte_fallback()
    assert "".join(pieces([*garbage, *tokenizer.encode(TEXT).ids], tokenizer)).endswith(TEXT)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_no_piece_of_a_text_has_half_a_character(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    assert not any("\ufffd" in piece for piece in pieces(tokenizer.encode(TEXT).ids, tokenizer))


def test_a_character_is_given_with_its_last_byte() -> None:
    ids = [_token_of(byte) for byte in "a🙂b".encode()]
    assert pieces(ids, byte_level()) == ["a", "", "", "", "🙂", "b", ""]


def test_special_tokens_leave_the_space_after_them() -> None:
    tokenizer = byte_fallback()
    end = tokenizer.token_to_id("</s>") or 0
    ids = [end, *tokenizer.encode("The").ids, end, end, *tokenizer.encode("cat").ids]
    assert "".join(pieces(ids, tokenizer)) == tokenizer.decode(ids) == "The cat"


def test_many_tokens_without_text_cost_no_memory() -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer.decode)
    for _ in range(1000):
        detokenizer.push(tokenizer.token_to_id("<|end|>") or 0)
    assert len(detokenizer._window) <= 4


def test_endless_garbage_costs_no_memory() -> None:
    detokenizer = Detokenizer(byte_level().decode)
    continuation = _token_of(0x80)
    text = "".join(detokenizer.push(continuation) for _ in range(1000)) + detokenizer.finish()
    assert text == "\ufffd" * 1000
    assert len(detokenizer._window) <= 8


def _token_of(byte: int) -> int:
    """The byte-level token of one byte; GPT-2 writes each as a printable character."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [other for other in range(256) if other not in kept]
    character = chr(byte) if byte in kept else chr(256 + moved.index(byte))
    token = byte_level().token_to_id(character)
    assert token is not None
    return token
