"""plan_ranks: a model cut over processes or small devices, its layers through windows: memory of each, and steps.

What the engine does with --tensor-parallel and --window-blocks (engine.parallel), before anything is loaded: rank 0 has
the embedding and the head, every rank its share of the layers or a window of it, and its KV heads. A step takes

    max(compute + links, bytes streamed / disk rate)

as reads go on behind both. TPI-LLM (arXiv:2410.00531). Asks `cost` for every figure; imports no torch.
"""

from __future__ import annotations

from megalith.base.config import Config
from megalith.base.errors import ConfigError
from megalith.base.units import NS_PER_S
from megalith.cost.collective import Collective, Link, crossover_ns, step_link_ns
from megalith.cost.compute import CostModel
from megalith.cost.memory import RESIDENCY, kv_bytes_per_token, per_device_kv_heads, row_values, weight_bytes
from megalith.cost.parameters import count
from megalith.cost.profile import Profile
from megalith.cost.streaming import DiskRate, disk_rate
from megalith.specs.model import ModelSpec
from megalith.specs.plan import MemoryLine


class RanksQuestion(Config, kw_only=True):
    """What is to be planned."""

    spec: ModelSpec
    profile: Profile
    """Of one rank's processor."""
    ranks: int
    window_blocks: int = 0
    """Attention and FFN blocks in memory; 0: all."""
    weight_format: str = "f32"
    """As they lie in memory and in the window's file."""
    kv_format: str = "f32"
    context: int = 1024
    batch: int = 1
    rows: int = 256
    """Rows of the largest step."""
    collective: Collective = "star"
    link: Link = Link()
    disk_bytes_per_s: int | None = None


class RankMemory(Config, kw_only=True):
    """One rank."""

    rank: int
    lines: tuple[MemoryLine, ...]
    num_bytes: int


class RanksPlan(Config, kw_only=True):
    """What each rank needs and what a decode step takes. All of it is predicted."""

    model: str
    ranks: int
    window_blocks: int
    memory: tuple[RankMemory, ...]
    """Of rank 0, and of any other."""
    weight_bytes: int
    """Of the whole model."""
    stream_bytes: int
    """That each rank reads in a step."""
    step_ns: int
    compute_ns: int
    link_ns: int
    disk_ns: int
    crossover_ns: int | None
    """Latency beyond which a decode's sums are faster by the star; None: it never is."""
    disk_source: str


def plan_ranks(question: RanksQuestion) -> RanksPlan:
    """The plan. Raises ConfigError where the heads cannot be cut."""
    spec, ranks = question.spec, question.ranks
    kv = spec.num_kv_heads
    if ranks < 1 or spec.num_heads % ranks or (kv % ranks and ranks % kv):
        raise ConfigError(f"{spec.num_heads} heads and {kv} KV heads cannot be cut over {ranks} ranks evenly.")
    if spec.num_experts:
        raise ConfigError(f"{spec.name} has experts, which are not cut over ranks yet.", "Take a dense model.")
    whole, window = layer_bytes(question), window_bytes(question)
    stream = 0 if window >= whole else whole
    weights = weight_bytes(spec, question.weight_format, question.weight_format)
    cost = CostModel(spec, question.profile, weights, question.kv_format, ranks)
    step = cost.decode_step(question.batch, question.context)
    # The head is not cut: rank 0 computes the logits, so that nobody else learns the answer.
    head = weights.head * (ranks - 1) / ranks * question.profile.rates.weight_byte_ns
    compute = round(step.duration_ns - step.link_ns + head)
    link = round(step_link_ns(question.collective, spec.hidden, spec.num_layers, question.batch, ranks, question.link))
    reads = disk_rate(question.profile)
    if question.disk_bytes_per_s is not None:
        reads = DiskRate(bytes_per_s=float(question.disk_bytes_per_s), source="given")
    disk = round(stream * NS_PER_S / reads.bytes_per_s)
    payload = 4 * question.batch * spec.hidden
    crossover = crossover_ns(payload, ranks, question.link)
    return RanksPlan(
        model=spec.name, ranks=ranks, window_blocks=question.window_blocks,
        memory=tuple(rank_memory(question, rank) for rank in range(min(ranks, 2))), weight_bytes=weights.total,
        stream_bytes=stream, step_ns=max(compute + link, disk), compute_ns=compute, link_ns=link, disk_ns=disk,
        crossover_ns=None if crossover is None else round(crossover), disk_source=reads.source,
    )  # fmt: skip


