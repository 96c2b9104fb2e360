"""Compare figures with computations written another way."""

import json
import math
import platform
import shutil
import struct
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SHARED, TINY, load_by_path, load_emulated, make_small

import quant_lab


class Constant(torch.nn.Module):
    """Say the same logits whatever the input, in the interface of a language model."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)
        self.device = logits.device

    def forward(self, ids, use_cache=None):
        return SimpleNamespace(logits=self.logits.expand(*ids.shape, -1))


def score(model, ids, window, max_windows=0, visit=lambda number, logits: None):
    """Return losses of token ids in windows."""
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


def place_lab(folder, ids, **changes):
    """Return a lab of a model's folder and token ids [n], in float32 on the CPU."""
    options = quant_lab.Options(**dict(model=str(folder), dtype="float32") | changes)
    folder, tokenizer, context = quant_lab.open_model(options)
    return SimpleNamespace(options=options, device=torch.device("cpu"), eval_ids=ids,
                           model_folder=folder, tokenizer=tokenizer)


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


def rank(values, share):
    """Return a quantile by linear interpolation between sorted values."""
    values, place = sorted(values), share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


@pytest.fixture(scope="module")
def pair(small, tmp_path_factory):
    """Return folders of the small model and of one whose weights differ a little."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("pair") / "noisy"
    shutil.copytree(small, folder)
    torch.manual_seed(3)
    tensors = {name: (x + 0.03 * x.std() * torch.randn_like(x)) if x.dim() > 1 else x
               for name, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return small, folder


@pytest.mark.parametrize("kld_tokens, max_windows", [(8192, 2), (31, 0), (2, 0)])
def test_quality_equals_plain_loops_in_float64(pair, kld_tokens, max_windows):
    """Compute losses, KL divergence, agreement of whole logits by plain loops."""
    ids = torch.randint(0, 2000, (3 * 40 + 20,), generator=torch.Generator().manual_seed(5))
    found = measure(place_lab(pair[0], ids, window=40, kld_tokens=kld_tokens,
                              max_windows=max_windows, new_tokens=2), pair[1])
    models = [load_emulated(folder, "float32") for folder in pair]
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


def test_a_model_against_itself_does_not_differ(small):
    found = measure(place_lab(small, torch.arange(500), window=32, new_tokens=6), small)
    one = dict(value=1.0, low=1.0, high=1.0)
    assert found["perplexity_ratio"] == one
    assert found["top1_agreement"] == {name: 100.0 for name in one}
    assert {found["kld"].pop(k) for k in ("mean", "low", "high", "median", "p99")} == {0.0}
    assert [c["same_tokens"] for c in found["divergence"]["completions"]] == [6] * 8
    assert found["divergence"]["mean"] == 6


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
    lab = place_lab(small, torch.arange(64))
    model = load_emulated(small, "float32")
    assert model.generation_config.do_sample and model.generation_config.temperature < 1
    assert model.generation_config.repetition_penalty > 1
    found = quant_lab.complete_prompts(model, lab.tokenizer, 12)
    assert found == [greedy(model, lab.tokenizer, p, 12) for p in quant_lab.PROMPTS]
    assert len(set(map(tuple, found))) > 1 and max(map(len, found)) == 12


def test_a_completion_ends_where_the_model_says(small):
    """Take the third token that comes as the end, and a list of ends as Qwen has it."""
    lab = place_lab(small, torch.arange(64))
    model = load_emulated(small, "float32")
    end = greedy(model, lab.tokenizer, quant_lab.PROMPTS[0], 3)[2]
    for ends in (end, [lab.tokenizer.eos_token_id, end]):
        model.generation_config.eos_token_id = ends
        found = quant_lab.complete_prompts(model, lab.tokenizer, 12)[0]
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
    assert divergence["mean"] == sum(same) / 8 and 0 < divergence["mean"] < 12
    assert divergence["low"] <= divergence["mean"] <= divergence["high"]


@pytest.mark.parametrize("mine, theirs, same", [
    ([1, 2, 3], [1, 2, 3], 9), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 2], 2),
    ([4], [1], 0), ([1, 4, 3], [1, 2, 3], 1)])
def test_a_completion_that_ends_sooner_differs_there(monkeypatch, mine, theirs, same):
    """Count all new tokens for completions that are the same to their common end."""
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: str(ids))
    model, ids = Constant(torch.zeros(9)), torch.zeros(8, dtype=torch.long)
    lab = SimpleNamespace(options=quant_lab.Options(window=4, new_tokens=9), device=None,
                          eval_ids=ids, model_folder=None, tokenizer=tokenizer)
    monkeypatch.setattr(quant_lab, "place_model", lambda *_: model)
    monkeypatch.setattr(quant_lab, "complete_prompts", lambda *_: [theirs] * 8)
    lab.reference = quant_lab.measure_reference(lab)
    monkeypatch.setattr(quant_lab, "complete_prompts", lambda *_: [mine] * 8)
    found = quant_lab.measure_quality(model, lab)["divergence"]
    assert [one["same_tokens"] for one in found["completions"]] == [same] * 8
    assert {one["completion"] for one in found["completions"]} == {str(mine)}
    assert found["mean"] == same


def test_prompts_are_eight_and_fit_every_context():
    assert len(set(quant_lab.PROMPTS)) == 8 and max(map(len, quant_lab.PROMPTS)) < 100


@pytest.mark.parametrize("windows, low, high", [(12, 1, 40), (30, 5, 6), (29, 1, 9)])
def test_intervals_agree_with_a_bootstrap(windows, low, high):
    """Resample whole windows, of unequal size, whose tokens go together."""
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


@pytest.mark.parametrize("together, least, naive_most", [(0.3, 0.92, 0.88), (0.7, 0.82, 0.65)])
def test_intervals_hold_for_windows_that_resemble_their_neighbours(
        together, least, naive_most):
    """Count how often an interval holds what it should.

    On WikiText-2 neighbouring windows correlate by 0.7 in their losses, by up to 0.3 in
    the difference to the reference. Taken as independent, they would promise too much.
    """
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


def test_logits_are_never_whole_in_more_than_16_bits(monkeypatch):
    """Watch each tensor made: a window's logits pass in slices, and are so compared."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype in (torch.float32, torch.float64):
                self.numel = max(self.numel, out.numel())
            return out

    model, ids = Constant(torch.zeros(20_000).half()), torch.zeros(400, dtype=torch.long)
    options = quant_lab.Options(window=400)
    tokenizer = SimpleNamespace(decode=lambda *_, **__: "")
    lab = SimpleNamespace(options=options, device=None, eval_ids=ids, model_folder=None,
                          tokenizer=tokenizer)
    monkeypatch.setattr(quant_lab, "place_model", lambda *_: model)
    monkeypatch.setattr(quant_lab, "complete_prompts", lambda *_: [[1]] * 8)
    with Largest() as largest:
        lab.reference = reference = quant_lab.measure_reference(lab)
        found = quant_lab.measure_quality(model, lab)
    assert found["kld"]["tokens"] == found["tokens_scored"] == 399
    assert sum(x.nbytes for x in reference.logits) == 399 * 20_000 * 2, "kept as they came"
    assert 0 < largest.numel <= 128 * 20_000


