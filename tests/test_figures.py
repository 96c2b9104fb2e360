"""Compare figures with computations written another way."""

import json
import math
import platform
import shutil
import struct
from types import SimpleNamespace

import pytest
import torch
from architectures import make
from conftest import (
    CONTROL, LABELS, ROOT, SHARED, TINY, load_by_path, load_emulated, make_small,
    read_strict, run_all)

import quant_lab


class Constant(torch.nn.Module):
    """Say the same logits whatever the input, in the interface of a language model."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)
        self.device, self.devices = logits.device, ["cpu"]
        self.decoder = torch.nn.Module()
        self.decoder.forward = self.decode

    def get_decoder(self):
        return self.decoder

    def get_memory_footprint(self):
        return self.logits.nbytes

    def decode(self, input_ids, use_cache):
        states = self.logits.new_zeros(*input_ids.shape, 3)
        return SimpleNamespace(last_hidden_state=states)

    def forward(self, input_ids, use_cache=None):
        states = self.decoder(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        return SimpleNamespace(logits=self.logits.expand(*states.shape[:2], -1))


def cut(ids, window, max_windows=0):
    """Return windows [n, window] of token ids; a tail that is shorter is left."""
    return ids[: len(ids) // window * window].view(-1, window)[: max_windows or None]


def score(model, ids, window):
    """Return losses [windows, tokens] of token ids in windows."""
    lab = SimpleNamespace(windows=cut(ids, window), unscored=1, device="cpu")
    losses = torch.cat([losses for *_, losses in quant_lab.score_text(model, lab)])
    return losses.view(len(lab.windows), -1)


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
    """Check that each loss is of its own token, whatever slice of the window it is in."""
    ids = torch.arange(700).remainder(9)
    losses = score(Constant(torch.linspace(0, 4, 9)), ids, 300)
    wanted = torch.linspace(0, 4, 9).logsumexp(0) - torch.linspace(0, 4, 9)
    assert torch.allclose(losses, wanted.double()[ids[:600].view(2, 300)[:, 1:]])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_named(wrong):
    logits = torch.zeros(9)
    logits[5] = wrong  # Never the target.
    with pytest.raises(FloatingPointError, match="not finite.*--dtype"):
        score(Constant(logits), torch.zeros(64, dtype=torch.long), 32)


def place_lab(folder, ids=None, **changes):
    """Return a lab of a model's folder and token ids [n], in float32 on the CPU.

    Without ids, the windows are those that the lab makes of the evaluation text.
    """
    options = quant_lab.Options(**dict(model=str(folder), dtype="float32") | changes)
    folder, tokenizer, context, prompts = quant_lab.open_model(options)
    windows, begin = ((cut(ids, options.window, options.max_windows), [])
                      if ids is not None else
                      quant_lab.load_evaluation(options, tokenizer, context))
    return SimpleNamespace(
        options=options, device=torch.device("cpu"), windows=windows, begin=begin,
        unscored=max(1, len(begin)), model_folder=folder, tokenizer=tokenizer,
        prompts=prompts)


def measure(lab, folder):
    """Return the quality of a model's folder against the model of the lab."""
    model = quant_lab.place_model(folder, lab.options, lab.device)
    lab.reference = quant_lab.measure_reference(lab)
    return quant_lab.measure_quality(model, lab)


def log_odds(model, ids):
    """Return log-probabilities [tokens, vocabulary] by plain loops in float64."""
    with torch.no_grad():
        logits = model.double()(torch.tensor([ids])).logits[0].tolist()
    rows = []
    for odds in logits:
        top = max(odds)
        total = top + math.log(math.fsum(math.exp(x - top) for x in odds))
        rows.append([x - total for x in odds])
    return rows


