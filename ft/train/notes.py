"""Numbers that a method tells of its examples, between two log lines."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import field, frozen


@frozen
class Notes:
    """Takes numbers step by step and gives their means."""

    told: list[Mapping[str, float]] = field(factory=list)

    def add(self, numbers: Mapping[str, float]) -> None:
        self.told.append(numbers)

    def take(self) -> dict[str, float]:
        """The mean of each number over the steps that told it; what is told from now on begins anew."""
        names = dict.fromkeys(name for numbers in self.told for name in numbers)
        values = {name: [numbers[name] for numbers in self.told if name in numbers] for name in names}
        self.told.clear()
        return {name: sum(found) / len(found) for name, found in values.items()}
