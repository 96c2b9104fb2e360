"""The lab end to end: the demo, resuming, failures, the default route from a hub."""

import gc
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPT, TINY, make_small
from hub import serve
from test_figures import expected_bytes, quantile_of_t, tensor_bytes

import quant_lab

LABELS = ["00_fp16_baseline", "01_fp8_dynamic", "02_gptq_w4a16", "03_smoothquant_w8a8"]


def strict(file):
    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


def run_process(*words, folder=ROOT, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True,
        env={**os.environ, **environment}, stdin=subprocess.DEVNULL, cwd=folder)


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """The lab collects garbage before each load: let that skip the imported modules."""
    from datasets import Dataset  # noqa: F401
    from llmcompressor import oneshot  # noqa: F401

    gc.freeze()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    device = [] if not torch.cuda.is_available() else ["--device", "cpu"]
    done = run_process("--demo", "--output-dir", folder, *device)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, folder, strict(folder / "results.json")


def test_demo_gives_four_rows(demo):
    done, folder, results = demo
    assert results["schema"] == 1 and len(results["variants"]) == 4
    assert {"created", "command", "config", "machine", "versions"} <= set(results)
    assert {"device", "name", "compute_capability", "memory_bytes", "driver"} == set(
        results["machine"])
    assert {"python", "torch", "transformers", "llmcompressor",
            "compressed_tensors"} <= set(results["versions"])
    for label, row in zip(LABELS, results["variants"]):
        assert (row["label"], row["status"], row["error"]) == (label, "ok", None)
        assert row["rtn_fallbacks"] == 0 and row["tokens_scored"] % 511 == 0
        assert row["checkpoint"] == f"checkpoints/{label}"
        assert len(row["latency_s"]["samples"]) == 5 == len(row["decode_tok_s"]["samples"])
        first = row["divergence"]["completions"][0]
        assert row["sample"] == {k: first[k] for k in ("prompt", "completion")}
        assert row["sample"]["completion"] and len(row["divergence"]["completions"]) == 8
        assert len(row["window_losses"]) * 511 == row["tokens_scored"]
        assert row["kld"]["tokens"] == 8192 == results["config"]["kld_tokens"]
        for key, center in (("perplexity_interval", "value"), ("perplexity_ratio", "value"),
                            ("kld", "mean"), ("top1_agreement", "value")):
            interval = row[key]
            assert interval["low"] <= interval[center] <= interval["high"]
        assert row["runs_as"].endswith(" · not compiled")
        assert ("prefill" in row["runs_as"]) == (label != LABELS[0])
        assert [entry["batch"] for entry in row["decode"]] == [1, 8]
        assert row["weights_memory_bytes"] == pytest.approx(row["weight_bytes"], rel=0.02)
        assert row["prompt_tokens"] == 512 and row["load_seconds"] > 0
    assert done.stderr == "" and "Traceback" not in done.stdout


def test_quantization_shows_in_the_demo(demo):
    base, fp8, w4, w8 = (row["perplexity"] for row in demo[2]["variants"])
    assert abs(fp8 / base - 1) < 0.01 and abs(w8 / base - 1) < 0.03
    assert 1.015 < w4 / base < 1.3, "four bits show clearly"


def test_the_baseline_does_not_differ_from_itself(demo):
    """Two loads of the same weights, the logits of one by way of the file."""
    row = demo[2]["variants"][0]
    assert row["perplexity_ratio"] == dict(value=1, low=1, high=1)
    assert row["top1_agreement"] == dict(value=100, low=100, high=100)
    assert row["kld"] == dict(mean=0, low=0, high=0, median=0, p99=0, tokens=8192)
    assert row["divergence"]["mean"] == 64


