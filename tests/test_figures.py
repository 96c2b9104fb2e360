"""Figures against computations written another way."""

import json
import math
import struct
from types import SimpleNamespace

import pytest
import torch
from conftest import SHARED, TINY, load_by_path, make_small

import quant_lab


class Constant(torch.nn.Module):
    """A language model whose logits do not depend on its input."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)
        self.device = logits.device

    def forward(self, ids, use_cache=None):
        return SimpleNamespace(logits=self.logits.expand(*ids.shape, -1))


def test_perplexity_of_uniform_logits_is_the_vocabulary():
    ids = torch.randint(0, 321, (1000,))
    found = quant_lab.measure_perplexity(Constant(torch.zeros(321)), ids, 64, 0)
    assert found["perplexity"] == pytest.approx(321, rel=1e-6)
    assert found["tokens_scored"] == 1000 // 64 * 63


def test_perplexity_of_a_known_distribution():
    probabilities = torch.tensor([0.5, 0.25, 0.25])
    ids = torch.tensor([2, 0, 0, 1, 2, 1, 0, 2, 1, 1])  # Windows 200, 121, 021; 1 is left.
    found = quant_lab.measure_perplexity(Constant(probabilities.log()), ids, 3, 0)
    bits = 1 + 1 + 2 + 2 + 2 + 2  # Of 0 0, 2 1, 2 1: the first of each is unscored.
    assert found == {"perplexity": pytest.approx(2 ** (bits / 6)), "tokens_scored": 6}


@pytest.mark.parametrize("max_windows", [0, 2])
def test_perplexity_equals_a_plain_loop_in_float64(tmp_path, max_windows):
    folder = make_small(tmp_path, hidden=128)
    options = quant_lab.Options(dtype="float32")
    model = quant_lab.load_model(folder, options)
    ids = torch.randint(0, 2000, (3 * 100 + 40,))
    found = quant_lab.measure_perplexity(model, ids, 100, max_windows)
    model = model.double()
    losses = []
    for begin in range(0, (max_windows or 3) * 100, 100):
        window = ids[begin : begin + 100].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0]
        for position in range(99):
            odds = logits[position].tolist()
            top = max(odds)
            total = top + math.log(math.fsum(math.exp(x - top) for x in odds))
            losses.append(total - odds[window[position + 1]])
    expected = math.exp(math.fsum(losses) / len(losses))
    assert found["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert found["tokens_scored"] == len(losses)


def test_logits_that_are_not_finite_are_named():
    with pytest.raises(FloatingPointError, match="float16.*--dtype"):
        quant_lab.measure_perplexity(Constant(torch.full((9,), math.nan)),
                                     torch.zeros(64, dtype=torch.long), 32, 0)


def greedy(model, ids, steps):
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1)[:, None]], 1)
    return ids


def test_completion_is_plain_greedy_whatever_the_model_prefers(small, tmp_path):
    """The model's folder asks for sampling with a repetition penalty; none may leak."""
    options = quant_lab.Options(new_tokens=12, repeats=2, window=32, dtype="float32")
    folder = quant_lab.open_model(quant_lab.Options(model=str(small)))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / quant_lab.BASELINE).symlink_to(small)
    lab = quant_lab.Lab(options, torch.device("cpu"), {}, {}, tmp_path, *folder[:2],
                        torch.arange(64), [])
    row = quant_lab.benchmark_variant(quant_lab.BASELINE, lab)
    model, tokenizer = quant_lab.load_model(small, options), folder[1]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["sample"]["prompt"]}],
        add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        made = greedy(model, ids, 12)[0, ids.shape[1]:].tolist()
    if tokenizer.eos_token_id in made:
        made = made[: made.index(tokenizer.eos_token_id)]
    assert row["sample"]["completion"] == tokenizer.decode(made, skip_special_tokens=True)


