"""A recipe: everything that decides a run, as frozen, keyword-only attrs classes of plain values.

The text below each field is its documentation: ``ft show`` and ``ft run x.py --help`` print it. Derived values are
functions, never stored; no class edits another. Every number that is a size is in the unit its text names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from attrs import evolve, field, frozen, validators

from ft.recipe.limits import natural, positive, share
from ft.recipe.online import VLLM, Embedded, Judging
from ft.types import Environment, Method

_EMBEDDED, _JUDGING = Embedded(), Judging()

Dtype = Literal["float32", "bfloat16", "float16"]
Format = Literal[
    "auto", "messages", "conversations", "alpaca", "prompt", "preference", "label", "stepwise", "segments", "text",
    "tokens",
]  # fmt: skip


@frozen(kw_only=True)
class NF4:
    """4-bit NormalFloat storage, equal bit for bit to bitsandbytes' codes and absmax."""

    linears: bool = True
    """Quantise the weights of linear layers (never the head, embeddings, routers or norms)."""
    experts: bool = True
    """Quantise the stacked weights of routed experts, which other tools leave in 16 bits."""
    double: bool = True
    """Quantise the block scales too (8 bits, blocks of 256)."""
    block: int = field(default=64, validator=validators.in_((32, 64, 128, 256, 512, 1024, 2048, 4096)))
    """Weights that share one scale."""
    skip: tuple[str, ...] = ()
    """Module names, or ends of names, to leave unquantised."""


@frozen(kw_only=True)
class Model:
    """Which model, and how it is held in memory."""

    id: str
    """A local folder, or an id looked up in $FT_MODELS (default: ./models) and then on the hub."""
    revision: str | None = None
    """Hub branch, tag or commit; resolved to a commit, which is recorded."""
    family: str | None = None
    """Architecture (transformers' model_type), for a rehearsal where not even the model's config is at hand."""
    dtype: Dtype = "bfloat16"
    """Storage and compute type of the base weights. Trained weights are float32 masters in any case."""
    quant: NF4 | None = None
    """Hold frozen weights in 4 bits (QLoRA); None keeps them in `dtype`."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = "auto"
    """Attention implementation; auto takes the model's own default."""
    layout: Literal["auto", "packed", "padded"] = "auto"
    """How sequences share a forward; auto packs if the leak check passes; `packed` stops the run if it fails."""
    checkpointing: bool = True
    """Recompute each layer in backward instead of keeping its activations."""
    tile: int | None = field(default=None, validator=validators.optional(positive))
    """Tokens that an MLP, or a layer's experts, takes at a time: less memory for long rows; None takes all at once."""
    frozen: tuple[str, ...] = ()
    """Ends of parameter names that full fine-tuning leaves as they are."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Implementation of ft's own kernels, fixed when the model is built."""
    template: Path | None = None
    """A chat template (jinja file) to use instead of the model's own."""
    tiny: bool = False
    """Train a random look-alike of the same architecture, shrunk to fit any machine: a rehearsal."""


@frozen(kw_only=True)
class LoRA:
    """Low-rank adapters, saved in peft's format."""

    r: int = field(default=16, validator=positive)
    """Rank."""
    alpha: float = field(default=32.0, validator=positive)
    """The update is scaled by alpha / r (alpha / sqrt(r) with rslora)."""
    dropout: float = field(default=0.0, validator=validators.and_(validators.ge(0.0), validators.lt(1.0)))
    """Dropout on the adapter's input; must be 0 where experts are adapted."""
    targets: tuple[str, ...] = ("attention", "mlp")
    """Groups or ends of module names (q_proj). Groups: attention, mlp (dense ones), shared_experts, experts (routed
    ones), all-linear (all of these; never head or routers)."""
    rslora: bool = False
    """Scale by alpha / sqrt(r)."""
    init: Path | None = None
    """Start from this saved adapter (peft's format) instead of from zero."""


