"""Run the lab end to end: the demo, one folder's conditions, failures, the hub."""

import json
import math
import os
import re
import shutil
import statistics
import time
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from architectures import make
from conftest import (
    COMMITTED, CONTROL, LABELS, ROOT, TINY, make_small, quick_words, read_strict, run_all,
    run_process, start_beside)
from hub import serve
from test_architectures import score_plainly
from test_figures import expected_bytes, quantile_of_t, tensor_bytes

import quant_lab

# The demo, run once.


def test_demo_gives_four_rows(demo):
    results = demo.results
    assert results["schema"] == quant_lab.SCHEMA and len(results["variants"]) == 4
    assert {"created", "command", "config", "machine", "versions", "inputs", "model_name",
            "base_model", "license", "advice"} <= set(results)
    assert {"device", "name", "memory_bytes", "driver", "threads", "gpus",
            "compute_capability"} == set(results["machine"])
    assert {"python", "torch", "transformers", "llmcompressor",
            "compressed_tensors"} <= set(results["versions"])
    for label, row in zip(LABELS, results["variants"]):
        assert (row["label"], row["status"], row["error"]) == (label, "ok", None)
        assert row["rtn_fallbacks"] == 0 and row["tokens_scored"] % 511 == 0
        assert row["checkpoint"] == f"checkpoints/{label}"
        assert len(row["latency_s"]["samples"]) == 5 == len(row["decode"][0]["tok_s"]["samples"])
        completions = row["divergence"]["completions"]
        assert len(completions) == 8 and completions[0]["completion"]
        assert len(row["window_losses"]) * 511 == row["tokens_scored"]
        assert row["kld"]["tokens"] == row["tokens_scored"] == 511 * len(row["kld"]["windows"])
        assert statistics.mean(row["kld"]["windows"]) == pytest.approx(row["kld"]["mean"])
        assert row["group_size"] == (128 if label == LABELS[2] else None)
        assert bool(row["smoothing"]) == (label == LABELS[3])
        assert row["notes"] == []
        for key, center in (("perplexity_interval", "value"), ("perplexity_ratio", "value"),
                            ("kld", "mean"), ("top1_agreement", "value")):
            interval = row[key]
            assert interval["low"] <= interval[center] <= interval["high"]
        packed = "16-bit" if label == LABELS[0] else "dequantized"
        assert row["runs_as"] == f"{packed}, not compiled"
        assert [entry["batch"] for entry in row["decode"]] == [1, 8]
        assert row["weights_memory_bytes"] == pytest.approx(row["weight_bytes"], rel=0.02)
        assert row["prompt_tokens"] == 512 and set(row) == set(quant_lab.ROW)
    assert demo.err == "" and "Traceback" not in demo.out


def test_demo_times_prompts_of_several_lengths_and_counts_room_for_a_cache(demo):
    config = read_strict(TINY / "config.json")
    size = config["hidden_size"] // config["num_attention_heads"]
    layers, heads = config["num_hidden_layers"], config["num_key_value_heads"]
    lengths = [n for n in (128, 512, 2048) if n <= config["max_position_embeddings"]]
    assert demo.results["config"]["prompt_lengths"] == lengths == [128, 512, 2048]
    for row in demo.results["variants"]:
        assert [one["prompt_tokens"] for one in row["prefill"]] == lengths
        assert [one["error"] for one in row["prefill"]] == [None] * 3
        times = [one["ttft_s"] for one in row["prefill"]]
        for one in times:
            assert len(one["samples"]) == 5 and one["median"] == sorted(one["samples"])[2]
            assert 0 < one["min"] == min(one["samples"]) <= one["max"] == max(one["samples"])
        assert 2 * times[0]["min"] < times[2]["min"], "of 16 times as many tokens"
        assert row["kv_bytes_per_token"] == layers * 2 * heads * size * 2
        assert row["kv_tokens"] is row["peak_memory_bytes"] is None, "of a CPU"


def test_demo_advises_by_four_goals(demo):
    results, rows = demo.results, {row["label"]: row for row in demo.results["variants"]}
    assert [one["goal"] for one in results["advice"]] == [
        "one user waiting", "many at once", "least memory", "nothing may change"]
    assert results["advice"] == quant_lab.advise(results)
    most = 1 + results["config"]["max_loss"] / 100
    qualified = {label for label, row in rows.items()
                 if label == LABELS[0] or row["perplexity_ratio"]["high"] <= most}
    assert LABELS[2] not in qualified and {LABELS[0], LABELS[3]} <= qualified
    for one in results["advice"]:
        assert set(one) == {"goal", "variant", "why", "ties"} and one["why"]
        assert {one["variant"], *one["ties"]} - {None} <= qualified
    memory, closest = results["advice"][2:]
    least = min(rows[label]["weights_memory_bytes"] for label in qualified)
    assert rows[memory["variant"]]["weights_memory_bytes"] <= 1.03 * least
    assert (closest["variant"], closest["ties"]) == (LABELS[3], [])


def test_demo_shows_each_variant_as_it_finishes_and_ends_with_the_advice(demo):
    out, rows = demo.out, demo.results["variants"]
    assert max(map(len, out.split("\n"))) <= 120
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out)
    blocks = [quant_lab.render_result(label, demo.results) for label in LABELS]
    ends = [out.index(block) + len(block) for block in blocks]
    for end, label in zip(ends, LABELS[1:]):
        assert end < out.index(label), "a block stands before anything of the next variant"
    rest = out[ends[-1]:]
    tables = quant_lab.render_tables(demo.results, rows)
    notes = quant_lab.render_notes(demo.results)
    advice = quant_lab.render_advice(demo.results, demo.folder / "checkpoints")
    assert -1 < rest.find(tables) < rest.find(notes) < rest.find("## Which to deploy")
    assert rest.rstrip().endswith(advice)
    pick, _ = quant_lab.choose_variant(demo.results)
    assert advice.endswith(f"    vllm serve {demo.folder / 'checkpoints' / pick}")


def test_demo_gives_the_committed_figures_on_the_committed_machine(demo):
    kept, here = read_strict(ROOT / "results" / "demo-cpu" / "results.json"), demo.results
    for part in ("machine", "versions"):
        for name, value in here[part].items():
            if name != "memory_bytes" and kept[part].get(name) != value:
                pytest.skip(f"{name} is {value}, not {kept[part].get(name)}")
    for row, wanted in zip(here["variants"], kept["variants"], strict=True):
        for key in ("label", "perplexity", "perplexity_interval", "perplexity_ratio", "kld",
                    "top1_agreement", "divergence", "window_losses", "weight_bytes"):
            assert row[key] == wanted[key], (row["label"], key)


