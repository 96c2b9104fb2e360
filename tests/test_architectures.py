"""Run the lab on small models of many architectures; hold its figures to plain transformers."""

import contextlib
import math

import architectures
import pytest
import torch
from compressed_tensors.utils import match_named_modules
from conftest import LABELS, quick_words
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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


@pytest.fixture
def untimed(monkeypatch, quick_collection):
    """Leave out what other tests look at: timing, and what is rendered."""
    monkeypatch.setattr(quant_lab, "benchmark_speed", lambda *_: {"runs_as": "untimed"})
    monkeypatch.setattr(quant_lab, "write_outputs", lambda lab: None)


# Readers of one norm in parallel, norms before and after, 1 + weight, no norm that only
# Linears read, LayerNorm, two-dimensional inputs, convolutions, experts, soft caps.
MANY = ["phi", "gemma2", "gemma3_text", "olmo2", "nemotron", "opt", "lfm2", "olmoe"]
SMOOTHED = ["qwen2", "gemma2", "gemma3_text", "phi", "olmo2", "opt", "olmoe", "falcon_h1"]


def list_all(quick):
    """Return all architectures; those that are not to be quick are for slow runs."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow)
            for name in architectures.ARCHITECTURES]


@pytest.mark.parametrize("name", list_all(MANY))
def test_figures_are_those_of_plain_transformers(name, tmp_path, texts, untimed):
    """Measure baseline, FP8, W4A16 and W8A8; a row is right or says why it is not there."""
    rows = run_lab(name, tmp_path, texts)
    check_rows(rows, tmp_path, texts)
    fp8, w8a8 = rows[LABELS[1]], rows[LABELS[3]]
    if w8a8["status"] == "ok":
        assert w8a8["kld"]["mean"] < fp8["kld"]["mean"], "more than rounding did that"


@torch.no_grad()
def smooth_alone(folder, tmp_path, mappings=None):
    """Let SmoothQuant alone smooth a model in float32; return the row, the number of norms
    whose weights it changed, and the KLD to the model as it was."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.transform import SmoothQuantModifier

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, row = torch.arange(5, 69)[None], dict(notes=[])
    wanted = model(ids, use_cache=False).logits.double().log_softmax(-1)
    modifier = SmoothQuantModifier(smoothing_strength=0.8, mappings=mappings)
    before = {name: x.clone() for name, x in model.named_parameters() if x.dim() == 1}
    chats = Dataset.from_dict(dict(input_ids=ids.repeat(3, 1).tolist(),
                                   attention_mask=torch.ones_like(ids).repeat(3, 1).tolist()))
    log = tmp_path / "log.txt"
    with quant_lab.libraries_to(log), quant_lab.llmcompressor_session(model):
        quant_lab.fit_smoothing([modifier], model, row)
        if row["smoothing"]["pairs"]:
            oneshot(model=model, recipe=[modifier], dataset=chats,
                    processor=AutoTokenizer.from_pretrained(folder))
    after = {name: x for name, x in model.named_parameters() if x.dim() == 1}
    changed = [name for name, x in before.items()
               if name.endswith("weight") and (x - after[name]).norm() > 0.01 * x.norm()]
    found = model(ids, use_cache=False).logits.double().log_softmax(-1)
    return row, len(changed), (wanted.exp() * (wanted - found)).sum(-1).mean().item()


@pytest.mark.parametrize("name", list_all(SMOOTHED))
def test_smoothing_alone_changes_no_architecture(name, tmp_path, quick_collection):
    """What norms are divided by, their readers are multiplied by: the model says the same."""
    folder = architectures.make(name, tmp_path / "model")
    row, changed, kld = smooth_alone(folder, tmp_path)
    assert kld < 1e-6
    assert changed == row["smoothing"]["pairs"], "each norm that was found was smoothed"
    assert row["notes"] == ([] if changed else ["no norm could be smoothed"])


@pytest.mark.parametrize("part", ["k_proj", "up_proj"])
def test_a_reader_that_is_left_out_shows(part, tmp_path, quick_collection):
    """The test above would see a norm that something else reads, too."""
    folder = architectures.make("qwen2", tmp_path / "model")
    _, _, kld = smooth_alone(folder, tmp_path, [
        [[f"model.layers.{n}.{linear}" for linear in linears if part not in linear],
         f"model.layers.{n}.{norm}"]
        for n in range(2) for norm, linears in PAIRS.items()])
    assert kld > 1e-3