def test_divergence_orders_the_demos_variants(demo, run_script, tmp_path):
    """FP16 <= FP8 < GPTQ W4A16 < RTN W4A16, each beyond the intervals; the control is
    added to a finished run and asks for nothing to be measured again."""
    folder = shutil.copytree(demo[1], tmp_path / "demo")
    run = run_script("--demo", "--device", "cpu", "--output-dir", folder, "--variants",
                     *LABELS, "rtn_w4a16")
    assert run.code == 0 and run.out.count("finished before") == 4, run.out + run.err
    results = strict(folder / "results.json")
    rows = {row["label"]: row for row in results["variants"]}
    assert list(rows) == [*LABELS, "rtn_w4a16"]
    assert results["variants"][:4] == demo[2]["variants"], "nothing is measured twice"
    fp16, fp8, gptq, rtn = (rows[label]["kld"] for label in (*LABELS[:3], "rtn_w4a16"))
    assert fp16["mean"] <= fp8["low"] and fp8["high"] < gptq["low"]
    assert gptq["high"] < rtn["low"]
    control, gptq = rows["rtn_w4a16"], rows[LABELS[2]]
    assert control["quantize_seconds"] < gptq["quantize_seconds"]
    configs = [json.loads((folder / row["checkpoint"] / "config.json").read_text())
               ["quantization_config"] for row in (control, gptq)]
    assert configs[0]["format"] == configs[1]["format"] == "pack-quantized"
    groups = [config["config_groups"]["group_0"]["weights"] for config in configs]
    assert {k: groups[0][k] for k in ("num_bits", "group_size", "symmetric")} == {
        k: groups[1][k] for k in ("num_bits", "group_size", "symmetric")}
    assert control["weight_bytes"] == pytest.approx(gptq["weight_bytes"], rel=0.01)
    assert "GPTQ beat round-to-nearest" in run.out
    assert (folder / "summary.md").read_text(encoding="utf-8").count("rtn_w4a16") >= 10


def test_sizes_are_those_of_the_tensors(demo):
    _, folder, results = demo
    config = json.loads((TINY / "config.json").read_text())
    for row in results["variants"]:
        file = folder / row["checkpoint"] / "model.safetensors"
        counted, sizes = tensor_bytes(file)
        assert row["weight_bytes"] == counted == file.stat().st_size
        assert sum(sizes.values()) == expected_bytes(config, row["label"])
        assert "lm_head.weight" not in sizes, "the tied embedding is stored once"
        base = results["variants"][0]["weight_bytes"]
        assert row["size_ratio"] == row["weight_bytes"] / base


def test_recipes_travel_with_the_checkpoints(demo):
    modifiers = ((), ("QuantizationModifier",), ("GPTQModifier",),
                 ("SmoothQuantModifier", "GPTQModifier"))
    for row, names in zip(demo[2]["variants"], modifiers):
        folder = demo[1] / row["checkpoint"]
        said = (folder / "recipe.yaml").read_text("utf-8") if names else ""
        assert re.findall(r"^ *(\w+Modifier):", said, re.M) == list(names)
        card = (folder / "README.md").read_text("utf-8")
        assert card == quant_lab.render_model_card(row, demo[2])