def disturb(folder, target):
    """Write a copy of a model's folder whose weights differ a little; return its folder."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    torch.manual_seed(3)
    tensors = {name: (x + 0.03 * x.std() * torch.randn_like(x)) if x.dim() > 1 else x
               for name, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def pair(small, tmp_path_factory):
    """Return folders of the small model and of one whose weights differ a little."""
    return small, disturb(small, tmp_path_factory.mktemp("pair") / "noisy")


def check_against_loops(folders, max_windows):
    """Compute losses, KL divergence, agreement of whole logits by plain loops."""
    ids = torch.randint(0, 2000, (3 * 40 + 20,), generator=torch.Generator().manual_seed(5))
    found = measure(place_lab(folders[0], ids, window=40, max_windows=max_windows,
                              new_tokens=2), folders[1])
    models = [load_emulated(folder, "float32") for folder in folders]
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
    count = len(same)
    means = [math.fsum(values) / len(values) for values in losses]
    assert found["tokens_scored"] == len(losses[0])
    assert found["perplexity"] == pytest.approx(math.exp(means[1]), rel=1e-4)
    assert found["perplexity"] == found["perplexity_interval"]["value"]
    assert found["perplexity_ratio"]["value"] == pytest.approx(
        math.exp(means[1] - means[0]), rel=1e-5)
    assert found["window_losses"] == pytest.approx(
        [math.fsum(losses[1][i : i + 39]) / 39 for i in range(0, count, 39)])
    kld = found["kld"]
    assert kld["tokens"] == count == found["tokens_scored"] and kld["mean"] > 1e-4
    assert kld["mean"] == pytest.approx(math.fsum(divergences) / count, rel=1e-3)
    assert kld["windows"] == pytest.approx(
        [math.fsum(divergences[i : i + 39]) / 39 for i in range(0, count, 39)], rel=1e-3)
    assert kld["max"] == pytest.approx(max(divergences), rel=1e-3)
    assert set(kld) == {"mean", "low", "high", "max", "tokens", "windows"}
    assert found["top1_agreement"]["value"] == pytest.approx(100 * sum(same) / count)
    assert 0 < sum(same) < count, "an agreement that could not fail"


@pytest.mark.parametrize("max_windows", [2, 0])
def test_quality_equals_plain_loops_in_float64(pair, max_windows):
    check_against_loops(pair, max_windows)


@pytest.mark.parametrize("name, changes", [
    ("gemma2", dict(final_logit_softcapping=4.0)), ("granite", dict(logits_scaling=0.5))])
def test_what_comes_after_the_head_counts(tmp_path, name, changes):
    """Score models that cap or scale what their head puts out, which alone is wrong."""
    folder = make(name, tmp_path / "known", **changes)
    check_against_loops((folder, disturb(folder, tmp_path / "noisy")), 2)
    model, ids = load_emulated(folder, "float32"), torch.arange(40)[None]
    with torch.no_grad():
        head = model.lm_head(model.model(ids).last_hidden_state).log_softmax(-1)
        assert (head - model(ids).logits.log_softmax(-1)).abs().max() > 1


@pytest.mark.parametrize("offset", [0, 20, -200])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kld_is_that_of_float64(offset, dtype):
    """Of logits as a large vocabulary has them; the same ones give exactly 0."""
    draw = torch.Generator().manual_seed(0)
    wanted = 3 * torch.randn(64, 50_000, generator=draw) + offset
    for noise in (0.0, 1e-3, 0.1, 1.0):
        logits = (wanted + noise * torch.randn(wanted.shape, generator=draw)).to(dtype)
        p, q = (x.double().log_softmax(-1) for x in (wanted.to(dtype), logits))
        right = (p.exp() * (p - q)).sum(-1)
        found, _ = quant_lab.compare(*(x.float().log_softmax(-1)
                                       for x in (wanted.to(dtype), logits)))
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=3e-6)
        assert found.mean().item() == pytest.approx(right.mean().item(), rel=1e-5, abs=2e-7)
        assert noise or not found.any()


def test_mean_and_greatest_are_those_of_all_tokens(monkeypatch):
    """Give the reference one window of 2,000 tokens, and each token a KLD that is known.

    Of two words the reference says one for sure; the other model gives it the chance
    exp(-n / 1000), so that the KLD of token n is n / 1000.
    """
    count, most = 2000, 128
    known, other = Constant(torch.tensor([0.0, -800.0]).double()), Constant(torch.zeros(2))
    nats = torch.randperm(count, generator=torch.Generator().manual_seed(0)) / 1000.0
    parts = list(nats.double().clamp(min=1e-9).split(most))

    def say_next(input_ids, use_cache):
        p = (-parts.pop(0)).exp()
        return SimpleNamespace(logits=torch.stack([p.log(), torch.log1p(-p)], -1)[None])

    other.forward = say_next
    tokenizer = SimpleNamespace(decode=lambda *_, **__: "")
    lab = SimpleNamespace(options=quant_lab.Options(), device="cpu", unscored=1, prompts=[],
                          windows=torch.zeros(1, count + 1, dtype=torch.long),
                          model_folder=None, tokenizer=tokenizer)
    monkeypatch.setattr(quant_lab, "place_model", lambda *_: known)
    monkeypatch.setattr(quant_lab, "complete_prompts", lambda *_: [[1]] * 8)
    lab.reference = quant_lab.measure_reference(lab)
    kld = quant_lab.measure_quality(other, lab)["kld"]
    assert not parts and kld["tokens"] == count
    assert kld["mean"] == pytest.approx(0.9995, abs=1e-5)
    assert kld["windows"] == pytest.approx([0.9995], abs=1e-5), "one window of them all"
    assert kld["max"] == pytest.approx(1.999)
    assert kld["low"] is None, "of one window"


@pytest.mark.parametrize("name", ["small", "gemma2", "granite"])
def test_a_model_against_itself_does_not_differ(small, tmp_path, name):
    folder = small if name == "small" else make(name, tmp_path)
    found = measure(place_lab(folder, torch.arange(500), window=32, new_tokens=6), folder)
    one = dict(value=1.0, low=1.0, high=1.0)
    assert found["perplexity_ratio"] == one
    assert found["top1_agreement"] == {name: 100.0 for name in one}
    assert found["kld"] == dict(mean=0, low=0, high=0, max=0, tokens=15 * 31,
                                windows=[0] * 15)
    assert [c["same_tokens"] for c in found["divergence"]["completions"]] == [6] * 8
    assert [found["divergence"][k] for k in ("median", "min", "max")] == [6] * 3


def greedy(model, tokenizer, prompt, steps):
    """Return token ids of a plain greedy completion, without a cache."""
    text = tokenizer.apply_chat_template(
        [dict(role="user", content=prompt)], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    made = []
    with torch.no_grad():
        while len(made) < steps and tokenizer.eos_token_id not in made:
            made.append(model(ids).logits[0, -1].argmax().item())
            ids = torch.cat([ids, torch.tensor([made[-1:]])], 1)
    return made


def test_completions_are_plain_greedy_whatever_the_model_prefers(small):
    """Let none of the small model's sampling and repetition penalty leak in."""
    lab = place_lab(small, torch.arange(64), window=64, new_tokens=12)
    model = load_emulated(small, "float32")
    assert model.generation_config.do_sample and model.generation_config.temperature < 1
    assert model.generation_config.repetition_penalty > 1
    found = quant_lab.complete_prompts(model, lab)
    assert found == [greedy(model, lab.tokenizer, p, 12) for p in quant_lab.PROMPTS]
    assert len(set(map(tuple, found))) > 1 and max(map(len, found)) == 12


