"""Recipes: files, JSON, overrides, schema and what ``ft show`` prints. Messages are compared word for word."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from attrs import frozen

from ft import NF4, SFT, WSD, AdamW, Data, Linear, Log, LoRA, Model, Recipe, Save, Source
from ft.errors import FtError, MissingFileError, RecipeError
from ft.recipe import dump, dumps, load, override, rehearse, restore
from ft.recipe.override import pairs
from ft.recipe.schema import schema
from ft.recipe.show import compare, describe, items
from ft.recipe.typed import build, plain, spell
from ft.types import Method


def make(**changes: Any) -> Recipe:
    start = Recipe(model=Model(id="a/b"), data=Data(train="a.jsonl"), method=SFT())  # type: ignore[arg-type]
    return attrs.evolve(start, **changes)


FULL = make(
    model=Model(id="a/b", quant=NF4(block=128, skip=("gate",)), template=Path("t/x.jinja")),
    data=Data(train=(Source(path="a", columns={"q": "question"}), Source(path="hf:o/n", weight=2.5)), cache=None),
    adapter=LoRA(r=8, targets=("q_proj", "experts")),
    optim=AdamW(lr=1e-5, betas=(0.9, 0.95), clip=None, bits=8),
    schedule=WSD(decay=0.1),
    save=Save(dir=Path("runs/x")),
    log=Log(sinks=("wandb", "tensorboard")),
    steps=7,
    name="x",
)

SHIPPED = sorted((Path(__file__).parents[1] / "recipes").glob("*.py"))


# A method of another module, as a user would write one: a protocol inside, a function, a union of a class and none.


def shorter(text: str) -> float:
    return -float(len(text))


@frozen(kw_only=True)
class Inner:
    beta: float = 0.1
    """Strength."""


@frozen(kw_only=True)
class Outer(SFT):
    method: Method
    """The method that is run ahead."""
    reward: Callable[[str], float] = shorter
    inner: Inner | None = None
    mixed: tuple[int | str, ...] = ()


@attrs.define(kw_only=True)
class Mutable:
    beta: float = 0.1


OUTER = make(method=Outer(method=SFT(), inner=Inner(beta=0.5), mixed=(1, "a")))


# JSON -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [make(), FULL, OUTER, rehearse(FULL)], ids=["least", "full", "nested", "rehearsal"])
def test_dump_and_restore_are_inverse_through_json_text(recipe: Recipe):
    back = restore(json.loads(dumps(recipe)))
    assert back == recipe
    assert dumps(back) == dumps(recipe)


@pytest.mark.parametrize("path", SHIPPED, ids=[p.stem for p in SHIPPED])
def test_every_shipped_recipe_loads_and_repeats_from_json(path: Path, tmp_path: Path):
    recipe = load(path)
    assert recipe.name == path.stem
    (tmp_path / "recipe.json").write_text(dumps(recipe))
    assert load(tmp_path / "recipe.json") == recipe
    assert all(row.doc for row in describe(recipe)), "a field without documentation"


def test_classes_are_named_only_where_there_is_a_choice():
    stored = dump(FULL)
    assert stored["method"] == {"type": "ft.methods.sft:SFT", "kind": "nll"}
    assert stored["schedule"] == {"type": "ft.recipe.parts:WSD", "warmup": 0.03, "decay": 0.1, "floor": 0.0}
    assert "type" not in stored["optim"] and "type" not in stored["adapter"] and "type" not in stored["model"]["quant"]
    assert stored["save"]["dir"] == "runs/x" and stored["optim"]["betas"] == [0.9, 0.95]
    assert dump(OUTER)["method"]["reward"] == f"{__name__}:shorter"


def test_integers_fill_float_fields_and_become_floats():
    stored = dump(make())
    stored["optim"]["weight_decay"] = 1
    decay = restore(stored).optim.weight_decay
    assert decay == 1.0 and type(decay) is float


def broken(path: str, value: Any) -> dict[str, Any]:
    stored = dump(FULL)
    *parents, last = path.split(".")
    node: Any = stored
    for name in parents:
        node = node[int(name)] if isinstance(node, list) else node[name]
    node[last] = value
    return stored


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seed", 1.5, "seed: expected int, got 1.5"),
        ("seed", True, "seed: expected int, got True"),
        ("seed", "1", "seed: expected int, got '1'"),
        ("optim.lr", "1e-3", "optim.lr: expected float, got '1e-3'"),
        ("optim.lr", float("nan"), "optim.lr: expected finite float, got nan"),
        ("optim.lr", -1, "optim.lr: must be > 0, got -1"),
        ("optim.bits", 16, "optim.bits: expected one of 32, 8, got 16"),
        ("optim.bits", 8.0, "optim.bits: expected one of 32, 8, got 8.0"),
        ("optim.betas", [0.9], "optim.betas: expected (float, float), got [0.9]"),
        ("adapter.targets", "experts", "adapter.targets: expected tuple of text, got 'experts'"),
        ("adapter.dropout", 1.0, "adapter.dropout: must be < 1, got 1"),
        ("data.shuffle", 1, "data.shuffle: expected true or false, got 1"),
        ("data.train.1.weight", 0, "data.train.1.weight: must be > 0, got 0"),
        ("data.train.0.columns", {"a": 1}, "data.train.0.columns.a: expected text, got 1"),
        ("data.train", "a.jsonl", "data.train: expected tuple of Source, got 'a.jsonl'"),
        ("model.quant.block", 48, "model.quant.block: must be in (32, 64, 128, 256, 512, 1024, 2048, 4096), got 48"),
        ("model.quant", 4, "model.quant: expected NF4 or none, got 4"),
        ("name", "a b", r"name: must match [\w.-]*, got 'a b'"),
        ("steps", 0, "steps: must be > 0, got 0"),
        ("model.iid", 1, "model.iid: Model has no field 'iid'. Did you mean 'id'? It has: "),
        ("optim", [], "optim: expected AdamW, got []"),
        ("schedule.type", "ft.recipe.parts:AdamW", "schedule: expected Constant, Linear, Cosine or WSD, got "),
        ("schedule.decay", -0.1, "schedule.decay: must be >= 0, got -0.1"),
    ],
)
def test_a_wrong_value_in_json_says_where_what_and_which(path: str, value: Any, message: str):
    with pytest.raises(RecipeError) as error:
        restore(broken(path, value))
    assert str(error.value).startswith(message)


def test_a_missing_required_field_is_named():
    stored = dump(make())
    del stored["model"]["id"]
    with pytest.raises(RecipeError, match=re.escape("model.id: Model needs 'id'")):
        restore(stored)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os:system", "method: 'os:system' is not defined in os"),
        ("subprocess:run", "method: expected a frozen attrs class, got 'subprocess:run'"),
        ("collections:Counter", "method: expected a frozen attrs class, got 'collections:Counter'"),
        (f"{__name__}:Mutable", f"method: expected a frozen attrs class, got '{__name__}:Mutable'"),
        ("ft.recipe.parts:AdamW", "method: AdamW is no Method: it lacks examples, prepare and loss"),
        ("ft.methods.sft", "method: expected a name as \"package.module:Name\", got 'ft.methods.sft'"),
        (
            "ft.methods.sft:SFT.loss",
            "method: expected a name as \"package.module:Name\", got 'ft.methods.sft:SFT.loss'",
        ),
        ("ft.nowhere:SFT", "method: cannot find 'ft.nowhere:SFT': No module named 'ft.nowhere'"),
        (3, 'method.type: expected a name as "package.module:Name", got 3'),
    ],
)
def test_json_may_name_no_other_thing_than_a_frozen_attrs_class(name: Any, message: str):
    with pytest.raises(RecipeError) as error:
        restore(broken("method", {"type": name}))
    assert str(error.value).partition("\n")[0] == message


def test_a_function_in_json_must_be_a_plain_one_of_its_module():
    stored = dump(OUTER)
    for name, message in (
        ("os:system", "method.reward: 'os:system' is not defined in os"),
        (
            f"{__name__}:Inner",
            f"method.reward: expected a function, as \"package.module:name\", got '{__name__}:Inner'",
        ),
    ):
        stored["method"]["reward"] = name
        with pytest.raises(RecipeError) as error:
            restore(stored)
        assert str(error.value) == message


def test_what_no_other_process_could_import_is_refused():
    @frozen(kw_only=True)
    class Local(SFT):
        pass

    with pytest.raises(RecipeError, match=r"^method: .*Local is defined where no other process can import it"):
        dump(make(method=Local()))
    with pytest.raises(RecipeError, match=r"^method.reward: .*<lambda> is defined where no other process"):
        dump(make(method=Outer(method=SFT(), reward=lambda text: 0.0)))


def test_a_part_of_the_wrong_class_is_refused():
    with pytest.raises(RecipeError, match=r"^optim: expected AdamW, got 'ft.recipe.parts:Linear'"):
        dump(make(optim=Linear()))


def test_types_in_words():
    words = [spell(tp) for tp in (int, int | None, tuple[str, ...], tuple[float, float], dict[str, str], list[Path])]
    assert words == ["int", "int or none", "tuple of text", "(float, float)", "dict of text", "list of path"]
    assert build([1, "a"], tuple[int | str, ...]) == (1, "a") and plain((Path("a/b"),), tuple[Path, ...]) == ["a/b"]


# Files ----------------------------------------------------------------------------------------------------------------

HEAD = "from ft import *\n"
WHOLE = HEAD + 'recipe = Recipe(model=Model(id="a/b"), data=Data(train="a.jsonl"), method=SFT(), {more})\n'


def write(folder: Path, text: str, name: str = "mine.py") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_load_names_the_recipe_after_its_file_and_runs_it_afresh(tmp_path: Path):
    path = write(tmp_path, WHOLE.format(more="steps=3"))
    assert load(path) == make(name="mine", steps=3)
    path.write_text(WHOLE.format(more="steps=4, name='own'"))
    assert load(path) == make(name="own", steps=4)


def test_load_makes_lists_tuples_and_texts_paths(tmp_path: Path):
    more = 'save=Save(dir="runs/x"), log=Log(sinks=["wandb"]), optim=AdamW(lr=1)'
    recipe = load(write(tmp_path, WHOLE.format(more=more)))
    assert recipe.save.dir == Path("runs/x") and recipe.log.sinks == ("wandb",) and type(recipe.optim.lr) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "x = (1,\n", "{path}:2: SyntaxError: '(' was never closed\n  got: x = (1,"),
        (HEAD + "\nAdamW(lrr=1)\n", "{path}:3: AdamW has no field 'lrr'. Did you mean 'lr'? It has: lr, betas, eps, "),
        (HEAD + "AdamW(lr=-1)\n", "{path}:2: lr: must be > 0, got -1"),
        (
            HEAD + "AdamW(\n  lr='x',\n)\n",
            "{path}:2: TypeError: '>' not supported between instances of 'str' and 'int'",
        ),
        (HEAD + "NF4(block=48)\n", "{path}:2: block: must be in (32, 64, 128, 256, 512, 1024, 2048, 4096), got 48"),
        (HEAD + "AdamW(3)\n", "{path}:2: AdamW takes named values only: AdamW(name=value, ...)"),
        (HEAD + "Recipe(model=Model(id='a'))\n", "{path}:2: Recipe needs 'data' and 'method'"),
        (HEAD + "\n\nlearning_rate = 1\nAdamW(lr=learning_rat)\n", "{path}:5: name 'learning_rat' is not defined."),
        ("from ft import AdamV\n", "{path}:1: ft has no name 'AdamV'. Did you mean 'AdamW'?"),
        ("import nowhere\n", "{path}:1: ModuleNotFoundError: No module named 'nowhere'"),
        ("def f():\n  raise KeyError('k')\nf()\n", "{path}:2: KeyError: 'k'"),
        ("raise SystemExit('bye')\n", "{path}:1: SystemExit: bye"),
        (HEAD, "{path}: the file has no name `recipe`\n  expected: recipe = Recipe(...)"),
        (
            WHOLE.format(more="").replace("recipe =", "reciep ="),
            "{path}: the file has no name `recipe`\n  expected: recipe = Recipe(...)\n  got: reciep = Recipe(...)",
        ),
        (
            "recipe = {'a': 1}\n",
            "{path}: `recipe` is not a Recipe\n  expected: recipe = Recipe(...)\n  got: {{'a': 1}}",
        ),
        (WHOLE.format(more="steps=1.5"), "{path}: steps: expected int or none, got 1.5"),
        (WHOLE.format(more="optim=AdamW(lr=True)"), "{path}: optim.lr: expected float, got True"),
        (WHOLE.format(more="batch=None"), "{path}: batch: expected Batching, got None"),
        (
            "from attrs import frozen\n" + HEAD + "@frozen(kw_only=True)\nclass Mine(SFT): pass\n"
            "recipe = Recipe(model=Model(id='a'), data=Data(train='a'), method=Mine())\n",
            "{path}: method: Mine is defined where no other process can import it",
        ),
    ],
)
def test_a_bad_recipe_file_says_file_line_and_what(tmp_path: Path, text: str, message: str):
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as error:
        load(path)
    assert str(error.value).startswith(message.format(path=path))


def test_a_bad_json_recipe_says_line_or_path(tmp_path: Path):
    path = write(tmp_path, '{\n  "model": 1,\n}\n', "recipe.json")
    with pytest.raises(RecipeError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}:3: not JSON: ")
    path.write_text(json.dumps(broken("optim.lr", -1)))
    with pytest.raises(RecipeError) as error:
        load(path)
    assert str(error.value) == f"{path}: optim.lr: must be > 0, got -1"


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, "", "smollm2_lora.py")
    with pytest.raises(MissingFileError) as error:
        load(tmp_path / "smolm2_lora.py")
    found = tmp_path / "smollm2_lora.py"
    assert str(error.value) == f"{tmp_path / 'smolm2_lora.py'}: no such recipe\n  fix: did you mean {found}?"
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(FileNotFoundError, match=re.escape("fix: did you mean recipes/smollm2_lora.py?")):
        load("smollm2_lora")
    write(tmp_path, "{}", "recipe.json")
    with pytest.raises(MissingFileError, match=r"fix: name the file itself: .*recipe.json"):
        load(tmp_path)
    with pytest.raises(RecipeError, match=r"x.yaml: a recipe is a .py file, or the recipe.json of a run folder"):
        load(write(tmp_path, "", "x.yaml"))


# Overrides ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        ("optim.lr=2e-5", "optim.lr", 2e-5),
        ("--optim.lr=2e-5", "optim.lr", 2e-5),
        ("--optim.lr 2e-5", "optim.lr", 2e-5),
        ("--optim.weight-decay 1", "optim.weight_decay", 1.0),
        ("optim.lr=1e-3 optim.lr=2e-3", "optim.lr", 2e-3),
        ("steps=1_000", "steps", 1000),
        ("steps=1e3", "steps", 1000),
        ("steps=none", "steps", None),
        ("optim.clip=null", "optim.clip", None),
        ("optim.clip=2", "optim.clip", 2.0),
        ("optim.bits=8", "optim.bits", 8),
        ("optim.betas=0.9,0.95", "optim.betas", (0.9, 0.95)),
        ("data.shuffle=no", "data.shuffle", False),
        ("data.shuffle=1", "data.shuffle", True),
        ("data.thinking=yes", "data.thinking", True),
        ("data.mask=all", "data.mask", "all"),
        ("data.cache=x/y", "data.cache", Path("x/y")),
        ("save.dir=runs/none", "save.dir", Path("runs/none")),
        ("data.train=a.jsonl,b.jsonl", "data.train", (Source(path="a.jsonl"), Source(path="b.jsonl"))),
        ('data.train=[{"path":"a,b","weight":2}]', "data.train", (Source(path="a,b", weight=2.0),)),
        ("data.train.1.split=train[:10%]", "data.train.1.split", "train[:10%]"),
        ("data.train.0.columns.a=b=c", "data.train.0.columns", {"q": "question", "a": "b=c"}),
        ("data.eval=none", "data.eval", ()),
        ("log.sinks=trackio", "log.sinks", ("trackio",)),
        ("log.sinks=", "log.sinks", ()),
        ("adapter=none", "adapter", None),
        ("adapter=none adapter=lora adapter.r=4", "adapter", LoRA(r=4)),
        ("adapter.targets=experts,q_proj", "adapter.targets", ("experts", "q_proj")),
        ("model.quant=NF4", "model.quant", NF4()),
        ("model.quant.block=64", "model.quant.block", 64),
        ("schedule=Linear", "schedule", Linear()),
        ("schedule=linear schedule.warmup=10", "schedule", Linear(warmup=10.0)),
        ("schedule.decay=5", "schedule.decay", 5.0),
        ("model.id=1234", "model.id", "1234"),
    ],
)
def test_overrides_are_typed(words: str, path: str, value: Any):
    found: Any = override(FULL, words.split())
    for name in path.split("."):
        found = found[int(name)] if name.isdecimal() else getattr(found, name)
    assert found == value and type(found) is type(value)


def test_an_override_changes_nothing_else():
    changed = override(FULL, ["optim.lr=2e-5"])
    assert changed == attrs.evolve(FULL, optim=attrs.evolve(FULL.optim, lr=2e-5))
    assert override(FULL, []) == FULL


def test_overrides_reach_into_a_nested_method():
    changed = override(OUTER, ["method.inner.beta=2", "method.mixed=7,x"])
    assert changed.method == Outer(method=SFT(), inner=Inner(beta=2.0), mixed=(7, "x"))
    assert override(OUTER, ["method.inner=none", "method.inner=inner"]).method == attrs.evolve(
        OUTER.method, inner=Inner()
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "optim.lrr=1",
            "optim.lrr: AdamW has no field 'lrr'. Did you mean 'lr'? It has: lr, betas, eps, weight_decay, clip, bits.",
        ),
        ("schedule.lr=1", "schedule.lr: WSD has no field 'lr'. It has: warmup, decay, floor."),
        ("optm.lr=1", "optm: Recipe has no field 'optm'. Did you mean 'optim'? It has: model, data, method, adapter, "),
        ("method.beta=1", "method.beta: SFT has no field 'beta'. It has: kind."),
        ("seed=1.5", "seed=1.5: expected int, got '1.5'"),
        ("seed=1.0", "seed=1.0: expected int, got '1.0'"),
        ("seed=none", "seed=none: expected int, got 'none'"),
        ("steps=many", "steps=many: expected int or none, got 'many'"),
        ("optim.lr=fast", "optim.lr=fast: expected float, got 'fast'"),
        ("optim.lr=inf", "optim.lr=inf: expected finite float, got 'inf'"),
        ("optim.lr=-1", "optim.lr: must be > 0, got -1"),
        ("--optim.lr -1", "optim.lr: must be > 0, got -1"),
        ("optim.betas=0.9", "optim.betas=0.9: expected (float, float), got '0.9'"),
        ("data.shuffle=maybe", "data.shuffle=maybe: expected true or false, got 'maybe'"),
        (
            "data.mask=asistant",
            "data.mask=asistant: expected one of 'assistant', 'last', 'message', 'all', got 'asistant'. "
            "Did you mean 'assistant'?",
        ),
        (
            "log.sinks=wandb,tensorbord",
            "log.sinks.1: expected one of 'tensorboard', 'trackio', 'wandb', got 'tensorbord'. "
            "Did you mean 'tensorboard'?",
        ),
        ("model.quant.block=5", "model.quant.block: must be in (32, 64, 128, 256, 512, 1024, 2048, 4096), got 5"),
        ("adapter=none adapter.r=4", "adapter.r=4: adapter is none here; write adapter=LoRA before adapter.r=..."),
        ("save.dir.x=1", "save.dir.x: save.dir is path or none and has no fields"),
        ("steps.x=1", "steps.x: steps is int or none and has no fields"),
        (
            "schedule=lin",
            "schedule=lin: expected Constant, Linear, Cosine or WSD, got 'lin'. Did you mean 'Linear'?",
        ),
        ("optim=AdamW", "optim=AdamW: optim is a group; set its fields: lr, betas, eps, weight_decay, clip, bits"),
        ("data.train.2.weight=1", "data.train.2: data.train holds 2 items: 0 to 1"),
        ("data.eval.0.weight=1", "data.eval.0: data.eval holds 0 items: nothing"),
        (
            "method=SFT",
            "method=SFT: the recipe file chooses the class\n"
            "  fix: override its fields, as method.name=value, or edit the file",
        ),
        (
            "fast",
            "'fast' is not an override\n  expected: name=value, such as optim.lr=2e-5, or --optim.lr 2e-5",
        ),
        (
            "--optim.lr --seed=1",
            "'--optim.lr' is not an override\n  expected: name=value, such as optim.lr=2e-5, or --optim.lr 2e-5",
        ),
    ],
)
def test_a_bad_override_says_path_expected_and_got(words: str, message: str):
    with pytest.raises(RecipeError) as error:
        override(FULL, words.split())
    assert str(error.value).startswith(message)
    if not message.endswith(" "):
        assert str(error.value) == message


def test_pairs_of_every_spelling():
    words = ["a=1", "--b=2", "--c-d", "3", "e=f=g", "--h", "-4"]
    assert pairs(words) == [("a", "1"), ("b", "2"), ("c_d", "3"), ("e", "f=g"), ("h", "-4")]


# Show -----------------------------------------------------------------------------------------------------------------


def test_describe_has_a_row_for_every_field():
    rows = {row.path: row for row in describe(FULL)}
    lr, quant, betas, steps = (rows[p] for p in ("optim.lr", "model.quant", "optim.betas", "steps"))
    assert (lr.type, lr.value, lr.default, lr.doc, lr.changed) == (
        "float",
        "1e-05",
        "0.0002",
        "Peak learning rate.",
        True,
    )
    assert (quant.type, quant.value, quant.default, quant.changed) == ("NF4 or none", "NF4", "none", True)
    assert (betas.value, betas.default, steps.type, steps.value) == ("0.9,0.95", "0.9,0.999", "int or none", "7")
    assert not rows["optim.eps"].changed and rows["model.id"].default == "(required)"
    assert rows["data.train"].value == "a (columns=q:question),hf:o/n (weight=2.5)"
    leaves = dump(FULL)["optim"]
    assert [p for p in rows if p.startswith("optim.")] == [f"optim.{p}" for p in leaves]


def test_values_are_shown_as_they_are_typed():
    """Every value shown can be given back as an override."""
    for row in describe(FULL):
        if row.path not in ("data.train", "method", "name"):
            assert override(FULL, [f"{row.path}={row.value}"]) == FULL or row.value in ("NF4", "LoRA", "WSD")


def test_least_recipe_changes_only_what_is_required():
    assert [row.path for row in describe(make()) if row.changed] == ["model.id", "data.train", "method"]


def test_items_document_the_fields_of_sources():
    rows = {row.path: row for row in items(make())}
    assert rows["data.train.N.weight"].default == "1" and rows["data.train.N.path"].value == "(required)"


def test_compare_lists_what_a_rehearsal_changed():
    changes = {path: (a, b) for path, a, b in compare(make(name="x"), rehearse(make(name="x")))}
    assert changes["model.tiny"] == ("false", "true") and changes["save.dir"] == ("none", "runs/x-tiny")
    assert compare(FULL, FULL) == []


# Schema ---------------------------------------------------------------------------------------------------------------


def fits(value: Any, rule: dict[str, Any], root: dict[str, Any]) -> bool:
    """As much of JSON Schema as ours uses."""
    kinds = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "null": type(None), "object": dict}
    known = {"type", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems"}
    known |= {"enum", "const", "anyOf", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "$ref"}
    assert set(rule) - known <= {"description", "default", "title", "$schema", "$defs"}, rule
    if "$ref" in rule and not fits(value, root["$defs"][rule["$ref"].rpartition("/")[2]], root):
        return False
    if "type" in rule:
        kind = kinds.get(rule["type"], list)
        if not isinstance(value, kind) or (isinstance(value, bool) and rule["type"] in ("integer", "number")):
            return False
    if isinstance(value, dict):
        own, other = rule.get("properties", {}), rule.get("additionalProperties", {})
        if (other is False and set(value) - set(own)) or set(rule.get("required", ())) - set(value):
            return False
        return all(fits(v, own.get(k, other or {}), root) for k, v in value.items()) and any_fits(value, rule, root)
    if isinstance(value, list):
        kinds_ = rule.get("prefixItems", [rule.get("items", {})] * len(value))
        if not rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", 10**9):
            return False
        return all(fits(v, k, root) for v, k in zip(value, kinds_, strict=True)) and any_fits(value, rule, root)
    if isinstance(value, str) and not re.search(rule.get("pattern", ""), value):
        return False
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = rule.get("minimum", -1e99), rule.get("maximum", 1e99)
        if not (
            low <= value <= high and rule.get("exclusiveMinimum", -1e99) < value < rule.get("exclusiveMaximum", 1e99)
        ):
            return False
    return any_fits(value, rule, root)


def any_fits(value: Any, rule: dict[str, Any], root: dict[str, Any]) -> bool:
    if ("enum" in rule and value not in rule["enum"]) or ("const" in rule and value != rule["const"]):
        return False
    return "anyOf" not in rule or any(fits(value, r, root) for r in rule["anyOf"])


@pytest.mark.parametrize("recipe", [make(), FULL, OUTER], ids=["least", "full", "nested"])
def test_schema_takes_what_dump_writes(recipe: Recipe):
    for rules in (schema(), schema(recipe)):
        assert fits(json.loads(dumps(recipe)), json.loads(json.dumps(rules)), rules)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 1.5),
        ("seed", -1),
        ("optim.lr", 0),
        ("optim.lr", "fast"),
        ("optim.lrr", 1),
        ("optim.betas", [0.9]),
        ("data.mask", "asistant"),
        ("data.bad_rows", 1.5),
        ("schedule", {"type": "ft.recipe.parts:Linear", "decay": 1}),
        ("schedule", {"warmup": 1}),
        ("model.quant", 4),
        ("model.quant.block", 48),
        ("steps", 0),
        ("name", "a b"),
        ("adapter.targets", "experts"),
        ("method", {"type": "no name"}),
    ],
)
def test_schema_and_restore_refuse_the_same(path: str, value: Any):
    stored, rules = broken(path, value), schema()
    assert not fits(stored, rules, rules)
    with pytest.raises(FtError):
        restore(stored)


def test_schema_of_a_recipe_knows_its_method_and_documents_fields():
    rules = schema(OUTER)
    assert rules["$defs"][f"{__name__}:Outer"]["properties"]["type"] == {"const": f"{__name__}:Outer"}
    assert rules["$defs"]["AdamW"]["properties"]["lr"] == {
        "type": "number",
        "exclusiveMinimum": 0,
        "description": "Peak learning rate.",
        "default": 0.0002,
    }
    assert rules["required"] == ["model", "data", "method"] and rules["additionalProperties"] is False
