"""What several ranks add to an iteration: the collectives between them, and what the host of a node holds.

Arithmetic over assumed links, never a measurement; every figure carries its label as in ``estimate.roofline``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from .memory import size_text
from .roofline import Figure, Prediction

NVLINK = Figure(450, "pub", "NVLink 4 of H100 and H200 SXM: 900 GB/s, half of it in each direction")
NETWORK = Figure(50, "est", "one adapter of 400 Gb/s a node")
HOP_HOST = Figure(50, "est", "a step between hosts' processes, by gloo")
HOP_INSIDE = Figure(5, "est", "a step between GPUs of a node")
HOP_BETWEEN = Figure(15, "est", "a step between nodes")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Equal calls of one kind in an iteration.

    Attributes:
        what: travels.
        bytes: of the whole result of one call: of an all-reduce on every rank, of an all-gather over all ranks' parts.
        calls: in an iteration.
        host: between the processes, not their devices.
    """

    what: str
    op: Literal["all-reduce", "all-gather"]
    bytes: int
    calls: int = 1
    host: bool = False

    @property
    def rounds(self) -> int:
        """How often a ring is gone round: an all-reduce sums up, then hands out."""
        return 2 if self.op == "all-reduce" else 1

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends in one call, by a ring: (n-1)/n of the result in each round."""
        return self.rounds * (ranks - 1) / ranks * self.bytes


@dataclasses.dataclass(frozen=True)
class Fabric:
    """Ranks and what joins them.

    Attributes:
        per_node, nodes: ranks of each node, and nodes.
        inside: GB/s that a GPU sends to others of its node. between: GB/s that a node sends to others.
    """

    per_node: int = 1
    nodes: int = 1
    inside: Figure = NVLINK
    between: Figure = NETWORK

    @property
    def ranks(self) -> int:
        """Of all nodes."""
        return self.per_node * self.nodes

    @property
    def narrowest(self) -> float:
        """GB/s of the slowest link of a ring through all ranks, which enters and leaves each node once."""
        links = [self.inside.value] * (self.per_node > 1) + [self.between.value] * (self.nodes > 1)
        return min(links, default=self.inside.value)

    @property
    def hop(self) -> Figure:
        """Microseconds that one step of a ring of devices takes at least."""
        return HOP_BETWEEN if self.nodes > 1 else HOP_INSIDE

    def seconds(self, collective: Collective) -> float:
        """Of all its calls."""
        steps, hop = collective.rounds * (self.ranks - 1), HOP_HOST if collective.host else self.hop
        return collective.calls * (steps * hop.value / 1e6 + collective.sent(self.ranks) / self.narrowest / 1e9)

    def __str__(self) -> str:
        nodes = "1 node" if self.nodes == 1 else f"{self.nodes} nodes"
        return f"{self.ranks} ranks, {self.per_node} on {'each of ' if self.nodes > 1 else ''}{nodes}"

    def table(self, collectives: Sequence[Collective], beside: Prediction) -> str:
        """A readable page with its assumptions; ``beside`` is what a rank computes."""
        lines = [f"collectives of an iteration, {self}: predicted, not measured"]
        lines.append(f"{'what':12}{'op':12}{'calls':>6}{'result, MB':>14}{'sent a rank, MB':>17}{'seconds':>12}")
        for c in collectives:
            sizes = f"{c.bytes / 1e6:14.6g}{c.calls * c.sent(self.ranks) / 1e6:17.6g}"
            lines.append(f"{c.what:12}{c.op:12}{c.calls:6}{sizes}{self.seconds(c):12.3g}")
        total, sent = sum(map(self.seconds, collectives)), sum(c.calls * c.sent(self.ranks) for c in collectives)
        lines.append(f"{'sum':44}{sent / 1e6:17.6g}{total:12.3g}")
        tiers = list(beside.phases[0].seconds) if beside.phases else []
        whole = {tier: beside.total(tier) + total for tier in tiers}
        lines.append("an iteration with them: " + ", ".join(f"{s:.4g} s {tier}" for tier, s in whole.items()))
        if whole:
            lines.append(f"collectives are {total / min(whole.values()):.2%} of the shortest")
        return "\n".join([*lines, *self._assumptions()])

    def _assumptions(self) -> list[str]:
        links = [("inside a node, GB/s a GPU sends", self.inside)] * (self.per_node > 1)
        links += [("between nodes, GB/s a node sends", self.between)] * (self.nodes > 1)
        links.append(("a step of a ring, µs", self.hop))
        links.append(("a step of an agreement, µs", HOP_HOST))
        return [
            "assumptions:",
            *(f"  {name}: {f.value:g} [{f.label}: {f.source}]" for name, f in links),
            "  one ring through all ranks, whose slowest link decides: an all-reduce sends 2(n-1)/n of its result in 2(n-1)",
            "  steps, an all-gather (n-1)/n in n-1 steps; nothing is computed meanwhile [calc]",
            "not in it: waiting for the slowest rank, groups drawn again, evaluations, checkpoints, NCCL's start and buffers",
        ]


def host_table(read: int, offloaded: int, per_node: int) -> str:
    """What a node's host holds beside its processes.

    Args:
        read: bytes of the weights that each rank reads from files.
        offloaded: bytes of rewards that rest on the host, in each rank.
        per_node: ranks.
    """
    lines = [f"host memory of a node with {per_node} ranks: calculated"]
    lines.append(
        f"  weights in files    {size_text(read):>11}  mapped: once, whatever the ranks; the system may drop these pages"
    )
    if offloaded:
        lines.append(f"  offloaded rewards   {size_text(offloaded * per_node):>11}  {per_node} x {size_text(offloaded)}")
    lines.append(
        "  files of another dtype than the recipe's are converted, not mapped: then each rank has a copy while it loads"
    )
    return "\n".join([*lines, "  not in it: processes with their libraries, images that wait for rewards on the host"])
