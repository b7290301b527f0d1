"""The reward functions that ship, on answers a reader can score, and what the sandbox holds back."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from ft.rollout import rewards, sandbox

DOUBLE = "Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nDone."


# Text -----------------------------------------------------------------------------------------------------------------


def test_exact_takes_what_stands_between_answer_tags():
    said = ["4", " 4\n", "<answer>5</answer> no, <answer>4</answer>", "It is 4", "5"]
    assert rewards.exact(said, ["4", 4, "4", "4", "4"]) == [1, 1, 1, 0, 0]


def test_the_last_number_counts_whatever_its_form():
    said = ["3 + 1 = 4", "4, or rather 5", "-24", "1,024.0", "none", "- 24"]
    assert rewards.last_number(said, ["4", "4", "-24", "1024", "4", "-24"]) == [1, 0, 1, 1, 0, 1]


def test_a_pattern_must_match_all_of_it():
    said = ["<think>a\nb</think> 4", "4", "<think></think> 4 "]
    assert rewards.matches(said, r"<think>.*</think> \d+") == [1, 0, 0]


def test_shortness_falls_in_a_line():
    ids = [[0] * n for n in (4, 8, 12, 16, 20)]
    assert rewards.short([""] * 5, ids, most=8) == [1, 1, 0.5, 0, 0]


def test_reasoning_gym_scores_by_the_task_itself():
    pytest.importorskip("reasoning_gym")
    entry = {"question": "28 - 52 =", "answer": "-24", "metadata": {}}
    said = ["-24", "<answer> -24 </answer>", "24"]
    right, tagged, wrong = rewards.reasoning_gym(said, ["chain_sum"] * 3, [entry, '{"answer": "-24"}', entry])
    assert (right, tagged) == (1, 1) and wrong is not None and wrong < 1


def test_math_verify_knows_equal_formulas():
    pytest.importorskip("math_verify")
    said = [r"so \boxed{\frac{1}{2}}", "the answer is $0.5$", r"$\boxed{\frac{1}{3}}$", "no idea"]
    assert rewards.math_verify(said, [r"\frac{1}{2}", "1/2", "1/2", "1/2"]) == [1, 1, 0, 0]


# Code -----------------------------------------------------------------------------------------------------------------


def test_code_passes_its_tests_or_a_share_of_them():
    tests = ["assert double(2) == 4", "assert double('a') == 'aa'", "assert double(1) == 3"]
    assert rewards.unit_tests([DOUBLE], [tests[:2]]) == [1]
    assert rewards.unit_tests([DOUBLE], [tests]) == [0]
    assert rewards.unit_tests([DOUBLE], [tests], share=True) == [pytest.approx(2 / 3)]
    assert rewards.unit_tests([DOUBLE, DOUBLE], ["assert double(3) == 6", []]) == [1, None]


def test_the_last_block_of_an_answer_is_its_code():
    assert sandbox.code_of("```\na\n```\nor\n```py\nb = 1\n```") == "b = 1\n"
    assert sandbox.code_of("x = 1") == "x = 1"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise ValueError('x')", "ValueError: x"),
        ("def (", "SyntaxError: invalid syntax (answer.py, line 1)"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "not reached: the process ended"),
        ("import os; os.kill(os.getpid(), 11)", "not reached: the process ended"),
        ('print(\'0\' * 64, \'{"test": 0, "why": ""}\'); import os; os._exit(0)', "not reached: the process ended"),
        ("x = bytearray(10 ** 10)", "MemoryError: "),
        ("open('f', 'wb').write(bytes(20 << 20))", "OSError: [Errno 27] File too large"),
        ("x = 0", "AssertionError: "),
    ],
)
def test_what_goes_wrong_is_a_failed_test(code, why):
    (found,) = sandbox.run(code, ["assert x == 1"], seconds=10.0).tests
    assert found == why


def test_what_never_ends_is_killed_and_earlier_tests_count():
    began = time.monotonic()
    ran = sandbox.run("def f(): pass", ["f()", "while True: f()", "f()"], seconds=1.5)
    assert ran.tests == ("", "not reached within 1.5 s", "not reached within 1.5 s")
    assert ran.passed == 1 and time.monotonic() - began < 10


def test_it_runs_in_an_empty_folder_without_our_environment(monkeypatch):
    monkeypatch.setenv("FT_SECRET", "s")
    code = "import os, sys; here = os.listdir(); open('left', 'w').write('x'); home = os.getcwd()"
    tests = ["assert here == []", "assert 'FT_SECRET' not in os.environ", "assert home != " + repr(os.getcwd())]
    assert sandbox.run(code, tests, seconds=10.0).tests == ("", "", "")
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob("ft-sandbox-*/left"))


def test_there_is_no_network_where_the_kernel_allows_that():
    code = "import socket; names = [name for _, name in socket.if_nameindex()]; s = socket.socket()"
    ran = sandbox.run(code, ["assert names == ['lo']", "s.bind(('127.0.0.1', 0)); assert s.connect_ex(('1.1.1.1', 9))"],
                      seconds=10.0)  # fmt: skip
    if not ran.offline:
        pytest.skip("this kernel gives no network namespace")
    assert ran.tests[0] == ""


# Models ---------------------------------------------------------------------------------------------------------------


def test_a_reward_model_scores_as_transformers_does_alone(tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from ft.data.tokenizer import byte_tokenizer

    torch.manual_seed(0)
    tokenizer: Any = byte_tokenizer()
    sizes: Any = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_labels": 1, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    model = LlamaForSequenceClassification(LlamaConfig(**sizes)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked, said = [{"role": "user", "content": "why?"}], ["no", "because it is so", "yes"]
    found = rewards.reward_model(said, [asked] * 3, folder=str(tmp_path), batch=2)
    for one, text in zip(found, said, strict=True):
        whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": text}], tokenize=False)
        ids = torch.tensor([tokenizer(whole, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            assert one == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-5)
