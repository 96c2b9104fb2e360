"""Compare packed execution with compressed-tensors' own, and what the timings rest on."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import release_memory
from architectures import make
from conftest import load_by_path, load_emulated, make_small, run_all, vary
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import quant_lab

FORMATS = ["01_fp8_dynamic", "rtn_w4a16", "03_smoothquant_w8a8"]
ALL = [quant_lab.BASELINE, *FORMATS]


@pytest.fixture(scope="module")
def labs(tmp_path_factory, texts, quick_collection):
    """Return labs of two small models, tied and not, with checkpoints in all formats."""
    made = {}
    for tied in (True, False):
        place = tmp_path_factory.mktemp("model")
        folder = make_small(place, hidden=128, tie_word_embeddings=tied,
                            num_hidden_layers=2)
        made[tied] = lab = quant_lab.set_up([
            "--model", str(folder), "--eval-text", str(texts / "eval.txt"), "--window",
            "64", "--calibration-data", str(texts / "chats.jsonl"),
            "--calibration-length", "64", "--device", "cpu", "--output-dir",
            str(place / "out"), "--new-tokens", "4", "--repeats", "1",
            "--batch-sizes", "1", "2", "--prompt-lengths", "9"])
        for label in ALL:
            with quant_lab.libraries_to(lab.output / "log.txt"):
                quant_lab.quantize_variant(label, lab)
    return made


@pytest.fixture(scope="module")
def models(labs):
    """Return the folders of the checkpoints by label and whether tied."""
    return {(label, tied): lab.output / "checkpoints" / label
            for tied, lab in labs.items() for label in ALL}


COMPILE = torch.compile


def trace(function, **options):
    """Trace as torch.compile does, and run what was traced instead of making C++."""
    return COMPILE(function, **options, backend="aot_eager")


@pytest.fixture
def quick_compiler(monkeypatch):
    """Let torch.compile trace only."""
    monkeypatch.setattr(torch, "compile", trace)


def load(folder, packed, sm=(0, 0), dtype="float16"):
    """Return a checkpoint's model, packed as for a GPU of a compute capability or emulated."""
    if not packed:
        return load_emulated(folder, dtype)
    model = load_plain(folder, dtype)
    quant_lab.pack_model(model, sm)
    return model


