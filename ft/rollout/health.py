"""Signs that an online run learns nothing or falls apart, in plain words with advice; each is said once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from attrs import define, field, frozen

FLAT_STEPS = 20


@frozen
class Alarm:
    """A condition on the numbers of a log line, and what to tell."""

    name: str
    on: Callable[[Mapping[str, float]], bool]
    text: str


def _above(name: str, limit: float) -> Callable[[Mapping[str, float]], bool]:
    return lambda numbers: numbers.get(name, 0.0) > limit


def _below(name: str, limit: float) -> Callable[[Mapping[str, float]], bool]:
    return lambda numbers: numbers.get(name, limit) < limit


ALARMS = (
    Alarm("entropy", _below("entropy", 0.01),
          "entropy is {entropy:.2g}: the policy always says the same (mode collapse). Raise sampling.temperature or "
          "the method's kl, or lower optim.lr"),
    Alarm("ratio", _above("ratio_inverse_max", 100.0),
          "the smallest ratio is 1 / {ratio_inverse_max:.3g}: answers come from a policy far from this one. Sync more "
          "often: fewer iterations per batch, less running ahead, or a lower optim.lr"),
    Alarm("mismatch", _above("mismatch_kl", 0.05),
          "sampler and trainer differ by {mismatch_kl:.2g} per token (mismatch_kl): they may not hold the same weights "
          "or types. Compare model.dtype with the server's, and read the canary's notices"),
    Alarm("cut_off", _above("cut_off", 0.5),
          "{cut_off:.0%} of the answers were cut off: they never reach their end, so that nothing can be "
          "learnt of it. Raise sampling.max_tokens"),
    Alarm("alike", _above("groups_alike", 0.95),
          "{groups_alike:.0%} of the groups have one reward for all answers, and teach nothing. The task is too hard "
          "or too easy for the model: mix in other prompts, raise group or sampling.temperature, or grade more finely"),
    Alarm("unscored", _above("unscored", 0.1),
          "{unscored:.0%} of the answers have no reward. Try the reward functions by themselves: ft reward"),
)  # fmt: skip


@define
class Health:
    """Looks at the numbers of log lines, in their order."""

    said: set[str] = field(factory=set)
    began: int | None = None  # the step of the first line
    rewarded: bool = False

    def look(self, step: int, numbers: Mapping[str, float]) -> list[str]:
        """What to tell of the line after ``step`` steps. Other methods' lines, without a reward, tell nothing."""
        if "reward" not in numbers:
            return []
        found = [a for a in ALARMS if a.name not in self.said and a.on(numbers)]
        self.said |= {alarm.name for alarm in found}
        texts = [alarm.text.format(**numbers) for alarm in found]
        return texts + ([self._flat(step)] if self._is_flat(step, numbers) else [])

    def _is_flat(self, step: int, numbers: Mapping[str, float]) -> bool:
        self.began = step if self.began is None else self.began
        self.rewarded = self.rewarded or numbers["reward"] != 0 or numbers.get("reward_std", 0.0) != 0
        return not self.rewarded and step - self.began + 1 >= FLAT_STEPS and "flat" not in self.said

    def _flat(self, step: int) -> str:
        self.said.add("flat")
        return (
            f"no answer had a reward other than 0 up to step {step}: test the reward functions by themselves "
            "(ft reward), and see what is answered (ft rollouts)"
        )