def test_quantization_shows_in_the_demo(demo):
    base, fp8, w4, w8 = (row["perplexity"] for row in demo.results["variants"])
    assert abs(fp8 / base - 1) < 0.01 and abs(w8 / base - 1) < 0.03
    assert 1.015 < w4 / base < 1.3, "four bits show clearly"


def test_the_baseline_does_not_differ_from_itself(demo):
    """Two loads of the same weights, the logits of one by way of the file."""
    row = demo.results["variants"][0]
    assert row["perplexity_ratio"] == dict(value=1, low=1, high=1)
    assert row["top1_agreement"] == dict(value=100, low=100, high=100)
    tokens = row["tokens_scored"]
    assert row["kld"] == dict(mean=0, low=0, high=0, max=0, tokens=tokens,
                              windows=[0] * (tokens // 511))
    assert [row["divergence"][name] for name in ("median", "min", "max")] == [64] * 3


def test_kld_orders_the_demos_variants(demo):
    fp16, fp8, gptq, w8 = (row["kld"] for row in demo.results["variants"])
    assert fp16["mean"] <= w8["low"] and w8["high"] < fp8["low"]
    assert fp8["high"] < gptq["low"]


def test_the_control_has_gptqs_format_and_loses_more(demo, tmp_path):
    """Compare the two on the demo's model, by a KLD computed here."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ["--demo", "--device", "cpu", "--output-dir", str(tmp_path), "--variants", CONTROL]
    control = quant_lab.quantize_variant(CONTROL, quant_lab.set_up(words))
    gptq = demo.results["variants"][2]
    assert control["quantize_seconds"] < gptq["quantize_seconds"]
    assert control["weight_bytes"] == pytest.approx(gptq["weight_bytes"], rel=0.01)
    folders = [demo.folder / gptq["checkpoint"], tmp_path / control["checkpoint"]]
    formats = []
    for folder in folders:
        config = read_strict(folder / "config.json")["quantization_config"]
        weights = config["config_groups"]["group_0"]["weights"]
        formats.append([config["format"], *(
            weights[key] for key in ("num_bits", "group_size", "symmetric"))])
    assert formats[0] == formats[1] == ["pack-quantized", 4, 128, True]
    text = (ROOT / "tests" / "demo" / "eval.txt").read_text("utf-8")
    ids = AutoTokenizer.from_pretrained(TINY)(text, return_tensors="pt").input_ids[:, :1024]
    logits = []
    for folder in (TINY, *folders):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
        with torch.no_grad():
            logits.append(model(ids.view(-1, 256)).logits.double().log_softmax(-1))
    by_gptq, by_rounding = ((logits[0].exp() * (logits[0] - other)).sum(-1).mean().item()
                            for other in logits[1:])
    assert 0.03 < by_gptq < 0.9 * by_rounding


def test_sizes_are_those_of_the_tensors(demo):
    config = read_strict(TINY / "config.json")
    for row in demo.results["variants"]:
        file = demo.folder / row["checkpoint"] / "model.safetensors"
        counted, sizes = tensor_bytes(file)
        assert row["weight_bytes"] == counted == file.stat().st_size
        assert sum(sizes.values()) == expected_bytes(config, row["label"])
        assert "lm_head.weight" not in sizes, "the tied embedding is stored once"


def test_recipes_and_cards_travel_with_the_checkpoints(demo):
    modifiers = ((), ("QuantizationModifier",), ("GPTQModifier",),
                 ("SmoothQuantModifier", "GPTQModifier"))
    for row, names in zip(demo.results["variants"], modifiers):
        folder = demo.folder / row["checkpoint"]
        said = (folder / "recipe.yaml").read_text("utf-8") if names else ""
        assert re.findall(r"^ *(\w+Modifier):", said, re.M) == list(names)
        card = (folder / "README.md").read_text("utf-8")
        assert card == quant_lab.render_model_card(row, demo.results)


def test_checkpoints_say_what_they_are(demo):
    folder = demo.folder
    wanted = dict(zip(LABELS[1:], (
        ("float-quantized", "float", 8, "channel", None, 8),
        ("pack-quantized", "int", 4, "group", 128, None),
        ("int-quantized", "int", 8, "channel", None, 8))))
    for label in LABELS:
        files = {file.name for file in (folder / "checkpoints" / label).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
        config = json.loads((folder / "checkpoints" / label / "config.json").read_text())
        if label == LABELS[0]:
            assert "quantization_config" not in config
            continue
        quantization = config["quantization_config"]
        group, = quantization["config_groups"].values()
        weights, inputs = group["weights"], group["input_activations"]
        assert quantization["ignore"] == ["lm_head"] and group["targets"] == ["Linear"]
        assert (quantization["format"], weights["type"], weights["num_bits"],
                weights["strategy"], weights["group_size"],
                inputs and inputs["num_bits"]) == wanted[label]
        assert not inputs or (inputs["dynamic"], inputs["strategy"]) == (True, "token")
        if label == LABELS[3]:
            assert weights["actorder"] is None
    assert not list((folder / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("number", [0, 2, 3])
def test_perplexity_as_transformers_computes_it(demo, number):
    """The library's own loss of the first windows, on the checkpoint as anyone loads it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    row = demo.results["variants"][number]
    place = demo.folder / row["checkpoint"]
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float16)
    text = (ROOT / "tests" / "demo" / "eval.txt").read_text("utf-8")
    ids = AutoTokenizer.from_pretrained(place)(text, return_tensors="pt").input_ids
    assert row["tokens_scored"] == ids.shape[1] // 512 * 511
    with torch.no_grad():
        losses = [model(part, labels=part).loss.item() for part in ids.split(512, 1)[:6]]
    assert row["window_losses"][:6] == pytest.approx(losses, rel=1e-3)
    assert row["perplexity"] == pytest.approx(
        math.exp(statistics.mean(row["window_losses"])), rel=1e-9)


def test_summary_is_that_of_the_results_with_completions_below_each_other(demo):
    summary = (demo.folder / "summary.md").read_text(encoding="utf-8")
    assert summary == quant_lab.render_summary(demo.results)
    rows = demo.results["variants"]
    for number, prompt in enumerate(quant_lab.PROMPTS):
        block = summary.partition(f"**{prompt}**\n\n")[2].partition("\n\n")[0]
        said = " ".join(block.replace("\xa0", " ").split()).split("- 0")[1:]
        for row, text in zip(rows, said, strict=True):
            one = row["divergence"]["completions"][number]
            head, _, found = text.partition(": ")
            assert head == f"{row['label'][1:]}, {one['same_tokens']} tokens the same"
            assert found.strip().strip("`") == " ".join(
                quant_lab.one_line(one["completion"]).replace("`", "'").split())


def test_tokenizer_travels_with_the_checkpoint(demo):
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "What is a list?"}]
    wanted = AutoTokenizer.from_pretrained(TINY).apply_chat_template(chat, tokenize=False)
    for row in demo.results["variants"]:
        tokenizer = AutoTokenizer.from_pretrained(demo.folder / row["checkpoint"])
        assert tokenizer.apply_chat_template(chat, tokenize=False) == wanted