def load_plain(folder, dtype="float16"):
    """Return a checkpoint's model as transformers loads it: its first forward will unpack."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def packed_linears(model):
    """Return all PackedLinears of a model."""
    return [m for m in model.modules() if isinstance(m, quant_lab.PackedLinear)]


def held_bytes(model):
    """Return bytes of a model's tensors, each counted once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def weight_bytes(folder):
    """Return bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("label", FORMATS)
@torch.no_grad()
def test_logits_equal_the_emulated_ones_bit_for_bit(models, label, tied):
    """Include biases: Qwen2 has them at q, k and v; here they are not zero."""
    emulated, packed = (load(models[label, tied], on) for on in (False, True))
    for model in (emulated, packed):
        for name, tensor in model.named_parameters():
            if name.endswith(".bias"):
                tensor.copy_(torch.linspace(-1, 1, len(tensor)))
    assert not packed_linears(emulated) and len(packed_linears(packed)) == 14
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1), (1, 33), (3, 5)):
        ids = torch.randint(0, 2000, shape, generator=generator)
        wanted, logits = emulated(ids).logits, packed(ids).logits
        assert logits.dtype == torch.float16 and wanted.std() > 0.1
        assert torch.equal(logits, wanted)


@pytest.mark.parametrize("label", FORMATS)
@torch.no_grad()
def test_weights_stay_packed(models, label):
    folder = models[label, True]
    model = load(folder, True)
    loaded = held_bytes(model)
    model(torch.arange(40)[None])
    assert held_bytes(model) == loaded
    assert loaded == pytest.approx(weight_bytes(folder), rel=0.02)
    dense = load(folder, False)
    dense(torch.arange(40)[None])
    assert held_bytes(dense) > 1.2 * loaded, "plain transformers unpacks"


@pytest.mark.parametrize("label, sm, tokens, route", [
    ("01_fp8_dynamic", (9, 0), 512, "TENSOR_CORES"),
    ("01_fp8_dynamic", (8, 9), 2, "TENSOR_CORES"),
    ("01_fp8_dynamic", (8, 6), 2, "DEQUANTIZED"),
    ("01_fp8_dynamic", (8, 9), 1, "REGISTERS"),
    ("01_fp8_dynamic", (8, 6), 1, "DEQUANTIZED"),
    ("01_fp8_dynamic", (0, 0), 512, "DEQUANTIZED"),
    ("03_smoothquant_w8a8", (9, 0), 2048, "TENSOR_CORES"),
    ("03_smoothquant_w8a8", (7, 5), 8, "TENSOR_CORES"),
    ("03_smoothquant_w8a8", (7, 0), 8, "DEQUANTIZED"),
    ("03_smoothquant_w8a8", (7, 5), 1, "REGISTERS"),
    ("03_smoothquant_w8a8", (7, 0), 1, "REGISTERS"),
    ("rtn_w4a16", (9, 0), 512, "DEQUANTIZED"),
    ("rtn_w4a16", (9, 0), 129, "DEQUANTIZED"),
    ("rtn_w4a16", (8, 0), 128, "TENSOR_CORES"),
    ("rtn_w4a16", (9, 0), 8, "TENSOR_CORES"),
    ("rtn_w4a16", (9, 0), 1, "TENSOR_CORES"),
    ("rtn_w4a16", (7, 5), 8, "DEQUANTIZED"),
    ("rtn_w4a16", (7, 5), 1, "DEQUANTIZED"),
    ("rtn_w4a16", (0, 0), 1, "DEQUANTIZED")])
def test_routes(models, monkeypatch, label, sm, tokens, route):
    monkeypatch.setattr(quant_lab, "triton", object())
    model = load(models[label, True], True, sm)
    quantized = [linear for linear in packed_linears(model) if linear.kind != "dense"]
    assert len(quantized) == 14
    assert {linear.choose_route(tokens).name for linear in quantized} == {route}


@pytest.mark.parametrize("label", ALL)
def test_without_triton_a_gpu_multiplies_16_bits(models, monkeypatch, label):
    """An H100 has the tensor cores, and no Triton."""
    monkeypatch.setattr(quant_lab, "triton", None)
    for linear in packed_linears(load(models[label, True], True, (9, 0))):
        for tokens in (1, 8, 512):
            assert linear.choose_route(tokens).name == (
                "DENSE" if linear.kind == "dense" else "DEQUANTIZED")


def test_a_width_that_16_does_not_divide_is_dequantized(monkeypatch):
    monkeypatch.setattr(quant_lab, "triton", object())
    linear = load_by_path("bench_decode").random_linear(
        "int8", 32, 24, None, torch.device("cpu"), (9, 0))
    for tokens in (1, 8):
        assert linear.choose_route(tokens).name == "DEQUANTIZED"
    assert linear(torch.ones(2, 3, 24).half()).shape == (2, 3, 32)


@pytest.mark.parametrize("outputs, width, group, dtype, route", [
    (144, 256, 64, torch.float16, "TENSOR_CORES"),
    (144, 256, 256, torch.bfloat16, "TENSOR_CORES"),
    (144, 256, 32, torch.float16, "DEQUANTIZED"),
    (145, 256, 64, torch.float16, "DEQUANTIZED"),
    (144, 256, 64, torch.float32, "DEQUANTIZED")])
def test_tiles_of_int4_take_what_they_can(monkeypatch, outputs, width, group, dtype, route):
    """A tile is a group of 64 inputs or more, behind the bits of a 16-bit float."""
    monkeypatch.setattr(quant_lab, "triton", object())
    linear = load_by_path("bench_decode").random_linear(
        "int4", outputs, width, None, torch.device("cpu"), (9, 0), dtype, group)
    for tokens in (1, 128):
        assert linear.choose_route(tokens).name == route
    assert linear.choose_route(129).name == "DEQUANTIZED"


@torch.no_grad()
def test_integer_product_equals_the_simulated_one(models):
    """Multiply INT8 by _int_mm, also the few rows that have to be padded.

    Each Linear agrees, to 1e-3 in float16, and the logits of most tokens to far less: the
    last bit of one layer may tip a rounding of the next. In float16 that is common, hence
    float32.
    """
    folder, apart = models["03_smoothquant_w8a8", True], []
    emulated, packed = (load(folder, on, (7, 5), "float32") for on in (False, True))
    for shape in ((1, 2), (1, 16), (1, 17), (2, 40)):
        ids = 5 + torch.arange(shape[0] * shape[1]).view(shape)
        wanted, logits = emulated(ids).logits, packed(ids).logits
        apart.append(((logits - wanted).norm(dim=-1) / wanted.norm(dim=-1)).flatten())
    assert torch.cat(apart).median() < 1e-5 and torch.cat(apart).max() < 0.05
    for dtype, bound in ("float32", 1e-6), ("float16", 1e-3):
        emulated, packed = (load(folder, on, (7, 5), dtype) for on in (False, True))
        names = [name for name, module in emulated.named_modules()
                 if getattr(module, "quantization_scheme", None)]
        emulated(ids)
        assert len(names) == 14
        for name in names:
            linear = emulated.get_submodule(name)
            x = torch.randn(1, 20, linear.in_features).to(getattr(torch, dtype))
            wanted, found = linear(x).float(), packed.get_submodule(name)(x).float()
            assert (found - wanted).norm() / wanted.norm() < bound, (dtype, name)


def test_regrouped_words_hold_the_same_weights(models):
    """Compare with compressed-tensors' own unpacking, bit for bit."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import preset_name_to_scheme

    torch.manual_seed(0)
    words = torch.randint(-2**31, 2**31 - 1, (10, 48), dtype=torch.int32)
    scale = torch.rand(10, 3).half()
    weight = unpack_from_int32(words, 4, torch.Size((10, 384))).half()
    model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    vars(model[0]).update(
        quantization_scheme=preset_name_to_scheme("W4A16", ["Linear"]),
        weight_packed=words, weight_scale=scale)
    quant_lab.pack_model(model, (0, 0))
    packed = model[0]
    found = quant_lab.dequantize("int4", packed.weight, packed.scale)
    assert torch.equal(found, (weight.view(10, 3, 128) * scale[..., None]).flatten(1))