def test_a_completion_ends_where_the_model_says(small):
    """Take the third token that comes as the end, and a list of ends as Qwen has it."""
    lab = place_lab(small, torch.arange(64), window=64, new_tokens=12)
    model = load_emulated(small, "float32")
    end = greedy(model, lab.tokenizer, quant_lab.PROMPTS[0], 3)[2]
    for ends in (end, [lab.tokenizer.eos_token_id, end]):
        model.generation_config.eos_token_id = ends
        found = quant_lab.complete_prompts(model, lab)[0]
        assert found[-1] == end and len(found) <= 3 and end not in found[:-1]


def test_first_difference_is_that_of_plain_greedy_completions(pair):
    lab = place_lab(pair[0], torch.arange(64), window=32, new_tokens=12)
    divergence, same = measure(lab, pair[1])["divergence"], []
    models = [load_emulated(folder, "float32") for folder in pair]
    for prompt, said in zip(quant_lab.PROMPTS, divergence["completions"], strict=True):
        made = [greedy(model, lab.tokenizer, prompt, 12) for model in models]
        same.append(next((i for i in range(max(map(len, made)))
                          if made[0][i : i + 1] != made[1][i : i + 1]), 12))
        assert said["prompt"] == prompt and said["same_tokens"] == same[-1]
        assert said["completion"] == lab.tokenizer.decode(made[1], skip_special_tokens=True)
    middle = (sorted(same)[3] + sorted(same)[4]) / 2
    assert list(divergence) == ["median", "min", "max", "completions"]
    assert (divergence["median"], divergence["min"], divergence["max"]) == (
        middle, min(same), max(same))
    assert 0 <= min(same) < max(same) <= 12 and 0 < sum(same) < 96, "all would be the same"