# A folder holds results of one set of conditions, and a run may stop after any cell.


def read_rows(folder):
    return read_strict(folder / "results.json")["variants"]


def read_all(folder):
    """Return the content of all files of an output folder but its log."""
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*")
            if file.is_file() and file.name != "log.txt"}


def refused(lab, capsys, finished, *names):
    """Say whether a run into the folder is refused by a line with these names."""
    before = read_all(finished)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        lab()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1, said
    for name in ("--output-dir", "--fresh", *names):
        assert str(name) in said
    assert read_all(finished) == before
    return said


def alter(file, **changes):
    """Change what a results.json says of its conditions."""
    results = read_strict(file)
    for part, names in changes.items():
        results[part] |= names
    file.write_text(json.dumps(results), encoding="utf-8")


@pytest.mark.parametrize("words", [
    ["--max-windows", 6], ["--dampening", 0.02], ["--seed", 1], ["--repeats", 3],
    ["--batch-sizes", 1, 2], ["--prompt-lengths", 9], ["--dtype", "bfloat16"],
    ["--plain-text"]],
    ids=lambda words: words[0])
def test_a_changed_option_is_refused(lab, capsys, finished, words):
    said = refused(lambda: lab(*words), capsys, finished, words[0])
    assert re.search(rf" {words[0]} was .+, is .+; another keeps, --fresh drops it$", said)


def test_fresh_forgets_what_other_options_made(run_script, quick, finished):
    words = [*quick, "--variants", *LABELS[:2], "--max-windows", 6]
    assert run_script(*words).code == 2
    (finished / "checkpoints" / "step-1000").mkdir()
    run = run_script(*words, "--fresh")
    assert run.code == 0, run.out + run.err
    results = read_strict(finished / "results.json")
    assert results["config"]["max_windows"] == 6
    assert [(row["label"], len(row["window_losses"])) for row in results["variants"]] == [
        (label, 6) for label in LABELS[:2]]
    assert sorted(os.listdir(finished / "checkpoints")) == [*LABELS[:2], "step-1000"]


def test_a_changed_model_text_or_chat_file_is_refused(lab, capsys, finished, tmp_path, texts):
    """Another path is refused, too, as another option."""
    words = ["--eval-text", tmp_path / "eval.txt", "--calibration-data",
             tmp_path / "chats.jsonl", "--model", tmp_path / "model"]
    model = make_small(tmp_path / "model", hidden=128)
    for name in ("eval.txt", "chats.jsonl"):
        shutil.copy(texts / name, tmp_path)
    said = refused(lambda: lab(*words), capsys, finished)
    assert str(model) in said or str(tmp_path) in said
    rows = run_all(lab(*words, "--fresh", "--variants", LABELS[0]))["variants"]
    assert rows[0]["status"] == "ok"
    for name, change in (
            ("eval", lambda: (tmp_path / "eval.txt").write_text("Other words hold. " * 200)),
            ("chats", lambda: (tmp_path / "chats.jsonl").write_text(
                (texts / "chats.jsonl").read_text().replace("square", "double"))),
            ("model", lambda: make_small(model, hidden=128, initializer_range=0.1))):
        kept = {file: file.read_bytes() for file in tmp_path.rglob("*")
                if file.is_file() and finished not in file.parents}
        change()
        refused(lambda: lab(*words, "--variants", LABELS[0]), capsys, finished, name)
        for file, content in kept.items():
            file.write_bytes(content)
    assert run_all(lab(*words, "--variants", LABELS[0]))["variants"] == rows


class Clock(datetime):
    """A clock whose next day comes when it is told, or each time that it is looked at."""
    days, step = 0, 0

    @classmethod
    def now(cls, tz=None):
        cls.days += cls.step
        return datetime(2026, 7, 26, tzinfo=tz) + timedelta(days=cls.days)


@pytest.fixture
def dated(small, tmp_path, monkeypatch):
    """A model whose chat template begins with today's date, as Llama 3's; its clock."""
    import transformers.utils.chat_template_utils as templates

    folder = shutil.copytree(small, tmp_path / "dated")
    file = folder / "chat_template.jinja"
    file.write_text("Today is {{ strftime_now('%d %b %Y') }}.\n" + file.read_text())
    clock = type("Clock", (Clock,), {})
    monkeypatch.setattr(templates, "datetime", clock)
    return SimpleNamespace(folder=folder, clock=clock)


def test_a_template_with_todays_date_is_refused_on_another_day(lab, capsys, dated):
    words = ["--model", dated.folder, "--variants", LABELS[0]]
    rows = run_all(lab(*words))["variants"]
    assert run_all(lab(*words))["variants"] == rows, "on the same day it goes on"
    output = lab(*words).output
    dated.clock.days = 1
    refused(lambda: lab(*words), capsys, output, "prompts_in_the_chat_template")


def test_reference_and_variants_see_the_same_prompts(lab, dated, monkeypatch):
    """The day changes each time that the template is rendered."""
    real, seen = quant_lab.complete_prompts, []

    def note(model, lab):
        seen.append([ids.tolist() for ids in lab.prompts])
        return real(model, lab)

    monkeypatch.setattr(quant_lab, "complete_prompts", note)
    dated.clock.step = 1
    build = lab("--model", dated.folder, "--variants", LABELS[1])
    base, row = run_all(build)["variants"]
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2]
    first, second = (build.tokenizer.decode(ids[0][:20]) for ids in seen[0][:2])
    assert first.startswith("Today is") and first[:20] != second[:20], "it did change"
    assert base["divergence"]["min"] == 4 and base["kld"]["mean"] == 0


@pytest.mark.parametrize("part, name, value", [
    ("machine", "name", "Tesla T4"), ("machine", "threads", 64), ("machine", "driver", "1.2"),
    ("machine", "compute_capability", "7.5"),
    ("versions", "torch", "2.0.0"), ("versions", "transformers", "4.0.0")])
