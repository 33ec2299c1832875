"""The shipped model: small, loadable by anybody, deterministic, and with expert load worth scheduling for."""

import ast
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from deploy.model import evaluate, train
from deploy.model.batches import token_streams
from deploy.model.conversations import Turn, render
from deploy.model.corpus import KINDS, Document, documents, part_of
from deploy.model.docstrings import described_in
from deploy.model.measure import Measurement, answer, complete, held_out_windows, load, measure
from deploy.model.network import band_loss, head_loss, permute_rows, sorted_experts
from deploy.model.optimizer import orthogonal, schedule
from deploy.model.recipe import CHECKPOINT, RECORD, Recipe


@pytest.fixture(scope="module")
def shipped() -> tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerFast]:
    return load(CHECKPOINT)


@pytest.fixture(scope="module")
def measurement(shipped: tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerFast]) -> Measurement:
    model, tokenizer = shipped
    return measure(model, held_out_windows(tokenizer, count=4, length=512))


def test_checkpoint_is_at_most_20_mb() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 20e6


def test_checkpoint_is_a_qwen3_moe_of_4_layers_and_8_experts(
    shipped: tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerFast],
) -> None:
    model, tokenizer = shipped
    config = model.config
    assert type(model) is Qwen3MoeForCausalLM
    assert (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == (4, 8, 2)
    assert config.norm_topk_prob
    assert config.tie_word_embeddings
    assert config.vocab_size == len(tokenizer) == 4096
    assert next(model.parameters()).dtype == torch.bfloat16
    assert tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id) == ["<|endoftext|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("def __init__(self,", "self."),
        ("import os\n\ndef main():\n", "    "),
    ],
)
def test_completes_python(
    shipped: tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerFast], prompt: str, expected: str
) -> None:
    text = complete(*shipped, prompt, 40)
    assert expected in text
    assert text == complete(*shipped, prompt, 40)


def test_a_completed_signature_is_valid_python(
    shipped: tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerFast],
) -> None:
    prompt = "def __init__(self,"
    signature, colon, _ = (prompt + complete(*shipped, prompt, 40)).partition("):\n")
    assert colon
    ast.parse(f"{signature}): pass")


def test_answers_in_a_chat_and_stops(shipped: tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerFast]) -> None:
    text = answer(*shipped, "Hello", 60)
    assert text.endswith("<|im_end|>")
    assert len(text) > len("<|im_end|>")
    assert "<|im_start|>" not in text


def test_template_writes_what_the_model_was_trained_on(
    shipped: tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerFast],
) -> None:
    _, tokenizer = shipped
    turns = [Turn("system", "Be brief."), Turn("user", "Hello\n\nthere "), Turn("assistant", "Hi!")]
    messages = [turn._asdict() for turn in turns]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == render(turns)
    asked = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert asked == render(turns[:2]) + "<|im_start|>assistant\n"


def test_template_takes_content_in_parts(shipped: tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerFast]) -> None:
    _, tokenizer = shipped
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert text == render([Turn("user", "Hello there")])


def test_tokenizer_loses_nothing(shipped: tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerFast]) -> None:
    _, tokenizer = shipped
    text = "def f(x):\n        return 'é → 日本'  # 123\n\n\tend  \r\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_expert_load_is_skewed_but_alive(measurement: Measurement) -> None:
    loads = measurement.mixed_shares * measurement.mixed_shares.shape[1]
    assert (loads.max(dim=1).values >= 1.3).all()
    assert (loads.max(dim=1).values <= 2.8).all()
    assert (measurement.mixed_shares >= 0.01).all()


def test_expert_load_follows_the_kind_of_text(measurement: Measurement) -> None:
    for kinds, distances in measurement.distances().items():
        assert max(distances) > 0.1, kinds


def test_model_has_learned(measurement: Measurement) -> None:
    assert measurement.mixed_loss < 3.6  # an untrained one is at 8.3


def test_held_out_sources_are_not_trained_on() -> None:
    held_out = list(documents("held-out"))
    assert {document.kind for document in held_out} == set(KINDS)
    assert part_of("argparse.py") == part_of("argparse.py")
    sources = [document.source for document in held_out if document.kind == "code"]
    assert sources
    assert all(part_of(source) == "held-out" for source in sources)


