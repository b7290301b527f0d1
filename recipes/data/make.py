"""Make chat rows from reasoning-gym's tasks: `python recipes/data/make.py chain_sum --rows 512 --out rows.jsonl`.

Rows are {"messages": [user, assistant], "answer": ...}; the same seed makes the same rows, and held-out rows are
those of another seed whose questions do not occur among the first. The task `pairs` makes sums with a right and a
wrong answer, {"prompt": [user], "chosen": [assistant], "rejected": [assistant]}, `steps` makes longer sums worked out
step by step, {"prompt": [user], "completions": [step], "labels": [right so far]}, `tasks` makes sums to be answered
and judged, {"prompt": [user], "answer", "dataset", "entry"}, and `text` makes plain text.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "letter_counting": {"min_words": 3, "max_words": 6},
    "spell_backward": {"min_word_len": 3, "max_word_len": 5},
    "gcd": {"max_value": 60},
    "number_sorting": {"min_numbers": 3, "max_numbers": 5},
    "syllogism": {},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
}
ASK = " Answer with the result only."


def rows(task: str, seed: int) -> Iterator[dict[str, Any]]:
    """Endless rows of one task, each question once."""
    import reasoning_gym  # pyright: ignore[reportMissingImports]

    seen: set[str] = set()
    size = 4096
    for item in reasoning_gym.create_dataset(task, size=size, seed=seed, **TASKS[task]):
        if item["question"] in seen:
            continue
        seen.add(item["question"])
        user = {"role": "user", "content": item["question"].strip() + ASK}
        assistant = {"role": "assistant", "content": str(item["answer"])}
        yield {"messages": [user, assistant], "answer": str(item["answer"]), "task": task}


def talk(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Several questions as one conversation."""
    return {"messages": [m for part in parts for m in part["messages"]], "task": "+".join(p["task"] for p in parts)}


def mixed(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """All tasks in turn: single questions, conversations of two, and some with a system message."""
    sources = [rows(task, seed) for task in TASKS]
    for i in range(count):
        row = next(sources[i % len(sources)])
        if i % 3 == 1:
            row = talk([row, next(sources[(i + 2) % len(sources)])])
        if i % 4 == 2:
            row["messages"].insert(0, {"role": "system", "content": "You are exact and brief."})
        yield row


def pairs(seed: int) -> Iterator[dict[str, Any]]:
    """Sums with the right answer and one that is off by a little, as a slip in a digit would leave it."""
    rng = random.Random(seed)
    for row in rows("chain_sum", seed):
        user, right = row["messages"]
        wrong = {"role": "assistant", "content": str(int(row["answer"]) + rng.choice((-10, -2, -1, 1, 2, 10)))}
        yield {"prompt": [user], "chosen": [right], "rejected": [wrong], "task": row["task"]}


def steps(seed: int) -> Iterator[dict[str, Any]]:
    """Sums of three to five numbers, one addition a step; in half of them a step slips, and all after it are wrong."""
    rng = random.Random(seed)
    while True:
        total, *numbers = (rng.randint(1, 99) for _ in range(rng.randint(3, 5)))
        asked = " + ".join(map(str, (total, *numbers)))
        slip = rng.choice((None, rng.randrange(len(numbers))))
        worked, labels = [], []
        for i, number in enumerate(numbers):
            found = total + number + (rng.choice((-10, -2, -1, 1, 2, 10)) if i == slip else 0)
            worked.append(f"{total} + {number} = {found}")
            labels.append(slip is None or i < slip)
            total = found
        user = {"role": "user", "content": f"What is {asked}? Add one number at a time."}
        yield {"prompt": [user], "completions": worked, "labels": labels, "task": "steps"}


def tasks(seed: int) -> Iterator[dict[str, Any]]:
    """Sums of two digits to be answered, each once, with what reasoning-gym scores an answer by."""
    import reasoning_gym  # pyright: ignore[reportMissingImports]

    small, seen = {**TASKS["chain_sum"], "max_digits": 1}, set[str]()
    for item in reasoning_gym.create_dataset("chain_sum", size=4096, seed=seed, **small):
        if item["question"] in seen:
            continue
        seen.add(item["question"])
        entry = {"question": item["question"], "answer": str(item["answer"]), "metadata": item["metadata"]}
        user = {"role": "user", "content": item["question"].strip() + ASK}
        yield {"prompt": [user], "answer": str(item["answer"]), "dataset": "chain_sum", "entry": entry}


def question(row: dict[str, Any]) -> str:
    """What the row asks first."""
    return (row["prompt"] if "prompt" in row else row["messages"])[0]["content"]


def texts(seed: int) -> Iterator[dict[str, Any]]:
    """Plain text: worked questions, one after another, for pretraining."""
    for row in mixed(10**6, seed):
        yield {"text": "\n".join(m["content"].removesuffix(ASK) for m in row["messages"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=[*TASKS, "mixed", "pairs", "steps", "tasks", "text"])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out-from", type=Path, help="leave out questions that occur in this file")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    known = set()
    if args.held_out_from:
        for line in args.held_out_from.read_text().splitlines():
            known.add(question(json.loads(line)))
    made = {
        "mixed": lambda: mixed(args.rows, args.seed),
        "pairs": lambda: pairs(args.seed),
        "steps": lambda: steps(args.seed),
        "tasks": lambda: tasks(args.seed),
        "text": lambda: texts(args.seed),
    }
    source = made.get(args.task, lambda: rows(args.task, args.seed))()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with args.out.open("w", encoding="utf-8") as file:
        for row in source:
            if written == args.rows:
                break
            if "text" in row or question(row) not in known:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written += 1
    print(f"{args.out}: {written} rows of {args.task}")


if __name__ == "__main__":
    main()