PAIRS = {"input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
         "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"]}
GEMMA = {"input_layernorm": PAIRS["input_layernorm"],
         "pre_feedforward_layernorm": PAIRS["post_attention_layernorm"]}


def find_norms(model, mappings):
    return {name for name, _ in match_named_modules(model, [norm for _, norm in mappings])}


# Smoothing changes none of these two, and they are not listed: other configurations of
# StableLM share one norm, of Gemma 4 share keys and values or add experts.
NOT_LISTED = {"stablelm", "gemma4_text"}


@pytest.mark.parametrize("name", list_all([*SMOOTHED, "llama", "gemma3", "nemotron", "stablelm"]))
def test_the_list_is_of_what_smoothing_does_not_change(name, tmp_path, quick_collection):
    """Name each layer's norms and their readers, one by one, as in Llama and as in Gemma 2.

    Where all are there and smoothed, and the model still says the same, its class is in the
    list and has just these norms smoothed; no other class is in the list.
    """
    from llmcompressor.modifiers.transform import SmoothQuantModifier

    folder, fitting = architectures.make(name, tmp_path / "model"), []
    for readers in PAIRS, GEMMA:
        mappings = [[[f"re:.*model.layers.{n}.{linear}$" for linear in linears],
                     f"re:.*model.layers.{n}.{norm}$"]
                    for n in range(2) for norm, linears in readers.items()]
        with contextlib.suppress(RuntimeError, AttributeError):  # No such norm or Linear.
            _, changed, kld = smooth_alone(folder, tmp_path, mappings)
            fitting += [mappings] if changed == 4 and kld < 1e-6 else []
    model = AutoModelForCausalLM.from_pretrained(folder)
    modifier, row = SmoothQuantModifier(), dict(notes=[])
    quant_lab.fit_smoothing([modifier], model, row)
    if name in NOT_LISTED:
        assert len(fitting) == 1
    if not fitting or name in NOT_LISTED:
        assert modifier.mappings == [] and row["smoothing"] == dict(pairs=0)
        assert row["notes"] == ["no norm could be smoothed"]
    else:
        assert find_norms(model, modifier.mappings) == find_norms(model, fitting[0])
        assert row == dict(notes=[], smoothing=dict(pairs=4)) and len(fitting) == 1


def test_each_class_of_the_list_is_among_those_tested():
    tested = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[entry.get("model_type", name)]
              for name, entry in architectures.ARCHITECTURES.items()}
    assert {f"{name}ForCausalLM" for name in quant_lab.SMOOTHED} <= tested


@pytest.mark.parametrize("name, pairs", [("qwen2", 4), ("gemma3_text", 4), ("phi", 0)])
def test_what_was_smoothed_stands_in_row_and_recipe(name, pairs, tmp_path, texts, untimed):
    row = run_lab(name, tmp_path, texts, "--variants", "w8a8", "--dtype", "float32")[LABELS[3]]
    assert row["status"] == "ok", row["error"]
    assert row["smoothing"] == dict(pairs=pairs)
    assert ("no norm could be smoothed" in row["notes"]) == (pairs == 0)
    recipe = (tmp_path / "out" / row["checkpoint"] / "recipe.yaml").read_text("utf-8")
    assert ("q_proj" in recipe) == ("up_proj" in recipe) == (pairs > 0)


@pytest.mark.parametrize("name", ["qwen2", "opt"])
def test_emulated_figures_are_those_of_packed_weights(name, tmp_path, texts, untimed):
    """OPT flattens its tokens: each has a scale of its own all the same."""
    packed, emulated = (run_lab(
        name, tmp_path / way, texts, "--variants", "fp8", "w8a8", "--execution", way)
        for way in ("packed", "emulated"))
    for label in LABELS[1], LABELS[3]:
        assert packed[label]["status"] == emulated[label]["status"] == "ok"
        assert emulated[label]["kld"]["mean"] == pytest.approx(
            packed[label]["kld"]["mean"], rel=1e-3), label


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
