"""What really happens: killed runs, small memory, full disks, bad and hostile input."""

import gc
import json
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
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, SCRIPT, SHARED, make_small
from hub import serve
from test_lab import LABELS, count_calls, make_hub, run_process, strict

import quant_lab

TIMINGS = {"quantize_seconds", "load_seconds", "compile_seconds", "ttft_s", "latency_s",
           "decode_tok_s", "decode", "copy_bandwidth", "fingerprint"}
SHORT_DEMO = ["--demo", "--device", "cpu", "--calibration-samples", 8,
              "--calibration-length", 64, "--max-windows", 4, "--kld-tokens", 200,
              "--new-tokens", 4, "--repeats", 1, "--batch-sizes", 1]


def files_of(output: Path) -> dict:
    """Hashes of all files of all checkpoints but those that hold timings."""
    return {label: quant_lab.hash_files(
        file for file in (output / "checkpoints" / label).iterdir()
        if file.name not in ("quant_lab.json", "README.md")) for label in LABELS
        if (output / "checkpoints" / label).is_dir()}


def figures_of(output: Path) -> list[dict]:
    rows = strict(output / "results.json")["variants"]
    return [{key: row[key] for key in row.keys() - TIMINGS} for row in rows]


def same(output: Path, wanted: Path) -> None:
    assert figures_of(output) == figures_of(wanted)
    assert files_of(output) == files_of(wanted)
    assert not list(output.rglob("*.partial")) and (output / "summary.md").exists()


def run_killed(event, phase, number, words, output) -> bool:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kill.py"), event, phase, str(number),
         *map(str, words), "--output-dir", str(output)], capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stdout + done.stderr
    return done.returncode == -signal.SIGKILL


def steps_of(label: str, prompts=len(quant_lab.PROMPTS)) -> list[tuple]:
    """Events of a variant in their order; the reference completes the prompts, too, and
    the bandwidth's median comes before the timings'; results are written once a variant."""
    return [*([("quantize", "before", 1), ("quantize", "after", 1)] * (label != LABELS[0])),
            ("save", "before", 1), ("weights", "half", 1), ("save", "after", 1),
            ("note", "before", 1), ("note", "after", 1), ("rename", "before", 1),
            ("rename", "after", 1), ("complete", "before", prompts + 1),
            ("complete", "after", 2 * prompts), ("time", "before", 2),
            ("results", "before", nth := LABELS.index(label) + 1), ("results", "after", nth)]


@pytest.mark.slow
def test_killed_at_every_step_and_at_many_moments(tmp_path):
    """Each step of each variant in one chain of runs; then at random moments."""
    start = time.perf_counter()
    whole = run_process(*SHORT_DEMO, "--output-dir", tmp_path / "whole")
    seconds = time.perf_counter() - start
    assert whole.returncode == 0, whole.stdout + whole.stderr
    kills = 0
    for label in LABELS:
        for step in steps_of(label):
            assert run_killed(*step, SHORT_DEMO, tmp_path / "chain"), (label, step)
            kills += 1
    done = run_process(*SHORT_DEMO, "--output-dir", tmp_path / "chain")
    assert done.returncode == 0 and done.stdout.count("finished before") == 4
    same(tmp_path / "chain", tmp_path / "whole")
    draw, moments, finished = random.Random(0), [], 0
    while len(moments) < 16:
        words = [sys.executable, str(SCRIPT), *map(str, SHORT_DEMO),
                 "--output-dir", str(tmp_path / "random")]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
            moment = draw.uniform(0, seconds)
            try:
                assert process.wait(moment) == 0
                same(tmp_path / "random", tmp_path / "whole")
                shutil.rmtree(tmp_path / "random")
                finished += 1
            except subprocess.TimeoutExpired:
                process.kill()
                moments.append(moment)
    assert run_process(*SHORT_DEMO, "--output-dir", tmp_path / "random").returncode == 0
    same(tmp_path / "random", tmp_path / "whole")
    print(f"\n{kills} kills at steps, {len(moments)} at moments of a run of {seconds:.0f} s, "
          f"after {', '.join(f'{moment:.1f}' for moment in moments)} s; "
          f"{finished} of those runs ended before")


