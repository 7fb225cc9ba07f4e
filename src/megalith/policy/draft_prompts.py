"""A step in which prompts go before decodes (StepShape.prompts_first), while it is being put together.

Knows what Draft knows, and who was left out of the steps before. Must not know how long a step takes.
"""

from __future__ import annotations

from megalith.policy.draft import Draft
from megalith.policy.sequence import Sequence


class PromptsFirstDraft(Draft):
    """Call fill() once, then read the lists.

    Decodes that were left out of `max_left_out` steps in a row, then prompts, then the decodes that the rest of the
    budget has room for: first those that were left out, then the others by their seats. Whoever comes back sits down
    behind all others, and whoever decodes for the first time behind them.
    """

    __slots__ = ()

    def fill(self) -> bool:
        """See Draft."""
        roster = self._roster
        if roster.queue.items:
            self._make_room()
        before = roster.left_out
        for request_id, steps in before.items():
            if steps >= self._shape.max_left_out and self._left > 0:
                self._list_decode(roster.sequences.get(request_id))
        waited = [row.request.id for row in self.rows]
        if self._left > 0:
            self._add_prompts()
        members = roster.cohort.members
        if not before and len(members) <= self._left and self._all_have_room():
            self._add_decodes()
        else:
            self._add_by_seat(waited)
        return self.decodes > 0 and not (self.rows or roster.prompts or self.preempts or self.resumes)

    def _add_by_seat(self, waited: list[int]) -> None:
        """The decodes, where somebody was or will be left out."""
        roster = self._roster
        before, seats = roster.left_out, roster.seats
        here = {member.request.id: member for member in roster.cohort.members}
        back = [request_id for request_id in before if request_id in here]
        seated = sorted(
            [request_id for request_id in here if request_id in seats and request_id not in before],
            key=seats.__getitem__,
        )
        others = [
            member
            for member in roster.cohort.members
            if member.request.id not in seats and member.request.id not in before
        ]
        joined = [row.request.id for row in others if row.known - row.request.prompt_tokens > 1]
        fresh = [row.request.id for row in others if row.known - row.request.prompt_tokens == 1]
        order = [*back, *seated, *joined, *fresh]
        if not waited and len(order) <= self._left and self._all_have_room():
            self._add_decodes()
        else:
            for request_id in order:
                if self._left > 0:
                    self._list_decode(here[request_id])
        out = {} if self.decodes else {key: before.get(key, 0) + 1 for key in order if here[key].cohort is not None}
        roster.left_out = out
        places = [
            *seated,
            *joined,
            *[key for key in (*waited, *back) if key not in out],
            *[key for key in fresh if key not in out],
        ]
        roster.seats = {request_id: place for place, request_id in enumerate(places)}

    def _all_have_room(self) -> bool:
        """Whether all decodes can have blocks for their next tokens without anybody in the step stepping aside."""
        cohort = self._roster.cohort
        return not self.rows or not cohort.members or cohort.begin()

    def _list_decode(self, member: Sequence | None) -> None:
        """Put one decode into a step that not all are in, unless it has left or there is no block for its next token.

        Nobody steps aside for it once the step has rows, for it might be one of them.
        """
        if member is None or member.cohort is None:
            return
        kv = self._roster.kv
        if self.rows and not kv.free_blocks:
            member.cohort.settle(member)
            if member.known > member.table.held * kv.block_tokens:
                return
        self._roster.single_out(member)
        if self._grown(member):
            self._take(member, 1)