def test_checkpoints_say_what_they_are(demo):
    _, folder, results = demo
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
    """The library's own loss, window by window, on the checkpoint as anyone loads it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, folder, results = demo
    row = results["variants"][number]
    place = folder / row["checkpoint"]
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float16)
    ids = AutoTokenizer.from_pretrained(place)(
        quant_lab.python_help()[1], return_tensors="pt").input_ids
    with torch.no_grad():
        losses = [model(part, labels=part).loss.double()
                  for part in ids.split(512, dim=1) if part.shape[1] == 512]
    assert row["tokens_scored"] == 511 * len(losses)
    assert row["perplexity"] == pytest.approx(
        torch.stack(losses).mean().exp().item(), rel=1e-3)


def test_table_is_what_results_say(demo):
    done, folder, results = demo
    lines = done.stdout.split("\n")
    assert max(map(len, lines)) <= 120 and "\r" not in done.stdout
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout)
    table = quant_lab.render_table(results["variants"], quant_lab.QUALITY)
    summary = (folder / "summary.md").read_text(encoding="utf-8")
    assert summary == quant_lab.render_summary(results)
    assert quant_lab.render_body(results, 1) in done.stdout
    assert table in summary and "14,819 tokens" in summary and "windows of 512" in summary
    assert len({line.count("|") for line in table.split("\n")}) == 1
    for row in results["variants"]:
        line, = (line for line in table.split("\n") if row["label"] in line)
        assert f" {row['perplexity']:.2f} ±" in line and f" {row['size_ratio']:.3f} " in line
        assert f" {row['perplexity_ratio']['value']:.4f} ±" in line
        assert f" {row['kld']['mean']:.5f} ±" in line
        assert f" {row['top1_agreement']['value']:.1f} ±" in line
        assert f" {row['divergence']['mean']:.0f} ±" in line


def test_completions_stand_side_by_side(demo):
    """Each column of a prompt's block, read downwards, is a variant's completion."""
    summary = (demo[1] / "summary.md").read_text(encoding="utf-8")
    rows = demo[2]["variants"]
    for number, prompt in enumerate(quant_lab.PROMPTS):
        block = summary.partition(f"**{prompt}**\n\n")[2].partition("\n\n")[0]
        lines = block.split("\n")
        starts = [lines[0].index(row["label"]) for row in rows]
        for row, start, end in zip(rows, starts, [*(s - 3 for s in starts[1:]), 120]):
            said = row["divergence"]["completions"][number]
            found = "".join(line[start:end] for line in lines[3:])
            assert found.replace(" ", "") == (
                quant_lab.plain(said["completion"]).replace(" ", ""))
            assert lines[1][start:end].strip() == f"tokens alike: {said['same_tokens']}"


def test_tokenizer_travels_with_the_checkpoint(demo):
    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "What is a list?"}]
    wanted = AutoTokenizer.from_pretrained(TINY).apply_chat_template(chat, tokenize=False)
    for row in demo[2]["variants"]:
        tokenizer = AutoTokenizer.from_pretrained(demo[1] / row["checkpoint"])
        assert tokenizer.apply_chat_template(chat, tokenize=False) == wanted


class Died(BaseException):
    """Not an Exception: nothing in the lab may survive it."""


def count_calls(monkeypatch, name):
    real, calls = getattr(quant_lab, name), []

    def counted(*arguments, **named):
        calls.append(arguments)
        return real(*arguments, **named)

    monkeypatch.setattr(quant_lab, name, counted)
    return calls


def die_at(monkeypatch, owner, name, number):
    """Make the call `number` (from 1) of a function die; returns an undo."""
    real, left = getattr(owner, name), [number]

    def deadly(*arguments, **named):
        left[0] -= 1
        if not left[0]:
            raise Died
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, deadly)
    return lambda: monkeypatch.setattr(owner, name, real)


@pytest.mark.parametrize("owner, name, number, done, made", [
    (quant_lab, "load_model", 5, 1, 1), (quant_lab, "apply_recipe", 2, 2, 2),
    (quant_lab.Path, "rename", 3, 2, 2), (quant_lab, "measure_quality", 3, 2, 3),
    (quant_lab, "measure_reference", 1, 0, 0),
    (quant_lab, "measure_speed", 4, 3, 4), (quant_lab, "write_json", 8, 3, 4)])
def test_what_is_finished_survives_a_death(lab, monkeypatch, owner, name, number, done, made):
    """Killed in any step: finished rows and checkpoints are kept, the rest is redone."""
    undo = die_at(monkeypatch, owner, name, number)
    with pytest.raises(Died):
        quant_lab.run_lab(lab(), [])
    undo()
    output = lab().output
    before = quant_lab.read_json(output / "results.json").get("variants", [])
    whole = {p.name for p in (output / "checkpoints").iterdir() if p.suffix != ".partial"}
    assert [row["label"] for row in before] == LABELS[:done] and whole == set(LABELS[:made])
    recipes = count_calls(monkeypatch, "build_recipe")
    benchmarks = count_calls(monkeypatch, "benchmark_variant")
    after = quant_lab.run_lab(lab(), [])["variants"]
    assert [row["status"] for row in after] == ["ok"] * 4
    assert after[:done] == before
    assert [call[0] for call in benchmarks] == LABELS[done:]
    made_again = [call[0] for call in recipes[len(quant_lab.VARIANTS):]]  # After the keys.
    assert made_again == LABELS[made:]
    assert not list((output / "checkpoints").glob("*.partial"))


def test_changed_settings_reuse_nothing_they_shape(lab, monkeypatch, small, tmp_path):
    first = quant_lab.run_lab(lab("--variants", *LABELS[1:3]), [])["variants"]
    recipes = count_calls(monkeypatch, "apply_recipe")
    benchmarks = count_calls(monkeypatch, "benchmark_variant")

    def rerun(*words):
        recipes.clear(), benchmarks.clear()
        rows = quant_lab.run_lab(lab("--variants", *LABELS[1:3], *words), [])["variants"]
        return len(recipes), len(benchmarks), rows

    assert rerun() == (0, 0, first)
    assert rerun("--dampening", 0.02)[:2] == (1, 1), "FP8 has no dampening"
    assert rerun("--calibration-samples", 9)[:2] == (1, 1), "nor any chats"
    assert rerun("--calibration-samples", 9, "--repeats", 3)[:2] == (0, 2)
    assert rerun("--plain-text")[:2] == (2, 2)
    assert rerun("--seed", 1)[:2] == (2, 2)
    assert rerun("--fresh", "--seed", 1)[:2] == (2, 2)
    (tmp_path / "model").mkdir()
    folder = make_small(tmp_path / "model", hidden=128, initializer_range=0.1)
    assert rerun("--model", folder, "--seed", 1)[:2] == (2, 2)
    (lab().output / "results.json").write_text("{ cut off")
    assert rerun("--model", folder, "--seed", 1)[:2] == (0, 2)


def test_rows_of_other_variants_stay(lab):
    quant_lab.run_lab(lab("--variants", LABELS[1]), [])
    alone = strict(lab().output / "results.json")["variants"]
    assert alone[0]["size_ratio"] is None
    assert alone[0]["perplexity_ratio"]["value"] > 0, "the reference needs no baseline row"
    table = quant_lab.render_table(alone, quant_lab.QUALITY)
    assert " – " in table.split("\n")[2], "the size has nothing to be held against"
    rows = quant_lab.run_lab(lab("--variants", LABELS[0]), [])["variants"]
    assert [row["label"] for row in rows] == LABELS[:2]
    assert rows[1]["size_ratio"] == rows[1]["weight_bytes"] / rows[0]["weight_bytes"]


def test_a_run_without_calibration_keeps_calibrated_rows(run_script, quick, tmp_path):
    assert run_script(*quick).code == 0
    before = strict(tmp_path / "out" / "results.json")["variants"]
    again = run_script(*quick, "--variants", LABELS[0])
    assert again.code == 0 and again.out.count("finished before") == 1
    assert strict(tmp_path / "out" / "results.json")["variants"] == before


@pytest.mark.parametrize("text", [
    "[]", '{"variants": "abc"}', '{"variants": null}', '{"variants": [1, {}, []]}',
    '{"variants": [{"status": "ok", "fingerprint": []}]}', "[" * 100_000, "\x00", "NaN"])
def test_spoilt_results_are_measured_again(lab, text):
    wanted = quant_lab.run_lab(lab("--variants", LABELS[0]), [])["variants"][0]
    (lab().output / "results.json").write_text(text)
    row, = quant_lab.run_lab(lab("--variants", LABELS[0]), [])["variants"]
    assert (row["status"], row["perplexity"]) == ("ok", wanted["perplexity"])


@pytest.mark.parametrize("spoil", [
    lambda folder: (folder / "model.safetensors").unlink(),
    lambda folder: (folder / "model.safetensors").write_bytes(b"cut off"),
    lambda folder: (folder / "quant_lab.json").write_text("{"),
    lambda folder: (folder / "quant_lab.json").unlink()])
def test_spoilt_checkpoints_are_made_again(lab, monkeypatch, spoil):
    wanted = quant_lab.run_lab(lab("--variants", *LABELS[:2]), [])["variants"]
    spoil(lab().output / "checkpoints" / LABELS[1])
    made = count_calls(monkeypatch, "quantize_variant")
    rows = quant_lab.run_lab(lab("--variants", *LABELS[:2]), [])["variants"]
    assert [call[0] for call in made] == [LABELS[1]] and rows[0] == wanted[0]
    assert rows[1]["perplexity"] == wanted[1]["perplexity"]


def test_a_recipe_that_quantizes_nothing_fails(lab, monkeypatch):
    nothing = quant_lab.Variant("FP8_DYNAMIC", lambda m, o: [
        m.QuantizationModifier(scheme="FP8_DYNAMIC", targets="Conv2d")])
    monkeypatch.setitem(quant_lab.VARIANTS, LABELS[1], nothing)
    row, = quant_lab.run_lab(lab("--variants", LABELS[1]), [])["variants"]
    assert row["status"] == "failed" and row["error"]
    assert not (lab().output / "checkpoints" / LABELS[1]).exists()


def test_sampling_defaults_without_sampling_do_not_stop_the_lab(lab, small, tmp_path):
    """Older chat models ship a temperature without do_sample, which cannot be saved."""
    folder = shutil.copytree(small, tmp_path / "old")
    (folder / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    row, = quant_lab.run_lab(lab("--model", folder, "--variants", LABELS[0]), [])["variants"]
    assert row["status"] == "ok", row["error"]


@pytest.mark.parametrize("error, says", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "9 GiB"),
    (NotImplementedError("no kernel image for this device"), "no kernel image"),
    (FloatingPointError("logits are not finite"), "not finite")])
def test_a_failing_variant_is_a_row(lab, monkeypatch, capsys, error, says):
    real = quant_lab.measure_speed

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return real(*arguments)

    calls = []
    monkeypatch.setattr(quant_lab, "measure_speed", fail)
    results = quant_lab.run_lab(lab(), [])
    assert [row["status"] for row in results["variants"]] == ["ok", "failed", "ok", "ok"]
    row = strict(lab().output / "results.json")["variants"][1]
    assert says in row["error"] and row["perplexity"] is None
    for columns in quant_lab.list_tables(results["config"]):
        assert "failed" in quant_lab.render_table(results["variants"], columns).split("\n")[3]
    assert says in " ".join(quant_lab.render_warnings(results))
    assert f"{LABELS[1]} failed" in quant_lab.render_summary(results)
    fixed = quant_lab.run_lab(lab(), [])["variants"]
    assert [row["status"] for row in fixed] == ["ok"] * 4


def test_exit_code_1_when_a_recipe_does_not_fit(run_script, quick, tmp_path):
    """Groups of 128 do not divide a width of 64: W4A16 fails and says so."""
    folder = make_small(tmp_path / "narrow", hidden=64)
    run = run_script(*quick, "--model", folder)
    assert run.code == 1, run.out + run.err
    rows = strict(tmp_path / "out" / "results.json")["variants"]
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "ok"]
    said = " ".join(run.out.split())
    assert "128" in rows[2]["error"] and rows[2]["error"] in said
    assert "Traceback" not in run.out + run.err


def test_nan_weights_fail_the_row(run_script, quick, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_small(tmp_path / "nan", hidden=128)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    run = run_script(*quick, "--model", folder, "--variants", LABELS[0])
    row, = strict(tmp_path / "out" / "results.json")["variants"]
    assert run.code == 1 and row["status"] == "failed" and "--dtype" in row["error"]


def test_the_reference_is_measured_once_and_again_only_if_needed(lab, monkeypatch):
    calls = count_calls(monkeypatch, "measure_reference")
    quant_lab.run_lab(lab("--variants", *LABELS[:2]), [])
    assert len(calls) == 1
    quant_lab.run_lab(lab("--variants", *LABELS[:2]), [])
    assert len(calls) == 1, "all is finished"
    quant_lab.run_lab(lab("--variants", *LABELS[:2], "--kld-tokens", 100), [])
    assert len(calls) == 2


def test_without_a_reference_each_row_says_so(lab, monkeypatch):
    def overflow(*arguments):
        raise FloatingPointError("logits are not finite")

    monkeypatch.setattr(quant_lab, "score_text", overflow)
    rows = quant_lab.run_lab(lab("--variants", *LABELS[:2]), [])["variants"]
    for row in rows:
        assert row["status"] == "failed" and "unquantized model" in row["error"]
        assert "not finite" in row["error"]
    assert not list((lab().output / "checkpoints").iterdir()), "nothing was made in vain"
    assert "overflow" in (lab().output / "log.txt").read_text(), "with its traceback"


def test_a_variant_that_overflows_alone_fails_alone(lab, monkeypatch):
    """The checkpoint of one variant gives NaN; the reference and the others do not."""
    from safetensors.torch import load_file, save_file

    real = quant_lab.quantize_variant

    def spoil(label, key, lab):
        note = real(label, key, lab)
        file = lab.output / "checkpoints" / label / "model.safetensors"
        if label == LABELS[1]:
            tensors = load_file(file)
            tensors["model.norm.weight"][3] = float("nan")
            save_file(tensors, file, metadata={"format": "pt"})
        return note

    monkeypatch.setattr(quant_lab, "quantize_variant", spoil)
    rows = quant_lab.run_lab(lab("--variants", *LABELS[:2]), [])["variants"]
    assert [row["status"] for row in rows] == ["ok", "failed"], rows[1]["error"]
    assert "float16" in rows[1]["error"] and "--dtype" in rows[1]["error"]
    assert "unquantized" not in rows[1]["error"] and rows[1]["kld"] is None


def test_missing_weights_fail_the_row(run_script, quick, small, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_small(tmp_path / "gap", hidden=128)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    run = run_script(*quick, "--model", folder, "--variants", LABELS[0])
    row, = strict(tmp_path / "out" / "results.json")["variants"]
    assert run.code == 1 and "up_proj" in row["error"]


def test_fallbacks_to_rounding_are_counted(lab, tmp_path):
    """One sample of 8 tokens cannot fill a 128 x 128 matrix: undamped, no layer inverts."""
    build = lab("--variants", LABELS[2], "--dampening", 0, "--calibration-samples", 1,
                "--calibration-length", 8)
    row, = quant_lab.run_lab(build, [])["variants"]
    assert row["status"] == "ok" and row["rtn_fallbacks"] == 7
    assert row["rtn_fallbacks"] == int(re.search(
        r"inversion failed for (\d+)/7", (build.output / "log.txt").read_text())[1])


COMMITTED = [ROOT / "results" / "demo-cpu", ROOT / "results" / "h100-0.5b"]


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_results_are_those_of_the_readme(folder):
    results = strict(folder / "results.json")
    summary = (folder / "summary.md").read_text(encoding="utf-8")
    assert summary == quant_lab.render_summary(results)
    for columns in quant_lab.list_tables(results["config"]):
        assert quant_lab.render_table(results["variants"], columns) in (
            ROOT / "README.md").read_text(encoding="utf-8"), f"stale: {folder.name}"


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_intervals_follow_from_the_committed_losses(folder):
    rows = strict(folder / "results.json")["variants"]
    base = rows[0]["window_losses"]
    for row in rows:
        for key, values in (("perplexity_interval", row["window_losses"]), (
                "perplexity_ratio", [a - b for a, b in zip(row["window_losses"], base)])):
            mean, count = statistics.mean(values), min(len(values), 30)
            blocks = [0.0] * count
            for number, value in enumerate(values):
                blocks[number * count // len(values)] += value - mean
            width = quantile_of_t(count - 1) * statistics.stdev(blocks) * (
                count ** 0.5 / len(values))
            for name, side in (("value", 0), ("low", -1), ("high", 1)):
                assert row[key][name] == pytest.approx(math.exp(mean + side * width), rel=1e-3)


def make_hub(folder: Path):
    """The tiny model as Qwen's, a chat set like UltraChat's, a text like WikiText's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    model, chats, wiki = (folder / name for name in ("model", "chats", "wiki"))
    for place in (model / "onnx", chats / "data", wiki / "wikitext-2-raw-v1"):
        place.mkdir(parents=True)
    for file in TINY.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    for name in ("pytorch_model.bin", "onnx/model.onnx", "consolidated.safetensors"):
        (model / name).write_bytes(b"0" * 100_000)
    text = quant_lab.python_help()[1]
    rows = [{"prompt": os.urandom(1000).hex(), "messages": [
        {"role": "user", "content": f"Say {n * 7919 % 10007} in words."},
        {"role": "assistant", "content": f"{n * 104729 % 1000003} " * 4}]}
        for n in range(20_000)]
    for split in ("train_sft-0", "train_sft-1", "test_sft-0"):
        pq.write_table(pa.Table.from_pylist(rows), chats / "data" / f"{split}.parquet",
                       row_group_size=1000)
    lines = [{"text": line + "\n" if line.strip() else ""}
             for line in text[:20_000].split("\n")]
    for split in ("test", "train", "validation"):
        pq.write_table(pa.Table.from_pylist(lines),
                       wiki / "wikitext-2-raw-v1" / f"{split}-0.parquet")
    for place, name, splits, under in (
            (chats, "default", ("train_sft", "test_sft"), "data"),
            (wiki, "wikitext-2-raw-v1", ("test", "train"), "wikitext-2-raw-v1")):
        listed = "".join(f"  - split: {split}\n    path: {under}/{split}-*\n"
                         for split in splits)
        (place / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{listed}---\n")
    return {"models/Qwen/Qwen2.5-0.5B-Instruct": model,
            "datasets/HuggingFaceH4/ultrachat_200k": chats,
            "datasets/Salesforce/wikitext": wiki}, lines


def test_default_route_from_the_hub_and_again_from_the_cache(tmp_path):
    repos, lines = make_hub(tmp_path / "hub")
    home = dict(HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0", folder=tmp_path)
    with serve(repos) as hub:
        done = run_process("--device", "cpu", "--batch-sizes", 1, "--repeats", 2,
                           HF_ENDPOINT=hub.url, **home)
        assert done.returncode == 0, done.stdout + done.stderr
    output = tmp_path / "results" / "Qwen2.5-0.5B-Instruct-cpu"
    results = strict(output / "results.json")
    assert [row["status"] for row in results["variants"]] == ["ok"] * 4
    assert results["config"]["calibration_samples"] == 256 and "256 chats" in done.stdout
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(TINY)("\n\n".join(
        row["text"] for row in lines)).input_ids
    assert results["variants"][0]["tokens_scored"] == len(ids) // 2048 * 2047
    sent = {name.rpartition("/")[2]: size for name, size in hub.sent.items()}
    assert not {"pytorch_model.bin", "model.onnx", "consolidated.safetensors"} & set(sent)
    assert sent["model.safetensors"] == (TINY / "model.safetensors").stat().st_size
    assert {name for name in sent if name.endswith(".parquet")} == {
        "test-0.parquet", "train_sft-0.parquet"}
    chats = repos["datasets/HuggingFaceH4/ultrachat_200k"] / "data" / "train_sft-0.parquet"
    assert sent["train_sft-0.parquet"] < chats.stat().st_size / 2, "the chats are streamed"
    again = run_process("--device", "cpu", "--fresh", "--variants", LABELS[2],
                        "--repeats", 1, "--new-tokens", 2, HF_ENDPOINT=hub.url, **home)
    assert again.returncode == 0, again.stdout + again.stderr
    row = strict(output / "results.json")["variants"][0]
    assert row["perplexity"] == results["variants"][2]["perplexity"]
    assert row["kld"] == results["variants"][2]["kld"]