@pytest.mark.parametrize("mine, theirs, same", [
    ([1, 2, 3], [1, 2, 3], 9), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 2], 2),
    ([4], [1], 0), ([1, 4, 3], [1, 2, 3], 1)])
def test_a_completion_that_ends_sooner_differs_there(monkeypatch, mine, theirs, same):
    """Count all new tokens for completions that are the same to their common end."""
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: str(ids))
    model, windows = Constant(torch.zeros(9)), torch.zeros(2, 4, dtype=torch.long)
    lab = SimpleNamespace(options=quant_lab.Options(new_tokens=9), device="cpu", unscored=1,
                          windows=windows, prompts=[], model_folder=None,
                          tokenizer=tokenizer)
    monkeypatch.setattr(quant_lab, "place_model", lambda *_: model)
    monkeypatch.setattr(quant_lab, "complete_prompts", lambda *_: [theirs] * 8)
    lab.reference = quant_lab.measure_reference(lab)
    monkeypatch.setattr(quant_lab, "complete_prompts", lambda *_: [mine] * 8)
    found = quant_lab.measure_quality(model, lab)["divergence"]
    assert [one["same_tokens"] for one in found["completions"]] == [same] * 8
    assert {one["completion"] for one in found["completions"]} == {str(mine)}
    assert found["median"] == found["min"] == found["max"] == same


def test_prompts_are_eight_and_fit_every_context():
    assert len(set(quant_lab.PROMPTS)) == 8 and max(map(len, quant_lab.PROMPTS)) < 100