def test_the_logits_kept_have_a_budget(small, monkeypatch):
    monkeypatch.setattr(quant_lab, "LOGITS_BYTES", 30 * 2048)
    lab = place_lab(small, torch.arange(500), window=32, new_tokens=2)
    assert sum(map(len, quant_lab.measure_reference(lab).logits)) == 7
    assert measure(lab, small)["kld"]["tokens"] == 7


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
    sizes = {label: expected_bytes(config, label) for label in quant_lab.VARIANTS}
    published = dict(zip(quant_lab.VARIANTS, (
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
    there = {file.name: file.read_bytes() for file in (ROOT / "tests" / "demo").iterdir()}
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
    (dict(value=1.35, low=1.01, high=1.80), "1.35 (1.01–1.80)"),
    (dict(mean=20.0, low=0.0, high=41.4), "20.00 ± 20.70"),
    (dict(mean=3.0, low=0.0, high=41.4), "3.00 (0.00–41.40)"),
    (dict(value=1.0, low=0.9, high=1.1), "1.00 ± 0.10"),
    (dict(value=1.0, low=None, high=None), "1.00"), (12_345.678, "12,346"),
    (dict(median=2.0, min=1.9, max=2.1, samples=[1.9, 2, 2.1]), "2.00 (1.90–2.10)"),
    (dict(median=2.0, min=1.0, max=4.0, samples=[1, 2, 4]), "1.00–4.00 noisy")])
def test_an_uneven_interval_is_shown_by_its_ends(value, text):
    assert quant_lab.format_figure(value, 2) == text


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not beside the project")
def test_real_tokenizer_and_wikitext():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "qwen2.5-0.5b-instruct")
    options = quant_lab.Options(
        eval_text=str(SHARED / "wikitext-2-raw" / "wiki.test.raw"),
        calibration_data=str(SHARED / "ultrachat" / "train_sft.jsonl"))
    assert len(quant_lab.load_evaluation(options, tokenizer, 32_768)) == 299_078
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
    for row in results["variants"]:
        assert row["runs_as"].endswith("· compiled") and row["compile_seconds"] > 0
        assert row["peak_memory_bytes"] > row["weights_memory_bytes"] > 0
        assert "in registers" in row["runs_as"]
