"""Made-up traffic: several kinds of text, a drifting mix, bursts and lulls. Pure and seeded, on a clock of its own.

What people send is not stationary. Here every kind's weight in the mix and the rate of arrivals wander (processes that
return to their mean), calm stretches alternate with bursts, often all of one kind, and with lulls, and some requests
begin like an earlier one. The same seed and texts give the same requests.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]

_MIX_SPREAD, _MIX_TAU_S = 0.9, 120.0  # log-weights: standard deviation, and time they take to forget
_RATE_SPREAD, _RATE_TAU_S = 0.25, 300.0
_LENGTH_SPREAD = 0.6
_BURST_OF_ONE_KIND, _IN_BURST = 0.7, 0.85
_FOLLOW_UP = 0.15
_REMEMBERED = 64
_ROOM = (1.0, 4.0)  # how far above its answer's length a client sets its limit
_SHORTEST_PROMPT = 8


@dataclass(frozen=True)
class Profile:
    """Mean lengths of prompts and answers, tokens."""

    prompt_tokens: float
    answer_tokens: float


PROFILES: Mapping[str, tuple[Profile, ...]] = {
    "prefill-heavy": (Profile(250, 24),),
    "decode-heavy": (Profile(170, 80),),
    "mixed": (Profile(250, 24), Profile(170, 80)),
}
"""Each request takes one of its profile's, by chance."""


@dataclass(frozen=True)
class _Phase:
    """How fast requests arrive, and for how long on average."""

    factor: float
    mean_s: float


_CALM, _BURST, _LULL = _Phase(1.0, 10.0), _Phase(4.0, 6.0), _Phase(0.1, 4.0)
_BURST_SHARE = 0.6  # of what follows a calm phase
_CYCLE = _CALM.mean_s + _BURST_SHARE * _BURST.mean_s + (1 - _BURST_SHARE) * _LULL.mean_s
_MEAN_FACTOR = (
    _CALM.mean_s + _BURST_SHARE * _BURST.factor * _BURST.mean_s + (1 - _BURST_SHARE) * _LULL.factor * _LULL.mean_s
) / _CYCLE


@dataclass(frozen=True)
class Request:
    """One request of made-up traffic."""

    time_s: float
    """When it arrives."""
    kind: str
    prompt: Tokens
    answer_tokens: int
    """Its answer ends after so many tokens ..."""
    max_tokens: int
    """... of which only this bound is told to the service."""
    seed: int