@pytest.mark.parametrize("windows, blocks", [(12, 4), (24, 4), (29, 5), (146, 10), (300, 10)])
def test_intervals_agree_with_a_bootstrap(windows, blocks):
    """Resample whole blocks of windows, whose tokens go together, with the spread of few."""
    random = torch.Generator().manual_seed(windows)
    shared = torch.randn(windows, 1, generator=random)
    values = (shared + 0.3 * torch.randn(windows, 7, generator=random)).double()
    found = quant_lab.estimate(values)
    groups = [values[[i for i in range(windows) if i * blocks // windows == block]].flatten()
              for block in range(blocks)]
    sums, sizes = (torch.tensor([f(group) for group in groups]).double()
                   for f in (torch.sum, len))
    drawn = torch.randint(0, blocks, (20_000, blocks), generator=random)
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    spread = means.std().item() * (blocks / (blocks - 1)) ** 0.5
    assert found["value"] == pytest.approx(values.mean().item())
    assert found["high"] - found["low"] == pytest.approx(
        2 * quantile_of_t(blocks - 1) * spread, rel=0.05)
    naive = 2 * 1.96 * values.std().item() / values.numel() ** 0.5
    assert found["high"] - found["low"] > 1.3 * naive, "tokens are not independent"


def quantile_of_t(freedom):
    """Return the 97.5 % point of Student's t by counting area under its density."""
    def density(t):
        return (1 + t * t / freedom) ** (-(freedom + 1) / 2)

    step = 1e-3
    half = math.sqrt(freedom * math.pi) * math.exp(
        math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2)) / 2
    area, t = 0.0, 0.0
    while area < 0.95 * half:
        area, t = area + step * density(t + step / 2), t + step
    return t


@pytest.mark.parametrize("windows, least, naive_most", [
    (20, 0.90, 0.80), (30, 0.90, 0.80), (146, 0.93, 0.80)])
def test_intervals_hold_for_windows_that_resemble_their_neighbours(
        windows, least, naive_most):
    """Count how often an interval holds what it should, of neighbours correlated by 0.5.

    On WikiText-2 neighbouring windows correlate by 0.7 in their losses, by up to 0.3 in
    the difference to the reference. Taken as independent, they would promise too much.
    """
    random, count = torch.Generator().manual_seed(2), 3000
    steps = torch.randn(windows, count, 1, generator=random).double()
    series = [steps[0] / (1 - 0.5**2) ** 0.5]  # As long after a beginning.
    for step in steps[1:]:
        series.append(0.5 * series[-1] + step)
    series = torch.stack(series, 1)
    together = (series[:, 1:] * series[:, :-1]).mean() / series.square().mean()
    assert together == pytest.approx(0.5, abs=0.01)
    found = [quant_lab.estimate(values) for values in series]
    covered = sum(one["low"] < 0 < one["high"] for one in found)
    errors = quantile_of_t(windows - 1) * series.std(1) / windows**0.5
    naive = (series.mean(1).abs() < errors).sum().item()
    assert covered > least * count and naive < naive_most * count, (covered, naive)


@pytest.mark.parametrize("windows, blocks, table", [
    (12, 4, 3.182), (25, 5, 2.776), (30, 6, 2.571), (40, 8, 2.365), (50, 10, 2.262),
    (300, 10, 2.262)])
def test_interval_of_blocks_of_equal_size_is_the_textbooks(windows, blocks, table):
    """Take a block for one measurement, and the 97.5 % point from a table."""
    values = torch.randn(windows, 3, generator=torch.Generator().manual_seed(1)).double()
    found = quant_lab.estimate(values, math.exp)
    error = values.view(blocks, -1).mean(1).std().item() / blocks**0.5
    assert quantile_of_t(blocks - 1) == pytest.approx(table, abs=2e-3)
    assert found["value"] == pytest.approx(math.exp(values.mean()))
    for side, name in ((-1, "low"), (1, "high")):
        assert (math.log(found[name]) - values.mean().item()) * side / error == (
            pytest.approx(table, rel=0.01))


@pytest.mark.parametrize("windows", [1, 2, 3, 11])
def test_few_windows_have_no_interval(windows):
    values = torch.arange(2.0 * windows).view(windows, 2).double()
    assert quant_lab.estimate(values) == dict(value=windows - 0.5, low=None, high=None)
    assert quant_lab.estimate(torch.rand(12, 2).double(), name="mean")["low"] is not None


def test_a_loss_whose_exponential_is_no_float_is_a_figure(lab, monkeypatch):
    """Let the variant lose 800 nats a token more: in the row stands what JSON can hold."""
    real = quant_lab.measure_reference

    def lose(model, lab):
        for hidden, logits, losses in score(model, lab):
            yield hidden, logits, losses + 800 if started else losses

    def refer(lab):
        reference = real(lab)
        started.append(True)
        return reference

    score, started = quant_lab.score_text, []
    monkeypatch.setattr(quant_lab, "score_text", lose)
    monkeypatch.setattr(quant_lab, "measure_reference", refer)
    assert [quant_lab.raise_e(x) for x in (-800.0, 0.0, 3.0)] == [0, 1, math.exp(3)]
    assert quant_lab.raise_e(800.0) < math.inf
    build = lab("--variants", LABELS[0])
    row, = run_all(build)["variants"]
    assert row["status"] == "ok", row["error"]
    for figure in row["perplexity_interval"], row["perplexity_ratio"]:
        assert 1e300 < figure["value"] < math.inf
    kept, = read_strict(build.output / "results.json")["variants"]
    assert kept["perplexity"] == row["perplexity"]


def windowed(label, values):
    """Return the row of a variant whose KLD in each window is known."""
    values = torch.as_tensor(values).double()
    return quant_lab.ROW | dict(
        label=label, status="ok", kld=quant_lab.estimate(values[:, None], name="mean") | dict(
            windows=values.tolist()))


def test_variants_are_ranked_by_paired_differences():
    """Tell apart what differs in each window, though the text moves both far more."""
    random = torch.Generator().manual_seed(1)
    text = torch.rand(40, generator=random).double() + 0.5
    noise = 0.01 * torch.randn(40, generator=random).double()
    first, second = windowed("first", text), windowed("second", text * 1.05 + noise)
    assert second["kld"]["low"] < first["kld"]["high"], "unpaired, they overlap"

    def rank(*rows):
        """Return what the advice names where nothing may change."""
        good = dict(value=1.0, low=1.0, high=1.0)
        memory = dict(weights_memory_bytes=1, perplexity_ratio=good)
        *_, advice = quant_lab.advise(dict(
            variants=[row | memory for row in rows], config=dict(max_loss=2.0),
            machine=dict(device="cpu")))
        assert advice["goal"] == "nothing may change"
        return [advice["variant"], *advice["ties"]]

    assert rank(second, first) == ["first"]
    equal = windowed("equal", text)
    assert rank(first, equal, second) == ["first", "equal"]
    alike = windowed("alike", text + noise - noise.mean() + 1e-4)
    assert rank(alike, second, first) == ["first", "alike"]
    few = [windowed(name, x[:11]) for name, x in (("first", text), ("second", text * 2))]
    assert rank(*few) == [None]


def add_begin(folder, tokens, target):
    """Write a copy of a model's folder whose tokenizer puts tokens before a text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    shutil.copytree(folder, target)
    before = AutoTokenizer.from_pretrained(folder)
    backend = before.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single=f"{' '.join(tokens)} $A",
        special_tokens=[(token, before.convert_tokens_to_ids(token)) for token in tokens])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=tokens[0], eos_token=before.eos_token,
        pad_token=before.pad_token, chat_template=before.chat_template,
    ).save_pretrained(target)
    return target


@pytest.mark.parametrize("tokens", [[], ["<|im_start|>"], ["<|im_start|>", "<|im_end|>"]])
def test_each_window_begins_as_a_text_does(small, texts, tmp_path, tokens):
    """Compare windows and losses with plain ones: what begins a window is not scored."""
    folder = add_begin(small, tokens, tmp_path / "model") if tokens else small
    lab = place_lab(folder, window=48, eval_text=str(texts / "eval.txt"), new_tokens=2)
    begin = lab.tokenizer.convert_tokens_to_ids(tokens)
    assert lab.begin == begin and lab.tokenizer("word").input_ids[: len(begin)] == begin
    ids = lab.tokenizer((texts / "eval.txt").read_text("utf-8")).input_ids[len(begin) :]
    size, wanted, scored = 48 - len(begin), [], []
    model = load_emulated(folder, "float32")
    for start in range(0, len(ids) - size + 1, size):
        wanted.append(begin + ids[start : start + size])
        rows = log_odds(model, wanted[-1]) if len(wanted) <= 3 else []
        scored += [-row[target] for row, target in list(zip(rows, wanted[-1][1:]))[
            max(0, len(begin) - 1) :]]
    assert lab.windows.tolist() == wanted and {len(one) for one in wanted} == {48}
    lab.windows = lab.windows[:3]
    found = measure(lab, folder)
    assert found["tokens_scored"] == len(scored) == 3 * (48 - max(1, len(begin)))
    assert math.log(found["perplexity"]) == pytest.approx(math.fsum(scored) / len(scored))
    assert found["kld"]["max"] == 0 == found["kld"]["mean"]


def test_what_windows_begin_with_is_told_and_makes_another_run(small, lab, tmp_path):
    tokens = ["<|im_start|>", "<|im_end|>"]
    folder = add_begin(small, tokens, tmp_path / "model")
    plain, begun = lab(), lab("--model", folder, "--output-dir", tmp_path / "begun")
    assert (plain.begin, plain.unscored, begun.unscored) == ([], 1, 2)
    assert plain.head["inputs"]["window_begin"] == ""
    assert begun.head["inputs"]["window_begin"] == "".join(tokens)
    for build, said in (plain, False), (begun, True):
        caption = quant_lab.render_tables(build.head, []).split("\n\n")[0]
        assert ("".join(tokens) in caption) == said
        assert build.windows.shape[1] == 64
    for place, token in enumerate(tokens):
        wanted = begun.tokenizer.convert_tokens_to_ids(token)
        assert set(begun.windows[:, place].tolist()) == {wanted}


def test_logits_are_never_whole(monkeypatch):
    """Watch each tensor made: a window's logits pass in slices, and are so compared."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    model, tokenizer = Constant(torch.zeros(20_000).half()), SimpleNamespace()
    tokenizer.decode = lambda *_, **__: ""
    lab = SimpleNamespace(options=quant_lab.Options(), device="cpu", model_folder=None,
                          windows=torch.zeros(1, 400, dtype=torch.long), unscored=1,
                          prompts=[], tokenizer=tokenizer)
    monkeypatch.setattr(quant_lab, "place_model", lambda *_: model)
    monkeypatch.setattr(quant_lab, "complete_prompts", lambda *_: [[1]] * 8)
    with Largest() as largest:
        lab.reference = reference = quant_lab.measure_reference(lab)
        found = quant_lab.measure_quality(model, lab)
    assert found["kld"]["tokens"] == found["tokens_scored"] == 399
    assert sum(x.nbytes for x in reference.states) == 399 * 3 * 2, "kept as they came"
    assert 0 < largest.numel <= 128 * 20_000


def test_the_reference_keeps_its_head_and_hidden_states_alone(small):
    """Count bytes: of the layers nothing stays, of the text one vector a token."""
    lab = place_lab(small, torch.arange(500), window=32, new_tokens=2)
    reference = quant_lab.measure_reference(lab)
    assert sum(x.nbytes for x in reference.states) == 15 * 31 * 128 * 4
    whole = load_emulated(small, "float32")
    layers = sum(x.nbytes for x in whole.model.layers.parameters())
    assert reference.head.get_memory_footprint() <= whole.get_memory_footprint() - layers


def tensor_bytes(file):
    """Return bytes of a safetensors file by its own header, and of its tensors by name."""
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0]
             for name, entry in header.items()}
    return 8 + length + sum(sizes.values()), sizes


