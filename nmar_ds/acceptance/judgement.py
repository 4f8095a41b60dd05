"""Which node is bad: numbers in, verdicts out. Nothing is measured here, and nothing imports torch.

A rate is judged against the median of all ranks, never against a table of devices: what matters
is that one slow node makes every other one wait (BLOOM's logbook tells of nodes that were found
and left out by hand).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

GIB = 2**30
# Two checkpoints lie side by side while one is published, and a little more.
CHECKPOINTS_THAT_FIT = 2.2


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is still good.

    Attributes:
        slow_factor: a rank whose matmul rate is below median / this is slow.
        slow_link_factor: a link whose round trip takes longer than median * this is slow.
        min_bandwidth: GB/s that every link must reach; 0 asks for nothing.
        max_skew_seconds: between clocks of two nodes, or a node and the file system.
        min_free_gpu_memory: share of a GPU's memory that must be free.
        min_tmp_bytes: free where temporary files go.
    """

    slow_factor: float = 3.0
    slow_link_factor: float = 4.0
    min_bandwidth: float = 0.0
    max_skew_seconds: float = 1.0
    min_free_gpu_memory: float = 0.9
    min_tmp_bytes: int = GIB // 4

    @classmethod
    def of_device(cls, kind: str) -> Limits:
        """Defaults: GPUs of one kind keep one pace; CPU cores are shared with other work."""
        return cls(slow_factor=1.3, slow_link_factor=2.0) if kind == "cuda" else cls()


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """What one rank measured.

    Attributes:
        node: host name.
        rank, local_rank, local_world_size: as in `Ranks`.
        device: `cpu` or `cuda`.
        visible: GPUs this rank sees, or CPU cores it may use.
        cores: numbers of those cores.
        versions: of driver, CUDA and packages, by name.
        gpu_memory: (free, total) bytes, or None on a CPU.
        free: bytes free in the run folder.
        tmp, tmp_free: folder for temporary files and its free bytes.
        sees_folder: whether it sees what rank 0 wrote into the run folder.
        folder_problem: why it could not write there, or "".
        clock: seconds its clock is ahead of rank 0's; None but for each node's first rank.
        file_clock: seconds the run folder's clock is ahead of its own, or None if not measured.
        flops: median floating-point operations per second of a matmul.
        wrong: elements of exactly representable products that came out wrong.
        unstable: elements that differed between repeats of one product.
    """

    node: str
    rank: int
    local_rank: int = 0
    local_world_size: int = 1
    device: str = "cpu"
    visible: int = 1
    cores: tuple[int, ...] = (0,)
    versions: dict[str, str] = field(default_factory=dict)
    gpu_memory: tuple[int, int] | None = None
    free: int = 0
    tmp: str = "/tmp"
    tmp_free: int = 0
    sees_folder: bool = True
    folder_problem: str = ""
    clock: float | None = None
    file_clock: float | None = None
    flops: float = 0.0
    wrong: int = 0
    unstable: int = 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        node: host name, or "all" for what concerns every node.
        ranks: whom it speaks of.
        check: its name.
        value: what was measured, with its unit.
        verdict: `bad` decides the exit code; `noted` is a figure nothing is expected of.
        expected: what would be good.
        advice: what to do where it is bad.
    """

    node: str
    ranks: tuple[int, ...]
    check: str
    value: str
    verdict: Literal["good", "bad", "noted"]
    expected: str = ""
    advice: str = ""

    def sentence(self) -> str:
        """The line that names a bad node."""
        who = f"(ranks {spans(self.ranks)})"
        return (
            f"bad node {self.node} {who}: {self.check}: {self.value} measured, "
            f"expected {self.expected}; {self.advice}"
        )

    def as_json(self) -> dict[str, Any]:
        """For preflight.json."""
        return asdict(self)


def spans(numbers: Sequence[int]) -> str:
    """0-3, 8 for 0, 1, 2, 3, 8."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def leave_out(node: str) -> str:
    """What a user of a cluster does with a node that is not theirs to mend."""
    return f"leave it out (sbatch --exclude={node}) and tell its administrators"


