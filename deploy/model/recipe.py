"""What a training run is made of and what it leaves on record."""

from dataclasses import dataclass
from pathlib import Path

CHECKPOINT = Path(__file__).parent / "evermoe-tiny"
RECORD = "training.json"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result."""

    steps: int = 1300
    """Optimizer steps."""
    seed: int = 0
    """Seed of the weights, the order of the text and the mixture."""
    batch_tokens: int = 4096
    """Tokens per step."""
    window: int = 256
    """Length of the training windows; attention is a third of the cost already at this length."""
    long_every: int = 8
    """Every so many steps the windows are as long as the whole context, which attention would otherwise not learn."""
    muon_rate: float = 0.02
    """Highest learning rate of the matrices inside the network."""
    adam_rate: float = 3e-3
    """Highest learning rate of embeddings, norms and routers."""
    weight_decay: float = 0.1
    """Decay of the matrices inside the network."""
    balance: float = 0.1
    """Weight of the load-balancing band loss."""
    lowest_load: float = 0.35
    """Load below which an expert is helped, as a multiple of the layer's mean."""
    highest_load: float = 2.0
    """Load above which an expert is held back, as a multiple of the layer's mean."""


@dataclass(frozen=True)
class Record:
    """What a training run was and took; kept beside the weights for the model card."""

    recipe: Recipe
    tokens: int
    """Tokens trained on, repeats included."""
    corpus_tokens: dict[str, int]
    """Distinct training tokens of each kind."""
    seconds: float
    """Wall-clock time, reading the text and training the tokenizer included."""
    cpu_seconds: float
    """Processor time of the whole process; on an idle machine, threads times wall-clock time."""
    final_loss: float
    """Mean training loss of the last 50 steps, nats per token."""
    threads: int
    python: str
    torch: str
    transformers: str
