"""`plan fleet`: the cheapest or the least-power fleet that keeps a service level under a load.

First arithmetic: what no number of instances can do, and the least number that the work needs (fleet_bounds). Then
simulation, kinds in the order of what they promise: the smallest fleet of each kind on a part of the load, given up
when it cannot come before the second-best any more. Then the best ones on all of the load, until nothing is left that
may come before. The same question has the same answer on every machine: how many worker processes there are does not
matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, inf
from typing import TypeAlias

import msgspec

from megalith.base.errors import CapacityError, MegalithError
from megalith.plan.fleet_answer import FORMAT, Choice, FleetPlan, Headroom, Passed, Risk
from megalith.plan.fleet_choice import bought, make_choice, order
from megalith.plan.fleet_elsewhere import layouts
from megalith.plan.fleet_estimate import Prediction
from megalith.plan.fleet_explain import describe_binding
from megalith.plan.fleet_kind import Kind, find_kind, least_objective
from megalith.plan.fleet_load import cut
from megalith.plan.fleet_question import FleetQuestion, Shape, Size, shapes
from megalith.plan.fleet_risks import hazards, judge, power_room, predicted_headroom, slo_room
from megalith.plan.fleet_trial import Probe, Settle, Settled, Trial, perform
from megalith.plan.fleet_unmet import unmet
from megalith.plan.mechanisms import contributions, variants
from megalith.sim.processes import Crew, Failed, count_workers

WAVE = 8
"""Kinds that are searched at once; fixed, so that the answer does not depend on the machine."""
_FINALISTS = 2
SAMPLE_REQUESTS = 3_000
STEP = 1.05
"""Headroom is found to within this factor, and looked for up to STEP ** 28, about four times the load."""
_HEADROOM_STEPS = ((1, 4), (10, 18), (28,))
_MOST_TIMES = 4
"""A mechanism is left away in fleets of up to so many times the best one's instances."""

Settlement: TypeAlias = tuple[Kind, Trial, Trial | None]
"""A kind, its smallest fleet that keeps the service level, and the largest that was seen not to."""