def test_e4m3_is_that_of_pytorch():
    codes = torch.arange(-128, 128, dtype=torch.int8)
    values = codes.view(torch.float8_e4m3fn).float()
    finite = values.isfinite()
    assert torch.equal(quant_lab.dequantize("fp8", codes, torch.ones(1))[finite], values[finite])
    x = torch.cat([values[finite], torch.randn(20_000) * 90, torch.tensor([448.0])])
    found, scale = quant_lab.round_activations("fp8", x.clamp(-448, 448))
    assert scale.item() == 1 and torch.equal(found, x.clamp(-448, 448).to(torch.float8_e4m3fn))


@torch.no_grad()
def test_fp8_below_sm_89_is_the_same(models):
    """Multiply without units for it: the same bits."""
    folder = models["01_fp8_dynamic", True]
    old, new = load(folder, True, (7, 5)), load(folder, True)
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        one, two = old.get_submodule(name), new.get_submodule(name)
        x = torch.randn(4, 7, one.weight.shape[1]).half()
        assert torch.equal(one(x), two(x))


SCHEMES = dict(W4A16="int4", W8A8="int8", FP8_DYNAMIC="fp8", W8A16=None, FP8=None,
               FP8_BLOCK=None, W4A16_ASYM=None, W4A8=None, NVFP4A16=None, MXFP4=None)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_what_the_kernels_implement_is_packed(scheme):
    from compressed_tensors.quantization import preset_name_to_scheme

    linear = torch.nn.Linear(128, 16)
    assert quant_lab.find_kind(linear) == "dense"
    linear.quantization_scheme = form = preset_name_to_scheme(scheme, ["Linear"])
    assert quant_lab.find_kind(linear) == SCHEMES[scheme]
    form.output_activations = form.weights
    assert quant_lab.find_kind(linear) is None
    form.output_activations = None
    linear.weight_g_idx = torch.arange(128)
    assert quant_lab.find_kind(linear) is None, "its inputs are in another order"


@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "FP8"])
@torch.no_grad()
def test_a_format_without_a_kernel_runs_emulated_and_says_so(
        labs, models, monkeypatch, scheme):
    """Add a recipe of zero points, or of one scale for all tokens: its figures are right."""
    lab = vary(labs[True], marks={scheme: "mine"})
    monkeypatch.setitem(quant_lab.VARIANTS, scheme, quant_lab.Variant(scheme, lambda m, o: [
        m.QuantizationModifier(scheme=scheme, **quant_lab.LINEAR)], True))
    with quant_lab.libraries_to(lab.output / "log.txt"):
        quant_lab.quantize_variant(scheme, lab)
    folder, ids = lab.output / "checkpoints" / scheme, draw_prompts(2)
    model = quant_lab.place_model(folder, quant_lab.Options(), torch.device("cpu"))
    assert not model.packs and not packed_linears(model)
    assert quant_lab.benchmark_speed(scheme, lab)["runs_as"] == (
        "emulated in 16 bits, not compiled")
    wanted, logits = load_plain(folder)(ids).logits, model(ids).logits
    assert torch.equal(logits, wanted)
    dense = load(models[quant_lab.BASELINE, True], False)(ids).logits
    assert 0 < (logits - dense).float().norm() < 0.8 * dense.float().norm()


@torch.no_grad()
def decode(model, prompts, steps=8):
    """Return what comes after prompts [n, tokens], each alone, and after all at once.

    Of one prompt there is no batch. Each is done twice, the second time after a rewind.
    """
    quant_lab.compile_layers(model, True)
    alone = [follow(model, prompt[None], steps, True)[0] for prompt in prompts]
    return (alone, follow(model, prompts, steps, True)) if len(prompts) > 1 else alone


def follow(model, prompts, steps, compiled):
    """Return the tokens that a Decoder writes after prompts [n, tokens], twice the same."""
    decoder, written = quant_lab.Decoder(model, prompts, steps + 1, compiled), []
    for _ in range(2):
        decoder.run(0)
        tokens = [decoder.token.clone()]
        for _ in range(steps):
            decoder.step()
            tokens.append(decoder.token.clone())
        written.append(torch.cat(tokens, dim=1).tolist())
    assert written[0] == written[1]
    return written[0]


def generate(model, prompts, steps=8):
    """Return what transformers' generate makes of each prompt."""
    return [model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt[None]), do_sample=False,
        max_new_tokens=steps + 1, min_new_tokens=steps + 1, eos_token_id=None,
        pad_token_id=0, repetition_penalty=1.0)[0, len(prompt) :].tolist() for prompt in prompts]


