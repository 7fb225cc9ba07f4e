"""What a fleet of blocks is made of: devices, instances of units, requests on their way through them.

Knows times and bytes of each; must not know where requests go.
"""

from __future__ import annotations

from collections import deque

from megalith.base.errors import ConfigError, DoesNotFit
from megalith.base.units import NS_PER_S, format_bytes
from megalith.cost import parameters as counting
from megalith.cost.memory import kv_bytes_per_token, weight_bytes
from megalith.cost.timer import PS_PER_NS, Prompt
from megalith.cost.timer_analytic import AnalyticTimer
from megalith.cost.timer_choice import choose_timer
from megalith.policy.block_zoo import Unit
from megalith.sim.live import Live
from megalith.specs import catalog
from megalith.specs.blocks import BlockScenario

SEEN = 1024
"""Context at which a request's part of a round is judged."""
VALUE_BYTES = 2
TOKEN_BYTES = 8
"""Of a token on its way back to the first block."""


class BaseTimes:
    """Times and bytes of one base model on the devices of the scenario, whole."""

    def __init__(self, scenario: BlockScenario, name: str) -> None:
        spec = catalog.model(name)
        if spec.num_layers < scenario.zoo.blocks:
            raise ConfigError(f"{name} has {spec.num_layers} layers.", f"Cut it into {spec.num_layers} blocks at most.")
        timer = choose_timer("analytic", name, scenario.device)
        assert isinstance(timer, AnalyticTimer)
        self.timer, self.name, self.layers = timer, name, spec.num_layers
        self.row_bytes = spec.hidden * VALUE_BYTES
        self.token_kv_bytes = kv_bytes_per_token(spec)
        self.weight_bytes = weight_bytes(spec, "bf16").total
        self.token_flops = 2 * counting.layer_macs(spec)
        """Of the linear layers, for one token."""
        first = timer.step_ps((), 1, SEEN, SEEN)
        self.step_ns = first // PS_PER_NS
        self.row_ns = (timer.step_ps((), 2, 2 * SEEN, SEEN) - first) // PS_PER_NS
        self.prompt_token_ns = timer.step_ps((Prompt(SEEN, 0, True),), 0, 0, 0) // (SEEN * PS_PER_NS)


class Row:
    """One request on its way. `context` tokens have KV; `new_tokens` are to be computed in this round."""

    __slots__ = (
        "application", "context", "live", "moved", "new_tokens", "owners", "place", "queued_ns", "round_ps", "trial",
    )  # fmt: skip

    def __init__(self, live: Live, application: int) -> None:
        self.live, self.application = live, application
        self.owners: list[Instance] = []
        """Of its KV, by place in the chain."""
        self.place = 0
        self.new_tokens, self.context = live.request.prompt_tokens, 0
        self.moved = False
        """Its context is computed again with this hop."""
        self.queued_ns = 0
        self.round_ps = 0
        """When it got its last token."""
        self.trial: Trial | None = None

    @property
    def tokens(self) -> int:
        """Tokens that its KV has room for, from admission on."""
        return self.live.request.prompt_tokens + self.live.output_tokens

    @property
    def computes(self) -> int:
        """Tokens that the next step computes for it."""
        return self.new_tokens + (self.context if self.moved else 0)


class Trial:
    """What a block was begun on before its true input was there."""

    __slots__ = ("done", "right", "state")

    def __init__(self, right: bool) -> None:
        self.right = right
        self.state = "open"
        """open: the true input is on its way. stands, redo: it is there."""
        self.done = False
        """The block is through with it."""