class Search:
    """One question on its way to an answer. `advance(by)` is called for every simulated run."""

    def __init__(
        self, question: FleetQuestion, workers: int | None = None, advance: Callable[[int], object] | None = None
    ) -> None:
        part, load, in_all = cut(question.workload, question.seed, question.most_requests)
        self.question = msgspec.structs.replace(question, workload=part)
        self.load, self.in_all = load, in_all
        self.workers = count_workers(workers)
        self.advance = advance or (lambda _: None)
        self.runs = 0
        self._not_apart = ""
        """Why no fleet with its attention on other devices was simulated."""
        self.passed: list[Passed] = []
        self.kinds = self._kinds()

    # Arithmetic

    def _kinds(self) -> list[Kind]:
        kinds = []
        for shape in shapes(self.question):
            found = find_kind(self.question, self.load, shape)
            if isinstance(found, Kind):
                kinds.append(found)
            else:
                self._pass(shape, "arithmetic", found.why, found.instances)
        return kinds

    def least_objective(self, kind: Kind, instances: int) -> float:
        """No fleet of so many instances is better than that."""
        return least_objective(self.question, self.load, kind, instances)

    def _pass(
        self, shape: Shape, stage: str, why: str, instances: int | None = None, objective: float | None = None
    ) -> None:
        self.passed.append(
            Passed(shape=shape, stage=stage, instances=instances, objective=objective, why=why)  # type: ignore[arg-type]
        )

    # Prediction only

    def predicted(self) -> FleetPlan:
        """The answer of the arithmetic alone. Raises CapacityError when no fleet will do by it."""
        choices = []
        for kind in self.kinds:
            if kind.guess is None:
                self._pass(kind.shape, "arithmetic", "no size keeps the service level by prediction")
                continue
            size, found = kind.guess
            choices.append(self._choice(kind, size, None, found))
        if not choices:
            reasons = "; ".join(dict.fromkeys(f"{one.shape.render()}: {one.why}" for one in self.passed))
            raise CapacityError(
                f"By prediction no fleet of up to {self.question.most_devices:,} devices keeps {self.question.slo} "
                f"({reasons}).",
                "Ask again without --predict-only: it says which service level works.",
            )
        choices = self._rank(choices, "arithmetic")
        kind = next(kind for kind in self.kinds if kind.shape == choices[0].shape)
        assert kind.guess is not None
        found = kind.guess[1]
        most = _HEADROOM_STEPS[-1][-1]
        headroom = predicted_headroom(kind, choices[0], self.load, self.question.slo, STEP, most)
        binding = f"{found.resource} has the least margin: {found.margin:.0%} of its limit is left (predicted)"
        return self._plan("predicted", choices, binding, found.resource, headroom)

    # Simulation

    def simulated(self) -> FleetPlan:
        """The answer of the simulator. Raises CapacityError, with what would work, when no fleet will do."""
        with Crew(perform, self.workers) as crew:
            self._crew = crew
            found = self._screen()
            settled = self._confirm(found)
            if not settled:
                raise unmet(self.question, self.load, self.passed, self._probes)
            settled += self._variants(settled)
            choices = self._rank([self._choice(kind, one.size, one, None) for kind, one, _ in settled], "whole")
            winner = choices[0]
            kind, _, below = next(one for one in settled if one[0].shape == winner.shape)
            headroom = self._headroom(kind, winner)
            risks = judge(winner, self._probes(hazards(self._probe(kind, winner.size), winner)))
        binding, resource = describe_binding(winner, below, kind.least.resource)
        return self._plan("simulated", choices, binding, resource, headroom, risks)

    def _screen(self) -> list[tuple[Kind, Settled]]:
        """The smallest fleet of each kind on a part of the load; kinds that cannot be second any more are passed."""
        sample = self._sample()
        found: list[tuple[Kind, Settled]] = []
        waiting = sorted(self.kinds, key=self._promise)
        for begin in range(0, len(waiting), WAVE):
            limit = self._second([(kind, one.found) for kind, one in found if one.found is not None])
            tasks, kinds = [], []
            for kind in waiting[begin : begin + WAVE]:
                task = self._settle(kind, limit, sample)
                if task is None:
                    self._too_much(kind)
                else:
                    tasks.append(task)
                    kinds.append(kind)
            for kind, one in zip(kinds, self._settled(tasks), strict=True):
                if isinstance(one, Failed):
                    self._pass(kind.shape, "sample", str(one))
                elif one.found is None:
                    self._miss(kind, one, "sample", limit)
                else:
                    found.append((kind, one))
        return found

    def _confirm(self, found: Sequence[tuple[Kind, Settled]]) -> list[Settlement]:
        """The best of them on the whole load, until what is left cannot come before the second-best."""
        whole = len(found) > 0 and self._sample() == self.load.requests
        ranked = sorted(found, key=lambda pair: (self._objective(pair[0], pair[1].found), self.kinds.index(pair[0])))
        if whole:
            return [(kind, one.found, one.below) for kind, one in ranked if one.found is not None]
        settled: list[Settlement] = []
        for begin in range(0, len(ranked), _FINALISTS):
            limit = self._second([(kind, trial) for kind, trial, _ in settled])
            tasks, kinds = [], []
            for kind, one in ranked[begin : begin + _FINALISTS]:
                assert one.found is not None
                # On the whole load one instance fewer may do, hardly two.
                if self.least_objective(kind, max(one.found.instances - 1, 1)) >= limit:
                    why = f"needs {_instances(one.found.size)} for a part of the load: comes after the runner-up"
                    objective = self._objective(kind, one.found)
                    self._pass(kind.shape, "sample", why, one.found.instances, objective)
                    continue
                task = self._settle(kind, limit, self.load.requests, one.found.instances)
                if task is None:
                    self._too_much(kind)
                    continue
                tasks.append(task)
                kinds.append(kind)
            for kind, result in zip(kinds, self._settled(tasks), strict=True):
                if isinstance(result, Failed):
                    self._pass(kind.shape, "whole", str(result))
                elif result.found is None:
                    self._miss(kind, result, "whole", limit)
                else:
                    settled.append((kind, result.found, result.below))
        return settled

    def _variants(self, settled: Sequence[Settlement]) -> list[Settlement]:
        """The best kind with one policy more each, on the whole load: what every mechanism is worth."""
        best, found, _ = min(settled, key=lambda one: (self._objective(one[0], one[1]), self.kinds.index(one[0])))
        kinds, tasks = [], []
        apart, self._not_apart = layouts(self.question, self.load, best.ability.timer)
        for shape in (*variants(best.shape), *apart):
            kind = find_kind(self.question, self.load, shape)
            if not isinstance(kind, Kind):
                self._pass(shape, "arithmetic", kind.why, kind.instances)
                continue
            task = self._settle(kind, inf, self.load.requests, max(found.instances, kind.least.instances))
            if task is not None:
                most = max(kind.least.instances, _MOST_TIMES * found.instances)
                tasks.append(msgspec.structs.replace(task, most=min(task.most, most)))
                kinds.append(kind)
        more: list[Settlement] = []
        for kind, one, task in zip(kinds, self._settled(tasks), tasks, strict=True):
            if isinstance(one, Failed):
                self._pass(kind.shape, "whole", str(one))
            elif one.found is None:
                self._pass(kind.shape, "whole", f"does not keep it with {_instances(task.most)} either")
            else:
                more.append((kind, one.found, one.below))
        return more

    def _headroom(self, kind: Kind, winner: Choice) -> Headroom:
        """The load that the winner takes: steps of STEP, two at once, then between the last kept and the first not."""
        tried: dict[int, Trial] = {0: winner.trial} if winner.trial is not None else {}
        grid = list(_HEADROOM_STEPS)
        low = 0
        while True:
            high = min((step for step in tried if step > low), default=None)
            if high is None:
                steps: Sequence[int] = grid.pop(0) if grid else ()
            else:
                steps = sorted({low + ceil((high - low) * i / 3) for i in (1, 2)} - set(tried))
            if not steps:
                break
            trials = self._probes([self._probe(kind, winner.size, STEP**step) for step in steps])
            tried |= dict(zip(steps, trials, strict=True))
            low = max(step for step in tried if all(tried[one].kept for one in tried if one <= step))
        return Headroom(
            kept_times=STEP**low,
            broken_times=None if high is None else STEP**high,
            breaks="" if high is None else tried[high].breaks,
            slo=slo_room(winner.trial),
            power=power_room(winner),
        )

    # Small parts

    def _sample(self) -> int:
        return self.load.requests if self.load.requests <= 2 * SAMPLE_REQUESTS else SAMPLE_REQUESTS

    def _promise(self, kind: Kind) -> tuple[float, int]:
        instances = kind.least.instances if kind.guess is None else kind.guess[0].instances
        unlikely = self.least_objective(kind, instances) * (1 if kind.guess is not None else 1e6)
        return unlikely, self.kinds.index(kind)

    def _settle(self, kind: Kind, limit: float, requests: int, start: int | None = None) -> Settle | None:
        """The search in one kind, up to the largest fleet that may come before `limit`; None when there is none."""
        most = self.question.most(kind.shape)
        if limit < inf:
            low, high = kind.least.instances - 1, most
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if self.least_objective(kind, middle) <= limit else (low, middle - 1)
            most = low
        if most < kind.least.instances:
            return None
        guess = kind.guess[0].instances if kind.guess is not None else kind.least.instances * 2
        workload = msgspec.structs.replace(self.question.workload, requests=requests)
        return Settle(
            question=msgspec.structs.replace(self.question, workload=workload), shape=kind.shape,
            rate_per_s=self.load.rate_per_s, start=start or guess, least=kind.least.instances, most=most,
            prefill_share=kind.prefill_share, least_prefill=max(kind.least.prefill, 1),
            least_decode=max(kind.least.decode, 1),
        )  # fmt: skip

    def _settled(self, tasks: Sequence[Settle]) -> list[Settled | Failed]:
        results: dict[int, Settled | Failed] = {}
        for place, one in self._crew.results(tasks):
            assert isinstance(one, Settled | Failed)
            results[place] = one
            done = one.runs if isinstance(one, Settled) else 1
            self.runs += done
            self.advance(done)
        return [results[place] for place in range(len(tasks))]

    def _probe(self, kind: Kind, size: Size, times_rate: float = 1.0, early: bool = True) -> Probe:
        return Probe(
            question=self.question, shape=kind.shape, size=size, rate_per_s=self.load.rate_per_s,
            times_rate=times_rate, early=early,
        )  # fmt: skip

    def _probes(self, tasks: Sequence[Probe]) -> list[Trial]:
        results: dict[int, Trial] = {}
        for place, one in self._crew.results(tasks):
            if isinstance(one, Failed):
                raise MegalithError(f"A run of {tasks[place].shape.render(tasks[place].size)} failed: {one}")
            assert isinstance(one, Trial)
            results[place] = one
            self.runs += 1
            self.advance(1)
        return [results[place] for place in range(len(tasks))]

    def _second(self, found: Sequence[tuple[Kind, Trial]]) -> float:
        """What a further fleet must not exceed to be winner or runner-up, which are different devices to buy."""
        best: dict[tuple[str, int, int], float] = {}
        for kind, trial in found:
            bought = (kind.shape.device, kind.shape.devices, trial.instances)
            best[bought] = min(best.get(bought, inf), self._objective(kind, trial))
        return sorted(best.values())[1] if len(best) > 1 else inf

    def _too_much(self, kind: Kind) -> None:
        least = kind.least.instances
        why = f"{kind.least.resource}: needs {_instances(least)} at least, which comes after the runner-up"
        self._pass(kind.shape, "arithmetic", why, least, self.least_objective(kind, least))

    def _miss(self, kind: Kind, one: Settled, stage: str, limit: float) -> None:
        below = one.below
        if below is None:
            self._pass(kind.shape, stage, "has no size that may be tried")
            return
        at = f"with {_instances(below.size)} {below.breaks} breaks ({below.attained:.0%} of the requests are good)"
        more = "more come after the runner-up" if limit < inf else "more is above --max-devices"
        self._pass(kind.shape, stage, f"{at}; {more}", below.instances + 1, None)

    def _objective(self, kind: Kind, trial: Trial | None) -> float:
        assert trial is not None
        if self.question.minimise == "power":
            return inf if trial.power_w is None else trial.power_w
        return self.least_objective(kind, trial.instances)

    def _choice(self, kind: Kind, size: Size, trial: Trial | None, prediction: Prediction | None) -> Choice:
        objective = self.least_objective(kind, size.instances) if trial is None else self._objective(kind, trial)
        return make_choice(self.question.slo, kind, size, objective, trial, prediction)

    def _rank(self, choices: Sequence[Choice], stage: str) -> list[Choice]:
        """All of them, winner and runner-up first; the others are passed."""
        first, *rest = sorted(choices, key=order)
        runner_up = next((choice for choice in rest if bought(choice) != bought(first)), None)
        rest = [choice for choice in rest if choice is not runner_up]
        for choice in rest:
            same = bought(choice) == bought(first)
            why = "keeps it with the winner's devices too" if same else "keeps it and comes after the runner-up"
            self._pass(choice.shape, stage, why, choice.size.instances, choice.objective)
        return [first, *([] if runner_up is None else [runner_up]), *rest]

    def _plan(
        self,
        nature: str,
        choices: Sequence[Choice],
        binding: str,
        resource: str,
        headroom: Headroom | None,
        risks: Sequence[Risk] = (),
    ) -> FleetPlan:
        question, load = self.question, self.load
        notes = []
        if self.in_all is not None and self.in_all > load.requests:
            notes.append(f"Only the first {load.requests:,} of {self.in_all:,} requests: --requests takes more.")
        if nature == "simulated" and self._sample() < load.requests:
            what = f"Kinds were first compared on {self._sample():,} requests, the best then on all {load.requests:,}."
            notes.append(what)
        notes.append(
            "Not searched: pools of different devices (but see --mix), deep pipelines, other batch policies and limits."
        )
        return FleetPlan(
            format=FORMAT, nature=nature, minimise=question.minimise, model=question.model, slo=str(question.slo),  # type: ignore[arg-type]
            load=question.workload.name or "drawn", rate_per_s=load.rate_per_s, requests=load.requests,
            requests_in_all=self.in_all, span_s=load.span_s, winner=choices[0],
            runner_up=next((one for one in choices[1:2] if bought(one) != bought(choices[0])), None),
            binding=binding, resource=resource, headroom=headroom,
            passed=self.passed, contributions=contributions(
                question, load, choices, self.passed, nature, self._not_apart
            ),
            risks=list(risks), runs=self.runs, notes=notes,
            timing={kind.shape.device: kind.ability.timing for kind in self.kinds},
        )  # fmt: skip


def plan_fleet(
    question: FleetQuestion,
    *,
    simulate: bool = True,
    workers: int | None = None,
    advance: Callable[[int], object] | None = None,
) -> FleetPlan:
    """The answer. `simulate` False: predicted, within seconds. `workers`: processes, by default one a core.

    Raises ConfigError for a question that cannot be, CapacityError when no fleet keeps the service level: with the
    best figures that some fleet reaches, and the nearest service level that works.
    """
    search = Search(question, workers, advance)
    return search.simulated() if simulate else search.predicted()


def _instances(count: int | Size) -> str:
    return "1 instance" if str(count) == "1" else f"{count} instances"