def expected_bytes(config, label):
    """Return bytes of a Qwen2 checkpoint's tensors from its shape alone."""
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
    labels = [*LABELS, CONTROL]
    sizes = {label: expected_bytes(config, label) for label in labels}
    published = dict(zip(labels, (
        988_097_536, 630_899_272, 456_988_608, 630_898_432, 456_988_608)))
    assert sizes == pytest.approx(published, rel=1e-3)


def test_demo_never_shows_what_it_scores():
    """Read the demo's files; a line of 40 characters or more must not be in both."""
    chats, text = (quant_lab.find_path(quant_lab.DEMO[name]).read_text("utf-8")
                   for name in ("calibration_data", "eval_text"))
    chats = [json.loads(line)["messages"] for line in chats.splitlines()]
    seen = {line.strip() for chat in chats for turn in chat
            for line in turn["content"].split("\n")}
    scored = {line.strip() for line in text.split("\n")}
    assert len(scored) > 300 and len(chats) > 100
    assert not [line for line in seen & scored if len(line) >= 40]


@pytest.mark.skipif(platform.python_version() != "3.11.7",
                    reason="the help of another Python is another text")
def test_demo_texts_are_made_of_pythons_help(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [
        "make_checkpoint.py", "--demo-texts", str(tmp_path / "demo")])
    load_by_path("make_checkpoint").main()
    made = {file.name: file.read_bytes() for file in (tmp_path / "demo").iterdir()}
    there = {file.name: file.read_bytes() for file in (ROOT / "tests" / "demo").iterdir()
             if file.is_file()}
    assert made == there and sorted(there) == ["chats.jsonl", "eval.txt"]


