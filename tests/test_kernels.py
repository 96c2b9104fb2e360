"""Compile the Triton kernels for GPUs that this machine need not have.

That they multiply right is tested on a GPU (test_speed.py). Here Triton, without a GPU,
compiles what a T4 (SM 7.5), an A100 (8.0), an L4 (8.9) or an H100 (9.0) would run.
"""

import builtins
import dis
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, load_by_path

import quant_lab

triton = pytest.importorskip("triton")

ROW = dict(outputs="i32", width="i32", y="*fp32")
TILE = dict(ROW, tokens="i32", span="i32")
WORDS = dict(x="*i32", weight="*i32")
CODES = dict(x="*fp8e4nv", weight="*i8")


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


@pytest.mark.parametrize("sm, kind, types", [
    (75, "int8", WORDS),
    (75, "dense", dict(weight="*fp16", x="*fp16")),
    (80, "int8", WORDS),
    (80, "dense", dict(weight="*bf16", x="*bf16")),
    (89, "fp8", CODES),
    (90, "fp8", CODES),
])
def test_a_row_compiles(sm, kind, types):
    rows, block, warps = quant_lab.TILES[kind]
    compile_kernel(quant_lab.row_kernel, sm, ROW | types, dict(num_warps=warps),
                   KIND=kind, ROWS=rows, BLOCK=block)


def test_what_is_compiled_for_a_t4_runs_on_a_later_gpu(monkeypatch, tmp_path):
    """The rehearsal needs that; the architecture stands in the flags of the ELF file."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))  # Not from an earlier run.
    names, undo = load_by_path("rehearse_t4").assemble_for(90)
    try:
        made = compile_kernel(
            quant_lab.row_kernel, 75, ROW | WORDS, KIND="int8", ROWS=2, BLOCK=512)
    finally:
        undo()
    flags = int.from_bytes(made.asm["cubin"][48:52], "little")
    assert ".target sm_75" in made.asm["ptx"] and 90 in (flags & 255, flags >> 8 & 255)
    assert names == ["row_kernel"]


class Launch:
    """Stand for a kernel, which notes how it is called."""

    def __getitem__(self, programs):
        return partial(self.note, programs)

    def note(self, programs, *arguments, **options):
        self.programs, self.arguments, self.options = programs, arguments, options


@pytest.mark.parametrize("sm, kilobytes", [(80, 163), (89, 99), (90, 227)])
@pytest.mark.parametrize("kind, half, group", [
    ("int4", "fp16", 128), ("int4", "bf16", 64), ("int8", "fp16", 0)])
@pytest.mark.parametrize("tokens", [1, 32, 2048])
def test_tiles_compile_and_are_read_ahead(monkeypatch, sm, kilobytes, kind, half, group, tokens):
    """Find shared memory for more than one tile, as the next is on its way, and no more
    than a program may have (CUDA programming guide, compute capabilities)."""
    # More of INT4 are dequantized; one of INT8 is a row.
    tokens = min(tokens, 128) if kind == "int4" else max(tokens, 2)
    launch, dtype = Launch(), dict(fp16=torch.float16, bf16=torch.bfloat16)[half]
    monkeypatch.setattr(quant_lab, "tile_kernel", launch)
    weight = torch.zeros(4096, 1024 if kind == "int4" else 4096,
                         dtype=torch.int16 if kind == "int4" else torch.int8)
    scale = torch.zeros(4096, 4096 // group if group else 1, dtype=dtype)
    x = torch.zeros(tokens, 4096, dtype=dtype if kind == "int4" else torch.int8)
    assert quant_lab.multiply_tiles(kind, x, weight, scale).shape == (tokens, 4096)
    count, rows, block = launch.arguments[-3:]
    parts, span = launch.programs[2], launch.arguments[7]
    assert launch.programs[:2] == (math.ceil(tokens / count), 4096 / rows)
    assert span % block == 0 and (parts - 1) * span < weight.shape[1] <= parts * span
    monkeypatch.undo()
    x, weight = (f"*{half}", "*i16") if kind == "int4" else ("*i8", "*i8")
    y = f"*{half}" if parts == 1 else "*fp32"
    made = compile_kernel(
        quant_lab.tile_kernel, sm, TILE | dict(x=x, weight=weight, scale=f"*{half}", y=y),
        launch.options, KIND=kind, TOKENS=count, ROWS=rows, BLOCK=block)
    size = rows * block * (2 if kind == "int4" else 1)
    assert 2 * size <= made.metadata.shared <= kilobytes * 1024


@pytest.mark.parametrize("name", ["row_kernel", "tile_kernel"])
def test_a_kernel_needs_no_name_of_the_script(name):
    """inductor copies its source into a module of its own, which imports Triton alone."""
    names = {"tl": triton.language}
    exec(getattr(quant_lab, name).src, names)  # Looks up annotations.
    used = {step.argval for step in dis.get_instructions(names[name])
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


@pytest.mark.parametrize("kind, alone, batch", [
    ("int4", {("multiply_tiles", 1), ("multiply_tiles", 40)}, {("multiply_tiles", 8)}),
    ("int8", {("multiply_row", 1), ("multiply_tiles", 40)},
     {("multiply_tiles", 8), ("multiply_tiles", 320)})])
@torch.no_grad()
def test_compiled_layers_call_the_kernels(monkeypatch, kind, alone, batch):
    """Trace one sequence and eight without a break, as for an H100; nothing is computed.

    Their prompts have 40 tokens each: of eight, INT4 is dequantized.
    """
    calls = []

    def note(name, kind, x, weight, *others):
        calls.append((name, len(x)))
        return x.new_zeros(len(x), len(weight), dtype=torch.float32)

    for name in "multiply_row", "multiply_tiles":
        monkeypatch.setattr(quant_lab, name, partial(note, name))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = load_by_path("bench_decode").random_model("tiny", kind, torch.device("cpu"))
    for linear in model.modules():
        if isinstance(linear, quant_lab.PackedLinear):
            linear.sm, linear.fits = (9, 0), True
    quant_lab.compile_layers(model, True)
    prompts = torch.arange(5, 325).view(8, 40)
    for count, wanted in (1, alone), (8, batch):
        decoder = quant_lab.Decoder(model, prompts[:count], 4, True)
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
    quant_lab.compile_layers(model, True)
    for batch in range(1, 12):
        quant_lab.Decoder(model, torch.full((batch, 20), 5), 2, True).run(1)
