"""See what really happens: killed runs, small memory, full disks, bad and hostile input.

What is finished is never lost, and nothing is measured that is not what it was written as.
Of each fault: what the lab does, and the tests, of this file where none is named.

- **killed at any moment, Ctrl-C**: the same command goes on; figures and checkpoints end up as
  without.
  `test_killed_or_interrupted_anywhere_a_run_goes_on`
- **another option, version, GPU or driver since**: refused with exit code 2, names what
  differs; nothing is changed.
  `test_a_changed_option_is_refused` of `test_lab.py`,
  `test_another_machine_or_version_is_refused` of `test_lab.py`
- **another model file, text or chat file since**: the same.
  `test_a_changed_model_text_or_chat_file_is_refused` of `test_lab.py`
- **another number of threads, another date in the chat template since**: the same.
  `test_another_number_of_threads_is_refused` of `test_lab.py`,
  `test_a_template_with_todays_date_is_refused_on_another_day` of `test_lab.py`
- **another `--max-loss`**: nothing is measured again, the advice is another.
  `test_another_max_loss_measures_nothing_again_and_changes_the_advice` of `test_lab.py`
- **an edited recipe**: its variant is measured again where it is asked for, all else stays.
  `test_an_edited_recipe_is_measured_again_where_it_is_asked_for` of `test_lab.py`
- **other work on the machine while timing**: a timing whose greatest is over 1.3 times its
  least is marked noisy and not ranked.
  `test_a_noisy_timing_is_marked_and_not_ranked` of `test_report.py`
- **out of memory**: the row names the step and options to change, the others go on.
  `test_what_does_not_fit_is_a_row_that_names_the_option`
- **a batch or a prompt does not fit**: `OOM` in its cell.
  `test_a_batch_or_a_prompt_that_does_not_fit_is_a_cell` of `test_speed.py`
- **memory that stays behind**: none: within 5 % after the fourth variant of after the first.
  `test_no_variant_leaves_anything_in_memory`
- **a disk that fills up**: a row that says so, no half checkpoint; of results.json, one line
  and exit code 2.
  `test_a_disk_that_fills_up_leaves_no_half_checkpoint`,
  `test_no_room_for_the_results_is_one_line`
- **a checkpoint cut off or altered**: known by its SHA-256, made again.
  `test_an_altered_checkpoint_is_made_again`
- **results.json cut off, or of an older schema**: refused with exit code 2; `--fresh` starts
  over.
  `test_results_cut_off_are_refused` of `test_lab.py`,
  `test_results_that_cannot_be_read_are_refused` of `test_lab.py`
- **a download cut off, a busy hub, no network**: the hub's client tries again, then one line;
  with all cached or local, `HF_HUB_OFFLINE=1` works.
  `test_default_route_from_the_hub_and_again_from_the_cache` of `test_lab.py`,
  `test_hub_that_cannot_be_reached` of `test_options.py`
- **chats that are malformed, blank, not UTF-8, of unknown roles**: exit code 2 and the number
  of the line.
  `test_chat_file_that_cannot_be_used` of `test_options.py`,
  `test_chats_without_text_are_refused`
- **chats that the model's template refuses**: left out, counted; exit code 2 if none is left.
  `test_chats_that_the_template_refuses_are_skipped_and_counted` of `test_options.py`
- **a LoRA adapter, GGUF, `.bin` only, an embedding model, no causal LM**: exit code 2 and the
  way out.
  `test_what_is_no_whole_causal_model_is_refused_with_the_way_out` of `test_options.py`
- **a model whose norms may have other readers**: not smoothed, and a note says so.
  `test_the_list_is_of_what_smoothing_does_not_change` of `test_architectures.py`,
  `test_smoothing_alone_changes_no_architecture` of `test_architectures.py`
- **experts that transformers unpacks or loses**: the row fails, as its figures would be others.
  `test_experts_that_transformers_unpacks_fail` of `test_lab.py`,
  `test_experts_that_do_not_load_again_fail` of `test_lab.py`
- **a recipe that cannot be built**: a row that fails with the reason, the others go on.
  `test_a_recipe_that_cannot_be_built_is_a_row_with_its_reason` of `test_lab.py`
- **AWQ that overflows in float16**: a row that fails with the reason; `--dtype bfloat16` works.
  `test_awq_that_overflows_in_float16_says_so_and_runs_in_bfloat16` of `test_lab.py`
- **timing that fails**: quality stays, the reason stands in `runs_as`.
  `test_where_speed_cannot_be_measured_quality_stays`
- **a server that fails or hangs**: an error in the row's `served`, with its last line; it is
  ended after 1,200 s; the next run tries again.
  `test_one_that_fails_or_hangs_is_an_error_and_the_row_stays` of `test_served.py`
- **a server whose pace drifts**: the baseline, measured first and last, differs by over 5 %:
  all is noisy.
  `test_a_baseline_that_drifts_makes_all_noisy` of `test_served.py`
- **no such interpreter, no vLLM in it, one before 0.20, no GPU**: exit code 2 before anything
  is quantized.
  `test_what_cannot_serve_is_refused_before_anything_is_quantized` of `test_served.py`
- **no chat template; widths that not even 32 divides**: a line that names `--plain-text`; a row
  that fails and says what to take.
  `test_a_base_model_of_odd_widths`
- **a hostile model**: no code of it runs, no pickle is read, its template runs in a sandbox.
  `test_no_code_of_a_model_runs`
- **hostile text or names**: stays text in Markdown; no control character reaches the terminal;
  no path leads out of the output folder.
  `test_foreign_text_stays_text`,
  `test_paths_stay_inside`,
  `test_names_do_no_harm` of `test_report.py`
"""