def judge(
    facts: Sequence[RankFacts],
    links: dict[tuple[int, int], float],
    *,
    link_bytes: int,
    checkpoint_bytes: int,
    limits: Limits,
) -> list[Row]:
    """All verdicts but that on the collective over all ranks.

    Args:
        facts: one per rank, in order of rank.
        links: seconds of a round trip, by the two ranks that made it.
        link_bytes: sent there, and as many back.
        checkpoint_bytes: of one checkpoint of the run.
        limits: what is still good.
    """
    nodes: dict[str, list[RankFacts]] = {}
    for one in facts:
        nodes.setdefault(one.node, []).append(one)
    rows = [row for members in nodes.values() for row in _devices(members)]
    rows += _versions(nodes)
    for members in nodes.values():
        rows += _gpu_memory(members, limits)
        rows += _folders(members, checkpoint_bytes, limits)
    rows += _clocks(nodes, limits)
    rows += _rates(facts, limits)
    rows += _products(facts)
    rows += _links(facts, links, link_bytes, limits)
    return rows


def _row(node: str, ranks: Sequence[int], check: str, value: str, *, good: bool,
         expected: str, advice: str = "") -> Row:  # fmt: skip
    return Row(
        node=node, ranks=tuple(ranks), check=check, value=value,
        verdict="good" if good else "bad", expected=expected, advice=advice or leave_out(node),
    )  # fmt: skip


def _ranks(members: Sequence[RankFacts]) -> list[int]:
    return [one.rank for one in members]


def _devices(members: list[RankFacts]) -> Iterator[Row]:
    first = members[0]
    needed = max(one.local_world_size for one in members)
    if first.device == "cuda":
        # A scheduler may show each rank its own GPU alone, or all of them to every rank.
        fits = all(one.visible > one.local_rank for one in members)
        seen, kind = min(one.visible for one in members), "visible GPUs"
    else:
        seen, kind = len({core for one in members for core in one.cores}), "cores"
        fits = seen >= needed
    yield _row(
        first.node, _ranks(members), "devices", f"{seen} {kind}", good=fits,
        expected=f"one for each of {needed} local ranks",
        advice=f"start fewer ranks there, or {leave_out(first.node)}",
    )  # fmt: skip


def _versions(nodes: dict[str, list[RankFacts]]) -> Iterator[Row]:
    """Every name of a version must be the most frequent one's; a tie goes to the first rank's."""
    names = sorted({name for ms in nodes.values() for one in ms for name in one.versions})
    usual = {
        name: Counter(one.versions.get(name, "none") for ms in nodes.values() for one in ms)
        .most_common(1)[0][0]
        for name in names
    }  # fmt: skip
    for node, members in nodes.items():
        other = {
            name: one.versions.get(name, "none")
            for one in members for name in names if one.versions.get(name, "none") != usual[name]
        }  # fmt: skip
        yield _row(
            node, _ranks(members), "versions",
            ", ".join(f"{n} {v}" for n, v in other.items()) or f"{len(names)} as elsewhere",
            good=not other,
            expected=", ".join(f"{name} {usual[name]}" for name in other) or "the same everywhere",
            advice="start the same environment or container on every node, or "
            + leave_out(node),
        )  # fmt: skip


def _gpu_memory(members: list[RankFacts], limits: Limits) -> Iterator[Row]:
    for one in members:
        if one.gpu_memory is None:
            continue
        free, total = one.gpu_memory
        yield _row(
            one.node, [one.rank], "GPU memory", f"{free / GIB:.1f} of {total / GIB:.1f} GiB free",
            good=free >= limits.min_free_gpu_memory * total,
            expected=f"at least {limits.min_free_gpu_memory:.0%}",
            advice=f"another process holds it (nvidia-smi says which): end it, or "
            f"{leave_out(one.node)}",
        )  # fmt: skip


def _folders(members: list[RankFacts], checkpoint_bytes: int, limits: Limits) -> Iterator[Row]:
    node, ranks = members[0].node, _ranks(members)
    blind = [one.rank for one in members if not one.sees_folder]
    stuck = [one for one in members if one.folder_problem]
    value = "seen and written"
    if stuck:
        value = stuck[0].folder_problem
    elif blind:
        value = f"ranks {spans(blind)} do not see what rank 0 writes"
    yield _row(
        node, ranks, "run folder", value, good=not blind and not stuck,
        expected="one folder that every node sees and may write",
        advice="mount the shared file system there, or choose another `output`",
    )  # fmt: skip
    needed, free = CHECKPOINTS_THAT_FIT * checkpoint_bytes, min(one.free for one in members)
    yield _row(
        node, ranks, "disk", f"{free / GIB:.1f} GiB free", good=free >= needed,
        expected=f"at least {needed / GIB:.1f} GiB ({CHECKPOINTS_THAT_FIT} checkpoints of "
        f"{checkpoint_bytes:,} bytes)",
        advice="make room in the run folder, or choose another `output`",
    )  # fmt: skip
    tightest = min(members, key=lambda one: one.tmp_free)
    yield _row(
        node, ranks, "temporary files", f"{tightest.tmp_free / GIB:.1f} GiB free in {tightest.tmp}",
        good=tightest.tmp_free >= limits.min_tmp_bytes,
        expected=f"at least {limits.min_tmp_bytes / GIB:.2g} GiB",
        advice="clean it up, or set TMPDIR to another folder",
    )  # fmt: skip