def test_killed_at_three_steps(quick, tmp_path):
    words = [*quick, "--variants", *LABELS[:2]]
    assert run_process(*words, "--output-dir", tmp_path / "whole").returncode == 0
    for step in (("weights", "half", 1), ("rename", "before", 2), ("results", "before", 2)):
        assert run_killed(*step, words, tmp_path / "cut")
    done = run_process(*words, "--output-dir", tmp_path / "cut")
    assert done.returncode == 0 and done.stdout.count("finished before") == 1
    same(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("after", ["", "device", "quantized in", "gptq"])
def test_an_interrupt_ends_at_once_and_says_how_to_go_on(quick, tmp_path, after):
    """At the start, while loading, while timing, in GPTQ; and a second run is kept out."""
    words = [sys.executable, str(SCRIPT), *map(str, quick)]
    words += ["--repeats", "100000"] if "quantized" in after else []
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        log = tmp_path / "out" / "log.txt"
        while after == "gptq" and not (
                log.exists() and "GPTQ" in log.read_text("utf-8").upper()):
            time.sleep(0.01)
        if not after:
            time.sleep(2.5)
        for line in process.stdout if after not in ("", "gptq") else ():
            if after in line:
                break
        if "quantized" in after:
            second = run_process(*quick)
            assert second.returncode == 2 and "another run" in second.stderr
            assert len(second.stderr.strip().split("\n")) == 1
        begin = time.perf_counter()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "run again" in out and err == ""
    assert time.perf_counter() - begin < 3
    assert after != "gptq" or "quantized in" not in out.partition("[3/4]")[2]
    if "quantized" in after:
        assert (tmp_path / "out" / "checkpoints" / LABELS[0] / "model.safetensors").exists()


@pytest.mark.parametrize("part, changes", [
    ("machine", dict(name="Tesla T4")), ("versions", dict(torch="2.0.0"))])
def test_rows_of_two_machines_or_versions_never_meet(lab, capsys, part, changes):
    quant_lab.run_lab(lab("--variants", *LABELS[:2]), [])
    here = lab("--variants", LABELS[0])
    capsys.readouterr()
    elsewhere = quant_lab.replace(here, **{part: getattr(here, part) | changes})
    results = quant_lab.run_lab(elsewhere, [])
    said = " ".join(capsys.readouterr().out.split())
    assert [row["label"] for row in results["variants"]] == LABELS[:1]
    assert results[part] == getattr(elsewhere, part) == strict(
        here.output / "results.json")[part]
    (name, value), = changes.items()
    assert f"not kept: {LABELS[0]}, {LABELS[1]}" in said
    assert f"{name} {getattr(here, part)[name]} → {value}" in said


def test_two_fresh_runs_are_alike_to_the_byte(lab, tmp_path):
    for name in "one", "two":
        quant_lab.run_lab(lab("--output-dir", tmp_path / name), [])
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert len(files_of(tmp_path / "one")) == 4
    assert figures_of(tmp_path / "one") == figures_of(tmp_path / "two")


@pytest.mark.slow
def test_two_fresh_demos_are_alike_to_the_byte(tmp_path):
    for name in "one", "two":
        assert run_process("--demo", "--device", "cpu", "--output-dir",
                           tmp_path / name).returncode == 0
    same(tmp_path / "one", tmp_path / "two")


GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate "
                    "memory: you tried to allocate 9663676416 bytes. Error code 12")


def refuse(monkeypatch, owner, name, error, times, begin=0):
    """Let some calls of a function raise the error, after `begin` that do not."""
    real, count = getattr(owner, name), [0]

    def refusing(*arguments, **named):
        count[0] += 1
        if begin < count[0] <= begin + times:
            raise error
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, refusing)


@pytest.mark.parametrize("error", [GPU, HOST])
def test_short_of_memory_once_a_smaller_form_does_the_same(lab, monkeypatch, error):
    import llmcompressor

    label = LABELS[2]
    wanted, = quant_lab.run_lab(lab("--variants", label), [])["variants"]
    assert wanted["retried"] is False
    refuse(monkeypatch, quant_lab.F, "cross_entropy", error, 1)
    refuse(monkeypatch, llmcompressor, "oneshot", error, 1)
    calls = count_calls(monkeypatch, "score_text")
    results = quant_lab.run_lab(lab("--variants", label, "--fresh"), [])
    row, = results["variants"]
    assert row["status"] == "ok", row["error"]
    assert row["retried"] is True and "for want of memory" in " ".join(
        quant_lab.render_warnings(results))
    assert [call[4] for call in calls] == [128, 16, 128], "the reference, again, the variant"
    assert row["kld"]["mean"] < 2 * wanted["kld"]["mean"]
    monkeypatch.undo()
    # The reference's windows are 11, so this is the variant's.
    refuse(monkeypatch, quant_lab.F, "cross_entropy", error, 1, begin=14)
    again, = quant_lab.run_lab(lab("--variants", label, "--repeats", 3), [])["variants"]
    assert again["perplexity"] == row["perplexity"] and again["kld"] == row["kld"]