import gc
import hashlib
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.utils import release_memory
from conftest import (
    LABELS, ROOT, SCRIPT, SHARED, make_small, quick_words, read_strict, run_all, run_process,
    start_beside)
from torch._subclasses.fake_tensor import is_fake

import quant_lab

KILL = ROOT / "tests" / "kill.py"
TIMINGS = {"quantize_seconds", "ttft_s", "latency_s", "prefill", "decode"}
SHORT_DEMO = ["--demo", "--device", "cpu", "--calibration-samples", 8,
              "--calibration-length", 64, "--max-windows", 4, "--new-tokens", 4,
              "--repeats", 1, "--batch-sizes", 1]


def read_rows(output):
    return read_strict(output / "results.json")["variants"]


def files_of(output):
    """Return hashes of all files of all checkpoints but those that hold timings."""
    return {file.relative_to(output): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in (output / "checkpoints").rglob("*")
            if file.is_file() and file.name not in ("quant_lab.json", "README.md")}


def assert_same(output, wanted):
    """Compare all that two runs leave but timings."""
    for mine, theirs in zip(read_rows(output), read_rows(wanted), strict=True):
        for key in theirs.keys() - TIMINGS:
            assert mine[key] == theirs[key], (mine["label"], key)
    assert files_of(output) == files_of(wanted)
    assert not list(output.rglob("*.partial"))
    for name in ("summary.md", "summary.png"):
        assert (output / name).exists()


def run_killed(steps, words):
    """Run the script once for each step, ended there; return all exit codes and the rest."""
    done = run_process(", ".join(steps), *words, script=KILL)
    assert done.returncode == 0, done.stdout + done.stderr
    return [int(code) for code in re.findall(r"(?m)^ended (-?\d+)$", done.stdout)], done


KILLS = ["weights half 1", "rename before 1", "results before 1", "quantize after 1"]


@pytest.fixture(scope="session", autouse=True)
def running_killed(request, small, texts, tmp_path_factory):
    """Start the runs that are killed beside the other tests if one asks for them."""
    words = [*quick_words(small, texts), "--output-dir", tmp_path_factory.mktemp("killed")]
    steps = [*KILLS, "time interrupt 2"]
    return words, start_beside(request, "killed", run_killed, steps, words)


@pytest.fixture
def killed(running_killed):
    """Return the words of the runs, their exit codes, and what they said."""
    words, runs = running_killed
    return words, *runs.result()


def test_killed_or_interrupted_anywhere_a_run_goes_on(killed, finished_run):
    """Each run dies at a step; the last goes through: files and figures as if in one go."""
    words, codes, done = killed
    output = words[-1]
    assert codes == [-signal.SIGKILL] * len(KILLS) + [-signal.SIGINT], (
        done.stdout + done.stderr)
    assert "Ctrl-C" in done.stdout, "it says beforehand that one can go on"
    assert "Traceback" not in done.stdout + done.stderr
    left = read_rows(output)
    assert [row["status"] for row in left] == ["ok"] * len(left) and len(left) < 4
    lab = quant_lab.set_up([str(word) for word in words])
    assert run_all(lab)["variants"][: len(left)] == left, "finished rows stay"
    assert_same(output, finished_run)


STEPS = ["quantize before 1", "quantize after 1", "save before 1", "weights half 1",
         "save after 1", "note before 1", "note after 1", "rename before 1", "rename after 1",
         "complete before 9", "complete after 16", "time before 2"]