def test_the_tiny_model_trains_on_the_demos_chats_not_on_what_is_scored(
        tmp_path, monkeypatch):
    maker = load_by_path("make_checkpoint")
    scored = (ROOT / "tests" / "demo" / "eval.txt").read_text("utf-8")
    held_out = next(line for line in scored.split("\n") if len(line.strip()) >= 40)
    monkeypatch.setattr(maker, "docstrings", lambda folder: [
        f"Mine.\n    {held_out.strip()}", "Another."])
    documents = maker.python_documents()
    chats = (ROOT / "tests" / "demo" / "chats.jsonl").read_text("utf-8").splitlines()
    assert len(documents) >= 3 * len(chats)
    assert "Another." in documents and not [d for d in documents if "Mine." in d]
    monkeypatch.setattr(maker, "python_documents", lambda: documents[:40])
    monkeypatch.setattr("sys.argv", [
        "make_checkpoint.py", "--out", str(tmp_path), "--steps", "1", "--batch", "1",
        "--length", "16", "--device", "cpu", "--tokenizer", str(TINY)])
    maker.main()
    model, made = (json.loads((folder / "config.json").read_text())
                   for folder in (TINY, tmp_path))
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
        assert model[key] == made[key]


def test_tiny_model_fits_and_has_the_shape_it_should():
    config = json.loads((TINY / "config.json").read_text())
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 10e6
    assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == 0
    assert config["tie_word_embeddings"] is True and config["model_type"] == "qwen2"


