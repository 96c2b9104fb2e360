"""Figures against computations written another way."""

import json
import math
import shutil
import struct
from dataclasses import replace
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


def score(model, ids, window, max_windows=0, visit=lambda number, logits: None):
    options = quant_lab.Options(window=window, max_windows=max_windows)
    return quant_lab.score_text(model, ids, options, visit)


def test_perplexity_of_uniform_logits_is_the_vocabulary():
    losses = score(Constant(torch.zeros(321)), torch.randint(0, 321, (1000,)), 64)
    assert losses.shape == (1000 // 64, 63)
    assert losses.mean().exp().item() == pytest.approx(321, rel=1e-6)


def test_losses_of_a_known_distribution():
    probabilities = torch.tensor([0.5, 0.25, 0.25])
    ids = torch.tensor([2, 0, 0, 1, 2, 1, 0, 2, 1, 1])  # Windows 200, 121, 021; 1 is left.
    losses = score(Constant(probabilities.log()), ids, 3)
    bits = torch.tensor([[1, 1], [2, 2], [2, 2]])  # The first of each is unscored.
    assert torch.allclose(losses, bits.double() * math.log(2))


def test_all_tokens_cross_the_slices_once():
    """Each token's loss is its own logit's, whatever slice of the window it is in."""
    ids = torch.arange(700).remainder(9)
    losses = score(Constant(torch.linspace(0, 4, 9)), ids, 300)
    wanted = torch.linspace(0, 4, 9).logsumexp(0) - torch.linspace(0, 4, 9)
    assert torch.allclose(losses, wanted.double()[ids[:600].view(2, 300)[:, 1:]])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_named(wrong):
    logits = torch.zeros(9)
    logits[5] = wrong  # Never the target.
    with pytest.raises(FloatingPointError, match="float16.*--dtype"):
        score(Constant(logits), torch.zeros(64, dtype=torch.long), 32)


def place_lab(tmp_path, model, variant, ids, **changes):
    """A lab whose baseline is a model folder and whose one checkpoint is another."""
    options = quant_lab.Options(**{"model": str(model), "dtype": "float32", **changes})
    folder, tokenizer, _ = quant_lab.open_model(options)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / quant_lab.BASELINE).symlink_to(variant)
    return quant_lab.Lab(options, torch.device("cpu"), {}, {}, tmp_path, folder, tokenizer,
                         ids, [])


def measure(lab):
    model = quant_lab.place_model(lab.output / "checkpoints" / quant_lab.BASELINE, lab)
    return quant_lab.measure_quality(model, lab, quant_lab.measure_reference(lab))


def log_odds(model, ids):
    """Log-probabilities [tokens, vocabulary] after each token, plain Python in float64."""
    with torch.no_grad():
        logits = model.double()(torch.tensor([ids])).logits[0].tolist()
    rows = []
    for odds in logits:
        top = max(odds)
        total = top + math.log(math.fsum(math.exp(x - top) for x in odds))
        rows.append([x - total for x in odds])
    return rows


def rank(values, share):
    """A quantile by linear interpolation between sorted values."""
    values, place = sorted(values), share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