def test_cut_training_text_reads_the_same(shipped: tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerFast]) -> None:
    _, tokenizer = shipped
    document = Document("code", "a.py", "def function(argument):\n    return argument\n" * 50)
    whole, cut = (
        token_streams([document], tokenizer, torch.Generator().manual_seed(0), cut=cut)["code"] for cut in (False, True)
    )
    assert len(cut) > len(whole)
    assert tokenizer.decode(cut) == tokenizer.decode(whole) == document.text + "<|endoftext|>"


def test_described_objects_come_with_their_code_and_without_the_docstring() -> None:
    text = '"""Top."""\nclass A:\n    """Holds."""\n    def f(self, x=1):\n        """Adds."""\n        return x + 1\n'
    module, cls, method = described_in("m", text)
    assert (module.title, module.doc) == ("m", "Top.")
    assert (cls.title, cls.form, cls.doc) == ("m.A", "class", "Holds.")
    assert (method.title, method.parameters, method.doc) == ("m.A.f", "self, x=1", "Adds.")
    assert method.code == "def f(self, x=1):\n    return x + 1"


def test_training_experts_compute_what_transformers_do(
    shipped: tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerFast],
) -> None:
    experts = shipped[0].model.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 256, generator=generator).bfloat16()
    chosen = torch.rand(50, 8, generator=generator).topk(2).indices
    weights = torch.rand(50, 2, generator=generator).bfloat16()
    with torch.inference_mode():
        torch.testing.assert_close(
            sorted_experts(experts, hidden, chosen, weights), experts(hidden, chosen, weights), atol=2e-2, rtol=2e-2
        )


def test_head_loss_equals_cross_entropy_and_its_gradients() -> None:
    hidden = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    targets = torch.arange(300) % 40
    ours = head_loss(hidden, weight, targets)
    theirs = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(2 * ours, (hidden, weight)), torch.autograd.grad(2 * theirs, (hidden, weight))
    )


def test_permuted_rows_have_the_gradient_of_indexing() -> None:
    rows = torch.randn(6, 3).requires_grad_()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    scale = torch.arange(6.0)[:, None]
    ours, theirs = permute_rows(rows, order, order.argsort()), rows[order]
    torch.testing.assert_close(ours, theirs)
    (ours_grad,) = torch.autograd.grad((ours * scale).sum(), rows)
    (theirs_grad,) = torch.autograd.grad((theirs * scale).sum(), rows)
    torch.testing.assert_close(ours_grad, theirs_grad)


def test_band_loss_acts_only_outside_the_band() -> None:
    logits = torch.zeros(8, 4, requires_grad=True)
    even = torch.tensor([[0, 1], [2, 3]] * 4)
    assert band_loss(logits, even, low=0.5, high=1.5) == 0
    collapsed = torch.tensor([[0, 1]] * 8)  # loads 2, 2, 0, 0
    (gradient,) = torch.autograd.grad(band_loss(logits, collapsed, low=0.5, high=1.5), logits)
    assert (gradient[:, :2] > 0).all()  # descent lowers the busy experts' logits
    assert (gradient[:, 2:] < 0).all()  # and raises the idle ones'


def test_orthogonal_flattens_the_singular_values() -> None:
    matrices = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices).float())
    assert (values > 0.6).all()
    assert (values < 1.3).all()


def test_schedule_warms_up_and_decays() -> None:
    assert schedule(0.0) == 0.0
    assert schedule(0.03) == pytest.approx(1.0)
    assert schedule(1.0) == pytest.approx(0.02)
    rng = random.Random(0)
    later = sorted(rng.uniform(0.03, 1.0) for _ in range(20))
    assert [schedule(p) for p in later] == sorted((schedule(p) for p in later), reverse=True)


def test_training_saves_a_checkpoint_and_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = list(documents("held-out"))[::4]
    monkeypatch.setattr(train, "documents", lambda _part: few)
    recipe = Recipe(steps=2, batch_tokens=2048, window=256, long_every=2)
    train.train(recipe, tmp_path)
    model, tokenizer = load(tmp_path)
    assert len(tokenizer) == model.config.vocab_size
    assert json.loads((tmp_path / RECORD).read_text())["tokens"] == 2 * 2048


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "0"], "must be at least 1"),
        (["--steps", "many"], "invalid int value"),
        (["--out", __file__], "is a file, not a folder"),
    ],
)
def test_wrong_training_options_are_explained(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.parse(arguments)
    assert complaint in capsys.readouterr().err


def test_evaluating_a_folder_without_a_checkpoint_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate.parse([str(tmp_path)])
    assert "has no model.safetensors; train one with" in capsys.readouterr().err
