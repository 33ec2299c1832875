"""The analytic forecast: which rows come, and how each kind of them is routed.

Rows of the horizon are prompt rows already queued, prompt rows of requests nobody knows yet, rows that running
sequences decode and rows of answers that have not begun. How many of each is forecast from the queue and the pace; each
kind's shares come from the sources that know most about it. How far each source is trusted is fitted (non-negative
least squares), layer by layer: a collapsed layer needs other weights than one that follows the text.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from predictor.features import SHARES
from predictor.load_step import QUEUE_SPANS
from predictor.rows_model import RowsForecast
from predictor.samples import Samples

Array = npt.NDArray[np.float32]

_REWEIGHTED, _LEAST_ERROR = 4, 0.03
_MOST_FITTED = 120_000  # (moment, expert) pairs
_FAITH = 0.003  # how strongly weights hold to what is expected of them, of what the data say
_WHOLE = 10.0  # how strongly those of one kind of rows hold to a sum of one
_TAIL, _TAIL_TOKENS = 0.6, 400.0  # behind which part of a queue, of at least so many tokens, its youngest are

KINDS = ("queued", "unknown prompts", "running answers", "new answers")
SOURCES: tuple[tuple[int, str, float], ...] = (
    (0, "queue", 0.95),
    (0, "prefill:64", 0.05),
    (1, "prefill:16", 0.1),
    (1, "prefill:64", 0.35),
    (1, "prefill:256", 0.25),
    (1, "prefill:1024", 0.1),
    (1, "tail", 0.2),
    (2, "decode_near", 0.6),
    (2, "decode:16", 0.0),
    (2, "decode:64", 0.3),
    (2, "decode:256", 0.1),
    (3, "decode_far", 0.2),
    (3, "decode:64", 0.2),
    (3, "decode:256", 0.3),
    (3, "decode:1024", 0.1),
    (3, "prompts", 0.2),
)
"""(kind of rows, estimate of its shares, the weight expected of it). ``queue`` is the part of the queue that will be
computed, `queue_ahead`; ``tail`` its youngest, most like those that nobody knows yet; ``prompts`` how answers are
routed, changed as far as the prompts that wait differ from others."""

_KIND = np.array([kind for kind, _, _ in SOURCES])
_EXPECTED = np.array([weight for _, _, weight in SOURCES])
_QUEUE_SHARES = [SHARES.index(f"queue_{span}") for span in QUEUE_SPANS]


class Mixture:
    """Shares as a weighted sum of the sources, for each layer."""

    def __init__(self, weights: Array, static: Array) -> None:
        """`weights` [L, SOURCES]; `static` [L, E] are the shares over all the training data."""
        self.weights, self.static = weights, static

    @classmethod
    def fit(cls, samples: Samples, rows: RowsForecast) -> Mixture:
        """Learn from `samples`."""
        counts = samples.future.counts.sum(axis=0)
        static = (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).astype(np.float32)
        every = max(1, -(-len(samples) * static.shape[1] // _MOST_FITTED))
        target = samples.future.shares[::every]
        columns = _columns(samples.shares[::every], rows.take(slice(None, None, every)))  # [n, J, L, E]
        weights = [_least_absolute(columns[:, :, layer], target[:, layer]) for layer in range(len(static))]
        return cls(np.array(weights, np.float32), static)

    def forecast(self, shares: Array, rows: RowsForecast) -> Array:
        """`shares` [n, SHARES, L, E] -> [n, L, E]."""
        mixed = np.einsum("njle,lj->nle", _columns(shares, rows), self.weights)
        return normalised(mixed.astype(np.float32))


def _columns(shares: Array, rows: RowsForecast) -> Array:
    """What each source says of its part of the rows [n, SOURCES, L, E]."""
    queue = queue_ahead(shares, rows.queued, rows.prefill)
    made = {"queue": queue, "tail": _tail(shares, rows.queued), "prompts": _like_prompts(shares, queue)}
    columns = np.empty((len(shares), len(SOURCES), *shares.shape[2:]), np.float32)
    for j, (kind, name, _) in enumerate(SOURCES):
        source = made[name] if name in made else shares[:, SHARES.index(name)]
        np.multiply(rows.parts[:, kind, None, None], source, out=columns[:, j])
    return columns


def queue_ahead(shares: Array, queued: Array, rows: Array) -> Array:
    """Shares [n, L, E] of the first `rows` [n] tokens of the queue, of which `queued` [n, spans] lie in its spans.

    What lies between the ends of two spans is taken to be alike: rows are linear in between.
    """
    weights = _span_weights(queued, rows)
    silent = weights.sum(axis=1) <= 0
    weights[silent] = np.eye(len(QUEUE_SPANS), dtype=np.float32)[-1]  # what stands in for an empty queue
    return normalised(np.einsum("nj,njle->nle", weights, shares[:, _QUEUE_SHARES]))


def _tail(shares: Array, queued: Array) -> Array:
    """Shares [n, L, E] of the youngest of the queue; of the latest prompts where hardly anything waits."""
    tokens = queued[:, -1]
    weights = _span_weights(queued, tokens) - _span_weights(queued, _TAIL * tokens)
    youngest = normalised(np.einsum("nj,njle->nle", weights, shares[:, _QUEUE_SHARES]))
    few = np.asarray(tokens < _TAIL_TOKENS)
    youngest[few] = shares[few, SHARES.index("prefill:16")]
    return youngest


def _like_prompts(shares: Array, queue: Array) -> Array:
    answers, prompts = shares[:, SHARES.index("decode:256")], shares[:, SHARES.index("prefill:256")]
    return normalised((answers * queue / np.maximum(prompts, 0.01)).astype(np.float32))


def _span_weights(queued: Array, rows: Array) -> Array:
    """Weights [n, spans] with which the spans' shares sum up to the first `rows` tokens' rows."""
    ends = np.concatenate([np.zeros((len(queued), 1), np.float32), queued], axis=1)
    inside = (np.minimum(rows[:, None], ends[:, 1:]) - ends[:, :-1]).clip(0) / np.maximum(np.diff(ends), 1)
    # Rows up to the forecast are sums of differences of rows up to the ends of spans: one weight for each span.
    weights = inside.copy()
    weights[:, :-1] -= inside[:, 1:]
    return np.asarray(weights * queued, np.float32)


def _least_absolute(columns: Array, target: Array) -> npt.NDArray[np.float64]:
    """Non-negative weights [J] of `columns` [n, J, E] that bring their sum near `target` [n, E].

    The error counts as it is, not squared (iteratively reweighted least squares): moments at which little can be known
    would else drown those at which much is. A recording has few stretches of traffic, however many its moments are:
    weights are drawn towards what is expected of them.
    """
    inputs = columns.transpose(0, 2, 1).reshape(-1, columns.shape[1]).astype(np.float64)
    goal = target.ravel().astype(np.float64)
    weights = _EXPECTED
    for _ in range(_REWEIGHTED):
        error = np.abs(inputs @ weights - goal).reshape(target.shape).mean(axis=1)
        scale = np.repeat(1 / np.maximum(error, _LEAST_ERROR / target.shape[1]), target.shape[1])
        weights = _drawn(inputs.T @ (inputs * scale[:, None]), inputs.T @ (goal * scale))
    return weights


def _drawn(gram: npt.NDArray[np.float64], goal: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Non-negative least squares by its normal equations, drawn towards the weights that are expected."""
    size = np.trace(gram) / len(gram) + 1e-9
    gram = gram + _FAITH * size * np.eye(len(gram))
    goal = goal + _FAITH * size * _EXPECTED
    for kind in range(len(KINDS)):
        own = np.asarray(kind == _KIND, np.float64)
        gram += _WHOLE * size * np.outer(own, own)
        goal += _WHOLE * size * own
    root = np.linalg.cholesky(gram)
    return np.asarray(nnls(root.T, np.linalg.solve(root, goal))[0], np.float64)


def normalised(shares: Array) -> Array:
    """`shares` [..., E] without what is negative, as sums of one; an even load where nothing is left."""
    kept = np.maximum(shares, 0)
    total = kept.sum(axis=-1, keepdims=True)
    even = np.float32(1 / shares.shape[-1])
    return np.where(total > 1e-6, kept / np.maximum(total, 1e-6), even).astype(np.float32)
