"""Run the lab on small models of many architectures; hold its figures to plain transformers."""

import math

import architectures
import pytest
import torch
from conftest import LABELS, quick_words
from transformers import AutoModelForCausalLM, AutoTokenizer

import quant_lab

WINDOW = 64


def round_each_token(linear):
    """Let compressed-tensors see three dimensions: of two it makes one scale for all tokens."""
    forward = linear.forward
    linear.forward = lambda x: forward(x.flatten(0, -2)[None]).unflatten(1, x.shape[:-1])[0]


@torch.no_grad()
def score_plainly(folder, texts, dtype=torch.float16):
    """Return log probabilities [windows, 63, vocabulary] and the ids scored, by plain loops."""
    ids = AutoTokenizer.from_pretrained(folder)(
        (texts / "eval.txt").read_text(encoding="utf-8")).input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model(torch.tensor([ids[:2]]))  # Unpacks compressed weights.
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:  # Experts, which are unpacked to that.
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            round_each_token(module)
    found, wanted = [], []
    for begin in range(0, len(ids) - WINDOW + 1, WINDOW):
        window = torch.tensor([ids[begin : begin + WINDOW]])
        logits = model(window, use_cache=False).logits[0, :-1]
        found.append(logits.double().log_softmax(-1))
        wanted.append(window[0, 1:])
    return torch.stack(found), torch.stack(wanted)


def run_lab(name, folder, texts, *words):
    """Return the rows of the quick lab on a small model of an architecture."""
    model = architectures.make(name, folder / "model")
    lab = quant_lab.set_up([str(word) for word in (
        *quick_words(model, texts), "--output-dir", folder / "out", *words)])
    for label in lab.options.variants:
        quant_lab.run_variant(label, lab)
    return lab.rows


def check_rows(rows, folder, texts):
    """Hold the figures of each row that is ok to an independent computation."""
    wanted, ids = score_plainly(folder / "model", texts)
    assert rows[LABELS[0]]["status"] == "ok", rows[LABELS[0]]["error"]
    for label, row in rows.items():
        if row["status"] == "failed":
            assert row["error"] and row["perplexity"] is None
            continue
        found, _ = score_plainly(folder / "out" / "checkpoints" / label, texts)
        loss = -found.gather(-1, ids[..., None]).mean().item()
        kld = (wanted.exp() * (wanted - found)).sum(-1).mean().item()
        assert row["perplexity"] == pytest.approx(math.exp(loss), rel=2e-3), label
        assert row["kld"]["mean"] == pytest.approx(kld, rel=2e-3, abs=2e-3), label
        if row["smoothing"]:
            assert row["smoothing"]["kld"] < 1e-3


@pytest.fixture
def untimed(monkeypatch, quick_collection):
    """Leave out what other tests look at: timing, and what is rendered."""
    monkeypatch.setattr(quant_lab, "benchmark_speed", lambda *_: {"runs_as": "untimed"})
    monkeypatch.setattr(quant_lab, "write_outputs", lambda lab: None)


# Readers of one norm in parallel, norms before and after, 1 + weight, no norm that only
# Linears read, LayerNorm, two-dimensional inputs, convolutions, experts, soft caps.
MANY = ["phi", "gemma2", "gemma3_text", "olmo2", "nemotron", "opt", "lfm2", "olmoe"]
ALL = [pytest.param(name, marks=[] if name in MANY else pytest.mark.slow)
       for name in architectures.ARCHITECTURES]


@pytest.mark.parametrize("name", ALL)
def test_figures_are_those_of_plain_transformers(name, tmp_path, texts, untimed):
    """Measure baseline, FP8, W4A16 and W8A8; a row is right or says why it is not there."""
    rows = run_lab(name, tmp_path, texts)
    check_rows(rows, tmp_path, texts)
    fp8, w8a8 = rows[LABELS[1]], rows[LABELS[3]]
    if w8a8["status"] == "ok":
        assert w8a8["kld"]["mean"] < fp8["kld"]["mean"], "more than rounding did that"


@pytest.mark.parametrize("name, pairs", [
    ("qwen2", 4), ("phi", 2), ("gemma3_text", 4), ("opt", 4), ("olmo2", 0), ("nemotron", 0)])
