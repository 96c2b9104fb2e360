"""Packed execution against compressed-tensors' own, and what the timings rest on."""

import gc
import os
import weakref
from functools import partial

import pytest
import torch
from conftest import load_by_path, make_small

import quant_lab

FORMATS = ["01_fp8_dynamic", "rtn_w4a16", "03_smoothquant_w8a8"]


@pytest.fixture(scope="module")
def models(tmp_path_factory, texts):
    """Folders of two small models, tied and not, in all formats."""
    made = {}
    for tied in (True, False):
        place = tmp_path_factory.mktemp("model")
        folder = make_small(place, hidden=128, tie_word_embeddings=tied,
                            num_hidden_layers=2)
        options = quant_lab.parse_options([
            "--model", str(folder), "--eval-text", str(texts / "eval.txt"), "--window",
            "64", "--calibration-data", str(texts / "chats.jsonl"),
            "--calibration-length", "64", "--device", "cpu", "--output-dir",
            str(place / "out")])
        device = torch.device("cpu")
        folder, tokenizer, context = quant_lab.open_model(options)
        output = quant_lab.prepare_output(options, quant_lab.describe_machine(device))
        lab = quant_lab.Lab(options, device, {}, {}, output, folder, tokenizer,
                            torch.arange(64),
                            quant_lab.load_calibration(options, tokenizer, context))
        for label in ("00_fp16_baseline", *FORMATS):
            with quant_lab.chatter_to(output / "log.txt"):
                quant_lab.quantize_variant(label, "key", lab)
            made[label, tied] = output / "checkpoints" / label
    return made


def load(folder, packed, sm=(0, 0), dtype="float16"):
    model = quant_lab.load_model(folder, quant_lab.Options(dtype=dtype))
    if packed:
        quant_lab.pack_model(model, sm)
    return model


def held_bytes(model):
    tensors = (*model.parameters(), *model.buffers())
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("label", FORMATS)
@torch.no_grad()
def test_logits_equal_the_emulated_ones_bit_for_bit(models, label, tied):
    """Biases included: Qwen2 has them at q, k and v; here they are not zero."""
    emulated, packed = (load(models[label, tied], on) for on in (False, True))
    for model in (emulated, packed):
        for name, tensor in model.named_parameters():
            if name.endswith(".bias"):
                tensor.copy_(torch.linspace(-1, 1, len(tensor)))
    assert not any(isinstance(m, quant_lab.PackedLinear) for m in emulated.modules())
    assert sum(isinstance(m, quant_lab.PackedLinear) for m in packed.modules()) == 14
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
    assert loaded == pytest.approx(quant_lab.weight_bytes(folder), rel=0.02)
    dense = load(folder, False)
    dense(torch.arange(40)[None])
    assert held_bytes(dense) > 1.2 * loaded, "plain transformers unpacks"


@pytest.mark.parametrize("label, sm, rows, said", [
    ("01_fp8_dynamic", (9, 0), 512, "fp8 tensor cores"),
    ("01_fp8_dynamic", (7, 5), 512, "dequantized to fp16 (tensor cores need SM 8.9)"),
    ("01_fp8_dynamic", (7, 5), 1, "fp8→fp32 in registers"),
    ("01_fp8_dynamic", (0, 0), 512, "dequantized to fp16 (a CPU)"),
    ("03_smoothquant_w8a8", (7, 5), 8, "int8 tensor cores"),
    ("03_smoothquant_w8a8", (7, 0), 8, "dequantized to fp16 (tensor cores need SM 7.5)"),
    ("03_smoothquant_w8a8", (7, 5), 1, "int8→int32 in registers"),
    ("rtn_w4a16", (9, 0), 8, "dequantized to fp16 (PyTorch multiplies no int4)"),
    ("rtn_w4a16", (9, 0), 1, "int4→fp32 in registers"),
    ("rtn_w4a16", (0, 0), 1, "dequantized to fp16 (a CPU)")])
def test_routes(models, monkeypatch, label, sm, rows, said):
    monkeypatch.setattr(quant_lab, "triton", object())
    model = load(models[label, True], True, sm)
    assert {module.route(rows) for module in model.modules()
            if isinstance(module, quant_lab.PackedLinear) and module.kind != "plain"} == {
        said}
    batches = (1, rows) if rows > 1 else (1,)
    options = quant_lab.Options(batch_sizes=batches)
    assert said in quant_lab.name_routes(label, model, max(rows, 2), options)