@frozen(kw_only=True)
class Source:
    """Where rows come from."""

    path: str
    """A file (.jsonl .json .parquet .csv, .gz and .zst too), a glob, a folder, or `hf:owner/name`."""
    split: str = "train"
    """A split, or a slice of it: train[:90%], train[100:200], train[90%:]. Files have the one split train."""
    name: str | None = None
    """Configuration of a hub dataset."""
    revision: str | None = None
    """Hub branch, tag or commit."""
    weight: float = field(default=1.0, validator=positive)
    """How many times each row is seen in an epoch: 2.0 twice; 0.5 one half of the rows, newly drawn each epoch."""
    format: Format = "auto"
    """Shape of the rows; auto looks at their columns."""
    columns: dict[str, str] = field(factory=dict)
    """Rename columns: {"theirs": "ours"}."""
    streaming: bool = False
    """Read a hub dataset as it comes, without a copy on disk; rows keep their order."""


def _sources(value: Any) -> tuple[Source, ...]:
    """One path, one Source, or several of either."""
    if value is None:
        return ()
    items = (value,) if isinstance(value, (str, Path, Source)) else tuple(value)
    return tuple(Source(path=str(v)) if isinstance(v, (str, Path)) else v for v in items)


@frozen(kw_only=True)
class Data:
    """Rows, how they become tokens, and which tokens are trained."""

    train: tuple[Source, ...] = field(converter=_sources)
    """Training rows; several sources make a mixture."""
    eval: tuple[Source, ...] = field(default=(), converter=_sources)
    """Held-out rows."""
    rehearsal: tuple[Source, ...] = field(default=(), converter=_sources)
    """Rows used instead of `train` under --tiny, said aloud; none: the training rows themselves."""
    mask: Literal["assistant", "last", "message", "all"] = "assistant"
    """Trained tokens: every assistant turn, the last one, messages marked `train`, or all tokens."""
    end_of_turn: bool = True
    """Train the token that ends an assistant turn; without it a model does not learn to stop."""
    max_tokens: int = field(default=2048, validator=validators.ge(2))
    """Longest row, in tokens."""
    overlong: Literal["drop", "truncate", "raise"] = "drop"
    """What happens to a longer row; counted in every case."""
    on_bad_row: Literal["raise", "skip", "quarantine"] = "raise"
    """What happens to a malformed row; quarantine copies it into the run folder."""
    bad_rows: float = field(default=0.01, validator=share)
    """Largest share of rows that may be skipped or quarantined before the run stops."""
    thinking: bool | None = None
    """Passed to templates that know `enable_thinking`; None leaves it to the template."""
    append_eos: bool = True
    """End `text` rows with the end-of-sequence token."""
    separator: str = "\n"
    """Put after each step of `stepwise` rows; a step is judged where it ends."""
    shuffle: bool = True
    """Draw a new order each epoch from the seed; False keeps the order of the rows."""
    cache: Path | None = Path(".ft-cache")
    """Where tokenised rows are kept, by content hash; None keeps nothing."""


@frozen(kw_only=True)
class AdamW:
    """AdamW with decoupled weight decay, on float32 masters."""

    lr: float = field(default=2e-4, validator=positive)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = field(default=1e-8, validator=positive)
    """Added to the root of the second moment."""
    weight_decay: float = field(default=0.0, validator=natural)
    """Applied to matrices; never to norms, biases and other vectors."""
    clip: float | None = field(default=1.0, validator=validators.optional(positive))
    """Largest norm of the whole gradient; None does not clip."""
    bits: Literal[32, 8] = 32
    """Bits of the moments; 8 needs the `optim` extra (torchao)."""


@frozen(kw_only=True)
class Constant:
    """Warm up, then hold."""

    warmup: float = field(default=0.0, validator=natural)
    """Below 1 a share of the steps, else a number of steps."""


@frozen(kw_only=True)
class Linear:
    """Warm up, then fall in a line to `floor` x lr."""

    warmup: float = field(default=0.03, validator=natural)
    """Below 1 a share of the steps, else a number of steps."""
    floor: float = field(default=0.0, validator=share)
    """Final share of the peak."""