@pytest.mark.slow
def test_killed_at_every_step_and_at_many_moments(tmp_path):
    """Each step of each variant in one chain of runs; then at random moments."""
    start = time.perf_counter()
    whole = run_process(*SHORT_DEMO, "--output-dir", tmp_path / "whole")
    seconds = time.perf_counter() - start
    assert whole.returncode == 0, whole.stdout + whole.stderr
    for number, label in enumerate(LABELS, 1):  # Each run goes on where the last one was.
        steps = [step for step in STEPS if number > 1 or "quantize" not in step]
        codes, done = run_killed(
            [*steps, f"results before {number}", f"results after {number}"],
            [*SHORT_DEMO, "--variants", *LABELS[:number], "--output-dir", tmp_path / "chain"])
        assert set(codes) == {-signal.SIGKILL}, (label, codes, done.stdout + done.stderr)
    done = run_process(*SHORT_DEMO, "--output-dir", tmp_path / "chain")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(tmp_path / "chain", tmp_path / "whole")
    draw, moments, finished = random.Random(0), [], 0
    while len(moments) < 16:
        words = [sys.executable, str(SCRIPT), *map(str, SHORT_DEMO),
                 "--output-dir", str(tmp_path / "random")]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
            moment = draw.uniform(0, seconds)
            try:
                assert process.wait(moment) == 0
                assert_same(tmp_path / "random", tmp_path / "whole")
                shutil.rmtree(tmp_path / "random")
                finished += 1
            except subprocess.TimeoutExpired:
                process.kill()
                moments.append(moment)
    assert run_process(*SHORT_DEMO, "--output-dir", tmp_path / "random").returncode == 0
    assert_same(tmp_path / "random", tmp_path / "whole")
    print(f"\n{len(moments)} kills at moments of a run of {seconds:.0f} s, after "
          f"{', '.join(f'{moment:.1f}' for moment in moments)} s; "
          f"{finished} of those runs ended before")


GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate "
                    "memory: you tried to allocate 9663676416 bytes. Error code 12")


@pytest.mark.parametrize("name, error, step, option", [
    ("transformers.AutoModelForCausalLM.from_pretrained", GPU, "quantizing", "--model"),
    ("llmcompressor.oneshot", HOST, "quantizing", "--calibration-length"),
    ("torch.nn.functional.nll_loss", GPU, "scoring", "--window"),
    ("transformers.GenerationMixin.generate", HOST, "scoring", "--model")])
def test_what_does_not_fit_is_a_row_that_names_the_option(
        lab, monkeypatch, capfd, name, error, step, option):
    def refuse(*inputs, **named):
        raise error

    build, broken = lab("--variants", LABELS[0], LABELS[2]), LABELS[2]
    quant_lab.run_variant(LABELS[0], build)
    with monkeypatch.context() as patch:
        patch.setattr(name, refuse)
        quant_lab.run_variant(broken, build)
    rows = read_rows(build.output)
    assert [row["status"] for row in rows] == ["ok", "failed"]
    said = rows[1]["error"]
    assert "; less " in said and option in said and "allocate" in said, said
    steps = [line.split()[-1] for line in capfd.readouterr().out.split("\n")
             if line.startswith(f"{broken}  ")]
    assert steps[-1] == step, "the last line says what it was at"
    assert not list(build.output.rglob("*.partial"))


def test_where_speed_cannot_be_measured_quality_stays(lab, monkeypatch):
    """Whatever the reason: the row is whole but for speed, names it, and is not made again."""
    build = lab("--variants", *LABELS[:2])
    quant_lab.run_variant(LABELS[0], build)
    with monkeypatch.context() as patch:
        patch.setattr(quant_lab.Decoder, "run", lambda *_: 1 / 0)
        quant_lab.run_variant(LABELS[1], build)
    whole, row = read_rows(build.output)
    assert (row["status"], row["error"]) == ("ok", None)
    assert "speed was not measured" in row["runs_as"] and "division by zero" in row["runs_as"]
    empty = {key for key in row if row[key] is None and whole[key] is not None}
    assert empty == {"ttft_s", "latency_s", "decode", "prefill", "prompt_tokens",
                     "kv_bytes_per_token"}
    results = quant_lab.collect_results(build)
    result = quant_lab.render_result(LABELS[1], results)
    assert "division by zero" in " ".join(result.split()) and "failed |" not in result
    table = {cells[0]: cells[1:] for cells in (
        re.findall(r"[^|\s][^|]*?(?= *\|)", line) for line in result.split("\n"))
        if len(cells) == 6}
    mine, over = table[LABELS[1]], table["over it"]
    assert mine[1] == f"{row['perplexity_ratio']['value']:.4f}" and mine[3] == "–"
    assert over[1] == f"{row['perplexity_ratio']['value']:.3f}"
    assert over[3] == "–", "a ratio that is not known is not 0"
    results["config"]["max_loss"] = math.inf  # All qualify, of so few windows, too.
    for one in quant_lab.advise(results)[:2]:
        known = one["variant"] is None and "too noisy to rank" in one["why"]  # As it may be.
        assert known or (one["variant"], one["ties"]) == (LABELS[0], []), one
    assert LABELS[1] == quant_lab.advise(results)[2]["variant"], "its memory is known"
    assert "division by zero" in (build.output / "summary.md").read_text("utf-8")
    assert run_all(lab("--variants", *LABELS[:2]))["variants"] == [whole, row]