@pytest.mark.parametrize("value, text", [
    (dict(value=1.35, low=1.01, high=1.80), "1.35 ± 0.40"),
    (dict(value=1.20, low=1.01, high=1.80), "1.20 (1.01–1.80)"),
    (dict(mean=20.0, low=0.0, high=41.4), "20.00 ± 20.70"),
    (dict(mean=3.0, low=0.0, high=41.4), "3.00 (0.00–41.40)"),
    (dict(value=1.0, low=0.9, high=1.1), "1.00 ± 0.10"),
    (dict(value=1.0, low=None, high=None), "1.00"), (12_345.678, "12,346"),
    (dict(value=1020.8, low=868.2, high=1173.4), "1,021 ± 153"),
    (dict(median=2.0, min=1.9, max=2.1, samples=[1.9, 2, 2.1]), "2.00 (1.90–2.10)"),
    (dict(median=2.0, min=1.0, max=4.0, samples=[1, 2, 4]), "1.00–4.00 noisy")])
def test_an_uneven_interval_is_shown_by_its_ends(value, text):
    row = quant_lab.ROW | dict(kld=value)
    assert quant_lab.render_cell(row, ("KLD", "kld", 2, 1)) == text


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not beside the project")
def test_real_tokenizer_and_wikitext():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "qwen2.5-0.5b-instruct")
    options = quant_lab.Options(
        eval_text=str(SHARED / "wikitext-2-raw" / "wiki.test.raw"),
        calibration_data=str(SHARED / "ultrachat" / "train_sft.jsonl"))
    windows, begin = quant_lab.load_evaluation(options, tokenizer, 32_768)
    assert windows.shape == (299_078 // 2048, 2048) and begin == []
    samples = quant_lab.load_calibration(options, tokenizer, 32_768)["input_ids"]
    assert len(samples) == 256 and max(map(len, samples)) <= 1024


@pytest.mark.gpu
def test_quality_fits_in_3_gb_above_the_weights(tmp_path):
    """Compare every position of the real vocabulary and window."""
    folder = make_small(tmp_path, hidden=128, vocab_size=151_936)
    lab = place_lab(folder, torch.arange(4096), window=2048, new_tokens=2, dtype="float16")
    lab.device = torch.device("cuda")
    model = quant_lab.place_model(folder, lab.options, lab.device)
    weights = torch.cuda.memory_allocated()
    lab.reference = quant_lab.measure_reference(lab)
    torch.cuda.reset_peak_memory_stats()
    found = quant_lab.measure_quality(model, lab)
    assert found["kld"]["mean"] == 0 and found["kld"]["tokens"] == 2 * 2047
    assert torch.cuda.max_memory_allocated() - weights < 3e9


@pytest.mark.gpu
def test_demo_on_the_gpu(run_script, tmp_path):
    run = run_script("--demo", "--device", "cuda", "--output-dir", tmp_path)
    assert run.code == 0, run.out + run.err
    results = run.names["RESULTS"]
    assert results["machine"]["device"] == "cuda"
    assert [row["status"] for row in results["variants"]] == ["ok"] * 4
    routes = ("16-bit, in registers", "tensor cores, in registers",
              "dequantized, tensor cores", "tensor cores, in registers")
    memory = results["machine"]["memory_bytes"]
    for row, route in zip(results["variants"], routes, strict=True):
        if torch.cuda.get_device_capability() >= (8, 9):
            assert row["runs_as"] == f"{route}, compiled"
        peak, token = row["peak_memory_bytes"], row["kv_bytes_per_token"]
        assert peak > row["weights_memory_bytes"] > 0 and token == 4 * 2 * 2 * 64 * 2
        assert row["kv_tokens"] == int((0.9 * memory - peak) / token)
        assert [one["error"] for one in row["prefill"]] == [None] * 3