@frozen(kw_only=True)
class Cosine:
    """Warm up, then fall along half a cosine to `floor` x lr."""

    warmup: float = field(default=0.03, validator=natural)
    """Below 1 a share of the steps, else a number of steps."""
    floor: float = field(default=0.1, validator=share)
    """Final share of the peak."""


@frozen(kw_only=True)
class WSD:
    """Warm up, stay, then decay in a line to `floor` x lr."""

    warmup: float = field(default=0.03, validator=natural)
    """Below 1 a share of the steps, else a number of steps."""
    decay: float = field(default=0.2, validator=natural)
    """Length of the decay: below 1 a share of the steps, else a number of steps."""
    floor: float = field(default=0.0, validator=share)
    """Final share of the peak."""


@frozen(kw_only=True)
class Batching:
    """How much a step sees, and how much of it at a time. Only `examples` changes what is learnt."""

    examples: int = field(default=32, validator=positive)
    """Rows of one optimizer step, over all ranks."""
    tokens: int = field(default=8192, validator=positive)
    """Most tokens of one micro-batch on one rank."""


@frozen(kw_only=True)
class Parallel:
    """How ranks share the work (FSDP2)."""

    replicate: int = field(default=1, validator=positive)
    """Groups of ranks that each hold a whole copy; weights are sharded inside a group."""
    reshard: bool = True
    """Free gathered weights after each layer's forward; False is faster and holds the whole model."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients are summed over ranks."""
    timeout: float = field(default=600.0, validator=positive)
    """Seconds a rank waits for the others before the run stops."""


@frozen(kw_only=True)
class Eval:
    """Loss on held-out rows, by the same path as training."""

    every: int = field(default=0, validator=natural)
    """Steps between evaluations; 0 evaluates before the first step and after the last only."""
    examples: int | None = field(default=None, validator=validators.optional(positive))
    """Most rows to use; None uses all."""
    patience: int | None = field(default=None, validator=validators.optional(positive))
    """Stop after this many evaluations without a better loss; None never stops early."""


@frozen(kw_only=True)
class Save:
    """Checkpoints: safetensors and JSON, written whole or not at all."""

    dir: Path | None = None
    """Run folder; None is runs/<name of the recipe>."""
    every: int = field(default=100, validator=natural)
    """Steps between checkpoints; 0 saves at the end only."""
    keep: int = field(default=2, validator=positive)
    """Newest checkpoints to keep, besides the best."""


@frozen(kw_only=True)
class Log:
    """What is shown and kept; metrics.jsonl is always written."""

    every: int = field(default=1, validator=positive)
    """Steps between log lines. Between them nothing waits for the device."""
    sinks: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Trackers besides metrics.jsonl; one that fails is dropped with a warning, and the run goes on."""
    project: str = "ft"
    """Project name for trackers."""
    rollouts: int = field(default=8, validator=natural)
    """Answers of each step to keep in rollouts.jsonl, best to worst; two are shown on log lines. 0: none."""
    patience: int = field(default=3, validator=positive)
    """Steps in a row with a non-finite loss or gradient before the run stops."""


def _unmoved(reference: Reference, attribute: Any, value: int) -> None:
    if value and reference.cached:
        raise ValueError("'every' must be 0 with cached=True, since what is kept on disk cannot move")
    if value and reference.model is not None:
        raise ValueError("'every' must be 0 with a second model, which has other weights to mix with")


def _moved(reference: Reference, attribute: Any, value: float) -> None:
    if not reference.every and value != 1:
        raise ValueError("'mix' must be left at 1 with every=0: nothing is mixed")


@frozen(kw_only=True)
class Reference:
    """The frozen model that a method compares with, or learns from; for methods that have one (DPO, KTO, BCO, Distill).

    By default it is the trained model as it began: the base with its adapters off, or with full fine-tuning a frozen
    copy of the weights.
    """

    model: Model | None = None
    """A second model of the same vocabulary, such as a teacher; it may be held in NF4. None is the trained model."""
    cached: bool = False
    """Compute each row's reference log-probs once, before the first step, and keep them in `data.cache`, by content."""
    every: int = field(default=0, validator=validators.and_(natural, _unmoved))
    """TR-DPO: steps after which the reference becomes mix x policy + (1 - mix) x reference; 0 never moves it."""
    mix: float = field(default=1.0, validator=validators.and_(positive, validators.le(1.0), _moved))
    """The policy's part in it. 1 replaces the reference; with adapters nothing else is possible."""