@pytest.fixture(scope="module")
def pair(small, tmp_path_factory):
    """The small model and one whose weights differ a little."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("pair") / "noisy"
    shutil.copytree(small, folder)
    torch.manual_seed(3)
    tensors = {name: (x + 0.03 * x.std() * torch.randn_like(x)) if x.dim() > 1 else x
               for name, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return small, folder


@pytest.mark.parametrize("kld_tokens, max_windows", [(8192, 2), (31, 0), (2, 0)])
def test_quality_equals_plain_loops_in_float64(pair, tmp_path, kld_tokens, max_windows):
    """Whole logits, plain loops, no slices: losses, KL divergence, agreement."""
    ids = torch.randint(0, 2000, (3 * 40 + 20,), generator=torch.Generator().manual_seed(5))
    lab = place_lab(tmp_path, *pair, ids, window=40, kld_tokens=kld_tokens,
                    max_windows=max_windows, new_tokens=2)
    found = measure(lab)
    models = [quant_lab.load_model(folder, lab.options) for folder in pair]
    losses, divergences, same = ([], []), [], []
    for begin in range(0, (max_windows or 3) * 40, 40):
        window = ids[begin : begin + 40].tolist()
        known, quantized = (log_odds(model, window) for model in models)
        for position in range(39):
            p, q = known[position], quantized[position]
            losses[0].append(-p[window[position + 1]])
            losses[1].append(-q[window[position + 1]])
            divergences.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q)))
            same.append(p.index(max(p)) == q.index(max(q)))
    count = min(kld_tokens, len(same))
    chosen = [place * len(same) // count for place in range(count)]
    divergences, same = [divergences[i] for i in chosen], [same[i] for i in chosen]
    means = [math.fsum(values) / len(values) for values in losses]
    assert found["tokens_scored"] == len(losses[0])
    assert found["perplexity"] == pytest.approx(math.exp(means[1]), rel=1e-4)
    assert found["perplexity"] == found["perplexity_interval"]["value"]
    assert found["perplexity_ratio"]["value"] == pytest.approx(
        math.exp(means[1] - means[0]), rel=1e-5)
    assert found["window_losses"] == pytest.approx(
        [math.fsum(losses[1][i : i + 39]) / 39 for i in range(0, len(losses[1]), 39)])
    kld = found["kld"]
    assert kld["tokens"] == count and kld["mean"] > 1e-4
    assert kld["mean"] == pytest.approx(math.fsum(divergences) / count, rel=1e-3)
    assert kld["median"] == pytest.approx(rank(divergences, 0.5), rel=1e-3)
    assert kld["p99"] == pytest.approx(rank(divergences, 0.99), rel=1e-3)
    assert found["top1_agreement"]["value"] == pytest.approx(100 * sum(same) / count)
    assert count < 30 or 0 < sum(same) < count, "an agreement that could not fail"


def test_a_model_against_itself_does_not_differ(small, tmp_path):
    lab = place_lab(tmp_path, small, small, torch.arange(500), window=32, new_tokens=6)
    found = measure(lab)
    one = dict(value=1.0, low=1.0, high=1.0)
    assert found["perplexity_ratio"] == one
    assert found["top1_agreement"] == {name: 100.0 for name in one}
    assert {found["kld"].pop(k) for k in ("mean", "low", "high", "median", "p99")} == {0.0}
    assert [c["same_tokens"] for c in found["divergence"]["completions"]] == [6] * 8
    assert found["divergence"]["mean"] == 6


def test_first_difference_is_that_of_plain_greedy_completions(pair, tmp_path):
    lab = place_lab(tmp_path, *pair, torch.arange(64), window=32, new_tokens=12)
    divergence, same = measure(lab)["divergence"], []
    models = [quant_lab.load_model(folder, lab.options) for folder in pair]
    for prompt, said in zip(quant_lab.PROMPTS, divergence["completions"]):
        ids = lab.tokenizer.apply_chat_template(
            [dict(role="user", content=prompt)], add_generation_prompt=True,
            return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            made = [greedy(model, ids, 12)[0, ids.shape[1]:].tolist() for model in models]
        end = lab.tokenizer.eos_token_id
        made = [m[: m.index(end) + 1] if end in m else m for m in made]
        same.append(next((i for i in range(max(map(len, made)))
                          if made[0][i : i + 1] != made[1][i : i + 1]), 12))
        assert said["prompt"] == prompt and said["same_tokens"] == same[-1]
        assert said["completion"] == lab.tokenizer.decode(made[1], skip_special_tokens=True)
    assert divergence["mean"] == sum(same) / 8 and 0 < divergence["mean"] < 12
    assert divergence["low"] <= divergence["mean"] <= divergence["high"]


def test_prompts_are_eight_and_fit_every_context():
    assert len(set(quant_lab.PROMPTS)) == 8 and max(map(len, quant_lab.PROMPTS)) < 100


@pytest.mark.parametrize("windows, low, high", [(12, 1, 40), (30, 5, 6), (29, 1, 9)])
def test_intervals_agree_with_a_bootstrap(windows, low, high):
    """Windows of unequal size whose tokens go together, resampled whole."""
    random = torch.Generator().manual_seed(windows)
    sizes = torch.randint(low, high, (windows,), generator=random)
    shared = torch.randn(windows, generator=random)
    places = torch.arange(windows).repeat_interleave(sizes)
    values = (shared[places] + 0.3 * torch.randn(len(places), generator=random)).double()
    found = quant_lab.estimate(values, places)
    sums = torch.zeros(windows).double().index_add(0, places, values)
    drawn = torch.randint(0, windows, (20_000, windows), generator=random)
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    spread = 2 * quantile_of_t(windows - 1) * means.std().item()
    assert found["value"] == pytest.approx(values.mean().item())
    assert found["high"] - found["low"] == pytest.approx(spread, rel=0.1)
    naive = 2 * 1.96 * values.std().item() / len(values) ** 0.5
    assert found["high"] - found["low"] > 1.3 * naive, "tokens are not independent"


def quantile_of_t(freedom):
    """The 97.5 % point of Student's t by counting area under its density."""
    def density(t):
        return (1 + t * t / freedom) ** (-(freedom + 1) / 2)

    step = 1e-3
    half = math.sqrt(freedom * math.pi) * math.exp(
        math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2)) / 2
    area, t = 0.0, 0.0
    while area < 0.95 * half:
        area, t = area + step * density(t + step / 2), t + step
    return t