class Instance:
    """One copy of a unit on a device, with a queue of its own."""

    __slots__ = ("base", "device", "id", "idle_ns", "num_bytes", "present", "prompt_tokens", "queue", "share", "unit")

    def __init__(self, number: int, unit: Unit, base: BaseTimes, device: Device, blocks: int) -> None:
        self.id, self.unit, self.base, self.device = number, unit, base, device
        self.share = unit.blocks, blocks
        self.num_bytes = -(-base.weight_bytes * unit.blocks // blocks)
        self.queue: deque[Row] = deque()
        self.prompt_tokens = 0
        """Tokens in the queue beside decodes."""
        self.present = 0
        """Requests whose KV is here."""
        self.idle_ns = 0
        """When the last of them left."""

    def part(self, whole: int) -> int:
        """Its part of what a whole model takes."""
        return whole * self.share[0] // self.share[1]

    def kv_bytes(self, tokens: int) -> int:
        """KV of so many tokens in its layers."""
        return self.part(tokens * self.base.token_kv_bytes)

    def step_ps(self, rows: list[Row]) -> int:
        """Duration of a step of these rows."""
        prompts, decodes, contexts, longest = [], 0, 0, 0
        for row in rows:
            if row.computes == 1:
                decodes, contexts, longest = decodes + 1, contexts + row.context, max(longest, row.context)
            else:
                prompts.append(Prompt(row.computes, 0 if row.moved else row.context, True))
        return max(1, self.part(self.base.timer.step_ps(prompts, decodes, contexts, longest)))

    def take(self, most: int, budget: int) -> list[Row]:
        """The rows of the next step: as many as may run, in order, with at least one."""
        rows: list[Row] = []
        left = budget
        while self.queue and len(rows) < most:
            tokens = self.queue[0].computes
            if tokens > 1 and tokens > left and rows:
                break
            left -= tokens if tokens > 1 else 0
            rows.append(self.queue.popleft())
        self.prompt_tokens -= sum([row.computes for row in rows if row.computes > 1])
        return rows

    def queued_ns(self) -> int:
        """About how long its queue takes."""
        if not self.queue:
            return 0
        return self.part(self.base.step_ns + self.prompt_tokens * self.base.prompt_token_ns)

    def round_ns(self) -> int:
        """About how long a token for each of its requests takes."""
        return self.part(self.base.step_ns + self.present * self.base.row_ns) if self.present else 0


class Device:
    """One device: its instances take turns."""

    __slots__ = (
        "busy_ps",
        "end_ps",
        "free_bytes",
        "free_ps",
        "id",
        "instances",
        "last",
        "running",
        "server",
        "weights_bytes",
    )

    def __init__(self, number: int, server: int, free_bytes: int) -> None:
        self.id, self.server, self.free_bytes = number, server, free_bytes
        self.instances: list[Instance] = []
        self.running = False
        self.last = "", 0, 0
        """(base, place, instance) of the step before."""
        self.weights_bytes = self.busy_ps = self.free_ps = self.end_ps = 0

    def queued(self) -> int:
        """Rows that wait for it."""
        return sum([len(instance.queue) for instance in self.instances])

    def present(self) -> int:
        """Requests on it, each in parts of a whole model."""
        return sum([instance.present * instance.share[0] for instance in self.instances]) // max(
            [1, *[instance.share[1] for instance in self.instances]]
        )

    def queue_ns(self, now_ns: int) -> int:
        """About how long what runs and waits here takes."""
        left = max(0, self.end_ps // PS_PER_NS - now_ns) if self.running else 0
        return left + sum([instance.queued_ns() for instance in self.instances if instance.queue])

    def round_ns(self) -> int:
        """About how long a token for each request here takes."""
        return sum([instance.round_ns() for instance in self.instances])


def make_devices(scenario: BlockScenario) -> list[Device]:
    """All devices, empty. Raises ConfigError for a device that nobody knows."""
    memory = int(catalog.device(scenario.device).memory_bytes * scenario.memory_share)
    places = [server for server, number in enumerate(scenario.servers) for _ in range(number)]
    return [Device(number, server, memory) for number, server in enumerate(places)]


def no_room(unit: Unit, num_bytes: int, scenario: BlockScenario) -> DoesNotFit:
    """The error of a unit that has no place."""
    return DoesNotFit(
        f"{unit.base}, blocks {unit.first} to {unit.first + unit.blocks - 1}, needs {format_bytes(num_bytes)} and no "
        f"device of {sum(scenario.servers)} has as much left for weights.",
        "Add devices, raise weights_share, or share more.",
    )


def load_ns(num_bytes: int, scenario: BlockScenario) -> int:
    """How long weights take from host memory."""
    return round(num_bytes * NS_PER_S / scenario.host_bytes_per_s)