@frozen(kw_only=True)
class Recipe:
    """A whole run."""

    model: Model
    data: Data
    method: Method
    adapter: LoRA | None = None
    """What is trained: adapters, or None for all weights."""
    sampler: Embedded | VLLM = _EMBEDDED
    """Where the answers of online methods come from."""
    judging: Judging = _JUDGING
    """How they are scored."""
    environment: Environment | None = None
    """What replies to the model's turns, for answers of several (ft.rollout.calculator is an example); its reward is
    the column `environment` of reward functions (ft.rollout.rewards.environment)."""
    turns: int = field(default=8, validator=positive)
    """Most turns of the model in an answer, each of at most `method.sampling.max_tokens`, with an environment."""
    optim: AdamW = AdamW()
    schedule: Constant | Linear | Cosine | WSD = Cosine()
    batch: Batching = Batching()
    parallel: Parallel = Parallel()
    reference: Reference = Reference()
    eval: Eval = Eval()
    save: Save = Save()
    log: Log = Log()
    steps: int | None = field(default=None, validator=validators.optional(positive))
    """Optimizer steps; None counts them from `epochs`."""
    epochs: float = field(default=1.0, validator=positive)
    """Passes over the training rows, where `steps` is None."""
    seed: int = field(default=0, validator=natural)
    """Decides the order of rows, fresh weights and dropout."""
    name: str = field(default="", validator=validators.matches_re(r"[\w.-]*", func=re.fullmatch))
    """Names the run folder and the tracker's run; empty is the recipe file's name."""


def total_steps(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of a run over ``examples`` rows per epoch; the last, partial step of the run counts."""
    if recipe.steps is not None:
        return recipe.steps
    return max(1, -int(-recipe.epochs * examples // recipe.batch.examples))


def run_folder(recipe: Recipe) -> Path:
    """Where the run keeps everything."""
    return recipe.save.dir if recipe.save.dir is not None else Path("runs") / (recipe.name or "run")


REHEARSAL_STEPS, REHEARSAL_TOKENS, REHEARSAL_EXAMPLES = 20, 512, 8


def tiny_reference(reference: Reference) -> Reference:
    """The same with a look-alike of its model, where it has one."""
    model = reference.model
    return evolve(reference, model=evolve(model, tiny=True, dtype="float32")) if model else reference


def rehearse(recipe: Recipe) -> Recipe:
    """The same recipe on a shrunken model: short rows, few steps, float32, and the rehearsal rows if it names any.

    The run folder gets "-tiny" at its end, so that a rehearsal never stands in the way of the run.
    """
    data = recipe.data
    folder = run_folder(recipe)
    return evolve(
        recipe,
        model=evolve(recipe.model, tiny=True, dtype="float32"),
        adapter=evolve(recipe.adapter, init=None) if recipe.adapter else None,
        reference=tiny_reference(recipe.reference),
        sampler=recipe.sampler if isinstance(recipe.sampler, Embedded) else Embedded(),  # no server has a look-alike
        data=evolve(
            data,
            train=data.rehearsal or data.train,
            eval=() if data.rehearsal else data.eval,
            max_tokens=min(data.max_tokens, REHEARSAL_TOKENS),
            overlong="truncate",
        ),
        batch=evolve(
            recipe.batch,
            examples=min(recipe.batch.examples, REHEARSAL_EXAMPLES),
            tokens=min(recipe.batch.tokens, 4 * REHEARSAL_TOKENS),
        ),
        save=evolve(recipe.save, dir=folder.with_name(folder.name + "-tiny"), every=min(recipe.save.every, 10)),
        steps=min(recipe.steps or REHEARSAL_STEPS, REHEARSAL_STEPS),
    )
