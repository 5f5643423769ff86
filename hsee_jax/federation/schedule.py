"""The cuts of all clients in every round, where they change during a training."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Cuts = tuple[int, ...]  # of client 0, 1, ...


class CutSchedule(NamedTuple):
    """A pure value that gives the cuts in each round; rounds count from 1."""

    starts: tuple[int, ...]  # the first round of each phase, ascending from 1
    cuts: tuple[Cuts, ...]  # of all clients, for each phase

    @classmethod
    def of(cls, cuts: Mapping[int, Sequence[int]]) -> "CutSchedule":
        """Make the value from the cuts by the round from which they hold.

        Entries that change nothing are left out.

        Args:
          cuts: the cuts of all clients in round 1, and in each round that changes them.

        Raises:
          ValueError: there are no cuts for round 1, or an earlier round, or cuts of
            another number of clients.
        """
        starts: list[int] = []
        found: list[Cuts] = []
        for number in sorted(cuts):
            own = tuple(cuts[number])
            if not found or own != found[-1]:
                starts.append(number)
                found.append(own)
        if starts[:1] != [1] or len({len(own) for own in found}) != 1:
            raise ValueError(f"cuts: {dict(cuts)} is not a schedule from round 1 on")
        return cls(tuple(starts), tuple(found))

    @classmethod
    def from_function(
        cls, cuts_in: Callable[[int], Sequence[int]], rounds: int
    ) -> "CutSchedule":
        """Make the value from a function of the round, for rounds 1, 2, ..."""
        return cls.of({number: cuts_in(number) for number in range(1, rounds + 1)})

    def cuts_in(self, number: int) -> Cuts:
        """Return the cuts of all clients in a round."""
        return self.cuts[self._phase(number)]

    def left_before(self, number: int) -> dict[int, tuple[int, ...]]:
        """Return the clients that once had a cut and have another in a round, by cut.

        The clients of a cut are ascending.
        """
        now = self._phase(number)
        left: dict[int, set[int]] = {}
        for cuts in self.cuts[:now]:
            for i, cut in enumerate(cuts):
                if cut != self.cuts[now][i]:
                    left.setdefault(cut, set()).add(i)
        return {cut: tuple(sorted(left[cut])) for cut in sorted(left)}

    def _phase(self, number: int) -> int:
        return bisect_right(self.starts, max(number, 1)) - 1