def draw_prompts(count, length=40):
    """Return different prompts [count, length] of random words."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, 500, (count, length), generator=generator)


@pytest.mark.parametrize("label", ALL)
def test_traced_layers_say_what_eager_ones_do(models, quick_compiler, label):
    """Decode two prompts, each alone and both; in float32, where no rounding tips a token."""
    folder, prompts = models[label, True], draw_prompts(2)
    model = load(folder, label in FORMATS, dtype="float32")
    eager = generate(model, prompts)
    alone, batch = decode(model, prompts)
    assert eager == alone == batch
    assert eager[0] != eager[1] and len(set(eager[0])) > 1


def test_compiled_layers_say_what_eager_ones_do(models):
    """Compile in earnest, one format and one sequence: it takes half a minute."""
    model = load(models["rtn_w4a16", True], True, dtype="float32")
    eager = generate(model, draw_prompts(1))
    assert eager == decode(model, draw_prompts(1)) and len(set(eager[0])) > 1


# What decoding takes: also experts, biases, positions of other kinds, windows and soft caps
# that do nothing.
WIDE = dict(sliding_window=512)
TAKEN = [("llama", {}), ("qwen3", {}), ("phi3", {}), ("opt", {}), ("mixtral", {}),
         ("qwen3_moe", {}), ("mistral_window", WIDE), ("gemma3_text", WIDE)]
CAPPED = "no kernel for sliding windows, soft caps, sinks"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family, changes", TAKEN)
@torch.no_grad()
def test_decoding_of_families_writes_what_generate_does(
        tmp_path, quick_compiler, family, changes, compiled):
    """Continue three prompts at once, whatever the model's own settings ask for."""
    model = load_emulated(make(family, tmp_path, **changes), "float32")
    prompts = draw_prompts(3, 80)
    wanted = generate(model, prompts)
    assert len(set(map(tuple, wanted))) == 3 and max(len(set(one)) for one in wanted) > 3
    model.generation_config.update(
        eos_token_id=list({ids[1] for ids in wanted}), pad_token_id=0, do_sample=True,
        temperature=5.0, repetition_penalty=9.0)
    quant_lab.compile_layers(model, compiled)
    assert follow(model, prompts, 8, compiled) == wanted
    assert follow(model, prompts[1:2], 8, compiled) == wanted[1:2]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family, changes, reason", [
    ("gemma3_text", {}, CAPPED), ("mistral_window", {}, CAPPED), ("gpt_oss", WIDE, CAPPED),
    ("gemma2", WIDE, CAPPED), ("lfm2", {}, "has_previous_state"),
    ("qwen3_next", {}, "has_previous_state"), ("falcon_h1", {}, "has_previous_state"),
    ("mamba", {}, "past_key_values"), ("gpt_neox", {}, "past_key_values"),
    ("bloom", {}, "layers")])
def test_what_decoding_does_not_take_is_refused_not_timed(
        tmp_path, quick_compiler, family, changes, reason, compiled):
    """A window that is not seen, or a state that is not kept, would be fast, and wrong."""
    model = load_emulated(make(family, tmp_path, **changes), "float32")
    options = quant_lab.Options(
        new_tokens=4, repeats=1, batch_sizes=(1,), prompt_lengths=())
    with pytest.raises(Exception, match=reason):
        quant_lab.measure_speed(model, draw_prompts(1, 80), options, compiled)


@pytest.mark.parametrize("tied, compiled", [(True, False), (False, False), (True, True)])
def test_length_is_forced_past_the_end_of_sequence(
        small, tmp_path, quick_compiler, tied, compiled):
    """Time a model that wants to end at once on exactly the tokens asked for."""
    folder = small if tied else make_small(tmp_path, 128, tie_word_embeddings=False)
    options = quant_lab.Options(
        new_tokens=7, repeats=3, batch_sizes=(1, 2), prompt_lengths=(5, 70))
    model = load_emulated(folder, "float32")
    calls = []

    def count(module, inputs, output):
        calls.append(tuple(output.logits.shape[:2]))
        output.logits[..., model.config.eos_token_id] += 1e4
        return output

    model.register_forward_hook(count)
    prompts = torch.arange(60).view(3, 20)  # Of more there may be: the first of them.
    speed = quant_lab.measure_speed(model, prompts, options, compiled)
    # The cache is counted; set-up makes one, and warms up with a prefill and two steps.
    assert calls == [(1, 1)] * (1 + 4 + 4 * 7) + [(2, 1)] * (4 + 4 * 7) + [(1, 1)] * 2 * (2 + 4)
    for key in ("ttft_s", "latency_s"):
        samples = speed[key]["samples"]
        assert len(samples) == 3 and min(samples) == speed[key]["min"] > 0
        assert sorted(samples)[1] == speed[key]["median"] <= speed[key]["max"]
    for latency, first, rate in zip(
            speed["latency_s"]["samples"], speed["ttft_s"]["samples"],
            speed["decode"][0]["tok_s"]["samples"]):
        assert latency == pytest.approx(first + 6 / rate)
    assert [entry["batch"] for entry in speed["decode"]] == [1, 2]
    for entry in speed["decode"]:
        for itl, rate in zip(entry["itl_ms"]["samples"], entry["tok_s"]["samples"]):
            assert rate == pytest.approx(1000 * entry["batch"] / itl)
    assert [(one["prompt_tokens"], one["error"]) for one in speed["prefill"]] == [
        (5, None), (70, None)]
    assert all(len(one["ttft_s"]["samples"]) == 3 for one in speed["prefill"])
    assert speed["kv_bytes_per_token"] == 2 * 4 * 64, "keys and values of one head, float32"
    assert model.get_memory_footprint() == held_bytes(model) and speed["prompt_tokens"] == 20
    assert "peak_memory_bytes" not in speed and "kv_tokens" not in speed, "of a GPU"


