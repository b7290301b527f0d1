"""The values that pass between rooms, and the protocols a method and a sampler fulfil.

Shapes: T tokens of a micro-batch (packed, 1-D), S sequences, N trained positions, L tokens of one sequence
(ragged), D model width, C scores of a position, M layers with routed experts, K experts per token. ``mask_L[i]`` is
True where predicting ``tokens_L[i]`` is trained. Shifting happens once, in ``ft.data.pack.collate``: ``logp_T[t]``
scores ``target_T[t]``, given ``input_T[: t + 1]`` of the same sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import attrs
from attrs import field, frozen

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


@frozen(kw_only=True, eq=False)
class Example:
    """One sequence ready for training. There is no prompt/completion split: the mask says what is trained.

    ``unit``: examples with the same unit share a batch (the two answers of a DPO pair). ``group``: prompt id.
    ``source`` names the row for messages, as "file.jsonl:17".
    """

    tokens_L: np.ndarray  # int32
    mask_L: np.ndarray  # bool; mask_L[0] is never used, since nothing predicts the first token
    source: str = ""
    unit: int | None = None
    group: int | None = None
    sampled_logp_L: np.ndarray | None = None  # float32, the sampler's when it drew the tokens
    old_logp_L: np.ndarray | None = None  # float32, the policy's before the first step on these tokens
    keep_L: np.ndarray | None = None  # float32, 0 where a policy loss leaves the token out, though it is counted
    ref_logp_L: np.ndarray | None = None  # float32, the reference's where it is known beforehand
    adv_L: np.ndarray | None = None  # float32
    ce_L: np.ndarray | None = None  # float32, weight of a cross-entropy term
    label: float | None = None
    label_L: np.ndarray | None = None  # float32, a judgement of each token that mask_L marks (process rewards)
    margin: float | None = None
    routes_LMK: np.ndarray | None = None  # int16, experts that the sampler chose of each token; -1: the model chooses
    shared: int = 0  # positions before the first that are forwarded once for the unit (ft.data.share)
    against: Example | None = None  # this prompt with an answer that belongs to another one (KTO)
    columns: Mapping[str, Any] | None = None  # of a prompt's row: what its answers are judged by
    row: int | None = None  # of a prompt: its number in the data

    def __len__(self) -> int:
        return len(self.tokens_L)


@frozen(kw_only=True, eq=False)
class Batch:
    """A packed micro-batch: sequence s owns positions ``cu_S1[s] : cu_S1[s + 1]`` of every ``_T`` tensor.

    Positions from ``cu_S1[-1]`` on are filler: forwarded, never scored, belonging to no sequence (``seq_T`` is S
    there). A filler batch of an idle rank is all filler: S = 0. ``trained_N`` lists where ``mask_T`` is True, so
    that no step asks the device for it.
    """

    input_T: Tensor  # int64
    target_T: Tensor  # int64
    pos_T: Tensor  # int64, begins anew in each sequence: at 0, or at what it shares
    seq_T: Tensor  # int64
    cu_S1: Tensor  # int32
    mask_T: Tensor  # bool
    trained_N: Tensor  # int64
    lengths: tuple[int, ...]  # per sequence, host side: what cu_S1 says, without asking the device
    unit_S: Tensor  # int64
    group_S: Tensor  # int64, -1 where there is none
    shared: tuple[int, ...] = ()  # per sequence: how much of the last one before that shares nothing it begins with
    sources: tuple[str, ...] = ()
    sampled_logp_T: Tensor | None = None
    old_logp_T: Tensor | None = None  # of the policy that ratios are taken to, or WPO's; None: the policy as it is
    keep_T: Tensor | None = None
    ref_logp_T: Tensor | None = None
    ref_hidden_ND: Tensor | None = None  # the reference's last hidden states at trained_N, as wide as its own model
    adv_T: Tensor | None = None
    routes_MTK: Tensor | None = None  # int16, experts of input_T, -1 where the model chooses; None: everywhere
    ce_T: Tensor | None = None
    label_T: Tensor | None = None
    label_S: Tensor | None = None
    margin_S: Tensor | None = None
    against: Batch | None = None  # the mismatched answers, in a batch of their own that only ``prepare`` forwards
    baseline_S: Tensor | None = None  # numbers whose mean over the step is the loss's point of reference

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """The same batch with every tensor on ``device`` (copies do not block where memory is pinned)."""
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in attrs.fields(Batch)
            if hasattr(value := getattr(self, f.name), "to")
        }
        return attrs.evolve(self, **moved)


@frozen(kw_only=True)
class Counts:
    """Denominators of a step: summed over micro-batches and ranks before the first backward."""

    tokens: Any = 0  # trained positions; int, or a 0-d float64 tensor once summed over ranks
    ce_tokens: Any = 0  # sum of ce_T
    seqs: Any = 0
    units: Any = 0
    desirable: Any = 0  # sequences with a label above 1/2
    baseline: Any = 0  # sum of baseline_S, and how many there are
    baselines: Any = 0
    inputs: Any = 0  # forwarded positions that belong to a sequence, for tokens/s and padding waste

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in attrs.fields(Counts)})


@frozen(kw_only=True, eq=False)
class LogProbs:
    """What the policy says of a batch. ``logp_T`` is float32 and 0 where ``mask_T`` is False."""

    logp_T: Tensor
    entropy_T: Tensor | None = None  # float32, no gradient, 0 where mask_T is False
    aux: Tensor | None = None  # the router's balance loss of this micro-batch, a mean over its tokens
    hidden_TD: Tensor | None = None
    compared: Tensor | None = None  # 0-d, what ``Asks.compare`` made of policy and reference, summed over trained_N
    score_TC: Tensor | None = None  # float32, of a model with a head that scores; 0 where mask_T is False


@frozen(kw_only=True, eq=False)
class LossOutput:
    """This micro-batch's share of the step's global mean, and shares of the numbers to log.

    Over micro-batches and ranks ``loss`` and ``sums`` are reduced by SUM, ``maxes`` by MAX. Everything but ``loss``
    is detached and stays on the device.
    """

    loss: Tensor
    sums: Mapping[str, Tensor] = field(factory=dict)
    maxes: Mapping[str, Tensor] = field(factory=dict)


@frozen(kw_only=True, eq=False)
class Rollout:
    """One sampled completion. ``logp_L`` is the behaviour policy's log-prob of each token, as sampled."""

    prompt: Example
    tokens_L: np.ndarray
    logp_L: np.ndarray | None
    finish: str  # "stop" | "length" | "error"
    policy_step: int
    text: str = ""
    reward: float | None = None
    parts: Mapping[str, float] = field(factory=dict)
    mask_L: np.ndarray | None = None  # bool, False where an environment spoke; None: all of it was sampled
    routes_LMK: np.ndarray | None = None  # int16, experts of the prompt's and the answer's tokens but the last