class Traffic:
    """Requests in order of arrival, without end."""

    def __init__(
        self,
        texts: Mapping[str, Tokens],
        *,
        profile: str | Sequence[Profile] = "mixed",
        bursts: bool = True,
        drift: bool = True,
        mix: Mapping[str, float] | None = None,
        requests_per_s: float,
        longest: int,
        seed: int,
    ) -> None:
        """`texts` is one stream of tokens for each kind; `mix` their mean weights (default: equal).

        Without `bursts` arrivals are always calm; without `drift` rate and mix stay what they are on average.

        No request is longer than `longest` tokens, prompt and bound of its answer together. Raise ValueError for an
        unknown profile, kinds without text, weights that are none, and a `longest` that leaves no room.
        """
        weights = dict(mix) if mix is not None else dict.fromkeys(texts, 1.0)
        _check(texts, profile, weights, requests_per_s, longest)
        self._texts = {kind: texts[kind] for kind, weight in sorted(weights.items()) if weight > 0}
        self._kinds = list(self._texts)
        self._profiles = PROFILES[profile] if isinstance(profile, str) else tuple(profile)
        self._rate = requests_per_s
        self._longest = longest
        self._random = np.random.default_rng(seed)
        self._base = np.log([weights[kind] for kind in self._kinds])
        self._tide_spread = _RATE_SPREAD if drift else 0.0
        self._drift = _Wander(self._random, len(self._kinds), _MIX_SPREAD if drift else 0.0, _MIX_TAU_S)
        self._tide = _Wander(self._random, 1, self._tide_spread, _RATE_TAU_S)
        self._mean_factor = _MEAN_FACTOR if bursts else 1.0
        first_phase_s = self._random.exponential(_CALM.mean_s)
        self._phase, self._phase_ends, self._burst_kind = _CALM, first_phase_s if bursts else math.inf, -1
        self._recent: deque[tuple[int, int]] = deque(maxlen=_REMEMBERED)

    def __iter__(self) -> Iterator[Request]:
        now = 0.0
        while True:
            now = self._next_arrival(now)
            yield self._request(now)

    def mix(self, now: float) -> dict[str, float]:
        """The mix outside of bursts at `now`, which never goes back."""
        weights = np.exp(self._base + self._drift.at(now))
        return dict(zip(self._kinds, (weights / weights.sum()).tolist(), strict=True))

    def _next_arrival(self, now: float) -> float:
        while True:
            tide = math.exp(self._tide.at(now)[0] - self._tide_spread**2 / 2)
            gap = self._random.exponential(self._mean_factor / (self._rate * self._phase.factor * tide))
            if now + gap < self._phase_ends:
                return now + gap
            now = self._phase_ends
            self._change_phase(now)

    def _change_phase(self, now: float) -> None:
        calm = self._phase is not _CALM
        burst = self._random.random() < _BURST_SHARE
        self._phase = _CALM if calm else _BURST if burst else _LULL
        self._phase_ends = now + self._random.exponential(self._phase.mean_s)
        of_one_kind = self._phase is _BURST and self._random.random() < _BURST_OF_ONE_KIND
        self._burst_kind = self._kind(now) if of_one_kind else -1

    def _kind(self, now: float) -> int:
        return int(self._random.choice(len(self._kinds), p=list(self.mix(now).values())))

    def _request(self, now: float) -> Request:
        profile = self._profiles[self._random.integers(len(self._profiles))]
        answer = self._length(profile.answer_tokens, self._longest // 4)
        room = max(answer, int(answer * self._random.uniform(*_ROOM)))
        limit = min(room, self._longest // 2)
        prompt = max(self._length(profile.prompt_tokens, self._longest - limit), _SHORTEST_PROMPT)
        kind, start = self._place(now, prompt)
        stream = self._texts[self._kinds[kind]]
        tokens = stream[start : start + min(prompt, self._longest - limit)]
        self._recent.append((kind, start))
        return Request(
            time_s=now,
            kind=self._kinds[kind],
            prompt=tokens,
            answer_tokens=answer,
            max_tokens=limit,
            seed=int(self._random.integers(1 << 31)),
        )

    def _place(self, now: float, length: int) -> tuple[int, int]:
        """Kind and start of the next prompt: sometimes those of an earlier one, so that both begin alike."""
        if self._recent and self._random.random() < _FOLLOW_UP:
            return self._recent[self._random.integers(len(self._recent))]
        burst = self._burst_kind >= 0 and self._random.random() < _IN_BURST
        kind = self._burst_kind if burst else self._kind(now)
        return kind, int(self._random.integers(max(len(self._texts[self._kinds[kind]]) - length, 1)))

    def _length(self, mean: float, most: int) -> int:
        drawn = self._random.lognormal(math.log(mean) - _LENGTH_SPREAD**2 / 2, _LENGTH_SPREAD)
        return max(1, min(round(drawn), most))


class _Wander:
    """Numbers that wander about zero and come back (Ornstein-Uhlenbeck), exact at whatever times they are asked for."""

    def __init__(self, random: np.random.Generator, size: int, spread: float, tau_s: float) -> None:
        self._random = random
        self._spread = spread
        self._tau_s = tau_s
        self._time = 0.0
        self._value = random.normal(0.0, spread, size)

    def at(self, now: float) -> npt.NDArray[np.float64]:
        """The numbers at `now`, which never goes back."""
        if now > self._time:
            keep = math.exp((self._time - now) / self._tau_s)
            noise = self._random.normal(0.0, self._spread * math.sqrt(1 - keep**2), len(self._value))
            self._value, self._time = self._value * keep + noise, now
        return self._value


def _check(
    texts: Mapping[str, Tokens],
    profile: str | Sequence[Profile],
    mix: Mapping[str, float],
    rate: float,
    longest: int,
) -> None:
    if isinstance(profile, str) and profile not in PROFILES:
        raise ValueError(f"unknown profile '{profile}': choose one of {', '.join(PROFILES)}")
    unknown = next((kind for kind in mix if kind not in texts or not len(texts[kind])), None)
    if unknown is not None:
        raise ValueError(f"there is no text of kind '{unknown}': the kinds are {', '.join(sorted(texts))}")
    if not all(math.isfinite(weight) and weight >= 0 for weight in mix.values()) or not sum(mix.values()):
        raise ValueError("the weights of a mix are numbers of 0 or more, not all 0")
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"requests arrive at a rate above 0 a second, not {rate}")
    if longest < 4 * _SHORTEST_PROMPT:
        raise ValueError(f"requests of at most {longest} tokens leave no room for a prompt and an answer")