def test_norms_that_only_linears_read_are_smoothed(name, pairs, tmp_path, texts, untimed):
    row = run_lab(name, tmp_path, texts, "--variants", "w8a8", "--dtype", "float32")[LABELS[3]]
    assert row["smoothing"]["pairs"] == pairs and row["smoothing"]["kld"] < 1e-6
    if name == "phi":  # Attention and MLP read the same norm.
        recipe = (tmp_path / "out" / row["checkpoint"] / "recipe.yaml").read_text()
        assert all(part in recipe for part in ("q_proj", "k_proj", "v_proj", "fc1"))


def test_smoothing_that_changes_the_model_fails_the_row(tmp_path, texts, untimed, monkeypatch):
    """Leave one reader of Phi's norm unbalanced, as llmcompressor's own mapping does."""
    find = quant_lab.find_pairs
    monkeypatch.setattr(quant_lab, "find_pairs", lambda *parts: [
        [[name for name in names if "fc1" not in name], norm] for names, norm in find(*parts)])
    row = run_lab("phi", tmp_path, texts, "--variants", "w8a8")[LABELS[3]]
    assert row["status"] == "failed" and "smoothing changed the model" in row["error"]
    assert row["perplexity"] is None and not (tmp_path / "out" / "checkpoints" / LABELS[3]).exists()


def test_a_model_that_sees_what_comes_later_has_no_figures(tmp_path, texts, untimed):
    """Score an encoder that transformers loads as a causal LM."""
    from transformers import RobertaConfig, RobertaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(architectures.TINY)
    tokenizer.save_pretrained(tmp_path / "model")
    torch.manual_seed(1)
    RobertaForCausalLM(RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=0.2)).save_pretrained(tmp_path / "model")
    lab = quant_lab.set_up([str(word) for word in (
        *quick_words(tmp_path / "model", texts), "--output-dir", tmp_path / "out",
        "--variants", "00")])
    quant_lab.run_variant(LABELS[0], lab)
    row = lab.rows[LABELS[0]]
    assert row["status"] == "failed" and "no causal LM" in row["error"]


def test_weights_that_are_not_read_again_fail_the_row(tmp_path, texts, untimed, monkeypatch):
    """Rotations before and after a Linear are saved, and lost when transformers loads."""
    variant = quant_lab.Variant("W4A16", lambda m, o: [
        m.QuIPModifier(rotations=["v", "u"], transform_type="hadamard"),
        m.QuantizationModifier(scheme="W4A16", **quant_lab.LINEAR)], True)
    monkeypatch.setitem(quant_lab.VARIANTS, "quip", variant)
    row = run_lab("qwen2", tmp_path, texts, "--variants", "quip")["quip"]
    assert row["status"] == "failed" and row["perplexity"] is None, row["kld"]


def test_a_format_of_the_cache_is_measured_or_fails_plainly(
        tmp_path, texts, untimed, monkeypatch):
    cache = dict(num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True)
    variant = quant_lab.Variant("FP8_DYNAMIC", lambda m, o: [m.QuantizationModifier(
        scheme="FP8_DYNAMIC", kv_cache_scheme=cache, **quant_lab.LINEAR)], True)
    monkeypatch.setitem(quant_lab.VARIANTS, "cache", variant)
    row = run_lab("qwen2", tmp_path, texts, "--variants", "cache")["cache"]
    assert row["status"] == "ok" or "TypeError" not in row["error"], row["error"]


@pytest.mark.parametrize("name", ["phimoe", "llama4_text", "falcon_h1", "qwen2"])
@torch.no_grad()
def test_packing_for_a_gpu_changes_no_architecture(name, tmp_path, monkeypatch):
    """Leave a router alone that is a Linear of another forward."""
    monkeypatch.setattr(quant_lab, "triton", None)  # Its products are PyTorch's.
    model = AutoModelForCausalLM.from_pretrained(architectures.make(name, tmp_path)).eval()
    ids = torch.arange(5, 25)[None]
    wanted = model(ids, use_cache=False).logits
    quant_lab.pack_model(model, (9, 0))
    found = model(ids, use_cache=False).logits
    assert (found - wanted).norm() < 1e-3 * wanted.norm()
    assert any(isinstance(m, quant_lab.PackedLinear) for m in model.modules())