def test_another_machine_or_version_is_refused(lab, capsys, finished, part, name, value):
    alter(finished / "results.json", **{part: {name: value}})
    said = refused(lab, capsys, finished, name, value)
    assert f": {name} was {value}, is " in said


def test_another_number_of_threads_is_refused(lab, capsys, finished):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        refused(lab, capsys, finished, "threads", threads, threads + 1)
    finally:
        torch.set_num_threads(threads)


def test_an_edited_recipe_is_measured_again_where_it_is_asked_for(
        lab, finished, monkeypatch):
    """Keep its row in a run of others, and all other rows."""
    edited = quant_lab.VARIANTS[LABELS[2]]._replace(recipe=lambda m, o: [
        m.GPTQModifier(scheme="W4A16", block_size=64, **quant_lab.LINEAR)])
    monkeypatch.setitem(quant_lab.VARIANTS, LABELS[2], edited)
    before = json.loads((finished / "results.json").read_text("utf-8"))["variants"]
    rows, measured = {row["label"]: row for row in before}, []
    monkeypatch.setattr(quant_lab, "measure_row", lambda label, _: (
        measured.append(label) or rows[label]))
    for asked, wanted in (LABELS[1:2], []), (LABELS[1:3], LABELS[2:3]):
        build = lab("--variants", *asked)
        assert build.rows == rows, "until it is measured again, the row stays"
        run_all(build)
        assert measured == wanted


@pytest.mark.parametrize("content", [
    "", "[]", "{ cut off", '{"schema": 1, "variants": []}', "[" * 100_000, "\x00"])
def test_results_that_cannot_be_read_are_refused(lab, capsys, finished, content):
    (finished / "results.json").write_text(content)
    refused(lab, capsys, finished)


