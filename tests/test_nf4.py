"""NF4 against bitsandbytes (bit for bit) and against numbers worked by hand."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from ft.errors import ModelError, RecipeError
from ft.kernels import nf4
from ft.kernels.nf4.cases import CASES, Case, make

logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it reports an optional kernel that it did not find
oracle = pytest.importorskip("bitsandbytes.functional")

all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def theirs(w: Tensor, case: Case):
    return oracle.quantize_4bit(w, blocksize=case.block, compress_statistics=case.double, quant_type="nf4")


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@all_cases
def test_codes_and_scales_equal_bitsandbytes(case):
    w = make(case)
    q = nf4.quantise(w, block=case.block, double=case.double)
    packed, state = theirs(w, case)
    assert same(q.packed, packed.view(-1))
    assert same(q.absmax, state.absmax)
    assert q.shape == tuple(w.shape) and q.dtype == w.dtype
    if case.double:
        assert q.absmax2 is not None and q.offset is not None
        assert same(q.absmax2, state.state2.absmax)
        assert same(q.offset, state.offset)


@all_cases
def test_dequantised_weight_equals_bitsandbytes(case):
    w = make(case)
    packed, state = theirs(w, case)
    state.shape = torch.Size([w.numel()])  # its CPU kernel misplaces scales where a row is not a number of blocks
    with torch.compiler.set_stance("force_eager"):
        expected = oracle.dequantize_4bit(packed, state).reshape(w.shape)
    got = nf4.dequantise(nf4.quantise(w, block=case.block, double=case.double))
    assert same(got, expected)


def test_tables_equal_bitsandbytes():
    assert same(nf4.nf4_code(), oracle.get_4bit_type("nf4", device="cpu"))
    assert same(nf4.dynamic_map(), oracle.create_dynamic_map())


def test_tables_and_weights_do_not_follow_a_default_device():
    with torch.device("meta"):
        assert nf4.dynamic_map().device.type == nf4.nf4_code().device.type == "cpu"


def test_values_on_boundaries_go_to_the_lower_code():
    code = nf4.nf4_code()
    middle = (code[1:] + code[:-1]) / 2
    w = torch.cat([middle, torch.nextafter(middle, torch.tensor(2.0)), torch.tensor([1.0, -1.0])])
    q = nf4.quantise(w, double=False)
    got = torch.stack([q.packed >> 4, q.packed & 15], -1).view(-1)
    assert got.tolist() == [*range(15), *range(1, 16), 15, 0]


def test_every_float_near_a_boundary_gets_the_code_of_a_search():
    code = nf4.nf4_code()
    middle = ((code[1:] + code[:-1]) / 2).view(torch.int32)
    near = (middle[:, None] + torch.arange(-600, 600, dtype=torch.int32)).view(torch.float32).view(-1)
    w = torch.cat([near.view(-1, 60), torch.ones(300, 4)], 1)  # absmax 1, so that scaling changes nothing
    q = nf4.quantise(w, double=False)
    got = torch.stack([q.packed >> 4, q.packed & 15], -1).view(-1, 64)[:, :60].reshape(-1)
    assert torch.equal(got.long(), torch.bucketize(near, middle.view(torch.float32)))


def test_by_hand():
    w = torch.tensor([2.0, -2.0, 0.0, 1.0])
    q = nf4.quantise(w, double=False)
    assert q.absmax.tolist() == [2.0]
    assert q.packed.tolist() == [0xF0, 0x7C]  # codes 15 0 7 12: 1.0 / 2.0 is nearest to 0.4407
    assert nf4.dequantise(q).tolist() == [2.0, -2.0, 0.0, 2 * 0.44070982933044434]


def test_many_nested_scales_equal_bitsandbytes():
    torch.manual_seed(0)
    w = torch.randn(40_000, 32) * torch.rand(40_000, 1) ** 3  # scales of all sizes, 40,000 of them
    case = Case(name="", shape=(), block=32)
    q, (_, state) = nf4.quantise(w, block=32), theirs(w, case)
    assert same(q.absmax, state.absmax) and q.absmax2 is not None and same(q.absmax2, state.state2.absmax)


def test_zeros_stay_zeros():
    for double in (False, True):
        assert nf4.dequantise(nf4.quantise(torch.zeros(3, 64), double=double)).abs().max() == 0.0


def test_extreme_magnitudes_equal_bitsandbytes():
    for size in (1e-42, 1e-38, 1e-30, 1e37):
        w = torch.linspace(-1, 1, 192).view(3, 64) * size
        case = Case(name="", shape=(3, 64), double=False)
        assert same(nf4.quantise(w, double=False).packed, theirs(w, case)[0].view(-1))


def test_a_transposed_weight_is_read_in_its_own_order():
    w = make(Case(name="", shape=(64, 48))).T
    assert same(nf4.quantise(w).packed, nf4.quantise(w.contiguous()).packed)


def test_size():
    q = nf4.quantise(torch.ones(256, 256, dtype=torch.bfloat16))
    assert nf4.nbytes(q) == 256 * 256 // 2 + 1024 + 4 * 4 + 4  # codes, 8-bit scales, their scales, the mean
    assert nf4.nbytes(nf4.quantise(torch.ones(256, 256), double=False)) == 256 * 256 // 2 + 4 * 1024


def test_another_type_is_converted_after_rounding_to_the_weights_own():
    q = nf4.quantise(make(Case(name="", shape=(8, 64))))
    assert same(nf4.dequantise(q, torch.float32), nf4.dequantise(q).float())


@pytest.mark.parametrize("double", [True, False])
def test_slices_equal_slices_of_the_whole(double):
    w = make(Case(name="", shape=(9, 40, 64)))  # 40 blocks a row: slices begin inside blocks of nested scales
    q = nf4.quantise(w, double=double)
    dense = nf4.dequantise(q)
    for first, n in ((0, 9), (3, 1), (5, 3), (8, 1), (9, 0)):
        assert same(nf4.dequantise(nf4.slice_rows(q, first, n)), dense[first : first + n])
    index = torch.tensor([7, 0, 8, 7])
    assert same(nf4.dequantise_rows(q, index), dense[index])
    assert same(nf4.dequantise_rows(q, index[:0]), dense[:0])


def test_slices_share_bytes():
    q = nf4.quantise(torch.randn(4, 128))
    assert nf4.slice_rows(q, 2).packed.untyped_storage().data_ptr() == q.packed.untyped_storage().data_ptr()


def test_rows_that_straddle_blocks_cannot_be_sliced():
    q = nf4.quantise(torch.randn(3, 10, 10))
    with pytest.raises(ModelError, match=r"straddle.*\n.*multiple of 64.*\n.*100 values a row"):
        nf4.slice_rows(q, 0)
    with pytest.raises(ModelError, match="straddle"):
        nf4.dequantise_rows(q, torch.tensor([0]))
    with pytest.raises(ModelError, match="no such rows"):
        nf4.slice_rows(nf4.quantise(torch.randn(3, 64)), 1, 3)


@pytest.mark.parametrize("double", [True, False])
def test_linear_equals_the_dense_weight_with_gradients(double):
    torch.manual_seed(0)
    q = nf4.quantise(torch.randn(32, 64), double=double)
    w = nf4.dequantise(q)
    x, x2 = (torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    b, b2 = (torch.ones(32, requires_grad=True) for _ in range(2))
    y, y2 = nf4.linear(x, q, b), torch.nn.functional.linear(x2, w, b2)
    assert torch.equal(y, y2)
    y.square().sum().backward()
    y2.square().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(b.grad, b2.grad)


def test_linear_gradcheck():
    q = nf4.quantise(torch.randn(6, 64))
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    b = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: nf4.linear(x, q, b), (x, b))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("keep", [True, False])
def test_linear_equals_a_dense_layer_of_torch(dtype, keep):
    q = nf4.quantise(torch.randn(24, 50, generator=torch.Generator().manual_seed(0)))  # blocks straddle rows
    layer = torch.nn.Linear(50, 24, dtype=dtype)
    layer.weight.data.copy_(nf4.dequantise(q))
    b = layer.bias.detach().clone().requires_grad_()
    x = torch.randn(7, 3, 50, dtype=dtype, generator=torch.Generator().manual_seed(1)).transpose(0, 1).requires_grad_()
    grad = torch.randn(3, 7, 24, dtype=dtype, generator=torch.Generator().manual_seed(2))
    y, expected = nf4.linear(x, q, b, keep=keep), layer(x)
    got = torch.autograd.grad(y, (x, b), grad)
    theirs = torch.autograd.grad(expected, (x, layer.bias), grad)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for a, e in zip((y, *got), (expected, *theirs), strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def saved(x: Tensor, q: nf4.NF4Tensor, keep: bool = False) -> list[int]:
    """Bytes of each tensor that linear holds for backward."""
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        nf4.linear(x, q, keep=keep)
    return kept


def test_linear_keeps_the_dense_weight_only_when_asked():
    q, x = nf4.quantise(torch.randn(64, 64, dtype=torch.bfloat16)), torch.randn(2, 64, requires_grad=True)
    assert sum(saved(x, q)) == nf4.nbytes(q) == 2048 + 64 + 4 + 4
    assert saved(x, q, keep=True) == [64 * 64 * 4]
    bias = torch.zeros(64, requires_grad=True)
    y = nf4.linear(x.detach(), q, bias, keep=True)  # no gradient to x, nothing to keep
    y.sum().backward()
    assert bias.grad is not None and bias.grad.tolist() == [2.0] * 64


def test_linear_refuses_what_does_not_fit():
    q = nf4.quantise(torch.randn(8, 64))
    with pytest.raises(ModelError, match=r"fit its input\n.*a weight of \(any, 32\)\n.*\(8, 64\)"):
        nf4.linear(torch.randn(2, 32), q)
    with pytest.raises(ModelError, match="fit its input"):
        nf4.linear(torch.randn(2, 64), nf4.quantise(torch.randn(2, 8, 64)))


def test_triton_where_it_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    q, x = nf4.quantise(torch.randn(8, 64)), torch.randn(2, 64)
    for run in (
        lambda: nf4.quantise(x, impl="triton"),
        lambda: nf4.dequantise(q, impl="triton"),
        lambda: nf4.dequantise_rows(q, torch.tensor([0]), impl="triton"),
        lambda: nf4.linear(x, q, impl="triton"),
    ):
        with pytest.raises(RecipeError, match=r"model\.kernels: Triton kernels cannot run here"):
            run()


def test_linear_under_autocast_computes_in_its_type():
    q = nf4.quantise(torch.randn(16, 64))
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = nf4.linear(x, q, torch.ones(16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@all_cases
def test_entries_equal_those_of_bitsandbytes_and_come_back(case):
    w = make(case)
    q = nf4.quantise(w, block=case.block, double=case.double)
    packed, state = theirs(w, case)
    expected = {"w": packed} | {f"w.{key}": value for key, value in state.as_dict(packed=True).items()}
    got = nf4.to_bnb("w", q)
    assert set(got) == set(expected)
    assert all(same(got[key], expected[key]) for key in expected)
    for entries in (got, expected):
        assert same(nf4.dequantise(nf4.from_bnb("w", entries)), nf4.dequantise(q))


def test_bitsandbytes_reads_our_entries():
    q = nf4.quantise(make(Case(name="", shape=(4, 24, 64))))
    entries = nf4.to_bnb("experts.gate_up_proj", q)
    packed = entries.pop("experts.gate_up_proj")
    state = oracle.QuantState.from_dict(entries, device=torch.device("cpu"))
    assert same(oracle.dequantize_4bit(packed, state), nf4.dequantise(q))


def test_storage_in_another_type_is_read():
    w = make(Case(name="", shape=(16, 64)))
    packed, state = oracle.quantize_4bit(w, quant_type="nf4", compress_statistics=True, quant_storage=torch.bfloat16)
    assert packed.dtype == torch.bfloat16  # what FSDP asks for
    entries = {"w": packed} | {f"w.{key}": value for key, value in state.as_dict(packed=True).items()}
    assert same(nf4.dequantise(nf4.from_bnb("w", entries)), nf4.dequantise(nf4.quantise(w)))


def test_checkpoints_pass_between_transformers_and_here(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    config = AutoConfig.for_model("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                                  num_attention_heads=4, num_key_value_heads=2, vocab_size=50)  # fmt: skip
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    wish = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=wish, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")

    read, ours = load_file(tmp_path / "theirs" / "model.safetensors"), {}
    for name, w in dense.state_dict().items():
        if "_proj" in name:
            q = nf4.quantise(w)
            assert same(nf4.dequantise(nf4.from_bnb(name, read)), nf4.dequantise(q))
            ours |= nf4.to_bnb(name, q)
        else:
            ours[name] = w
    assert set(ours) == set(read) and all(same(ours[name], read[name]) for name in read)

    (tmp_path / "ours").mkdir()
    save_file(ours, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "ours" / "config.json").write_bytes((tmp_path / "theirs" / "config.json").read_bytes())
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back.model.layers[0].mlp.gate_proj).__name__ == "Linear4bit"
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, theirs(tokens).logits)


def test_entries_that_do_not_fit_are_refused():
    entries = nf4.to_bnb("w", nf4.quantise(torch.randn(8, 64)))
    with pytest.raises(ModelError, match=r"missing\n.*w\.absmax"):
        nf4.from_bnb("w", {key: value for key, value in entries.items() if key != "w.absmax"})
    with pytest.raises(ModelError, match=r"fit its shape\n.*256 bytes.*\n.*255"):
        nf4.from_bnb("w", entries | {"w": entries["w"][1:]})
    with pytest.raises(ModelError, match="another table"):
        nf4.from_bnb("w", entries | {"w.quant_map": torch.zeros(16)})
    _, fp4 = oracle.quantize_4bit(torch.randn(8, 64), quant_type="nf4", blocksize=64)
    fp4.quant_type = "fp4"
    foreign = fp4.as_dict(packed=True)["quant_state.bitsandbytes__fp4"]
    with pytest.raises(ModelError, match=r"not known here\n.*nf4\n.*fp4"):
        nf4.from_bnb("w", entries | {"w.quant_state.bitsandbytes__nf4": foreign})


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ModelError, match="block size"):
        nf4.quantise(torch.randn(8, 64), block=48)
    with pytest.raises(ModelError, match="NaN or infinity"):
        nf4.quantise(torch.tensor([1.0, float("nan"), 2.0]))
    with pytest.raises(ModelError, match="NaN or infinity"):
        nf4.quantise(torch.cat([torch.randn(64), torch.tensor([float("-inf")])]))
    with pytest.raises(ModelError, match="16 or 32-bit"):
        nf4.quantise(torch.ones(64, dtype=torch.float64))
    with pytest.raises(ModelError, match="without values"):
        nf4.quantise(torch.ones(0, 64))