@pytest.mark.parametrize("family", ["llama", "phi3", "mistral_window", "gemma3_text", "lfm2",
                                    "qwen3_next", "falcon_h1"])
@torch.no_grad()
def test_bytes_of_the_cache_are_those_of_all_its_layers(tmp_path, family):
    """Let a window forget, and a state stay as large as it is, whatever the context."""
    from transformers import DynamicCache

    model, tokens = load_emulated(make(family, tmp_path), "float32"), 192
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.arange(tokens)[None] + 5, past_key_values=cache)
    window = getattr(model.config, "sliding_window", None) or 10**9
    wanted = 0
    for layer in cache.layers:
        for name, x in vars(layer).items():
            for leaf in tree_leaves(x):
                if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                    grows = name in ("keys", "values")
                    is_window = "Sliding" in type(layer).__name__
                    length = min(window, 8192) if is_window else 8192
                    wanted += leaf.nbytes * length / leaf.shape[-2] if grows else leaf.nbytes
    found = quant_lab.count_kv_bytes(model, torch.tensor([[5]]))
    assert found == pytest.approx(wanted / 8192, rel=1e-3, abs=1)


def test_a_batch_or_a_prompt_that_does_not_fit_is_a_cell(lab, monkeypatch):
    real = quant_lab.Decoder

    def refuse(*inputs):
        if len(inputs[1]) == 8 or inputs[1].shape[1] == 70:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*inputs)

    monkeypatch.setattr(quant_lab, "Decoder", refuse)
    results = run_all(lab("--variants", quant_lab.BASELINE, "--batch-sizes", 8, 2,
                          "--prompt-lengths", 70, 80))
    row, = results["variants"]
    assert row["status"] == "ok" and [e["batch"] for e in row["decode"]] == [1, 2, 8]
    assert row["decode"][2] == dict(batch=8, tok_s=None, itl_ms=None, error="OOM")
    assert row["prefill"][0] == dict(prompt_tokens=70, error="OOM", ttft_s=None)
    assert row["prefill"][1]["ttft_s"]["median"] > 0 and row["prefill"][1]["error"] is None
    assert quant_lab.read_figure(row, "ttft_s@70").word == "OOM"
    table = quant_lab.render_tables(results, [row]).split("\n\n")[3]
    assert [cell.strip() for cell in table.split("\n")[2].split("|")][3] == "OOM"