def test_length_is_forced_past_the_end_of_sequence(small):
    """A model that wants to end at once is timed on exactly the tokens asked for."""
    folder, tokenizer, _ = quant_lab.open_model(quant_lab.Options(model=str(small)))
    model = quant_lab.load_model(folder, quant_lab.Options(dtype="float32"))
    end, calls = tokenizer.eos_token_id, []

    def prefer_the_end(module, inputs, output):
        calls.append(output.logits.shape[1])
        output.logits[..., end] += 1e4
        return output

    model.register_forward_hook(prefer_the_end)
    prompt = tokenizer("What is a list?", return_tensors="pt")
    free = model.generate(**prompt, do_sample=False, max_new_tokens=7)
    assert free.shape[1] - prompt.input_ids.shape[1] == 1
    calls.clear()
    speed = quant_lab.measure_speed(model, prompt, 7, 3)
    assert len(calls) == 7 * (1 + 3), "a warm-up and three repeats of seven tokens"
    for key in ("latency_s", "decode_tok_s"):
        samples = speed[key]["samples"]
        assert len(samples) == 3 and min(samples) == speed[key]["min"] > 0
        assert sorted(samples)[1] == speed[key]["median"] <= speed[key]["max"]
    for latency, rate in zip(speed["latency_s"]["samples"],
                             speed["decode_tok_s"]["samples"]):
        assert 6 / rate < latency, "six tokens follow the first, in less than the whole"


def tensor_bytes(file):
    """Bytes of a safetensors file by its own header, and of its tensors by name."""
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0]
             for name, entry in header.items()}
    return 8 + length + sum(sizes.values()), sizes


def expected_bytes(config, label):
    """Bytes of a Qwen2 checkpoint's tensors from its shape alone."""
    h, inner, layers = (config["hidden_size"], config["intermediate_size"],
                        config["num_hidden_layers"])
    heads = config["num_attention_heads"]
    kv = h // heads * config["num_key_value_heads"]
    linears = [(h, h), (kv, h), (kv, h), (h, h), (inner, h), (inner, h), (h, inner)]
    rest = 2 * (config["vocab_size"] * h + h + layers * (2 * h + h + 2 * kv))
    one = {
        "00_fp16_baseline": lambda out, into: 2 * out * into,
        "01_fp8_dynamic": lambda out, into: out * into + 2 * out,
        "02_gptq_w4a16": lambda out, into: out * into // 2 + 2 * out * into // 128 + 16,
        "03_smoothquant_w8a8": lambda out, into: out * into + 2 * out,
    }[label]
    return rest + layers * sum(one(*shape) for shape in linears)


def test_made_shapes_have_qwens_parameters():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shapes = load_by_path("make_checkpoint").SHAPES
    for shape, wanted in (("0.5b", 494_032_768), ("7b", 7_615_616_512)):
        with torch.device("meta"):
            assert Qwen2ForCausalLM(Qwen2Config(**shapes[shape])).num_parameters() == wanted
    config = shapes["0.5b"]
    sizes = {label: expected_bytes(config, label) for label in quant_lab.VARIANTS}
    published = dict(zip(quant_lab.VARIANTS,
                         (988_097_536, 630_899_272, 456_988_608, 630_898_432)))
    assert sizes == pytest.approx(published, rel=1e-3)


def test_demo_never_shows_what_it_scores():
    chats, text = quant_lab.python_help()
    seen = {line.strip() for chat in chats for turn in chat
            for line in turn["content"].split("\n")}
    scored = {line.strip() for line in text.split("\n")}
    assert len(scored) > 300 and len(chats) > 100
    assert not [line for line in seen & scored if len(line) >= 40]


def test_tiny_model_fits_and_has_the_shape_it_should():
    config = json.loads((TINY / "config.json").read_text())
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 10e6
    assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == 0
    assert config["tie_word_embeddings"] is True and config["model_type"] == "qwen2"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not beside the project")
def test_real_tokenizer_and_wikitext():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "qwen2.5-0.5b-instruct")
    options = quant_lab.Options(
        eval_text=str(SHARED / "wikitext-2-raw" / "wiki.test.raw"),
        calibration_data=str(SHARED / "ultrachat" / "train_sft.jsonl"))
    assert len(quant_lab.load_evaluation(options, tokenizer, 32_768)) == 299_078
    samples = quant_lab.load_calibration(options, tokenizer, 32_768)
    assert len(samples) == 256 and max(map(len, samples)) <= 1024


@pytest.mark.gpu
def test_demo_on_the_gpu(run_script, tmp_path):
    run = run_script("--demo", "--device", "cuda", "--output-dir", tmp_path)
    assert run.code == 0, run.out + run.err
    assert run.names["RESULTS"]["machine"]["device"] == "cuda"
    assert [row["status"] for row in run.names["RESULTS"]["variants"]] == ["ok"] * 4