@pytest.mark.parametrize("owner, name, step, option", [
    (quant_lab, "load_model", "loading", "--model"),
    ("llmcompressor", "oneshot", "quantizing", "--calibration-length"),
    (quant_lab.F, "cross_entropy", "scoring", "--window"),
    ("transformers.GenerationMixin", "generate", "completing", "--new-tokens"),
    (quant_lab, "Decoder", "decoding one sequence", "--new-tokens")])
def test_what_does_not_fit_is_a_row_that_names_the_option(lab, monkeypatch, owner, name,
                                                          step, option):
    import llmcompressor
    import transformers

    owner = {"llmcompressor": llmcompressor,
             "transformers.GenerationMixin": transformers.GenerationMixin}.get(owner, owner)
    real, broken = quant_lab.run_variant, LABELS[2]

    def run_variant(label, *rest):
        with monkeypatch.context() as patch:
            if label == broken:
                refuse(patch, owner, name, GPU, 10**9, begin=name == "load_model")
            return real(label, *rest)

    monkeypatch.setattr(quant_lab, "run_variant", run_variant)
    rows = quant_lab.run_lab(lab("--variants", LABELS[0], broken, LABELS[3]), [])["variants"]
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    said = rows[1]["error"]
    assert step in said and option in said and "9.00 GiB" in said
    assert said.startswith("MemoryError") and not list(lab().output.rglob("*.partial"))


def test_no_variant_leaves_anything_in_memory(lab, monkeypatch):
    real, held = quant_lab.run_variant, []

    def run_variant(*inputs):
        row = real(*inputs)
        quant_lab.free_memory()
        tensors = {x.data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects()
                   if isinstance(x, torch.Tensor)}
        held.append((sum(tensors.values()), psutil.Process().memory_info().rss))
        return row

    gc.unfreeze()
    monkeypatch.setattr(quant_lab, "run_variant", run_variant)
    quant_lab.run_lab(lab(), [])
    for first, *_, last in zip(*held):
        assert last < 1.05 * first


def test_room_on_the_disk_is_looked_at_first(lab, monkeypatch, capsys):
    build = lab("--kld-tokens", 20)
    free = int(3.5 * quant_lab.weight_bytes(build.model))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(
        free, 0, free))
    made = count_calls(monkeypatch, "quantize_variant")
    with pytest.raises(SystemExit) as end:
        quant_lab.run_lab(build, [])
    said = capsys.readouterr().err
    assert end.value.code == 2 and not made and said.count("\n") == 1
    assert "--output-dir" in said and "4 checkpoints" in said and "--variants" in said
    half = build.output / "checkpoints" / f"{LABELS[0]}.partial"
    half.mkdir()
    fits = lab("--variants", *LABELS[:3], "--kld-tokens", 20)
    assert quant_lab.run_lab(fits, [])["variants"][2]["kld"] and not half.exists()
    with pytest.raises(SystemExit):
        quant_lab.run_lab(lab("--variants", LABELS[0], "--kld-tokens", 10**6), [])
    assert "logits" in capsys.readouterr().err


def test_a_disk_that_fills_up_leaves_no_half_checkpoint(quick, small, tmp_path):
    """A limit on the size of a file stands in for it: the baseline does not fit, FP8 does."""
    size = (small / "model.safetensors").stat().st_size

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(0.95 * size),) * 2)

    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, quick), "--kld-tokens", "20", "--variants",
         *LABELS[:2]], capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = strict(tmp_path / "out" / "results.json")["variants"]
    assert [row["status"] for row in rows] == ["failed", "ok"]
    assert "large" in rows[0]["error"] and rows[0]["error"].split(":")[0] in done.stdout
    assert os.listdir(tmp_path / "out" / "checkpoints") == [LABELS[1]]
    assert "Traceback" not in done.stdout + done.stderr


def test_no_room_for_the_results_is_one_line(run_script, quick, monkeypatch):
    real = Path.replace

    def full(path, target):
        if path.name == "results.partial":
            raise OSError(28, "No space left on device")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", full)
    run = run_script(*quick, "--variants", LABELS[0])
    assert run.code == 2 and run.err.count("\n") == 1
    assert "--output-dir" in run.err and "No space left" in run.err


