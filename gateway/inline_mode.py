"""How a gateway takes part in computing experts: the policy's `gateway.inline`, which may change while it runs."""

from __future__ import annotations

import threading

from experts.ffn import ExpertFFN
from experts.store import ExpertStore
from gateway.dispatch import Dispatcher
from gateway.inline_choice import InlineChoice
from gateway.inline_experts import KEEP_S, InlineExperts
from placement.cost import Speed
from placement.policy import Policy


class InlineMode:
    """The gateway's own experts, mapped as they are, or, with `prefer`, as fast as can be on its `device`."""

    def __init__(self, store: ExpertStore, policy: Policy, device: str) -> None:
        self._store = store
        self._device = device
        self._mode = policy.gateway.inline
        self._loading: threading.Thread | None = None
        self.costs = self._costs()
        """What learns costs, and decides."""
        self.experts = self._experts()

    @property
    def may_compute(self) -> bool:
        """Whether the gateway computes experts at all."""
        return self._mode != "never"

    def use(self, policy: Policy, dispatcher: Dispatcher) -> None:
        """Let `dispatcher` go on as `policy` says, from the next layer on."""
        if policy.gateway.inline != self._mode:
            self._mode = policy.gateway.inline
            self.costs, self.experts = self._costs(), self._experts()
            self.load()
        dispatcher.use(
            self.experts, policy.experts.min_rows_per_replica, policy.gateway.call_deadline_s,
            choice=self.costs, may_inline=self.may_compute,
        )  # fmt: skip

    def load(self) -> None:
        """With `prefer`, load all in a thread before they are asked for: packing an expert takes as long as reading."""
        self.close()
        if self._mode == "prefer":
            self._loading = threading.Thread(target=self._load, args=(self.experts,), name="load-experts", daemon=True)
            self._loading.start()

    def close(self) -> None:
        """Wait for what is being loaded."""
        if self._loading is not None:
            self._loading.join()

    def _costs(self) -> InlineChoice:
        manifest = self._store.manifest
        speed = Speed.of(manifest.slice_bytes, manifest.slice_numbers)
        return InlineChoice(speed, prefer=self._mode == "prefer")

    def _experts(self) -> InlineExperts:
        fast = self._mode == "prefer"
        ffn = ExpertFFN(self._store, self._device if fast else "cpu", fast=fast)
        return InlineExperts(ffn, keep_s=None if fast else KEEP_S)

    def _load(self, experts: InlineExperts) -> None:
        for layer, expert in self._store.slices:
            experts.load(layer, expert)
