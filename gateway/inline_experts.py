"""What the gateway computes itself, and when: the policy's `gateway.inline`, which may change while it runs."""

from __future__ import annotations

import threading

from experts.ffn import ExpertFFN
from experts.store import ExpertStore
from gateway.dispatch import Dispatcher
from gateway.fleet import DispatchTable
from gateway.inline_choice import InlineChoice
from placement.cost import Speed
from placement.policy import Policy


class InlineExperts:
    """The gateway's own experts, mapped as they are, or, with `prefer`, as fast as can be on its `device`."""

    def __init__(self, store: ExpertStore, policy: Policy, device: str) -> None:
        self._store = store
        self._device = device
        self._mode = ""
        self._loading: threading.Thread | None = None
        self.choice: InlineChoice | None = None
        """What decides, with `prefer`."""
        self.ffn = self._make(policy)

    @property
    def may_compute(self) -> bool:
        """Whether the gateway computes experts at all."""
        return self._mode != "never"

    def use(self, policy: Policy, dispatcher: Dispatcher) -> None:
        """Let `dispatcher` go on as `policy` says, from the next layer on."""
        if policy.gateway.inline != self._mode:
            self.ffn = self._make(policy)
            self.load()
        dispatcher.use(
            self.ffn, policy.experts.min_rows_per_replica, policy.gateway.call_deadline_s,
            choice=self.choice, may_inline=self.may_compute,
        )  # fmt: skip

    def load(self) -> None:
        """With `prefer`, load all in a thread before they are asked for: packing an expert takes as long as reading."""
        self.close()
        if self.choice is not None:
            self._loading = threading.Thread(target=self._load, args=(self.ffn,), name="load-experts", daemon=True)
            self._loading.start()

    def release(self, table: DispatchTable) -> None:
        """Unmap the experts that replicas serve everywhere, unless they are preferred here."""
        if self.choice is not None:
            return
        for expert in self.ffn.loaded:
            if all(table.copies(layer, expert) for layer in self._store.manifest.moe_layers):
                self.ffn.unload(expert)

    def close(self) -> None:
        """Wait for what is being loaded."""
        if self._loading is not None:
            self._loading.join()

    def _make(self, policy: Policy) -> ExpertFFN:
        self._mode = policy.gateway.inline
        fast = self._mode == "prefer"
        manifest = self._store.manifest
        self.choice = InlineChoice(Speed.of(manifest.slice_bytes, manifest.slice_numbers)) if fast else None
        return ExpertFFN(self._store, self._device if fast else "cpu", fast=fast)

    def _load(self, ffn: ExpertFFN) -> None:
        for expert in range(self._store.manifest.num_experts):
            ffn.load(expert)