@pytest.mark.parametrize("together, least, naive_most", [(0.3, 0.92, 0.88), (0.7, 0.82, 0.65)])
def test_intervals_hold_for_windows_that_resemble_their_neighbours(
        together, least, naive_most):
    """On WikiText-2 neighbouring windows correlate by 0.7 in their losses, by up to 0.3 in
    the difference to the reference. Taken as independent, they would promise too much."""
    random = torch.Generator().manual_seed(2)
    covered, naive = 0, 0
    for _ in range(600):
        values = [0.0]
        for x in torch.randn(346, generator=random).double().tolist():
            values.append(together * values[-1] + x)
        values = torch.tensor(values[201:], dtype=torch.float64)
        found = quant_lab.estimate(values, torch.arange(146))
        covered += found["low"] < 0 < found["high"]
        naive += abs(values.mean()) < 1.976 * values.std() / 146 ** 0.5
    assert covered > least * 600 and naive < naive_most * 600, (covered, naive)


def test_consecutive_windows_make_blocks_of_equal_size():
    values = torch.randn(300, generator=torch.Generator().manual_seed(4)).double()
    means = values.view(30, 10).mean(1)
    found, blocks = quant_lab.estimate(values, torch.arange(300)), means.std() / 30 ** 0.5
    assert found["high"] - found["value"] == pytest.approx(2.045 * blocks.item(), rel=1e-3)


@pytest.mark.parametrize("windows, table", [(3, 4.303), (4, 3.182), (5, 2.776), (11, 2.228),
                                            (30, 2.045)])
def test_interval_of_equal_windows_is_the_textbooks(windows, table):
    values = torch.randn(windows, generator=torch.Generator().manual_seed(1)).double()
    found = quant_lab.estimate(values, torch.arange(windows), math.exp)
    error = values.std().item() / windows ** 0.5
    assert quantile_of_t(windows - 1) == pytest.approx(table, abs=2e-3)
    assert found["value"] == pytest.approx(math.exp(values.mean()))
    for side, name in ((-1, "low"), (1, "high")):
        assert (math.log(found[name]) - values.mean().item()) * side / error == (
            pytest.approx(table, rel=0.01))


@pytest.mark.parametrize("windows", [[4, 4], [4, 5]])
def test_one_or_two_windows_have_no_interval(windows):
    found = quant_lab.estimate(torch.tensor([1.0, 3.0]), torch.tensor(windows))
    assert found == dict(value=2.0, low=None, high=None)