def test_without_triton_a_gpu_dequantizes_one_row(models, monkeypatch):
    monkeypatch.setattr(quant_lab, "triton", None)
    model = load(models["01_fp8_dynamic", True], True, (9, 0))
    assert {module.route(1) for module in model.modules()
            if isinstance(module, quant_lab.PackedLinear)} == {
        "fp16", "dequantized to fp16 (no Triton)"}


def test_the_baseline_says_that_it_runs_through_the_kernel_too(models, monkeypatch):
    monkeypatch.setattr(quant_lab, "triton", object())
    model = load(models["00_fp16_baseline", True], True, (7, 5))
    assert quant_lab.name_routes("00_fp16_baseline", model, 9, quant_lab.Options()) == (
        "prefill, batch 8, batch 32 fp16 · decode fp16→fp32 in registers")
    assert quant_lab.name_routes(
        "00_fp16_baseline", load(models["00_fp16_baseline", True], True), 9,
        quant_lab.Options()) == "fp16"


@torch.no_grad()
def test_integer_product_equals_the_simulated_one(models):
    """INT8 through _int_mm, also for the few rows that have to be padded.

    Each Linear to 1e-3, and the logits of most tokens to far less: the last bit of one
    layer may tip a rounding of the next. In float16 that is common, hence float32.
    """
    folder = models["03_smoothquant_w8a8", True]
    emulated, packed = (load(folder, on, (7, 5), "float32") for on in (False, True))
    for shape in ((1, 2), (1, 16), (1, 17), (2, 40)):
        ids = 5 + torch.arange(shape[0] * shape[1]).view(shape)
        wanted, logits = emulated(ids).logits, packed(ids).logits
        errors = (logits - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert errors.median() < 1e-5 and errors.max() < 0.05
    emulated, packed = (load(folder, on, (7, 5)) for on in (False, True))
    names = [name for name, module in emulated.named_modules()
             if getattr(module, "quantization_scheme", None)]
    emulated(ids)
    assert len(names) == 14
    for name in names:
        linear = emulated.get_submodule(name)
        x = torch.randn(1, 20, linear.in_features).half()
        wanted, found = linear(x).float(), packed.get_submodule(name)(x).float()
        assert (found - wanted).norm() / wanted.norm() < 1e-3


@pytest.mark.parametrize("label", ["00_fp16_baseline", *FORMATS])
@torch.no_grad()
def test_what_reads_the_same_is_one_product(models, label):
    """q, k and v, and gate and up: of one input, once; of others, what they ask for."""
    apart, joined = load(models[label, True], True), load(models[label, True], True, (7, 0))
    layer = joined.model.layers[0]
    assert layer.self_attn.q_proj.shared is layer.self_attn.v_proj.shared
    assert layer.mlp.gate_proj.shared is layer.mlp.up_proj.shared
    assert isinstance(layer.mlp.down_proj, quant_lab.PackedLinear)
    assert quant_lab.held_bytes(joined) == pytest.approx(quant_lab.held_bytes(apart), abs=99)
    calls, x = [], torch.randn(1, 9, 128).half()
    attention, alone = layer.self_attn, apart.model.layers[0].self_attn
    attention.q_proj.shared.register_forward_hook(lambda *inputs: calls.append(1))
    for other in (x, x, -x):  # The last asks out of turn.
        for name in ("q_proj", "k_proj", "v_proj"):
            y = x if name != "k_proj" else other
            wanted, found = (getattr(a, name)(y).float() for a in (alone, attention))
            assert (found - wanted).norm() / wanted.norm() < 2e-3
    assert len(calls) == 1 + 1 + 3
    ids = torch.arange(5, 35)[None]
    wanted, logits = apart(ids).logits.float(), joined(ids).logits.float()
    assert ((logits - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median() < 0.02


def test_regrouped_words_hold_the_same_weights(models):
    """Against compressed-tensors' own unpacking, bit for bit."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    torch.manual_seed(0)
    words = torch.randint(-2**31, 2**31 - 1, (10, 48), dtype=torch.int32)
    scale = torch.rand(10, 3).half()
    plain = unpack_from_int32(words, 4, torch.Size((10, 384))).half()
    found = quant_lab.dequantize("int4", quant_lab.regroup(words, 3), scale)
    assert torch.equal(found, (plain.view(10, 3, 128) * scale[..., None]).flatten(1))


def test_e4m3_without_fp8_instructions():
    codes = torch.arange(-128, 128, dtype=torch.int8)
    values = codes.view(torch.float8_e4m3fn).float()
    finite = values.isfinite()
    assert torch.equal(quant_lab.read_e4m3(codes)[finite].float(), values[finite])
    exact = values[finite].sort().values
    middles = (exact[1:] + exact[:-1]) / 2
    torch.manual_seed(0)
    x = torch.cat([exact, middles, middles * (1 + 1e-3), torch.randn(20_000) * 90,
                   torch.randn(20_000) * 1e-2]).clamp(-448, 448)
    for x in (x, x.half(), x.bfloat16()):
        assert torch.equal(quant_lab.round_e4m3(x), x.to(torch.float8_e4m3fn).to(x.dtype))


@torch.no_grad()
def test_fp8_below_sm_89_is_the_same(models):
    """The Linears that are not joined give the same bits without FP8 instructions."""
    folder = models["01_fp8_dynamic", True]
    old, new = load(folder, True, (7, 5)), load(folder, True)
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        one, two = old.get_submodule(name), new.get_submodule(name)
        assert (one.native, two.native) == (False, True)
        x = torch.randn(4, 7, one.weight.shape[1]).half()
        assert torch.equal(one(x), two(x))


def test_formats_of_other_makers_are_refused(models):
    model = quant_lab.load_model(models["rtn_w4a16", True], quant_lab.Options())
    for module in model.modules():
        if scheme := getattr(module, "quantization_scheme", None):
            scheme.weights.symmetric = False
    with pytest.raises(ValueError, match="--execution emulated"):
        quant_lab.pack_model(model, (0, 0))


@pytest.mark.parametrize("label", ["00_fp16_baseline", *FORMATS])
@torch.no_grad()
def test_compiled_layers_say_what_eager_ones_do(models, label):
    """One prefill, one row, one batch; in float32, where no rounding tips a token."""
    model = load(models[label, True], label in FORMATS, dtype="float32")
    prompt, found = torch.arange(5, 45)[None], []
    for compiled in (False, True):
        alone = quant_lab.Decoder(model, prompt, 9, compiled)
        both = quant_lab.Decoder(model, prompt, 9, compiled, alone, 2)
        alone.rewind()
        alone.prefill()
        both.token.copy_(alone.token.expand(2, 1))
        for decoder in (alone, both):
            said = [decoder.token[:, 0].tolist()]
            for _ in range(8):
                decoder.step()
                said.append(decoder.token[:, 0].tolist())
            found.append(said)
    assert found[0] == found[2] and found[1] == found[3]
    assert [token[0] for token in found[1]] == [token[0] for token in found[0]]


def architectures():
    """Small random models of several families, by name."""
    import transformers as hf

    common = dict(vocab_size=512, hidden_size=128, intermediate_size=256,
                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                  initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return dict(
        llama=lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**common)),
        qwen2=lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**common)),
        qwen3=lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**common, head_dim=48)),
        phi3=lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**common)),
        mixtral=lambda: hf.MixtralForCausalLM(hf.MixtralConfig(
            **common, num_local_experts=4)),
        mistral=lambda: hf.MistralForCausalLM(hf.MistralConfig(
            **common, sliding_window=16)))


def make_random(family):
    torch.manual_seed(0)
    return architectures()[family]().eval()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "mixtral"])
@torch.no_grad()
def test_decoding_is_that_of_generate(family):
    """Token by token in float32, one sequence and a batch; also after a rewind."""
    model, steps = make_random(family), 12
    prompt = torch.randint(3, 512, (1, 40), generator=torch.Generator().manual_seed(1))
    wanted = model.generate(
        prompt, do_sample=False, max_new_tokens=steps + 1, min_new_tokens=steps + 1,
        eos_token_id=None, pad_token_id=0)[0, 40:].tolist()
    assert len(set(wanted)) > 3
    alone = quant_lab.Decoder(model, prompt, steps + 1, False)
    batch = quant_lab.Decoder(model, prompt, steps + 1, False, alone, 3)
    for _ in range(2):
        alone.rewind()
        alone.prefill()
        batch.rewind()
        batch.token.copy_(alone.token.expand(3, 1))
        said = [alone.token.item()]
        for _ in range(steps):
            alone.step()
            batch.step()
            said.append(alone.token.item())
            assert batch.token.tolist() == 3 * [[said[-1]]]
        assert said == wanted


def test_a_sliding_window_is_refused_not_ignored():
    prompt = torch.arange(3, 43)[None]
    with pytest.raises(ValueError, match="sliding windows"):
        quant_lab.measure_speed(
            make_random("mistral"), prompt, quant_lab.Options(new_tokens=4), False, 1e9)


@pytest.fixture
def lab(small, texts, tmp_path):
    """A lab of the small model, on the CPU, that times three batch sizes."""
    options = quant_lab.parse_options([
        "--model", str(small), "--eval-text", str(texts / "eval.txt"), "--window", "64",
        "--device", "cpu", "--output-dir", str(tmp_path), "--new-tokens", "4",
        "--repeats", "1", "--batch-sizes", "8", "2"])
    device = torch.device("cpu")
    machine = quant_lab.describe_machine(device)
    output = quant_lab.prepare_output(options, machine)
    folder, tokenizer, context = quant_lab.open_model(options)
    return quant_lab.Lab(options, device, machine, quant_lab.list_versions(), output,
                         folder, tokenizer,
                         quant_lab.load_evaluation(options, tokenizer, context), [], context)


def run(lab, *labels):
    options = quant_lab.replace(lab.options, variants=labels)
    return quant_lab.run_lab(quant_lab.replace(lab, options=options), [])


def test_a_batch_that_does_not_fit_is_a_cell(lab, monkeypatch):
    real = quant_lab.Decoder

    def refuse(*inputs):
        if inputs[5:] == (8,):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*inputs)

    monkeypatch.setattr(quant_lab, "Decoder", refuse)
    results = run(lab, "00_fp16_baseline")
    row, = results["variants"]
    assert row["status"] == "ok" and [e["batch"] for e in row["decode"]] == [1, 2, 8]
    assert row["decode"][2] == dict(batch=8, tok_s=None, itl_ms=None, step_bytes=None,
                                    bandwidth_fraction=None, error="OOM")
    line = quant_lab.render_table([row], quant_lab.list_tables(results["config"])[2])
    assert line.split("\n")[2].split("|")[4].strip() == "OOM"


def test_no_room_for_one_sequence_fails_the_row(lab, monkeypatch):
    def refuse(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(quant_lab, "Decoder", refuse)
    row, = run(lab, "00_fp16_baseline")["variants"]
    assert row["status"] == "failed" and "out of memory" in row["error"]


def test_compiling_that_fails_is_measured_eagerly_and_said(lab, monkeypatch):
    real = quant_lab.compile_layers

    failed = []

    def fail(model, compiled):
        if compiled:
            failed.append(weakref.ref(model))
            raise RuntimeError("no such compiler")
        gc.collect()
        assert failed[0]() is None, "never two models at once"
        real(model, compiled)

    monkeypatch.setattr(quant_lab, "wants_compiling", lambda lab: True)
    monkeypatch.setattr(quant_lab, "run_apart", lambda measure: measure())
    monkeypatch.setattr(quant_lab, "compile_layers", fail)
    row, = run(lab, "01_fp8_dynamic")["variants"]
    assert row["status"] == "ok" and row["compile_seconds"] is None
    assert "not compiled, it failed: RuntimeError: no such compiler" in row["runs_as"]
    assert "registers" not in row["runs_as"] and row["decode"][0]["tok_s"]["median"] > 0


def test_a_compiled_variant_is_measured_in_a_process_of_its_own(lab, monkeypatch):
    monkeypatch.setattr(quant_lab, "wants_compiling", lambda lab: True)
    row, = run(quant_lab.replace(lab, options=quant_lab.replace(
        lab.options, batch_sizes=(1,))), "01_fp8_dynamic")["variants"]
    assert row["status"] == "ok" and row["runs_as"].endswith(") · compiled")
    assert row["compile_seconds"] > 0 and row["decode"][0]["tok_s"]["median"] > 0
    assert "compile_layers" not in (lab.output / "log.txt").read_text(), "no traceback"


def where() -> dict:
    return dict(process=os.getpid())


def test_apart_is_another_process_and_its_death_is_told():
    assert quant_lab.run_apart(where)["process"] != os.getpid()
    assert "died" in quant_lab.run_apart(partial(os._exit, 9))["failed"]


def test_emulated_is_the_ecosystems_path(lab):
    options = quant_lab.replace(lab.options, execution="emulated", batch_sizes=(1,))
    row, = run(quant_lab.replace(lab, options=options), "01_fp8_dynamic")["variants"]
    packed, = run(lab, "01_fp8_dynamic")["variants"]
    assert row["runs_as"] == "dequantized to fp16 · not compiled"
    assert row["weights_memory_bytes"] > 1.2 * packed["weights_memory_bytes"]
    for key in ("perplexity", "kld", "divergence", "weight_bytes"):
        assert row[key] == packed[key], "packed execution changes no figure of quality"


KINDS = ["plain", "int8", "fp8", "codes", "int4"]


def make_linear(kind, rows, width, dtype, device="cuda"):
    """A random PackedLinear of a format; codes: FP8 for a GPU without FP8 units."""
    torch.manual_seed(0)
    bias = torch.randn(rows).to(dtype).to(device) if rows % 2 == 0 else None
    sm = (8, 0) if kind == "codes" else torch.cuda.get_device_capability()
    return load_by_path("bench_decode").random_linear(
        kind.replace("codes", "fp8"), rows, width, bias, device, sm, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, width", [
    (16, 128), (83, 4864), (9728, 896), (9731, 896), (144, 18944)])
@pytest.mark.parametrize("count", [1, 8, 40, 512])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_multiply_right(kind, rows, width, count, dtype):
    """Of all formats and numbers of rows, with and without bias, against float64."""
    linear = make_linear(kind, rows, width, dtype)
    x = torch.randn(1, count, width, device="cuda").to(dtype)
    inputs, weight = x.double(), linear.weight.double()
    if linear.kind in ("int8", "fp8"):
        values, scale = quant_lab.quantize(linear.kind, x, linear.native)
        inputs = values.double() * scale.double()
    if kind != "plain":
        weight = quant_lab.dequantize(linear.kind, linear.weight, linear.scale.double())
    wanted = inputs @ weight.t() + (0 if linear.bias is None else linear.bias.double())
    found = linear(x)
    assert found.dtype == dtype and found.shape == (1, count, rows)
    error = ((found.double() - wanted).norm() / wanted.norm()).item()
    assert error < (1e-3 if dtype == torch.float16 else 8e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("width", [4864, 5008, 18944])
def test_a_wide_row_is_rounded_in_one_kernel(kind, width):
    x = 3 * torch.randn(1, width, device="cuda").half()
    for x in (x, 0 * x):
        wanted, scale = quant_lab.quantize(kind, x, True)
        found, unit = quant_lab.round_row(kind, x)
        assert torch.equal(unit[x.any()], scale[x.any()]) and found.dtype == wanted.dtype
        apart = (found.float() != wanted.float()).float().mean().item()
        assert apart < 1e-3, "the quotient's last bit may tip a rounding"


@pytest.mark.gpu
@pytest.mark.parametrize("heads, shared, size, length", [(14, 2, 64, 576), (4, 4, 128, 80)])
def test_attention_of_one_row(heads, shared, size, length):
    query = torch.randn(1, heads, 1, size, device="cuda").half()
    keys, values = torch.randn(2, 1, shared, length, size, device="cuda").half()
    mask = torch.zeros(1, 1, 1, length, device="cuda").half()
    mask[..., length // 3 :] = -torch.inf
    found, _ = quant_lab.attend(None, query, keys, values, mask, size**-0.5)
    keys, values = (x.double().repeat_interleave(heads // shared, 1) for x in (keys, values))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query.double(), keys, values, attn_mask=mask.double()).transpose(1, 2)
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("label", ["00_fp16_baseline", *FORMATS])
@torch.no_grad()
def test_graphs_on_a_gpu_say_what_eager_decoding_does(models, label):
    """The first token alike; later ones may part, once a rounding tips one."""
    found = []
    for compiled in (False, True):
        model = quant_lab.load_model(models[label, True], quant_lab.Options()).to("cuda")
        quant_lab.pack_model(model, torch.cuda.get_device_capability())
        decoder = quant_lab.Decoder(
            model, torch.arange(5, 45, device="cuda")[None], 9, compiled)
        decoder.run(0)
        found.append(decoder.token.item())
        decoder.run(3)
        assert quant_lab.held_bytes(model) == pytest.approx(
            quant_lab.weight_bytes(models[label, True]), rel=0.02)
    assert found[0] == found[1]


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