def _clocks(nodes: dict[str, list[RankFacts]], limits: Limits) -> Iterator[Row]:
    clocks = {n: ms[0].clock for n, ms in nodes.items()}
    known = [clock for clock in clocks.values() if clock is not None]
    # Of two nothing says which is wrong: the first one's is taken for right.
    usual = statistics.median(known) if len(known) > 2 else 0.0
    mend = "let chrony or ntpd set the clock there"
    for node, members in nodes.items():
        if (clock := clocks[node]) is not None:
            yield _row(
                node, _ranks(members), "clock", f"{clock - usual:+.3f} s from the others",
                good=abs(clock - usual) <= limits.max_skew_seconds,
                expected=f"within {limits.max_skew_seconds:g} s", advice=mend,
            )  # fmt: skip
        offsets = [one.file_clock for one in members if one.file_clock is not None]
        if offsets:
            worst = max(offsets, key=abs)
            yield _row(
                node, _ranks(members), "file times", f"{worst:+.3f} s from its clock",
                good=abs(worst) <= limits.max_skew_seconds,
                expected=f"within {limits.max_skew_seconds:g} s",
                advice=f"{mend}, or on the file server",
            )  # fmt: skip


def _rates(facts: Sequence[RankFacts], limits: Limits) -> Iterator[Row]:
    # The upper median: of two ranks the slow one is compared with the fast one.
    usual = statistics.median_high([one.flops for one in facts])
    floor = usual / limits.slow_factor
    for one in facts:
        yield _row(
            one.node, [one.rank], "matmul", f"{one.flops / 1e9:.4g} GFLOP/s",
            good=one.flops >= floor and one.flops > 0,
            expected=f"at least {floor / 1e9:.4g} (the median {usual / 1e9:.4g} / "
            f"{limits.slow_factor:g})",
        )  # fmt: skip


def _products(facts: Sequence[RankFacts]) -> Iterator[Row]:
    for one in facts:
        yield _row(
            one.node, [one.rank], "products",
            f"{one.wrong} wrong and {one.unstable} unstable elements",
            good=one.wrong == 0 and one.unstable == 0,
            expected="none: the device computes wrong numbers silently otherwise",
        )  # fmt: skip


def _links(
    facts: Sequence[RankFacts],
    links: dict[tuple[int, int], float],
    link_bytes: int,
    limits: Limits,
) -> Iterator[Row]:
    """A rank all of whose links are slow is slow itself; a slow link between good ones is both's.

    With two links or fewer nothing but `min_bandwidth` can be slow: there is no median to tell.
    """
    if not links:
        return
    # In a ring of three a slow rank makes two of the three links slow: the fastest one is usual.
    times = sorted(links.values())
    usual = times[0] if len(times) <= 3 else statistics.median_low(times)
    longest = usual * limits.slow_link_factor

    def bandwidth(seconds: float) -> float:
        return 2 * link_bytes / seconds / 1e9

    slow = {
        pair for pair, seconds in links.items()
        if (len(links) > 2 and seconds > longest) or bandwidth(seconds) < limits.min_bandwidth
    }  # fmt: skip
    touching = {rank: [p for p in links if rank in p] for pair in links for rank in pair}
    guilty = {rank for rank, pairs in touching.items() if len(links) > 2 and slow >= set(pairs)}
    floor = max(limits.min_bandwidth, bandwidth(longest) if len(links) > 2 else 0.0)
    for rank, pairs in touching.items():
        unexplained = [p for p in pairs if p in slow and not guilty & (set(p) - {rank})]
        worst = max(unexplained or pairs, key=lambda pair: links[pair])
        other = facts[worst[0] if worst[1] == rank else worst[1]]
        yield _row(
            facts[rank].node, [rank], "link",
            f"{bandwidth(links[worst]):.3g} GB/s to rank {other.rank} on {other.node}",
            good=not unexplained, expected=f"at least {floor:.3g} GB/s",
            advice="look at its network (NCCL_SOCKET_IFNAME), or " + leave_out(facts[rank].node),
        )  # fmt: skip