def _blocks(question: RanksQuestion) -> list[int]:
    """Bytes of attention and FFN of each layer on one rank; KV heads that are repeated are on each."""
    spec = question.spec
    weights = weight_bytes(spec, question.weight_format, question.weight_format)
    attention, ffn = 2 * spec.hidden * (spec.num_heads + spec.num_kv_heads) * spec.head_dim, 3 * spec.hidden * spec.ffn
    layer = -(-weights.layers // spec.num_layers)
    first = -(-layer * attention // (attention + ffn))
    repeats = per_device_kv_heads(spec, question.ranks) * question.ranks / spec.num_kv_heads
    kv_share = spec.num_kv_heads / (spec.num_heads + spec.num_kv_heads)
    factor = 1.0 + (repeats - 1.0) * kv_share
    return [round(first * factor / question.ranks), round((layer - first) / question.ranks)] * spec.num_layers


def layer_bytes(question: RanksQuestion) -> int:
    """Of one rank's layers."""
    return sum(_blocks(question))


def window_bytes(question: RanksQuestion) -> int:
    """Of what one rank keeps of its layers: all, or the most that so many blocks in a row take."""
    blocks, size = _blocks(question), question.window_blocks
    if not size or size >= len(blocks):
        return sum(blocks)
    return max(sum(blocks[first : first + size]) for first in range(len(blocks) - size + 1))


def held_bytes(question: RanksQuestion) -> int:
    """Of weights in all ranks on one machine, and of the processes beyond the first."""
    first, *other = [rank_memory(question, rank) for rank in range(min(question.ranks, 2))]
    weights = ("layers", "head", "embedding", "norms")
    return sum(line.num_bytes for line in first.lines if line.item in weights) + (question.ranks - 1) * sum(
        line.num_bytes for rank in other for line in rank.lines if line.item in (*weights, "overhead")
    )


def rank_memory(question: RanksQuestion, rank: int) -> RankMemory:
    """Memory of a rank, line by line."""
    spec, ranks = question.spec, question.ranks
    weights = weight_bytes(spec, question.weight_format, question.weight_format)
    kept = f"window of {question.window_blocks} blocks" if question.window_blocks else "all layers"
    lines = [MemoryLine(item="layers", num_bytes=window_bytes(question), formula=f"{kept} of a 1 / {ranks} share")]
    if rank == 0:
        head = f"vocabulary {spec.vocab:,} x {spec.hidden:,}"
        tied = "the embedding, too" if spec.tied_embeddings else "not cut: only rank 0 knows the answer"
        lines.append(MemoryLine(item="head", num_bytes=weights.head, formula=f"{head}; {tied}"))
        if weights.tables:
            lines.append(MemoryLine(item="embedding", num_bytes=weights.tables, formula=f"{head}; only rank 0"))
    heads = per_device_kv_heads(spec, ranks)
    tokens = question.context * question.batch
    kv = round(tokens * kv_bytes_per_token(spec, question.kv_format) * heads / spec.num_kv_heads)
    share = 3 * spec.hidden + (row_values(spec) - 3 * spec.hidden) // ranks
    residency = RESIDENCY["torch-cpu"]
    logits = question.batch * spec.vocab * residency.logit_bytes if rank == 0 else 0
    lines += [
        MemoryLine(item="norms", num_bytes=4 * count(spec).vectors, formula="norms and biases, on every rank"),
        MemoryLine(item="kv", num_bytes=kv, formula=f"{tokens:,} tokens, {heads} of {spec.num_kv_heads} KV heads"),
        MemoryLine(item="activations", num_bytes=4 * question.rows * share + logits,
                   formula=f"{question.rows} rows x {share:,} values x 4 B, and logits on rank 0"),
        MemoryLine(item="overhead", num_bytes=residency.base_bytes, formula=residency.base_note),
    ]  # fmt: skip
    return RankMemory(rank=rank, lines=tuple(lines), num_bytes=sum(line.num_bytes for line in lines))