def test_no_variant_leaves_anything_in_memory(lab):
    build, held = lab(), []
    for label in LABELS:
        quant_lab.run_variant(label, build)
        release_memory()
        tensors = {x.data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects()
                   if isinstance(x, torch.Tensor) and not is_fake(x)}  # Of traced tests.
        held.append((sum(tensors.values()), psutil.Process().memory_info().rss))
    for first, *_, last in zip(*held):
        assert last < 1.05 * first


def test_a_disk_that_fills_up_leaves_no_half_checkpoint(run_script, quick, small, tmp_path):
    """A limit on the size of a file stands in for it: the baseline does not fit, FP8 does."""
    size = (small / "model.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(0.95 * size), before[1]))
    try:
        run = run_script(*quick, "--variants", *LABELS[:2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run.code == 1, run.out + run.err
    rows = read_rows(tmp_path / "out")
    assert [row["status"] for row in rows] == ["failed", "ok"]
    assert "large" in rows[0]["error"] and rows[0]["error"].split(":")[0] in run.out
    assert os.listdir(tmp_path / "out" / "checkpoints") == [LABELS[1]]
    assert "Traceback" not in run.out + run.err


def test_no_room_for_the_results_is_one_line(run_script, quick, finished, monkeypatch):
    real, before = Path.replace, (finished / "results.json").read_bytes()

    def full(path, target):
        if path.name == "results.partial":
            raise OSError(28, "No space left on device")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", full)
    run = run_script(*quick)
    assert run.code == 2 and run.err.count("\n") == 1
    assert "--output-dir" in run.err and "No space left" in run.err
    assert (finished / "results.json").read_bytes() == before


def flip(file):
    """Change one bit in the middle; the size stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name, spoil", [
    ("model.safetensors", flip), ("config.json", flip), ("recipe.yaml", flip),
    ("tokenizer.json", Path.unlink), ("model.safetensors", lambda file: os.truncate(file, 9)),
    ("quant_lab.json", lambda file: file.write_text("{")), ("quant_lab.json", Path.unlink)])
def test_an_altered_checkpoint_is_made_again(lab, finished, finished_run, name, spoil):
    wanted = read_rows(finished)
    spoil(finished / "checkpoints" / LABELS[1] / name)
    rows = run_all(lab("--variants", LABELS[1]))["variants"]
    assert [*rows[:1], *rows[2:]] == [*wanted[:1], *wanted[2:]], "others are not touched"
    assert_same(finished, finished_run)


def test_one_giant_chat_is_cut(lab, tmp_path):
    line = json.dumps({"messages": [{"role": "user", "content": "word " * 400_000}]})
    (tmp_path / "giant.jsonl").write_text(line)
    build = lab("--calibration-data", tmp_path / "giant.jsonl")
    assert [len(ids) for ids in build.samples["input_ids"]] == [64]


@pytest.mark.parametrize("content", ["", " \\n\\t"])
def test_chats_without_text_are_refused(run_script, quick, tmp_path, content):
    (tmp_path / "blank.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "%s"}]}' % content)
    run = run_script(*quick, "--calibration-data", tmp_path / "blank.jsonl")
    assert run.code == 2 and "line 1" in run.err


@pytest.mark.parametrize("real", [False, True])
def test_a_base_model_of_odd_widths(run_script, quick, tmp_path, real):
    """No chat template, and widths that not even 32 divides: one row fails, with advice."""
    folder = SHARED / "stories260k" if real else tmp_path / "base"
    if not real:
        make_small(folder, hidden=40)
        (folder / "chat_template.jinja").unlink()
    elif not folder.is_dir():
        pytest.skip("the real data is not beside the project")
    run = run_script(*quick, "--model", folder)
    assert run.code == 2 and "--plain-text" in run.err and run.err.count("\n") == 1
    run = run_script(*quick, "--model", folder, "--plain-text", "--max-windows", 3)
    assert run.code == 1, run.out + run.err
    rows = read_rows(tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "ok"]
    for part in "128", str(172 if real else 40), "FP8":
        assert part in rows[2]["error"]
    assert rows[2]["error"] in " ".join(run.out.split())
    assert "Traceback" not in run.out + run.err
    assert not list((tmp_path / "out" / "checkpoints").rglob("*.jinja")), "not the model's"


HOSTILE = "<img src=x onerror=alert(1)> [a](javascript:b) `c` \x1b[31m\x07\u202e\n# d | e"


def test_foreign_text_stays_text(lab, monkeypatch, capfd):
    """Of errors and completions: no HTML, link or heading, nothing for the terminal."""
    import llmcompressor

    def fail(**named):
        raise ValueError(HOSTILE)

    build = lab("--variants", *LABELS[:2])
    monkeypatch.setattr(type(build.tokenizer), "decode", lambda *a, **k: HOSTILE)
    monkeypatch.setattr(llmcompressor, "oneshot", fail)
    capfd.readouterr()
    rows = run_all(build)["variants"]
    assert [row["status"] for row in rows] == ["ok", "failed"]
    summary = (build.output / "summary.md").read_text(encoding="utf-8")
    for text in capfd.readouterr().out, summary:
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", text)
        assert "\n# d" not in text and text.count("onerror") >= 2
    code = re.sub("(?m)^    .*$", "", summary)
    assert "<img" in code and "<img" not in re.sub("`[^`]*`", "", code)
    for words in range(60):  # Wherever a line is broken, none begins a block.
        row = quant_lab.ROW | dict(label=LABELS[1], status="failed",
                                   error="x " * words + "<script> # a 1. b")
        results = dict(variants=[row], config=dict(max_loss=2.0))
        for said in (quant_lab.render_notes(results),
                     quant_lab.render_result(LABELS[1], results)):
            assert "script" in said
            assert not re.search(r"(?m)^\s*([<#]|1\.)", said)


def test_no_code_of_a_model_runs(run_script, quick, small, tmp_path):
    """A pickle beside the safetensors, code beside the config, a template that pries."""
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = shutil.copytree(small, tmp_path / "model")
    for name in "pytorch_model.bin", "training_args.bin", "model.pkl":
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    (folder / "modeling.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = dict(AutoModelForCausalLM="modeling.M", AutoConfig="modeling.C")
    (folder / "config.json").write_text(json.dumps(config))
    run = run_script(*quick, "--model", folder, "--variants", LABELS[0])
    assert run.code == 0, run.out + run.err
    assert not (tmp_path / "ran").exists()
    (folder / "model.safetensors").unlink()
    assert run_script(*quick, "--model", folder).code == 2
    shutil.copy(small / "model.safetensors", folder)
    (folder / "chat_template.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    assert run_script(*quick, "--model", folder).code == 2
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name, model", [
    ("x\x1b[31m\ny", "../x\x1b[31m\ny"), ("here", ".."), ("-rf $(a) 'b'", "../-rf $(a) 'b'")])
def test_paths_stay_inside(quick, small, tmp_path, name, model):
    folder = shutil.copytree(small, tmp_path / name)
    (tmp_path / name / "work" if model == ".." else tmp_path / "work").mkdir()
    with chdir(folder / "work" if model == ".." else tmp_path / "work"):
        words = [str(word) for word in (*quick[:-2], "--model", model)]
        output = quant_lab.set_up(words).output.resolve()
        assert output.parent == Path.cwd() / "results"
        assert [path.name for path in Path.cwd().iterdir()] == ["results"]
    assert re.fullmatch(r"[A-Za-z0-9._-]+", output.name)
    assert set(os.listdir(tmp_path)) <= {name, "work"}


def test_the_table_of_faults_names_tests_that_exist():
    """Each entry of the docstring above names one or more, in the file where it is."""
    _, *entries = re.split(r"(?m)^- ", __doc__)
    for entry in entries:
        assert re.match(r"\*\*[^*]+\*\*: \S", entry), entry
        named = re.findall(r"`(test_\w+)`(?: of `(test_\w+\.py)`)?", entry)
        assert named, entry
        for name, file in named:
            source = (ROOT / "tests" / (file or "test_faults.py")).read_text("utf-8")
            assert f"\ndef {name}(" in source, (name, file)
    assert len(entries) > 20
