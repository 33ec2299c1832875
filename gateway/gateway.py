"""A gateway: the engine with its model, the fleet of replicas it uses, and its own port. Knows nothing of Serve."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from functools import partial
from pathlib import Path

import msgspec
import redis
import torch

from experts import kernels
from experts.families import moe_modules
from experts.store import ExpertStore
from experts.wire.sockets import host_id
from gateway import compilation
from gateway.compilation import Compilation
from gateway.dispatch import Dispatcher
from gateway.engine import Engine, EngineSettings
from gateway.fleet import Fleet
from gateway.grammar import Grammars
from gateway.inline_mode import InlineMode
from gateway.link.server import GatewayServer
from gateway.load_feed import LoadFeed
from gateway.look_ahead import Gates
from gateway.messages import GatewayStatus
from gateway.model import load_model
from gateway.routing_chunk import Hello
from gateway.routing_log import RoutingLog
from gateway.routing_packer import RoutingPacker
from gateway.step_times import StepTimes
from placement import plan
from placement.plan import Plan
from placement.policy import GatewayPolicy, Policy
from placement.policy.bounds import unit_bounds
from placement.policy.fitting import ModelFacts
from placement.unit import Unit, make_units
from predictor.shape import ModelShape
from recovery.directory import START_S, Directory, GatewayEntry
from recovery.lease import Lease
from recovery.policies import PolicyReader, start_policy

log = logging.getLogger(__name__)

_COMPILE_AFTER_S = 10.0
"""What a gateway that is ready has before decoder layers are compiled beside it."""
_HEAD_START_S = 2.0
"""What a gateway that is ready has before the first expert replica starts, and between tries to start them."""
_FINISH_POLL_S = 0.05


class Gateway:
    """Everything of one gateway process; it answers before any expert has a replica: rows then run inline.

    Raise StoreError, ModelError or DirectoryError when entered, for what can't be served.
    """

    def __init__(
        self,
        store: Path,
        policy: Policy,
        directory: Directory,
        *,
        name: str,
        node: str,
        node_ip: str,
        compiled: Path | None = None,
        record: Path | None = None,
    ) -> None:
        """`compiled` is a folder of this host for compiled layers; without one none are. `record`: a file to write
        what is routed to (see `predictor.records`).
        """
        self._store = ExpertStore.open(store)
        self._policy = policy
        self._directory = directory
        self._name = name
        self._node = node
        self._node_ip = node_ip
        self._units = make_units(policy.experts.unit, self._store.manifest.num_experts, self._store.manifest.moe_layers)
        self._compiled = compiled
        self._record = record
        told = record is not None or policy.predictor.enabled
        self._routing = RoutingLog(self._store.manifest.moe_layers) if told else None
        self._times = StepTimes()
        self._exits = contextlib.AsyncExitStack()

    @property
    def healthy(self) -> bool:
        """Whether the engine can go on."""
        return self._server.healthy

    async def __aenter__(self) -> Gateway:
        self._loop = asyncio.get_running_loop()
        if self._compiled is not None:
            kernels.load(self._compiled)
        self._directory.wait(START_S)
        secret, fingerprint = self._directory.secret(), self._store.manifest.fingerprint
        self._dispatcher = self._connect(secret)
        experts = self._dispatcher if self._routing is None else self._routing.watch(self._dispatcher)
        model = load_model(self._store, device=_device(self._policy.gateway.device), experts=experts)
        self._model = model
        grammars = Grammars(self._store.path, model.vocab_size)
        self._engine = Engine(
            model, _settings(self._policy.gateway), grammars=grammars, times=self._times, routing=self._routing
        )
        self._policies = self._follow_policy()
        self._server = await self._exits.enter_async_context(
            GatewayServer(
                self._engine,
                secret=secret,
                fingerprint=fingerprint,
                status=self._status,
                tcp_host=self._node_ip,
                prepare=self._prepare,
            )
        )
        self._exits.push_async_callback(self._finish_sequences)
        self._exits.enter_context(Lease(self._directory, self._entry(), self._figures))
        starting = asyncio.create_task(self._start_experts(), name="start-experts")
        self._exits.callback(starting.cancel)
        self._exits.callback(self._dispatcher.stop_waiting)
        self._inline.load()
        self._exits.push_async_callback(asyncio.to_thread, self._inline.close)
        if self._routing is not None:
            feeding = asyncio.create_task(self._feed_load(self._routing), name="feed-load")
            self._exits.callback(feeding.cancel)
        return self

    async def _feed_load(self, routing: RoutingLog) -> None:
        """Tell what is routed, not at once: see `_start_experts`."""
        manifest = self._store.manifest
        routing.gates = Gates(self._model.network, moe_modules(self._model.network), manifest.top_k)
        await asyncio.sleep(_HEAD_START_S)
        packer = RoutingPacker(routing, manifest.num_experts, self._policy.gateway.max_batch_tokens)
        feed = LoadFeed(packer, self._hello())
        self._exits.push_async_callback(asyncio.to_thread, feed.close)
        feed.start()

    def _hello(self) -> Hello:
        manifest, streamed = self._store.manifest, self._policy.predictor.enabled
        layers, vocabulary = tuple(manifest.moe_layers), self._model.vocab_size
        shape = ModelShape(manifest.fingerprint, layers, manifest.num_experts, manifest.top_k, vocabulary)
        return Hello(
            gateway=self._name,
            shape=shape.to_json(),
            redis_url=self._directory.url if streamed else None,
            namespace=self._directory.namespace,
            record=None if self._record is None else str(self._record),
        )

    def _prepare(self) -> None:
        """First thing in the engine's thread: what belongs to a thread, and compiled layers of an earlier start."""
        self._model.threads = self._policy.gateway.threads or os.cpu_count() or 1
        torch.set_num_threads(self._model.threads)
        if self._compiled is not None and self._model.device.type == "cpu":
            complete = compilation.adopt(self._model, self._compiled)
            if not complete:
                self._loop.call_soon_threadsafe(self._compile, self._compiled)

    def _compile(self, folder: Path) -> None:
        """Compile what is missing, in a while, and take it over when it is there."""

        def adopt() -> None:
            self._model.between_steps = partial(compilation.adopt, self._model, folder)

        compiling = Compilation(self._store.path, folder, adopt)
        self._exits.push_async_callback(asyncio.to_thread, compiling.close)
        self._exits.callback(self._loop.call_later(_COMPILE_AFTER_S, compiling.start).cancel)

    async def _start_experts(self) -> None:
        """Publish the first plan, not at once: starting replicas would take the cores from the first request."""
        while True:
            await asyncio.sleep(_HEAD_START_S)
            first = self._unplanned(epoch=1)
            try:
                await asyncio.to_thread(self._directory.publish, plan.DOCUMENT, plan.encode(first), only_first=True)
            except (redis.RedisError, OSError) as error:
                log.warning("the first plan can't be published yet, experts run inline: %s", error)
            else:
                return

    async def __aexit__(self, *_: object) -> None:
        """The lease first, so that no api sends new requests; then the connections, the fleet last."""
        await self._exits.aclose()

    async def _finish_sequences(self) -> None:
        """Wait for what still runs: the lease is given back, no new sequences come."""
        deadline = time.monotonic() + self._policy.api.drain_s
        while self._engine.has_work and time.monotonic() < deadline:
            await asyncio.sleep(_FINISH_POLL_S)

    def _follow_policy(self) -> PolicyReader:
        """From now on do what an operator applies; what was applied before this gateway started comes first."""
        manifest = self._store.manifest
        model = ModelFacts(
            name=self._store.path.name, experts=manifest.num_experts, layers=manifest.moe_layers,
            slice_bytes=manifest.slice_bytes,
        )  # fmt: skip
        start_policy(self._directory, self._policy, model, keep=True)
        return self._exits.enter_context(PolicyReader(self._directory, self._use))

    def _use(self, policy: Policy) -> None:
        """Take over what can change without a restart; in the reader's thread."""
        before, self._policy = self._policy, policy
        self._engine.scheduler.hold(policy.gateway.max_waiting)
        self._inline.use(policy, self._dispatcher)
        if before.experts.replicas != policy.experts.replicas and not policy.planned:
            document = self._directory.read(plan.DOCUMENT)
            if document is not None:
                changed = self._unplanned(epoch=plan.decode(document).epoch + 1)
                self._directory.publish(plan.DOCUMENT, plan.encode(changed))

    def _unplanned(self, epoch: int) -> Plan:
        """The plan before, or without, a planner."""
        count = self._policy.experts.replicas
        replicas = {unit.name: unit_bounds(self._policy, unit).clamp(count) for unit in self._units}
        return Plan(epoch=epoch, replicas=replicas, reason="experts.replicas of the policy", made_at=time.time())

    def _connect(self, secret: bytes) -> Dispatcher:
        """The dispatcher with the fleet it uses, and what the gateway computes itself."""
        manifest, policy = self._store.manifest, self._policy
        inline = self._inline = InlineMode(self._store, policy, _device(policy.gateway.device))
        self._fleet = self._exits.enter_context(Fleet(self._directory, secret, manifest.fingerprint))
        dispatcher = Dispatcher(
            self._fleet, inline.experts, manifest.num_experts, policy.experts.min_rows_per_replica,
            policy.gateway.call_deadline_s,
            choice=inline.costs,
            may_inline=inline.may_compute,
            times=self._times,
        )  # fmt: skip
        self._exits.callback(dispatcher.close)
        return dispatcher

    def _entry(self) -> GatewayEntry:
        return GatewayEntry(
            id=self._name,
            pid=os.getpid(),
            node=self._node,
            host=host_id(),
            addresses=self._server.addresses,
            fingerprint=self._store.manifest.fingerprint,
        )

    def _figures(self, entry: GatewayEntry) -> GatewayEntry:
        """What was learned and counted since; also a moment to tidy up, once a second and beside the engine."""
        costs, experts = self._inline.costs, self._inline.experts
        experts.tidy()
        costs.replicas = self._fleet.speed() or costs.replicas
        inline, call = costs.inline.speed, costs.call
        return msgspec.structs.replace(
            entry,
            inline_read_s=None if inline is None else inline.read_s,
            inline_row_s=None if inline is None else inline.row_s,
            call_s=call.seconds if call.seen else None,
            inline_rows=experts.rows,
            inline_bytes=experts.resident_bytes,
        )

    def _status(self, query_id: int) -> GatewayStatus:
        pool, scheduler = self._engine.pool, self._engine.scheduler
        return GatewayStatus(
            query_id=query_id,
            gateway=self._name,
            running=self._engine.running,
            waiting=self._engine.waiting,
            kv_blocks_used=pool.used,
            kv_blocks_total=pool.total,
            expert_calls=_by_unit(self._units, dict(self._dispatcher.calls)),
            inline_rows=self._inline.experts.rows,
            inline_bytes=self._inline.experts.resident_bytes,
            preemptions=scheduler.preemptions,
            prefix_cache_queries=scheduler.prefix_queries,
            prefix_cache_hits=scheduler.prefix_hits,
            steps=self._times.steps,
            step_seconds=dict(self._times.seconds),
            layer_counts=list(self._dispatcher.layer_times.counts),
            layer_seconds=self._dispatcher.layer_times.seconds,
            compiled_layers=self._model.compiled,
            policy_version=self._policies.version,
            load_steps_dropped=0 if self._routing is None else self._routing.dropped,
        )


def _settings(policy: GatewayPolicy) -> EngineSettings:
    return EngineSettings(
        kv_cache_gib=policy.kv_cache_gib,
        token_budget=policy.max_batch_tokens,
        max_sequences=policy.max_running,
        max_waiting=policy.max_waiting,
        prefix_caching=policy.prefix_caching,
    )


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _by_unit(units: list[Unit], calls: dict[tuple[int, int, str], int]) -> dict[str, dict[str, int]]:
    names = {(layer, expert): unit.name for unit in units for layer in unit.layers for expert in unit.experts}
    totals: dict[str, dict[str, int]] = {unit.name: {} for unit in units}
    for (layer, expert, path), count in calls.items():
        paths = totals[names[layer, expert]]
        paths[path] = paths.get(path, 0) + count
    return totals