def test_logits_are_never_whole_in_more_than_16_bits():
    """On the real vocabulary a window's logits pass in slices, in the comparison too."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype in (torch.float32, torch.float64):
                self.bytes = max(self.bytes, out.nbytes)
            return out

    logits = torch.zeros(151_936, dtype=torch.float16)
    with Largest() as largest:
        score(Constant(logits), torch.zeros(400, dtype=torch.long), 400)
    assert 0 < largest.bytes <= 128 * 151_936 * 4


def test_the_file_of_logits_has_a_budget(small, tmp_path, monkeypatch):
    monkeypatch.setattr(quant_lab, "LOGITS_FILE_BYTES", 7.5 * 4 * 2048)
    lab = place_lab(tmp_path, small, small, torch.arange(500), window=32, new_tokens=2)
    assert quant_lab.measure_reference(lab).logits.tell() <= 7.5 * 4 * 2048
    assert measure(lab)["kld"]["tokens"] == 7


def greedy(model, ids, steps):
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1)[:, None]], 1)
    return ids


def test_completion_is_plain_greedy_whatever_the_model_prefers(small, tmp_path):
    """The model's folder asks for sampling with a repetition penalty; none may leak."""
    lab = place_lab(tmp_path, small, small, torch.arange(64), window=32, new_tokens=12,
                    repeats=2)
    row = quant_lab.benchmark_variant(
        quant_lab.BASELINE, lab, quant_lab.measure_reference(lab))
    model, tokenizer = quant_lab.load_model(small, lab.options), lab.tokenizer
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["sample"]["prompt"]}],
        add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        made = greedy(model, ids, 12)[0, ids.shape[1]:].tolist()
    if tokenizer.eos_token_id in made:
        made = made[: made.index(tokenizer.eos_token_id)]
    assert row["sample"]["completion"] == tokenizer.decode(made, skip_special_tokens=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_length_is_forced_past_the_end_of_sequence(small, compiled):
    """A model that wants to end at once is timed on exactly the tokens asked for."""
    options = quant_lab.Options(dtype="float32", new_tokens=7, repeats=3, batch_sizes=(1, 2))
    model = quant_lab.load_model(small, options)
    calls = []

    def count(module, inputs, output):
        calls.append(tuple(output.logits.shape[:2]))
        output.logits[..., model.config.eos_token_id] += 1e4
        return output

    model.register_forward_hook(count)
    speed = quant_lab.measure_speed(
        model, torch.arange(20)[None], options, compiled, bandwidth=1e9)
    alone, both = 1 + 2 + 1 + 2 + 4 * 7, 2 + 4 * 6  # Set-up, then prefill and steps.
    assert calls == [(1, 1)] * alone + [(2, 1)] * both
    for key in ("ttft_s", "latency_s", "decode_tok_s"):
        samples = speed[key]["samples"]
        assert len(samples) == 3 and min(samples) == speed[key]["min"] > 0
        assert sorted(samples)[1] == speed[key]["median"] <= speed[key]["max"]
    for latency, first, rate in zip(*(speed[key]["samples"] for key in (
            "latency_s", "ttft_s", "decode_tok_s"))):
        assert latency == pytest.approx(first + 6 / rate)
    assert [entry["batch"] for entry in speed["decode"]] == [1, 2]
    for entry in speed["decode"]:
        for itl, rate in zip(entry["itl_ms"]["samples"], entry["tok_s"]["samples"]):
            assert rate == pytest.approx(1000 * entry["batch"] / itl)
        assert entry["bandwidth_fraction"] == pytest.approx(
            entry["step_bytes"] / entry["itl_ms"]["median"] * 1000
            / speed["copy_bandwidth"])
    cache = 2 * 4 * 32 * 64  # Keys and values, float32, 20 + 7 places, rounded up, of 64.
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert [e["step_bytes"] for e in speed["decode"]] == [weights + cache, weights + 2 * cache]
    assert (speed["compile_seconds"] is not None) == compiled


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
        "rtn_w4a16": lambda out, into: out * into // 2 + 2 * out * into // 128 + 16,
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
    published = dict(zip(quant_lab.VARIANTS, (
        988_097_536, 630_899_272, 456_988_608, 630_898_432, 456_988_608)))
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


def make_row(label, ratio=1.0, width=0.01, **changes):
    """A finished row of three windows whose ratio to a baseline of 14.2 is ratio ± width."""
    losses = [math.log(14.2 * ratio) + sign * 1e-4 for sign in (-1, 0, 1)]
    around = dict(value=ratio, low=ratio - width, high=ratio + width)
    return quant_lab.ROW | dict(
        label=label, status="ok", weight_bytes=10 ** 6, size_ratio=0.5, rtn_fallbacks=0,
        perplexity=14.2 * ratio, perplexity_ratio=around, perplexity_interval=around,
        window_losses=losses, tokens_scored=100, kld=dict(
            mean=0.01 * (label != quant_lab.BASELINE), low=0.009, high=0.011, tokens=50),
        top1_agreement=dict(value=97.0, low=96.0, high=98.0),
        divergence=dict(mean=5, low=4, high=6, completions=[
            dict(prompt=p, completion="", same_tokens=5) for p in quant_lab.PROMPTS])
    ) | changes


def say(*rows, **config):
    config = dict(model="some/model", eval_text="mine.txt", window=64, max_windows=0) | config
    results = dict(config=config, variants=list(rows))
    return quant_lab.render_verdict(rows), quant_lab.render_warnings(results)


FP16, FP8, GPTQ, W8A8 = quant_lab.Options().variants
KNOWN = dict(model="Qwen/Qwen2.5-0.5B-Instruct", eval_text=quant_lab.WIKITEXT, window=2048)


def test_verdict_names_what_cannot_be_told_from_fp16():
    said, warned = say(make_row(FP16, width=0), make_row(FP8, 1.005), make_row(GPTQ, 1.1),
                       make_row(W8A8, 0.95))
    assert f"{FP8} (at most 1.0150)" in said[0] and "KLD tells the difference" in said[0]
    assert GPTQ not in said[0] and W8A8 not in said[0]
    assert "saves 50.0 %" in said[1] and "1.0050 ± 0.0100" in said[1]
    assert "97.0 ± 1.0 %" in said[1] and quant_lab.CONTROL in said[-1]
    assert 4 <= len(said) <= 6 and warned == []
    said, _ = say(make_row(FP16, width=0), make_row(FP8, 1.02), make_row(GPTQ, 1.1))
    assert "every quantized variant differs" in said[0]


def test_one_window_claims_no_difference():
    none = dict(value=1.5, low=None, high=None)
    kld = dict(mean=0.2, low=None, high=None, tokens=50)
    said, _ = say(*(make_row(label, perplexity_ratio=none, kld=kld)
                    for label in (FP8, GPTQ, quant_lab.CONTROL)))
    assert "Too few windows" in said[0] and "perplexity by 1.5000 and" in said[1]
    assert "GPTQ cannot be told from round-to-nearest" in said[-1]


@pytest.mark.parametrize("low", [None, 0.0])
def test_kld_tells_no_difference_where_its_interval_does_not(low):
    """With --kld-tokens 2 there are many windows for the ratio, too few for KLD."""
    said, _ = say(make_row(FP8, kld=dict(mean=0.01, low=low, high=None, tokens=2)))
    assert "cannot be told from the baseline." in said[0] and "KLD" not in said[0]


@pytest.mark.parametrize("value, text", [
    (dict(value=1.35, low=1.01, high=1.80), "1.35 (1.01–1.80)"),
    (dict(mean=20.0, low=0.0, high=41.4), "20.00 ± 20.70"),
    (dict(mean=3.0, low=0.0, high=41.4), "3.00 (0.00–41.40)"),
    (dict(value=1.0, low=0.9, high=1.1), "1.00 ± 0.10"),
    (dict(value=1.0, low=None, high=None), "1.00"), (12_345.678, "12,346"),
    (dict(median=2.0, min=1.0, max=4.0, samples=[1, 2, 4]), "2.00 (1.00–4.00)")])
def test_an_uneven_interval_is_shown_by_its_ends(value, text):
    assert quant_lab.show(value, 2) == text


@pytest.mark.parametrize("gptq, says", [
    (0.03, "GPTQ beat"), (0.05, "GPTQ cannot be told from"), (0.07, "GPTQ did worse than")])
def test_the_control_is_held_against_gptq_by_kld(gptq, says):
    """Not by perplexity, in which errors cancel."""
    kld = [dict(mean=x, low=x - 0.005, high=x + 0.005, tokens=50) for x in (gptq, 0.055)]
    for ratio in (0.9, 1.3):
        said, _ = say(make_row(GPTQ, ratio, kld=kld[0]),
                      make_row(quant_lab.CONTROL, 1.2, kld=kld[1]))
        assert says in said[-1] and f"{gptq:.5f} ± 0.00500" in said[-1]


@pytest.mark.parametrize("label, ratio, warned", [
    (FP16, 1.0, False), (FP16, 1.1, True), (FP8, 1.01, False), (FP8, 1.03, True),
    (GPTQ, 1.15, False), (GPTQ, 1.36, True), (GPTQ, 1.01, True), (W8A8, 1.03, False),
    (W8A8, 1.05, True), (quant_lab.CONTROL, 1.46, False)])
def test_figures_outside_the_published_bands_are_warned_of(label, ratio, warned):
    row = make_row(label, ratio)
    assert bool(say(row, **KNOWN)[1]) is warned
    if warned:
        assert label in say(row, **KNOWN)[1][0]
    for other in (dict(window=512), dict(max_windows=20), dict(eval_text="mine.txt"),
                  dict(model="other/model")):
        assert say(row, **{**KNOWN, **other})[1] == []


def test_fallbacks_noise_and_failures_are_warned_of():
    noise = make_row(FP16)["kld"] | dict(mean=1e-5)
    _, warned = say(make_row(FP16, kld=noise), make_row(GPTQ, rtn_fallbacks=3),
                    quant_lab.ROW | dict(label=W8A8, status="failed", error="no\nmemory"))
    text = "\n".join(warned)
    assert len(warned) == 3 and f"{W8A8} failed: no memory" in text
    assert f"3 modules of {GPTQ}" in text and "1.0e-05" in text


def test_verdict_of_failures_alone():
    failed = quant_lab.ROW | dict(label=FP8, status="failed", error="no memory")
    assert len(say(failed)[0]) == 1 and len(say(make_row(FP16), failed)[0]) == 1


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
def test_quality_fits_in_3_gb_above_the_weights(tmp_path):
    """Of the real vocabulary and window, every position compared."""
    folder = make_small(tmp_path / "model", hidden=128, vocab_size=151_936)
    lab = place_lab(tmp_path, folder, folder, torch.arange(4096), window=2048,
                    new_tokens=2, dtype="float16")
    lab = replace(lab, device=torch.device("cuda"))
    model = quant_lab.place_model(folder, lab)
    weights = torch.cuda.memory_allocated()
    reference = quant_lab.measure_reference(lab)
    torch.cuda.reset_peak_memory_stats()
    assert quant_lab.measure_quality(model, lab, reference)["kld"]["mean"] == 0
    assert torch.cuda.max_memory_allocated() - weights < 3e9


@pytest.mark.gpu
def test_demo_on_the_gpu(run_script, tmp_path):
    run = run_script("--demo", "--device", "cuda", "--output-dir", tmp_path)
    assert run.code == 0, run.out + run.err
    assert run.names["RESULTS"]["machine"]["device"] == "cuda"
    assert [row["status"] for row in run.names["RESULTS"]["variants"]] == ["ok"] * 4