@frozen(eq=False)
class Said:
    """What a policy says of an example's tokens: log-probs, and its entropies there. 0 where nothing is trained."""

    logp_L: np.ndarray  # float32
    entropy_L: np.ndarray  # float32


class Score(Protocol):
    """Scores examples without gradient or dropout."""

    def __call__(self, examples: Sequence[Example], *, temperature: float) -> list[Said]: ...


class Drawn(Protocol):
    """What gives the examples of a step."""

    def draw(self, step: int, n: int, seed: int) -> list[Example]: ...
    def row(self, index: int) -> list[Example]: ...


class Dataset(Drawn, Protocol):
    """Prepared rows. A row is one example, or the two of a pair. ``fingerprint`` changes whenever an example would."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def rows(self) -> int: ...


@frozen(kw_only=True, eq=False)
class Given:
    """The same examples at every step: held-out rows, and trials."""

    examples: Sequence[Example]

    def draw(self, step: int, n: int, seed: int) -> list[Example]:
        return list(self.examples)

    def row(self, index: int) -> list[Example]:
        return [self.examples[index]]


@frozen(kw_only=True, eq=False)
class Context:
    """What a method may use to find its examples."""

    data: Drawn | None
    examples: int  # per step, over all ranks
    seed: int
    tokens: int | None = None  # most positions of a micro-batch, for methods that choose what must share one
    tokenizer: Any = None
    sampler: Sampler | None = None
    judge: Judge | None = None
    note: Callable[[Mapping[str, float]], None] = lambda numbers: None
    """Takes numbers of a step's examples, to be logged beside the loss's."""
    show: Callable[[int, Sequence[Rollout]], None] = lambda step, rollouts: None
    """Takes the scored answers of a step, to be kept and shown."""
    say: Callable[[str], None] = lambda line: None
    """Tells the user something."""
    score: Score | None = None
    """What the policy says of examples as it is; every rank calls it with the same, and gets the same."""
    store: dict[str, Any] = field(factory=dict)
    """What a method keeps from one step to the next. It is lost when a run stops: what is made of it must be remade."""
    kept: dict[str, Any] = field(factory=dict)
    """What a method keeps in checkpoints too: JSON values and numpy arrays, the same on every rank."""
    ahead: int = 0  # batches of rollouts that are drawn while others train


@frozen(kw_only=True)
class Asks:
    """What a method wants of the policy beyond log-probs; a method says it in an attribute ``asks``."""

    rows: Literal["answers", "prompts"] = "answers"  # what is read: rows to learn from, or prompts to be answered
    head: Literal["lm", "score", "steps"] = "lm"  # what stands on the trunk: the vocabulary, or scores to be trained
    classes: int = 1  # scores per position
    entropy: bool = False
    temperature: float = 1.0
    reference: Literal["none", "logps", "states"] = "none"  # of a frozen model: log-probs, or whole distributions
    compare: Callable[[Tensor, Tensor], Tensor] | None = None  # (policy_NV, reference_NV) logits -> their sum, 0-d
    repeats: int = 1  # steps on each batch of rows
    ahead: int = 0  # batches of rollouts that are to be drawn while others train


class Method(Protocol):
    """A training method: three functions on a frozen attrs class. See ``ft.methods.sft`` for the smallest.

    One that wants more than log-probs also has an attribute ``asks``, which ``asked`` reads.
    """

    def examples(self, step: int, ctx: Context) -> Sequence[Example]:
        """The same list on every rank; a pure function of (seed, step) for methods that read files."""
        ...

    def prepare(self, batch: Batch, policy: Any) -> Batch:
        """Fill in what needs a model but no gradient: reference or old log-probs, features. Runs under no_grad."""
        ...

    def loss(self, logprobs: LogProbs, batch: Batch, counts: Counts) -> LossOutput:
        """Pure. ``counts`` are the step's global denominators."""
        ...


