"""Compile the Triton kernels for GPUs that this machine need not have.

That they multiply right is tested on a GPU (test_speed.py). Here Triton, without a GPU,
compiles what a T4 (SM 7.5), an A100 (8.0), an L4 (8.9) or an H100 (9.0) would run.
"""

import builtins
import dis
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, load_by_path

import quant_lab

triton = pytest.importorskip("triton")

ROW = dict(outputs="i32", width="i32", y="*fp32")
WORDS = dict(x="*i32", weight="*i32")
BYTES = dict(weight="*i8")


def compile_kernel(kernel, sm, types, options=None, **constants):
    """Return what Triton compiles; types of arguments are Triton's, pointers are aligned."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {name: constants.get(name) for name in names if name not in types}
    aligned = [i for i, name in enumerate(names)
               if signature[name][0] == "*" or name in ("outputs", "width", "span")]
    source = ASTSource(kernel, signature,
                       {(names.index(name),): x for name, x in constants.items()},
                       {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


@pytest.mark.parametrize("sm, kind, half, types", [
    (75, "int4", "fp16", WORDS),
    (75, "int8", "fp16", WORDS),
    (75, "dense", "fp16", dict(weight="*fp16", x="*fp16")),
    (80, "int4", "bf16", WORDS),
    (80, "dense", "bf16", dict(weight="*bf16", x="*bf16")),
    (89, "fp8", "fp16", dict(BYTES, x="*fp8e4nv")),
    (90, "fp8", "bf16", dict(BYTES, x="*fp8e4nv")),
])
def test_a_row_compiles(sm, kind, half, types):
    types = ROW | types | (dict(scale=f"*{half}") if kind != "dense" else {})
    compile_kernel(quant_lab.row_kernel, sm, types, GROUP=16, KIND=kind, ROWS=2, BLOCK=512)


def test_what_is_compiled_for_a_t4_runs_on_a_later_gpu(monkeypatch, tmp_path):
    """The rehearsal needs that; the architecture stands in the flags of the ELF file."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))  # Not from an earlier run.
    names, undo = load_by_path("rehearse_t4").assemble_for(90)
    try:
        made = compile_kernel(
            quant_lab.row_kernel, 75, ROW | WORDS | dict(scale="*fp16"), GROUP=16, KIND="int4",
            ROWS=2, BLOCK=512)
    finally:
        undo()
    flags = int.from_bytes(made.asm["cubin"][48:52], "little")
    assert ".target sm_75" in made.asm["ptx"] and 90 in (flags & 255, flags >> 8 & 255)
    assert names == ["row_kernel"]


def test_a_kernel_needs_no_name_of_the_script():
    """inductor copies its source into a module of its own, which imports Triton alone."""
    names = {"tl": triton.language}
    exec(quant_lab.row_kernel.src, names)  # Looks up annotations.
    used = {step.argval for step in dis.get_instructions(names["row_kernel"])
            if step.opname == "LOAD_GLOBAL"}
    assert "tl" in used and used - {"tl"} <= {*dir(builtins)}


@pytest.mark.parametrize("scale, dequantizes_to", [("*fp16", 2), ("*fp32", 0)])
def test_kernels_of_llmcompressor_compile_for_a_t4(scale, dequantizes_to):
    """GPTQ's block of columns and rounding to integers; for FP8 they ask for SM 9.0."""
    from compressed_tensors.quantization.lifecycle import forward_helpers
    from llmcompressor.modifiers.gptq import gptq_quantize

    gptq, rounding = gptq_quantize._gptq_block_update_kernel, forward_helpers._quantize_kernel
    floats = dict.fromkeys(("work_ptr", "hinv_ptr", "zp_ptr", "quant_ptr", "errors_ptr"), "*fp32")
    whole = {name: "i32" for name in (*gptq.arg_names, *rounding.arg_names)
             if "stride" in name or name.startswith("dim_")}
    numbers = dict(out_rows="i32", q_min="fp32", q_max="fp32")
    compile_kernel(
        gptq, 75, whole | floats | numbers | dict(scale_ptr=scale),
        dict(num_warps=4, num_stages=2), WIDTH=128, QUANT_TYPE=0, DEQUANT_DTYPE=dequantizes_to,
        HAS_ZP=True, USE_FP8_E4B15=False, BLOCK_ROWS=16)
    limits = dict.fromkeys(("q_min_ptr", "q_max_ptr", "global_scale_ptr"), "*fp32")
    compile_kernel(
        rounding, 75, whole | limits | dict(
            output_ptr=scale, input_ptr=scale, scale_ptr=scale, zero_point_ptr="*i8",
            group_size="i32", num_scale_cols="i32"),
        quant_type=0, num_bits=8, use_intel_libdevice=False, BLOCK_SIZE_R=32, BLOCK_SIZE_C=32,
        has_zero_point=True, has_global_scale=False)


@torch.no_grad()
def test_compiled_layers_call_the_kernels(monkeypatch):
    """Trace one sequence and eight without a break, as for an H100; nothing is computed."""
    calls = []

    def note(kind, x, weight, *others):
        calls.append(kind)
        return x.new_zeros(len(x), len(weight), dtype=torch.float32)

    monkeypatch.setattr(quant_lab, "multiply_row", note)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = load_by_path("bench_decode").random_model("tiny", "int4", torch.device("cpu"))
    for linear in model.modules():
        if isinstance(linear, quant_lab.PackedLinear):
            linear.sm, linear.fits = (9, 0), True
    quant_lab.compile_layers(model)
    prompts = torch.arange(5, 325).view(8, 40)
    for batch, wanted in (1, {"int4"}), (8, set()):  # Of several, unpacked.
        decoder = quant_lab.Decoder(model, prompts[:batch], 4, True)
        calls.clear()
        decoder.run(2)
        assert set(calls) == wanted


def test_without_triton_the_script_runs():
    """Import it as on a machine whose PyTorch came without Triton."""
    code = "import sys; sys.modules['triton'] = None; import quant_lab; assert not quant_lab.triton"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@torch.no_grad()
def test_many_batch_sizes_compile(monkeypatch):
    """Pass dynamo's own limit of eight shapes of one function."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = load_by_path("bench_decode").random_model("tiny", "dense", torch.device("cpu"))
    quant_lab.compile_layers(model)
    for batch in range(1, 12):
        quant_lab.Decoder(model, torch.full((batch, 20), 5), 2, True).run(1)