def test_where_decoding_fails_quality_stays(lab, monkeypatch):
    """Let no variant decode: tables, advice, picture and results do without speed."""
    error = "one sequence does not fit"

    def refuse(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(quant_lab, "Decoder", refuse)
    build = lab("--variants", quant_lab.BASELINE, FORMATS[0], "--batch-sizes", 2)
    results = run_all(build)
    for row in results["variants"]:
        assert row["status"] == "ok" and row["error"] is None
        assert row["runs_as"].startswith("speed was not measured: ")
        assert error in row["runs_as"]
        for key in ("perplexity", "kld", "divergence", "weight_bytes", "weights_memory_bytes"):
            assert row[key] is not None, key
        for column in quant_lab.SPEED:
            assert quant_lab.read_figure(row, column[1]).middle is None
            assert quant_lab.render_cell(row, column) == "–"
    tables = quant_lab.render_tables(results, results["variants"]).split("\n\n")
    assert [tables[place].count(" – ") for place in (1, 2, 3)] == [0, 6, 2]
    assert [one["variant"] for one in quant_lab.advise(results)][:2] == [None, None]
    assert "GPTQ" not in quant_lab.render_advice(results)
    assert quant_lab.draw_summary(results).axes and (build.output / "summary.png").stat().st_size
    assert error in " ".join(quant_lab.render_result(FORMATS[0], results).split())


@pytest.fixture
def on_gpu(labs, monkeypatch):
    """Return a function that times a variant as on a GPU, which is the CPU."""
    place = quant_lab.place_model
    monkeypatch.setattr(quant_lab, "place_model", lambda folder, options, device, **_: place(
        folder, options, torch.device("cpu")))
    lab = vary(labs[True], device=torch.device("cuda", 0))
    return lambda label, **changes: quant_lab.benchmark_speed(
        label, vary(lab, options=replace(lab.options, **changes)))


def test_where_compiling_fails_there_is_no_speed(on_gpu, monkeypatch):
    """Uncompiled, one would measure Python."""
    def fail(*_, **__):
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    made = note_models(monkeypatch)
    assert on_gpu("01_fp8_dynamic") == dict(
        runs_as="speed was not measured: RuntimeError: no such compiler")
    gc.collect()
    assert len(made) == 1 and made[0]() is None


def test_a_variant_that_can_be_compiled_is(on_gpu, quick_compiler):
    row = on_gpu("01_fp8_dynamic")
    assert row["runs_as"] == "dequantized, compiled"
    assert [entry["tok_s"]["median"] > 0 for entry in row["decode"]] == [True, True]


@pytest.mark.parametrize("label, changes, said", [
    ("01_fp8_dynamic", dict(no_compile=True), "dequantized, not compiled"),
    ("01_fp8_dynamic", dict(execution="emulated"), "emulated in 16 bits, not compiled"),
    (quant_lab.BASELINE, dict(no_compile=True), "16-bit, not compiled"),
    (quant_lab.BASELINE, dict(execution="emulated"), "16-bit, not compiled")])
def test_what_is_not_compiled_says_so(on_gpu, monkeypatch, label, changes, said):
    def fail(*_, **__):
        raise RuntimeError("compiled")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    row = on_gpu(label, **changes)
    assert row["runs_as"] == said and row["decode"][1]["tok_s"]["median"] > 0


@pytest.mark.parametrize("label, sm, said", [
    (quant_lab.BASELINE, (7, 5), "16-bit, in registers, compiled"),
    ("01_fp8_dynamic", (9, 0), "tensor cores, in registers, compiled"),
    ("01_fp8_dynamic", (7, 5), "dequantized, compiled"),
    ("rtn_w4a16", (9, 0), "dequantized, tensor cores, compiled"),
    ("rtn_w4a16", (7, 5), "dequantized, compiled"),
    ("03_smoothquant_w8a8", (7, 5), "tensor cores, in registers, compiled")])
def test_all_routes_are_named_but_those_of_the_head(on_gpu, monkeypatch, label, sm, said):
    """A prompt of 512 tokens, one token and two; nothing is computed."""
    pack = quant_lab.pack_model
    monkeypatch.setattr(quant_lab, "pack_model", lambda model, _: pack(model, sm))
    monkeypatch.setattr(quant_lab, "triton", object())
    monkeypatch.setattr(quant_lab, "measure_speed", lambda *_: {})
    assert on_gpu(label) == dict(runs_as=said)


def test_prompts_are_the_evaluation_text(labs, monkeypatch):
    """Take 512 of its tokens, scored ones, for each of the largest batch.

    A shorter text is repeated; there is room for the new tokens.
    """
    monkeypatch.setattr(quant_lab, "measure_speed", lambda model, prompts, *_: dict(
        prompts=prompts))
    lab = vary(labs[True], context=2048, unscored=2)
    for windows, context, wanted in ((7, 2048, 512), (3, 2048, 512), (7, 100, 96)):
        ids = torch.arange(windows * 102).view(windows, 102)
        found = quant_lab.benchmark_speed(
            quant_lab.BASELINE, vary(lab, windows=ids, context=context))["prompts"]
        text = [token for token in range(windows * 102) if token % 102 >= 2]
        assert found.tolist() == [
            [text[(wanted * number + place) % len(text)] for place in range(wanted)]
            for number in range(2)]


def test_emulated_is_the_ecosystems_path(lab, tmp_path):
    words = "--variants", "01_fp8_dynamic"
    _, packed = run_all(lab(*words))["variants"]
    _, row = run_all(lab(*words, "--execution", "emulated", "--output-dir",
                         tmp_path / "emulated"))["variants"]
    assert packed["runs_as"] == "dequantized, not compiled"
    assert row["runs_as"] == "emulated in 16 bits, not compiled"
    assert row["weights_memory_bytes"] > 1.2 * packed["weights_memory_bytes"]
    for key in ("perplexity", "kld", "divergence", "weight_bytes"):
        assert row[key] == packed[key], "packed execution changes no figure of quality"


KINDS = ["dense", "int8", "int8_old", "fp8", "fp8_old", "int4", "int4_old"]


def make_linear(kind, outputs, width, dtype, device="cuda", group=128):
    """Return a random PackedLinear; old: as for a GPU of SM 7.5, such as a T4."""
    torch.manual_seed(0)
    bias = torch.randn(outputs).to(dtype).to(device) if outputs % 2 == 0 else None
    sm = (7, 5) if kind.endswith("_old") else torch.cuda.get_device_capability()
    return load_by_path("bench_decode").random_linear(
        kind.removesuffix("_old"), outputs, width, bias, device, sm, dtype, group)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs, width", [
    (16, 128), (83, 4864), (9728, 896), (9731, 896), (144, 18944), (3584, 3584)])