def asked(method: Method) -> Asks:
    """What ``method`` asks of the policy: log-probs alone, unless it says more."""
    return getattr(method, "asks", Asks())


class Sampler(Protocol):
    """Where completions come from: tokens in, tokens out. Every rank calls it, and gets the same."""

    def sync(self, step: int) -> None:
        """Let it sample from the policy as it stands after ``step`` optimizer steps."""
        ...

    def rollout(self, prompts: Sequence[Example], n: int, step: int, *, greedy: bool = False) -> list[list[Rollout]]:
        """``n`` completions of each prompt; a function of the seed, ``step`` and the prompts where it can be."""
        ...


Arrived = Callable[[Sequence[Rollout]], None]
"""Takes all answers to one prompt as soon as they are there, in any thread."""

Expect = Callable[[int], Arrived]
"""Told how many answers a draw will have, gives what takes them."""


class Environment(Protocol):
    """What replies to an answer, for answers of several turns: a frozen value, pure functions. See ``ft.rollout``."""

    def reset(self, columns: Mapping[str, Any]) -> Any:
        """The state of a new answer to a row with these columns."""
        ...

    def step(self, state: Any, said: str) -> tuple[Any, str | None]:
        """The state after the model's turn, and what it is told; None ends the answer."""
        ...

    def reward(self, state: Any) -> float | None:
        """Of the whole answer; goes to reward functions as the column ``environment``."""
        ...


class Judge(Protocol):
    """What says how good completions are."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The same rollouts with ``text``, ``reward`` and ``parts``. A reward of None: not to be trained on."""
        ...