def test_results_cut_off_are_refused(lab, capsys, finished):
    content = (finished / "results.json").read_bytes()
    (finished / "results.json").write_bytes(content[: len(content) // 2])
    refused(lab, capsys, finished)


def test_what_may_differ_is_not_refused(lab, finished):
    """Which variants, where, the loss that is accepted, and the memory of the machine."""
    before = read_rows(finished)
    alter(finished / "results.json", machine=dict(memory_bytes=1))
    for words in (["--variants", LABELS[1]], ["--variants", LABELS[0]], [],
                  ["--max-loss", 7]):
        assert run_all(lab(*words))["variants"] == before
    moved = finished.with_name("moved")
    finished.rename(moved)
    assert run_all(lab("--output-dir", moved))["variants"] == before == read_rows(moved)


def test_checkpoints_of_other_options_are_not_taken(lab, finished):
    before, wanted = read_all(finished), read_rows(finished)[2]
    (finished / "results.json").unlink()
    words = ["--variants", LABELS[2], "--calibration-samples", 2]
    _, row = run_all(lab(*words))["variants"]
    weights = Path("checkpoints", LABELS[2], "model.safetensors")
    assert read_all(finished)[weights] != before[weights] and row["kld"] != wanted["kld"]


def test_another_max_loss_measures_nothing_again_and_changes_the_advice(
        run_script, quick, finished, texts, tmp_path):
    """FP8 raises perplexity a little: under 0 % it does not qualify, under 1,000 % it does."""
    (tmp_path / "longer.txt").write_text((texts / "eval.txt").read_text("utf-8") * 2)
    words = [*quick, "--eval-text", tmp_path / "longer.txt", "--variants", LABELS[1]]
    found = {}
    for most, fresh in ((0, ["--fresh"]), (1000, [])):
        start = time.time_ns()
        run = run_script(*words, "--max-loss", most, *fresh)
        assert run.code == 0, run.out + run.err
        assert ("  quantizing" in run.out) == bool(fresh), "the second measures nothing"
        results = read_strict(finished / "results.json")
        assert results["config"]["max_loss"] == most
        assert results["advice"] == quant_lab.advise(results)
        weights = finished / "checkpoints" / LABELS[1] / "model.safetensors"
        assert (weights.stat().st_mtime_ns > start) == bool(fresh)
        assert f"{most:g} % allowed" in run.out
        assert run.out.rstrip().endswith(
            quant_lab.render_advice(results, finished / "checkpoints"))
        found[most] = results
    assert found[0]["variants"] == found[1000]["variants"], "rows are those of before"
    assert 0 < quant_lab.find_loss(found[0]["variants"][1]) < 1000
    for most, label in (0, LABELS[0]), (1000, LABELS[1]):
        memory, closest = found[most]["advice"][2:]
        assert memory["variant"] == label == quant_lab.choose_variant(found[most])[0]
        assert closest["variant"] == label


def test_prompts_longer_than_the_context_are_left_out(lab):
    build = lab("--variants", LABELS[0], "--prompt-lengths", 5000, 9, 2048, 2049)
    row, = run_all(build)["variants"]
    assert [one["prompt_tokens"] for one in row["prefill"]] == [9, 2048]
    assert read_strict(build.output / "results.json")["config"]["prompt_lengths"] == [9, 2048]


def test_no_prompt_within_the_context_is_no_fault(lab):
    row, = run_all(lab("--variants", LABELS[0], "--prompt-lengths", 5000))["variants"]
    assert row["prefill"] == [] and row["latency_s"]["median"] > 0


@pytest.mark.parametrize("card, base, licence", [
    ("---\nlicense: apache-2.0\nbase_model: Qwen/Qwen2.5-0.5B\n---\n# A model\n",
     "Qwen/Qwen2.5-0.5B", "apache-2.0"),
    ("---\nlicense: mit\n---\n", None, "mit"),
    ("---\nbase_model:\n- a/b\n- c/d\n---\n", ["a/b", "c/d"], None),
    ("# No front matter\n", None, None), ("---\nlicense: [\n---\n", None, None),
    (b"\xff\xfe\x00", None, None), (None, None, None)])
def test_licence_and_base_model_are_those_of_the_models_card(
        lab, small, tmp_path, card, base, licence):
    yaml = pytest.importorskip("yaml")
    folder = shutil.copytree(small, tmp_path / "tuned")
    if card:
        (folder / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    build = lab("--model", folder, "--variants", LABELS[1])
    wanted = dict(model_name="tuned", base_model=base, license=licence)
    assert wanted.items() <= build.head.items()
    results = run_all(build)
    assert wanted.items() <= read_strict(build.output / "results.json").items()
    for row in results["variants"]:
        assert row["status"] == "ok", row["error"]
        text = (build.output / row["checkpoint"] / "README.md").read_text("utf-8")
        head = yaml.safe_load(text.split("---\n")[1])
        assert (head.get("base_model"), head.get("license")) == (base, licence)
        assert "Licence and uses are those of the original. " in " ".join(text.split())
        assert "base_model_relation" not in head, "it is none of the base model itself"


def test_a_run_may_stop_after_any_cell(lab):
    """What there is by then is whole: results, summary, picture and cards."""
    build = lab("--variants", *LABELS[:3])
    for count, label in enumerate(LABELS[:3], 1):
        quant_lab.run_variant(label, build)
        results = read_strict(build.output / "results.json")
        assert [row["label"] for row in results["variants"]] == LABELS[:count]
        assert {row["status"] for row in results["variants"]} == {"ok"}
        summary = (build.output / "summary.md").read_text(encoding="utf-8")
        assert summary == quant_lab.render_summary(results)
        assert (build.output / "summary.png").read_bytes()[:4] == b"\x89PNG"
        (build.output / "summary.png").unlink()
        for row in results["variants"]:
            card = build.output / row["checkpoint"] / "README.md"
            assert card.read_text("utf-8") == quant_lab.render_model_card(row, results)
    assert not list(build.output.rglob("*.partial"))


def test_adding_the_control_measures_nothing_again(run_script, quick, finished):
    before = read_rows(finished)
    run = run_script(*quick, "--variants", *LABELS, CONTROL)
    rows = read_rows(finished)
    assert run.code == 0 and rows[:4] == before
    assert (rows[4]["label"], rows[4]["status"]) == (CONTROL, "ok")


def test_a_new_entry_only_adds_its_row(lab, finished, monkeypatch):
    """A recipe is one entry, also in a finished folder."""
    before = read_rows(finished)
    monkeypatch.setitem(quant_lab.VARIANTS, "mine", quant_lab.Variant("W8A16"))
    rows = run_all(lab("--variants", "mine"))["variants"]
    assert rows[:4] == before and rows == read_rows(finished)
    assert [(row["label"], row["status"]) for row in rows[4:]] == [("mine", "ok")]
    assert run_all(lab())["variants"] == rows, "it stays where it is not asked for"


# Recipes on request: each is measured right, or its row says why it is not.


REQUESTED = {
    "fp8_static": quant_lab.Variant("FP8", calibrated=True),
    "w8a16": quant_lab.VARIANTS["w8a16"], "fp8_block": quant_lab.VARIANTS["fp8_block"],
    "w4a16_asym": quant_lab.Variant("W4A16_ASYM"), "nvfp4a16": quant_lab.Variant("NVFP4A16")}


def test_a_row_stays_while_its_entry_is_away(lab, finished, monkeypatch):
    variant = quant_lab.Variant("FP8_DYNAMIC", quant_lab.VARIANTS[LABELS[1]].recipe)
    for present in (True, False, True):
        with monkeypatch.context() as patch:
            if present:
                patch.setitem(quant_lab.VARIANTS, "mine", variant)
            build = lab("--variants", "mine" if present else LABELS[1])
            quant_lab.run_variant("mine" if present else LABELS[1], build)
            assert "mine" in build.rows
    assert [row["label"] for row in read_rows(build.output)][-1] == "mine"


def run_words(folder, model, texts, *words):
    """Run the quick lab into a folder; return it, with its rows."""
    lab = quant_lab.set_up([str(word) for word in (
        *quick_words(model, texts), "--max-windows", 4, "--output-dir", folder, *words)])
    run_all(lab)
    return lab


@pytest.fixture(scope="module")
def requested(small, texts, tmp_path_factory, quick_collection):
    """Run the recipes on request, one that cannot be built, and AWQ, which wants a GPU."""
    folder = tmp_path_factory.mktemp("requested")
    with pytest.MonkeyPatch.context() as patch:
        for label, variant in {"broken": quant_lab.Variant("NOPE"), **REQUESTED}.items():
            patch.setitem(quant_lab.VARIANTS, label, variant)
        return run_words(folder, small, texts, "--variants", "broken", "awq", *REQUESTED)


def check_plainly(row, model, folder, texts, rel=2e-3):
    """Hold perplexity and KLD of a checkpoint to those that plain transformers gives."""
    losses, klds = [], []
    wanted, ids = score_plainly(model, texts)
    found, _ = score_plainly(folder, texts)
    for window in range(4):
        p, q, scored = wanted[window], found[window], ids[window]
        losses.append(-q[range(len(scored)), scored].mean().item())
        klds.append((p.exp() * (p - q)).sum(-1).mean().item())
    assert row["window_losses"] == pytest.approx(losses, rel=rel)
    assert row["perplexity"] == pytest.approx(math.exp(statistics.mean(losses)), rel=rel)
    assert row["kld"]["windows"] == pytest.approx(klds, rel=rel)
    assert row["kld"]["mean"] == pytest.approx(statistics.mean(klds), rel=rel)


def unpack_plainly(small, checkpoint, folder):
    """Write the model with the weights of a checkpoint as plain transformers unpacks them.

    To bfloat16, whatever the dtype: float16 activations could not be multiplied by them.
    That rounds them once more, which the tolerance has to allow for.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float16)
    packed = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    packed(torch.zeros(1, 1, dtype=torch.long))
    for name, module in packed.named_modules():
        if hasattr(module, "quantization_scheme"):
            model.get_submodule(name).weight.data = module.weight.data.half()
    model.generation_config = type(model.generation_config)()
    model.save_pretrained(folder)
    shutil.copy(small / "tokenizer.json", folder)
    shutil.copy(small / "tokenizer_config.json", folder)
    return folder


@pytest.mark.parametrize("label", REQUESTED)
def test_a_format_without_a_kernel_runs_emulated_and_right(
        requested, small, texts, tmp_path, label):
    row = requested.rows[label]
    assert row["status"] == "ok", row["error"]
    assert row["runs_as"] == "emulated in 16 bits, not compiled"
    folder = requested.output / row["checkpoint"]
    if label == "nvfp4a16":
        check_plainly(row, small, unpack_plainly(small, folder, tmp_path), texts, rel=2e-2)
    else:
        check_plainly(row, small, folder, texts)
    assert row["kld"]["mean"] > 1e-3, "rounding shows"
    base = requested.rows[LABELS[0]]
    assert base["runs_as"] == "16-bit, not compiled", "that variant alone"
    assert row["weight_bytes"] < base["weight_bytes"]
    assert row["weights_memory_bytes"] >= base["weights_memory_bytes"], "as held"


def test_a_recipe_that_cannot_be_built_is_a_row_with_its_reason(requested):
    row = requested.rows["broken"]
    assert row["status"] == "failed" and "scheme" in row["error"]
    assert len(row["error"]) < 250 and "\n" not in row["error"]
    log = (requested.output / "log.txt").read_text("utf-8")
    assert "Traceback" in log
    ends = [requested.rows[label]["status"] for label in (LABELS[0], *REQUESTED)]
    assert ends.count("ok") >= len(REQUESTED), "others go on"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_awq_without_a_gpu_is_a_row_with_its_reason(requested):
    row = requested.rows["awq_w4a16"]
    assert row["status"] == "failed" and row["perplexity"] is None
    assert "accelerator" in row["error"] or "GPU" in row["error"]


def test_awq_that_overflows_in_float16_says_so_and_runs_in_bfloat16(
        texts, tmp_path, quick_collection, monkeypatch):
    """Its grid search adds squared errors in the dtype of the model (llm-compressor#2213)."""
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM
    monkeypatch.setattr(IntermediatesCache, "pin_memory", lambda *_: None)  # Wants a GPU.
    folder = make_small(tmp_path / "model", hidden=64)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[0].mlp.down_proj.weight.data *= 200
    model.save_pretrained(folder)
    words = [folder, texts, "--variants", "awq", "--dtype"]
    row = run_words(tmp_path / "half", *words, "float16").rows["awq_w4a16"]
    assert row["status"] == "failed" and "No finite loss" in row["error"]
    row = run_words(tmp_path / "out", *words, "bfloat16").rows["awq_w4a16"]
    assert row["status"] == "ok", row["error"]


# Widths, experts, vision towers: what is quantized, and what the row says of it.


@pytest.mark.parametrize("hidden, words, size", [
    (96, [], 32), (64, [], 64), (128, [], 128), (128, ["--group-size", 32], 32)])
def test_the_largest_group_that_divides_all_widths(
        texts, tmp_path, quick_collection, hidden, words, size):
    yaml = pytest.importorskip("yaml")
    model = make_small(tmp_path / "model", hidden=hidden)
    build = run_words(tmp_path / "out", model, texts, "--variants", "w4a16", *words)
    base, row = build.rows.values()
    assert row["status"] == "ok", row["error"]
    assert row["group_size"] == size and base["group_size"] is None
    assert row["notes"] == ([f"groups of {size}"] if size < 128 else [])
    check_plainly(row, model, build.output / row["checkpoint"], texts)
    said = " ".join(quant_lab.render_notes(quant_lab.collect_results(build)).split())
    assert (f"GPTQ W4A16: groups of {size};" in said) == (size < 128)
    config = read_strict(build.output / row["checkpoint"] / "config.json")
    group, = config["quantization_config"]["config_groups"].values()
    assert group["weights"]["group_size"] == size
    text = (build.output / row["checkpoint"] / "recipe.yaml").read_text("utf-8")
    assert re.findall(r"group_size: (\d+)", text) == [str(size)], yaml.safe_load(text)


@pytest.mark.parametrize("hidden, words, sizes", [
    (96, ["gptq", "--group-size", 128], "128"), (40, ["gptq"], "128, 64, 32")])
def test_groups_that_do_not_divide_a_width_fail_with_it_before_calibration(
        texts, tmp_path, quick_collection, monkeypatch, hidden, words, sizes):
    refuse_to_calibrate(monkeypatch)  # Of the baseline there is nothing to calibrate.
    model = make_small(tmp_path / "model", hidden=hidden)
    build = run_words(tmp_path / "out", model, texts, "--variants", *words)
    base, row = build.rows.values()
    assert (base["status"], row["status"]) == ("ok", "failed")
    for part in sizes, str(hidden), "FP8":
        assert part in row["error"]


def test_blocks_that_do_not_divide_a_width_fail(texts, tmp_path, quick_collection):
    model = make_small(tmp_path / "model", hidden=96)
    _, row = run_words(tmp_path / "out", model, texts, "--variants", "fp8_block").rows.values()
    assert row["status"] == "failed" and "128" in row["error"] and "96" in row["error"]


def refuse_to_calibrate(patch):
    import llmcompressor

    def refuse(**named):
        raise AssertionError("it calibrates")

    patch.setattr(llmcompressor, "oneshot", refuse)


def test_experts_that_transformers_unpacks_fail(texts, tmp_path, quick_collection):
    """It would leave out the rounding of their activations: the figures would be others."""
    model = make("qwen3_moe", tmp_path / "model")
    build = run_words(tmp_path / "out", model, texts)
    base, *rows = build.rows.values()
    assert base["status"] == "ok", base["error"]
    assert [row["label"] for row in rows] == LABELS[1:]
    for row in rows:
        assert row["status"] == "failed" and row["error"], row
        for key in "perplexity", "kld", "decode", "weights_memory_bytes":
            assert row[key] is None, key
    for row in rows[:2]:  # INT8 it does not load at all.
        assert row["error"] == "transformers unpacks experts, and rounds no inputs of theirs"
    notes = " ".join(quant_lab.render_notes(quant_lab.collect_results(build)).split())
    assert f"FP8 dynamic: failed: {rows[0]['error']}" in notes


def test_experts_that_do_not_load_again_fail(texts, tmp_path, quick_collection):
    model = make("mixtral", tmp_path / "model")
    build = run_words(tmp_path / "out", model, texts)
    base, *rows = build.rows.values()
    assert base["status"] == "ok" and len(rows) == 3
    for row in rows:
        assert row["status"] == "failed" and row["perplexity"] is None, row
        assert "experts" in row["error"] and "lost" in row["error"]


@pytest.fixture(scope="module")
def vision(texts, tmp_path_factory, quick_collection):
    folder = tmp_path_factory.mktemp("vision")
    model = make("gemma3", folder / "model")
    return model, run_words(folder / "out", model, texts, "--variants", "fp8", "w4a16")


@pytest.mark.parametrize("label", LABELS[1:3])
def test_of_a_model_that_sees_only_the_language_model_is_quantized(vision, texts, label):
    from safetensors import safe_open

    model, build = vision
    row = build.rows[label]
    assert row["status"] == "ok", row["error"]
    folder = build.output / row["checkpoint"]
    check_plainly(row, model, folder, texts)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        scaled = [name for name in weights.keys() if name.endswith("weight_scale")]
    assert len(scaled) == 2 * 7 and all("language_model" in name for name in scaled)


def test_a_quantized_model_alone_is_drawn_beside_the_baseline(lab):
    build = lab("--variants", LABELS[2])
    results = run_all(build)
    assert [row["label"] for row in results["variants"]] == [LABELS[0], LABELS[2]]
    axes, = quant_lab.draw_summary(results).axes
    points = {tuple(map(float, line.get_xydata()[1])) for line in axes.lines}
    assert points == {(row["weight_bytes"] / 1e6, row["kld"]["mean"])
                      for row in results["variants"]}
    low, high = axes.get_xlim()
    assert math.isfinite(low) and all(low < size < high for size, _ in points)
    said = [line.get_label() for line in axes.lines]
    assert [re.match(".+(?=, [^,]+ MB)", one)[0] for one in said] == [
        "FP16 baseline", "GPTQ W4A16"]
    first, second = (float(re.search(r"[\d.]+(?= MB)", one)[0]) for one in said)
    assert 0.5 < second / first < 0.9


def test_rows_of_other_variants_stay(lab):
    build = lab("--variants", LABELS[2])
    quant_lab.run_variant(LABELS[2], build)
    alone, = quant_lab.collect_results(build)["variants"]
    assert alone["perplexity_ratio"]["value"] > 0, "the reference needs no baseline row"
    rows = run_all(lab("--variants", LABELS[1]))["variants"]
    assert [row["label"] for row in rows] == LABELS[:3] and rows == read_rows(build.output)
    assert rows[2] == alone


# Failures are rows.


def test_a_failing_variant_is_a_row_and_is_tried_again(lab, monkeypatch):
    import llmcompressor

    def fail(**named):
        raise NotImplementedError("no kernel image for this device")

    build = lab("--variants", *LABELS[:3])
    for label in LABELS[:3]:
        with monkeypatch.context() as patch:
            if label == LABELS[1]:
                patch.setattr(llmcompressor, "oneshot", fail)
            quant_lab.run_variant(label, build)
    results = read_strict(build.output / "results.json")
    rows = results["variants"]
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert "no kernel image" in rows[1]["error"] and rows[1]["perplexity"] is None
    for said in (quant_lab.render_summary(results), quant_lab.render_notes(results),
                 quant_lab.render_result(LABELS[1], results)):
        name = f"({LABELS[1]}|FP8 dynamic:)"
        assert re.search(rf"{name} failed: .*no kernel image", " ".join(said.split()))
    assert LABELS[1] not in {x for one in results["advice"] for x in (
        one["variant"], *one["ties"])}
    assert not (build.output / "checkpoints" / LABELS[1]).exists()
    fixed = run_all(lab("--variants", *LABELS[:3]))["variants"]
    assert [row["status"] for row in fixed] == ["ok"] * 3
    assert (fixed[0], fixed[2]["kld"]) == (rows[0], rows[2]["kld"])


@pytest.mark.parametrize("spoil, says", [
    (lambda tensors: tensors["model.norm.weight"].fill_(math.nan), "--dtype"),
    (lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"), "up_proj")],
    ids=["nan", "missing"])
def test_a_model_with_nan_or_missing_weights_fails_every_row(
        run_script, quick, tmp_path, spoil, says):
    from safetensors.torch import load_file, save_file

    folder = make_small(tmp_path / "spoilt", hidden=128)
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    run = run_script(*quick, "--model", folder, "--variants", *LABELS[:2])
    assert run.code == 1 and "Traceback" not in run.out + run.err
    for row in read_rows(tmp_path / "out"):
        assert row["status"] == "failed" and says in row["error"]
        assert row["error"] in " ".join(run.out.split())
    assert not list(tmp_path.glob("out/checkpoints/*")), "nothing was made in vain"
    assert "Traceback" in (tmp_path / "out" / "log.txt").read_text("utf-8")


def test_a_variant_that_overflows_alone_fails_alone(lab, monkeypatch):
    """The checkpoint of one variant gives NaN; the reference and the others do not."""
    from safetensors.torch import load_file, save_file

    real = quant_lab.quantize_variant

    def spoil(label, *inputs):
        row = real(label, *inputs)
        file = build.output / "checkpoints" / label / "model.safetensors"
        if label == LABELS[1]:
            tensors = load_file(file)
            tensors["model.norm.weight"][3] = float("nan")
            save_file(tensors, file, metadata={"format": "pt"})
        return row

    build = lab("--variants", *LABELS[:2])
    monkeypatch.setattr(quant_lab, "quantize_variant", spoil)
    rows = run_all(build)["variants"]
    assert [row["status"] for row in rows] == ["ok", "failed"], rows[1]["error"]
    assert "not finite" in rows[1]["error"] and "--dtype" in rows[1]["error"]
    assert rows[1]["kld"] is None


def test_a_recipe_that_quantizes_nothing_fails(lab, monkeypatch):
    nothing = quant_lab.Variant("FP8_DYNAMIC", lambda m, *_: [
        m.QuantizationModifier(scheme="FP8_DYNAMIC", targets="Conv2d")])
    monkeypatch.setitem(quant_lab.VARIANTS, LABELS[1], nothing)
    build = lab("--variants", LABELS[1])
    _, row = run_all(build)["variants"]
    assert row["status"] == "failed" and "no Linear" in row["error"]
    assert not (build.output / "checkpoints" / LABELS[1]).exists()


@pytest.mark.parametrize("content", [
    {"temperature": 0.9, "top_p": 0.6}, {"early_stopping": True, "num_beams": 1}])
def test_generation_defaults_that_do_not_validate_do_not_stop_the_lab(
        lab, small, tmp_path, content):
    """Chat models ship a temperature without do_sample, or more, which cannot be saved."""
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(small, tmp_path / "old")
    (folder / "generation_config.json").write_text(json.dumps(content | dict(eos_token_id=2)))
    with pytest.raises(ValueError):
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    rows = run_all(lab("--model", folder, "--variants", LABELS[1]))["variants"]
    for row in rows:
        assert row["status"] == "ok", row["error"]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / row["checkpoint"])
        assert model.generation_config.eos_token_id == 2, "what ends a completion stays"
        saved = json.loads((tmp_path / "out" / row["checkpoint"] / "generation_config.json"
                            ).read_text())
        assert content.items() <= saved.items(), "and so does the rest, as it came"


@pytest.mark.parametrize("chats, batches", [(39, 39), (82, 28)])
def test_chats_of_like_length_are_calibrated_together(lab, chats, batches):
    """The last batch of the 82 is smaller than the others."""
    build = lab("--variants", LABELS[2])
    ids = [[1] * (9 + place * 7 % 50) for place in range(chats)]
    build.samples = dict(input_ids=ids, attention_mask=ids)
    with quant_lab.libraries_to(build.output / "log.txt"):
        assert quant_lab.quantize_variant(LABELS[2], build)["weight_bytes"]
    assert f"| {batches}/{batches} [" in (build.output / "log.txt").read_text("utf-8")


def test_fallbacks_to_rounding_are_counted(lab):
    """One sample of 8 tokens cannot fill a 128 x 128 matrix: undamped, no layer inverts."""
    build = lab("--variants", LABELS[2], "--dampening", 0, "--calibration-samples", 1,
                "--calibration-length", 8)
    results = run_all(build)
    base, row = results["variants"]
    assert row["status"] == "ok" and row["rtn_fallbacks"] == 7 and base["rtn_fallbacks"] == 0
    base, row = quant_lab.render_notes(results).split("\n- ")
    assert "warning: 7 modules fell back to rounding: --dampening" in " ".join(row.split())
    assert "fell back" not in base


# Committed results: tests/test_report.py compares what is rendered from them.


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_intervals_follow_from_the_committed_losses(name):
    rows = [row for row in read_rows(ROOT / "results" / name) if row["status"] == "ok"]
    base = rows[0]["window_losses"]
    for row in rows:
        for key, values in (("perplexity_interval", row["window_losses"]), (
                "perplexity_ratio", [a - b for a, b in zip(row["window_losses"], base)])):
            mean, count = statistics.mean(values), min(10, max(4, len(values) // 5))
            blocks = [0.0] * count
            for number, value in enumerate(values):
                blocks[number * count // len(values)] += value - mean
            width = quantile_of_t(count - 1) * statistics.stdev(blocks) * (
                count ** 0.5 / len(values))
            for name, side in (("value", 0), ("low", -1), ("high", 1)):
                assert row[key][name] == pytest.approx(math.exp(mean + side * width), rel=1e-3)


def make_hub(folder, source):
    """Make folders of a model as Qwen's, a chat set like UltraChat's, a text like WikiText's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    model, chats, wiki = (folder / name for name in ("model", "chats", "wiki"))
    for place in (model / "onnx", chats / "data", wiki / "wikitext-2-raw-v1"):
        place.mkdir(parents=True)
    for file in source.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: Qwen/Other\n---\n")
    for name in ("pytorch_model.bin", "onnx/model.onnx", "consolidated.safetensors"):
        (model / name).write_bytes(b"0" * 100_000)
    text = (ROOT / "tests" / "demo" / "eval.txt").read_text("utf-8")
    rows = [{"prompt": os.urandom(1000).hex(), "messages": [
        {"role": "user", "content": f"Say {n * 7919 % 10007} in words."},
        {"role": "assistant", "content": f"{n * 104729 % 1000003} " * 4}]}
        for n in range(6000)]
    for split in ("train_sft-00000-of-2", "train_sft-00001-of-2", "test_sft-0"):
        pq.write_table(pa.Table.from_pylist(rows), chats / "data" / f"{split}.parquet")
    lines = [{"text": line + "\n" if line.strip() else ""}
             for line in text[:20_000].split("\n")]
    for split in ("test", "train", "validation"):
        pq.write_table(pa.Table.from_pylist(lines),
                       wiki / "wikitext-2-raw-v1" / f"{split}-0.parquet")
    return {"models/Qwen/Qwen2.5-0.5B-Instruct": model,
            "datasets/HuggingFaceH4/ultrachat_200k": chats,
            "datasets/Salesforce/wikitext": wiki}, lines


@pytest.fixture(scope="session", autouse=True)
def running_from_hub(request, small, tmp_path_factory):
    """Start the two runs of the hub beside the other tests if one asks for them."""
    return start_beside(request, "from_hub", run_from_hub, small, tmp_path_factory.mktemp("hub"))


@pytest.fixture
def from_hub(running_from_hub):
    """Return the first run, its results, the rows of the second, and of the hub: whether it
    failed at first, what it sent, the lines of its text."""
    return running_from_hub.result()


def run_from_hub(small, folder):
    repos, lines = make_hub(folder / "hub", small)
    output = folder / "results" / "Qwen2.5-0.5B-Instruct-cpu"
    words = ["--device", "cpu", "--batch-sizes", 1, "--repeats", 2, "--new-tokens", 8,
             "--calibration-length", 64, "--variants", LABELS[0], LABELS[2]]
    home = dict(HF_HOME=str(folder / "home"), HF_HUB_DISABLE_XET="1", folder=folder)
    with serve(repos) as hub:
        hub.fail_first = True
        done = run_process(*words, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", **home)
    assert done.returncode == 0, done.stdout + done.stderr
    results = read_strict(output / "results.json")
    shutil.rmtree(output / "checkpoints" / LABELS[2])
    again = run_process(*words, HF_HUB_OFFLINE="1", **home)
    assert again.returncode == 0, again.stdout + again.stderr
    return done, results, read_rows(output), hub.failed, hub.sent, lines


def test_default_route_from_the_hub_and_again_from_the_cache(small, from_hub):
    """A busy hub that cuts downloads off, at first; then none at all."""
    from transformers import AutoTokenizer

    done, results, rows, failed, sent, lines = from_hub
    assert failed
    assert [row["status"] for row in results["variants"]] == ["ok"] * 2
    assert results["base_model"] == results["model_name"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert results["license"] == "apache-2.0"
    assert "calibration  256 of 256 chats of " in done.stdout
    ids = AutoTokenizer.from_pretrained(TINY)("\n\n".join(
        row["text"] for row in lines)).input_ids
    assert results["variants"][0]["tokens_scored"] == len(ids) // 2048 * 2047
    sent = {name.rpartition("/")[2]: size for name, size in sent.items()}
    assert not {"pytorch_model.bin", "model.onnx", "consolidated.safetensors"} & set(sent)
    assert sent["model.safetensors"] <= 2 * (small / "model.safetensors").stat().st_size
    assert {name for name in sent if name.endswith(".parquet")} == {
        "test-0.parquet", "train_sft-00000-of-2.parquet"}, "one file of chats"
    for number, (row, wanted) in enumerate(zip(rows, results["variants"], strict=True)):
        for key in wanted if number != 1 else ("perplexity", "kld", "weight_bytes"):
            assert row[key] == wanted[key], "finished rows stay, and the chats are the same"