def flip(file: Path) -> None:
    """Change one bit in the middle; the size stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json",
                                  "recipe.yaml", "quant_lab.json"])
def test_an_altered_checkpoint_is_told_and_made_again(lab, monkeypatch, capfd, name):
    wanted, = quant_lab.run_lab(lab("--variants", LABELS[1]), [])["variants"]
    before = files_of(lab().output)
    file = lab().output / "checkpoints" / LABELS[1] / name
    if name == "quant_lab.json":
        note = strict(file) | dict(rtn_fallbacks=7)
        del note["files"]
        file.write_text(json.dumps(note))
    else:
        flip(file)
    made = count_calls(monkeypatch, "quantize_variant")
    capfd.readouterr()
    row, = quant_lab.run_lab(lab("--variants", LABELS[1]), [])["variants"]
    assert len(made) == 1 and files_of(lab().output) == before
    assert "altered" in capfd.readouterr().out and row["kld"] == wanted["kld"]


@pytest.mark.parametrize("part", ["variants", "machine"])
def test_altered_results_are_told_and_measured_again(lab, capsys, part):
    wanted = quant_lab.run_lab(lab("--variants", LABELS[1]), [])["variants"]
    file = lab().output / "results.json"
    results = strict(file)
    if part == "variants":
        results["variants"][0]["perplexity"] *= 0.5  # A figure too good to be true.
    else:
        results[part] = None
    file.write_text(json.dumps(results))
    capsys.readouterr()
    rows = quant_lab.run_lab(lab("--variants", LABELS[1]), [])["variants"]
    assert rows[0]["perplexity"] == wanted[0]["perplexity"]
    assert "altered" in capsys.readouterr().out


def test_downloads_are_tried_again_kept_and_checked(tmp_path):
    """Each file's first answer is "busy" or cut off; then offline; then spoilt on disk."""
    repos, _ = make_hub(tmp_path / "hub")
    home = dict(HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_XET="1")
    words = ["--device", "cpu", "--variants", LABELS[0], "--repeats", 1, "--new-tokens", 2,
             "--max-windows", 3, "--kld-tokens", 20, "--batch-sizes", 1,
             "--output-dir", tmp_path / "out"]

    def run(*more, **environment):
        done = run_process(*words, *more, **home, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        row, = strict(tmp_path / "out" / "results.json")["variants"]
        return row["perplexity"], done.stdout

    with serve(repos) as hub:
        hub.fail_first = True
        wanted, _ = run(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
        assert hub.failed
    assert run("--fresh", HF_HUB_OFFLINE="1")[0] == wanted
    blob = next((tmp_path / "home" / "hub").rglob("model.safetensors")).resolve()
    table = next((tmp_path / "home" / "datasets").rglob("quant_lab-*.json"))
    flip(blob), flip(table)
    with serve(repos) as hub:
        found, said = run("--fresh", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
        assert found == wanted and said.count("to be fetched again") == 2
        flip(blob)
    offline = run_process(*words, "--fresh", **home, HF_HUB_OFFLINE="1")
    assert offline.returncode == 2 and "--model" in offline.stderr
    assert len(offline.stderr.strip().split("\n")) == 1


@pytest.mark.parametrize("name", [
    "257cc5642cb1a054f08cc83f2d943e56fd3ebe99", "4" * 40, "config.json",
    "b5bb9d8014a0f9b1d61e21e796d78dccdf1352f23cd32812f4850b878ae4944c", "4" * 64])
def test_a_cached_file_is_known_by_its_name(tmp_path, name):
    """Hashes of foo, as `git hash-object` and `sha256sum` print them."""
    (tmp_path / name).write_bytes(b"foo\n")
    assert quant_lab.is_spoilt(tmp_path / name) == name.startswith("4444")


def test_one_giant_chat_is_cut(lab, tmp_path):
    line = json.dumps({"messages": [{"role": "user", "content": "word " * 400_000}]})
    (tmp_path / "giant.jsonl").write_text(line)
    build = lab("--calibration-data", tmp_path / "giant.jsonl")
    assert [len(ids) for ids in build.samples] == [64]


@pytest.mark.parametrize("content", ["", " \\n\\t"])
def test_chats_without_text_are_refused(run_script, quick, tmp_path, content):
    (tmp_path / "blank.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "%s"}]}' % content)
    run = run_script(*quick, "--calibration-data", tmp_path / "blank.jsonl")
    assert run.code == 2 and "line 1" in run.err


@pytest.mark.parametrize("real", [False, True])
def test_a_base_model_of_odd_widths(run_script, quick, tmp_path, real):
    """No chat template, and widths that 128 does not divide: one row fails, with advice."""
    folder = SHARED / "stories260k" if real else tmp_path / "base"
    if not real:
        make_small(folder, hidden=64)
        (folder / "chat_template.jinja").unlink()
    elif not folder.is_dir():
        pytest.skip("the real data is not beside the project")
    run = run_script(*quick, "--model", folder)
    assert run.code == 2 and "--plain-text" in run.err and run.err.count("\n") == 1
    run = run_script(*quick, "--model", folder, "--plain-text", "--kld-tokens", 100)
    assert run.code == 1, run.out + run.err
    rows = strict(tmp_path / "out" / "results.json")["variants"]
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "ok"]
    assert "no multiple of" in rows[2]["error"] and "FP8" in rows[2]["error"]
    assert not list((tmp_path / "out" / "checkpoints").rglob("*.jinja")), "not the model's"
    card = (tmp_path / "out" / "checkpoints" / LABELS[1] / "README.md").read_text("utf-8")
    assert "apply_chat_template" not in card and 'tokenizer("Hello!"' in card


HOSTILE = "<img src=x onerror=alert(1)> [a](javascript:b) `c` \x1b[31m\x07\u202e\n# d | e"


def test_foreign_text_stays_text(lab, monkeypatch, capfd):
    """Of errors and completions: no HTML, link or heading, nothing for the terminal."""
    def fail(*arguments):
        raise ValueError(HOSTILE)

    build = lab("--variants", *LABELS[:2])
    monkeypatch.setattr(type(build.tokenizer), "decode", lambda *a, **k: HOSTILE)
    monkeypatch.setattr(quant_lab, "apply_recipe", fail)
    results = quant_lab.run_lab(build, [])
    print(quant_lab.render_body(results, 1))
    quant_lab.write_report(results, build.output)
    summary = (build.output / "summary.md").read_text(encoding="utf-8")
    for text in capfd.readouterr().out, summary:
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", text)
        assert "\n# d" not in text and text.count("onerror") >= 2
    code = re.sub("(?m)^    .*$", "", summary)
    assert "<img" in code and "<img" not in re.sub("`[^`]*`", "", code)
    for words in range(60):  # Wherever a line is broken, none begins a block.
        row = quant_lab.ROW | dict(label=LABELS[1], error="x " * words + "<script> # a 1. b")
        said, = quant_lab.render_warnings(dict(config=results["config"], variants=[row]))
        filled = quant_lab.textwrap.fill(said, 110, break_on_hyphens=False)
        assert not re.search(r"(?m)^\s*([<#]|1\.)", filled)


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
    source = SCRIPT.read_text("utf-8")
    assert "trust_remote_code=True" not in source and "import pickle" not in source


@pytest.mark.parametrize("name", ["../../evil", "..", "a/../../b", "x\x1b[31m\ny"])
def test_paths_stay_inside(monkeypatch, tmp_path, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    output = quant_lab.prepare_output(
        quant_lab.Options(model=name), dict(device="cuda", name="../../Tesla T4"))
    inside = tmp_path / "here" / "results"
    assert output.resolve().parent == inside and "\x1b" not in str(output)
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


def linger() -> dict:
    print(os.getpid(), flush=True)
    time.sleep(600)
    return {}


def test_the_process_of_a_variant_dies_with_its_parent(tmp_path):
    """Or it would disturb the timings of the next run."""
    (tmp_path / "main.py").write_text(
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}\n"
        "import quant_lab, test_faults\n"
        "if __name__ == '__main__':\n    quant_lab.run_apart(test_faults.linger)\n")
    with subprocess.Popen([sys.executable, str(tmp_path / "main.py")], text=True,
                          stdout=subprocess.PIPE) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        assert not psutil.wait_procs([child], timeout=5)[1]


def test_the_table_of_faults_names_tests_that_exist():
    readme = (ROOT / "README.md").read_text("utf-8").partition("### When something")[2]
    sources = "".join(file.read_text("utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", readme.partition("\n## ")[0])
    assert len(named) > 20 and all(f"def {name}(" in sources for name in named)