@pytest.mark.parametrize("count", [1, 8, 40, 100, 512])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_multiply_right(kind, outputs, width, count, dtype, group=128):
    """Compare all formats and numbers of tokens with a product in float64."""
    linear = make_linear(kind, outputs, width, dtype, group=group)
    route = linear.choose_route(count).name
    if kind == "int4":
        in_tiles = count <= 128 and group >= 64 and outputs % 16 == 0
        assert route == ("TENSOR_CORES" if in_tiles else "DEQUANTIZED")
    elif kind in ("int4_old", "fp8_old"):
        assert route == "DEQUANTIZED"
    elif count == 1:
        assert route == "REGISTERS"
    else:
        assert route == ("DENSE" if kind == "dense" else
                         "DEQUANTIZED" if outputs % 16 else "TENSOR_CORES")
    x = torch.randn(1, count, width, device="cuda").to(dtype)
    inputs, weight = x.double(), linear.weight.double()
    if linear.kind in ("int8", "fp8"):
        values, scale = quant_lab.round_activations(linear.kind, x)
        inputs = values.double() * scale.double()
    if kind != "dense":
        weight = quant_lab.dequantize(linear.kind, linear.weight, linear.scale.double())
    wanted = inputs @ weight.t()
    if linear.bias is not None:  # As large as the product, which it would hide otherwise.
        linear.bias.data *= wanted.std().to(dtype)
        wanted = wanted + linear.bias.double()
    found = linear(x)
    assert found.dtype == dtype and found.shape == (1, count, outputs)
    error = ((found.double() - wanted).norm() / wanted.norm()).item()
    assert error < (1e-3 if dtype == torch.float16 else 8e-3)


