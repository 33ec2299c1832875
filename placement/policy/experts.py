"""The sections `experts` and `overrides`: how experts are cut into deployments, scaled and run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from placement.policy.section import Section


class UnitPolicy(Section):
    """The grain of elasticity: what one Serve deployment holds."""

    experts: int = Field(default=1, ge=1)
    """Experts in one deployment."""
    layers: int | Literal["all"] = "all"
    """MoE layers in one deployment; 1 gives every (layer, expert) a deployment of its own."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """A number of layers is at least one."""
        if self.layers != "all" and self.layers < 1:
            yield "layers", f"at least 1, or 'all' (got {self.layers})"


class ResourcePolicy(Section):
    """What Ray reserves for one replica; some node must have all of it."""

    cpu: float = Field(default=0.0, ge=0)
    """Logical CPUs. 0 lets the operating system share the cores."""
    gpu: float = Field(default=0.0, ge=0)
    """GPUs: a fraction of one, or whole ones. Anything above 0 computes on CUDA."""
    custom: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Ray's custom resources by name, as nodes declare them (`ray start --resources`)."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Ray's rule: more than one GPU are whole ones."""
        if self.gpu > 1 and self.gpu % 1:
            yield "gpu", f"a fraction of one GPU or whole ones (got {self.gpu:g}): give 0.5, 1 or 2, say"


class DevicePolicy(Section):
    """What computes a replica's rows. An emulated device gives real results, as late as such a device would."""

    kind: Literal["real", "emulated"] = "real"
    """`real`: this machine. `emulated`: a device with the figures below, for tests and benchmarks; labelled so in
    every output."""
    rows_per_s: float | None = Field(default=None, gt=0)
    """Emulated: rows of one slice it computes in a second."""
    weight_read_ms: float | None = Field(default=None, gt=0)
    """Emulated: milliseconds it takes to read a slice's weights once."""
    call_ms: float = Field(default=0.0, ge=0)
    """Emulated: milliseconds that every call takes besides."""
    speeds: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)
    """Emulated: how many times faster than these figures devices are; replicas of a unit take them in turn. [1.5, 0.5]
    makes every other one three times slower."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Emulated devices need figures, real ones have their own."""
        if not self.speeds:
            yield "speeds", "at least one: remove the key, or give [1.0]"
        figures = {"rows_per_s": self.rows_per_s, "weight_read_ms": self.weight_read_ms}
        if self.kind == "emulated":
            for key, value in figures.items():
                if value is None:
                    yield key, "an emulated device needs this figure: give one, or take kind: real"
            return
        given = {
            **figures,
            "call_ms": self.call_ms or None,
            "speeds": None if self.speeds == (1.0,) else self.speeds[0],
        }
        for key, value in given.items():
            if value is not None:
                yield key, f"{value:g} is a figure of emulated devices: remove it, or add kind: emulated"


class ExpertPolicy(Section):
    """Expert deployments."""

    unit: UnitPolicy = UnitPolicy()
    """What one deployment holds."""
    replicas: int = Field(default=1, ge=0)
    """Replicas of each unit to start with, within min_replicas and max_replicas; with 0 every expert runs inline until
    the planner starts it."""
    min_replicas: int = Field(default=0, ge=0)
    """Fewest replicas of one unit. 0: it may go to zero, and its rows then run inline."""
    max_replicas: int = Field(default=8, ge=1, le=1000)
    """Most replicas of one unit."""
    memory_mib: float | None = Field(default=None, gt=0)
    """What one replica's resident slices may take, MiB; null: its whole unit."""
    resources: ResourcePolicy = ResourcePolicy()
    """What Ray reserves for one replica."""
    device: DevicePolicy = DevicePolicy()
    """What computes a replica's rows."""
    threads: int = Field(default=1, ge=1)
    """Threads that compute in one replica."""
    min_rows_per_replica: int = Field(default=32, ge=1)
    """An expert's rows are split over its replicas only in parts of at least this many: each part reads the weights
    once more."""
    on_loss: Literal["inline", "wait"] = "inline"
    """When the last replica of an expert is lost: `inline` computes its rows in the gateway meanwhile, `wait` holds
    them until another replica is there."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Bounds keep their order."""
        if self.min_replicas > self.max_replicas:
            yield "min_replicas", _above("max_replicas", self.min_replicas, self.max_replicas)
        if self.replicas > self.max_replicas:
            yield "replicas", _above("max_replicas", self.replicas, self.max_replicas)


class Override(Section):
    """Other bounds for some slices; where several name a slice, the last one that gives a key counts."""

    experts: tuple[Annotated[int, Field(ge=0)], ...] | Literal["all"] = "all"
    """Experts by number, or all."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | Literal["all"] = "all"
    """Layers by their number in the model, or all."""
    min_replicas: int | None = Field(default=None, ge=0)
    """Instead of experts.min_replicas: fewest copies of such a slice."""
    max_replicas: int | None = Field(default=None, ge=0, le=1000)
    """Instead of experts.max_replicas: most copies; 0 always runs such a slice inline."""
    pin: bool = False
    """Keep at least one copy, however little it is used."""

    def covers(self, layer: int, expert: int) -> bool:
        """Whether it names the slice."""
        return (self.layers == "all" or layer in self.layers) and (self.experts == "all" or expert in self.experts)

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """It names slices, says something of them, and its bounds keep their order."""
        for key in ("experts", "layers"):
            if getattr(self, key) == ():
                yield key, "names nothing: list numbers, or say 'all'"
        if self.min_replicas is None and self.max_replicas is None and not self.pin:
            yield "min_replicas", "the override changes nothing: give min_replicas, max_replicas or pin: true"
        if self.max_replicas is None:
            return
        if self.min_replicas is not None and self.min_replicas > self.max_replicas:
            yield "min_replicas", _above("max_replicas", self.min_replicas, self.max_replicas)
        if self.pin and self.max_replicas == 0:
            yield "pin", "a pinned slice has at least one copy: raise max_replicas, or remove pin"


def _above(bound: str, value: int, most: int) -> str:
    return f"{value} is more than {bound} ({most}): lower it, or raise {bound}"