def test_a_prompt_attends_to_as_many_keys_as_it_has(monkeypatch):
    """Keep the flash kernel usable: it takes causal attention of as many keys as queries."""
    sdpa, seen = torch.nn.functional.scaled_dot_product_attention, []

    def note(query, key, value, **named):
        seen.append((query.shape[2], key.shape[2], value.shape[2], named["is_causal"]))
        return sdpa(query, key, value, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    query, (keys, values) = torch.randn(1, 4, 5, 16), torch.randn(2, 1, 2, 9, 16)
    found, _ = quant_lab.attend(module, query, keys, values, None, 0.25)
    assert seen == [(5, 5, 5, True)]
    keys, values = (x[:, :, :5].repeat_interleave(2, 1) for x in (keys, values))
    wanted = sdpa(query, keys, values, is_causal=True, scale=0.25).transpose(1, 2)
    assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int8", "int8_old", "fp8"])
@pytest.mark.parametrize("count", [1, 8, 512])
@pytest.mark.parametrize("outputs", [144, 145])
def test_the_largest_sums_of_products_stay_finite(kind, count, outputs):
    """Multiply nothing but the largest values, whose sum alone no float16 holds.

    Of 144 outputs several tokens take tensor cores, of 145 they are dequantized.
    """
    linear = make_linear(kind, outputs, 28_672, torch.float16)
    assert count == 1 or linear.choose_route(count).name == (
        "DEQUANTIZED" if outputs % 16 else "TENSOR_CORES")
    linear.bias = None
    linear.weight.data.fill_(-128 if linear.kind == "int8" else 126)  # E4M3: 448.
    linear.scale.data.fill_(1e-5)
    largest = 128 if linear.kind == "int8" else 448
    found = linear(torch.full((count, 28_672), -1.0, device="cuda").half())
    wanted = 28_672 * largest * linear.scale[0].item() * (1 if linear.kind == "int8" else -1)
    assert (found.double() / wanted - 1).abs().max() < 6e-3  # 127.5 is rounded to 128.


@pytest.mark.gpu
@pytest.mark.parametrize("group, width", [(32, 192), (32, 288), (64, 576), (64, 4864)])
@pytest.mark.parametrize("count", [1, 3, 8, 17, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_smaller_groups_multiply_right(group, width, count, dtype):
    test_kernels_multiply_right("int4", 144, width, count, dtype, group)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("heads, shared, size, length", [
    (14, 2, 64, 576), (4, 4, 128, 80), (6, 3, 80, 48)])
def test_attention_of_one_row(batch, heads, shared, size, length):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.randn(batch, heads, 1, size, device=device).half()
    keys, values = torch.randn(2, batch, shared, length, size, device=device).half()
    mask = torch.zeros(1, 1, 1, length, device=device).half()
    mask[..., length // 3 :] = -torch.inf
    found, _ = quant_lab.attend(None, query, keys, values, mask, size**-0.5)
    keys, values = (x.double().repeat_interleave(heads // shared, 1) for x in (keys, values))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query.double(), keys, values, attn_mask=mask.double()).transpose(1, 2)
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("label", ALL)
@torch.no_grad()
def test_graphs_on_a_gpu_say_what_eager_decoding_does(models, label):
    """Compare the first token; later ones may part, once a rounding tips one.

    Where activations are rounded to 8 bits, do so in float32: compiled code keeps more bits
    than float16 between its steps, which tips roundings and, of FP8, one first token in six.
    """
    dtype = "float32" if label in ("01_fp8_dynamic", "03_smoothquant_w8a8") else "float16"
    model = load_plain(models[label, True], dtype).to("cuda")
    quant_lab.pack_model(model, torch.cuda.get_device_capability())
    held, prompts = held_bytes(model), torch.arange(5, 45, device="cuda")[None]
    wanted, = generate(model, prompts, 0)
    quant_lab.compile_layers(model, True)
    decoder = quant_lab.Decoder(model, prompts, 9, True)
    decoder.run(0)
    assert [decoder.token.item()] == wanted
    decoder.run(3)
    weights = model.get_memory_footprint()
    assert weights == held
    if dtype == "float16":
        assert weights == pytest.approx(weight_bytes(models[label, True]), rel=0.02)
    assert torch.cuda.max_memory_allocated() > weights
    assert decoder.step.__self__.__class__ is torch.cuda.CUDAGraph


def note_models(patch):
    """Return a list that gets a weak reference to each model that is placed."""
    place, made = quant_lab.place_model, []

    def note(*inputs, **named):
        model = place(*inputs, **named)
        made.append(weakref.ref(model))
        return model

    patch.setattr(quant_lab, "place_model", note)
    return made


def test_timing_leaves_no_model_in_memory(on_gpu, monkeypatch, quick_compiler):
    """Or it would take memory while the next variant is quantized."""
    made = note_models(monkeypatch)
    for label in ALL:
        assert on_gpu(label)["runs_as"].split(", ")[-1] == "compiled"
        release_memory()
        assert made[-1]() is None
    assert len(made) == len(ALL)


@pytest.mark.gpu
def test_timing_leaves_nothing_on_a_gpu(labs, monkeypatch):
    lab = vary(labs[True], device=torch.device("cuda", 0))
    made, held = note_models(monkeypatch), []
    for label in ALL + ALL:
        row = quant_lab.benchmark_speed(label, lab)
        assert row["runs_as"].split(", ")[-1] == "compiled", row["runs_as"]
        release_memory()
        assert made[-1]() is None
        held.append(torch.cuda.memory_allocated())
    assert held[-1] - held[len(ALL) - 1] < 2**16  # Of libraries, once each.


def test_an_error_that_stays_costs_neither_quality_nor_the_run(lab, monkeypatch):
    """Fail as CUDA does after an illegal access: every call from then on."""
    broken = []

    def fail(*_, **__):
        broken.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def wait():
        if broken:
            fail()
        return 0.0

    monkeypatch.setattr(quant_lab, "measure_speed", fail)
    monkeypatch.setattr(torch.cuda, "empty_cache", wait)
    monkeypatch.setattr(quant_lab, "now", wait)
    first, second = run_all(lab("--variants", FORMATS[0]))["variants"]
    assert first["status"] == "ok" and first["perplexity"] > 1 and not first["decode"]
    assert "illegal memory access" in first["runs_as"]
    assert second["status"] == "failed" and "illegal memory access" in second["error"]


@pytest.mark.gpu
@torch.no_grad()
def test_graphs_are_recorded_for_nothing_before_each_timing(
        models, monkeypatch, quick_compiler):
    """Of a process, the first three graphs replay faster than all do after a fourth."""
    real, recorded = quant_lab.record, []
    monkeypatch.setattr(quant_lab, "record", lambda work: recorded.append(
        getattr(work, "__func__", None)) or real(work))
    model = load_plain(models[quant_lab.BASELINE, True]).to("cuda")
    quant_lab.pack_model(model, torch.cuda.get_device_capability())
    quant_lab.compile_layers(model, True)
    for count in 18, 36:
        quant_lab.Decoder(model, torch.arange(5, 45, device="cuda")[None], 9, True)
        assert len(recorded) == count  # Of each decoder two: a step's and the prefill's.
        assert recorded[count - 2:].count(quant_lab.Decoder.step) == 1


def test_the_bench_of_random_models_runs(monkeypatch, capsys):
    bench = load_by_path("bench_decode")
    monkeypatch.setattr("sys.argv", [
        "bench_decode.py", "--shape", "tiny", "--device", "cpu", "--prompt", "16",
        "--new-tokens", "3", "--repeats", "1", "--batch-sizes", "1", "2"])
    bench.main()
    lines = capsys.readouterr().out.split("\n")[1:]
    assert [line.split()[0] for line in lines if line] == list(bench.KINDS)
    megabytes = [int(line.split()[1].replace(",", "")) for line in lines if line]
    assert megabytes[0] > megabytes[1] == megabytes[2] > megabytes[3] > 0
