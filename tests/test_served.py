"""Serve checkpoints with a stand-in for vLLM: figures, errors, order, going on, the report."""

import ast
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import LABELS, ROOT, SCRIPT, quick_words, read_strict, run_process

import quant_lab

BASE, FP8, _, W8A8 = LABELS
SERVED = str(ROOT / "tests" / "served")


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """An interpreter of another environment, in which the stand-in is installed."""
    file = tmp_path_factory.mktemp("serve") / "python"
    file.write_text(f"#!/bin/sh\n[ -z \"$PYTHONPATH\" ] || exit 9\n"
                    f"PYTHONPATH='{SERVED}' exec '{sys.executable}' \"$@\"\n")
    file.chmod(0o755)
    return file


def serve(lab, **said):
    """Measure what is finished; return what was noted of each checkpoint asked for."""
    notes = lab.output / "notes.jsonl"
    notes.unlink(missing_ok=True)
    os.environ["STAND_IN"] = json.dumps(dict(said, notes=str(notes)))
    try:
        quant_lab.serve_all(lab)
    finally:
        del os.environ["STAND_IN"]
    return [json.loads(line) for line in notes.read_text().split("\n")[:-1]
            ] if notes.exists() else []


@pytest.fixture(scope="module")
def served(small, texts, tmp_path_factory, quick_collection, python):
    """Finish the quick run of three variants in two batch sizes, and serve it."""
    folder = tmp_path_factory.mktemp("served")
    words = [*quick_words(small, texts), "--batch-sizes", 2, "--variants", FP8, W8A8,
             "--output-dir", folder, "--vllm", python]
    lab = quant_lab.set_up([str(word) for word in words])
    for label in lab.options.variants:
        quant_lab.run_variant(label, lab)
    texts = {label: [one["completion"] for one in lab.rows[label]["divergence"]["completions"]]
             for label in (BASE, FP8)}
    notes = serve(lab, writes={**texts, FP8: [texts[FP8][0][:3] + "?", *texts[FP8][1:]]})
    return SimpleNamespace(lab=lab, notes=notes, words=words, folder=folder,
                           results=read_strict(folder / "results.json"))


def advise(results):
    """Return the advice as if all qualified: a text this short gives no intervals."""
    good = dict(perplexity_ratio=dict(value=1.0, low=1.0, high=1.0))
    return quant_lab.advise(dict(results, variants=[
        row | good for row in results["variants"]]))


def go_on(served, tmp_path, *words):
    """Set up the served run again in a copy of its folder; words are options on top."""
    folder = shutil.copytree(served.folder, tmp_path / "copy")
    return quant_lab.set_up([str(x) for x in (*served.words, "--output-dir", folder, *words)])


def test_the_figures_are_those_of_the_clock(served):
    """A call takes pace * (20 ms + 10 ms a further token) * (1 + batch / 100), nearly."""
    assert served.lab.engine == "vllm 0.26.0"
    assert [row["label"] for row in served.results["variants"]] == [BASE, FP8, W8A8]
    for row, pace in zip(served.results["variants"], (1, 0.5, 0.5)):
        said = row["served"]
        assert (said["engine"], said["error"], said["kv_tokens"]) == ("vllm 0.26.0", None, 12345)
        assert said["kernel"] == (None if row["label"] == BASE else "StandInKernel")
        assert said["ttft_s"]["median"] == pytest.approx(pace * 0.02 * 1.01, rel=0.01)
        assert said["latency_s"]["median"] == pytest.approx(pace * 0.05 * 1.01, rel=0.01)
        assert len(said["latency_s"]["samples"]) == 2, "repeats: the warm-up is twice as long"
        for one, batch in zip(said["decode"], (1, 2)):
            itl = pace * 0.01 * (1 + batch / 100)
            assert one["batch"] == batch
            assert one["itl_ms"]["median"] == pytest.approx(1000 * itl, rel=0.01)
            assert one["tok_s"]["median"] == pytest.approx(batch / itl, rel=0.01)
        assert said["drift"] == pytest.approx(0, abs=1e-9)


def test_the_baseline_is_measured_first_and_last_and_each_in_a_process(served, python):
    assert [note["label"] for note in served.notes] == [BASE, FP8, W8A8, BASE]
    for note in served.notes:
        longest = max(512, *(ids.shape[1] for ids in served.lab.prompts))
        assert note["max_model_len"] == longest + 4
        assert note["dtype"] == "float16" and note["seed"] == 42 and not note["caching"]
        assert note["part"] == 0.8, "of the GPU; some of it this process holds"
        assert note["path"] == SERVED, "no package of this environment leads there"
        assert note["multiprocessing"] == "0"
        assert note["tools"] == str(python.parent), "as if the environment were activated"


def test_completions_are_compared_with_the_labs(served):
    base, fp8, w8a8 = (row["served"]["divergence"] for row in served.results["variants"])
    assert {one["same_tokens"] for one in base["completions"]} == {4}
    counts = [one["same_tokens"] for one in fp8["completions"]]
    assert counts[0] < 4 and set(counts[1:]) == {4} and fp8["completions"][0]["completion"] != (
        served.results["variants"][1]["divergence"]["completions"][0]["completion"])
    assert w8a8["max"] == 0, "what writes something else is seen at once"


def test_the_report_shows_and_ranks_what_the_server_gave(served):
    summary = " ".join((served.folder / "summary.md").read_text(encoding="utf-8").split())
    assert "Served by vllm 0.26.0; baseline again last: 0.0 % off." in summary
    table = quant_lab.render_tables(served.results, served.results["variants"]).split("\n\n")
    assert "kernel |" in table[-1] and "12,345" in table[-1] and "StandInKernel" in table[-1]
    fp8 = served.results["variants"][1]["served"]["decode"][0]["tok_s"]["median"]
    assert f"| {FP8}" in table[-3] and f"| {fp8:.1f} (" in " ".join(table[-3].split())
    assert served.results["advice"] == quant_lab.advise(served.results)
    user, many, *_ = advise(served.results)
    for one, unit in (user, "s in vllm 0.26.0; 0.50"), (
            many, "tokens/s in batches of 2, in vllm 0.26.0; 2.00"):
        assert {one["variant"], *one["ties"]} == {FP8, W8A8}
        assert f"{unit} times the baseline's" in one["why"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant_lab, "find_loss", lambda row: 0.0)  # This text gives no interval.
        title = quant_lab.draw_summary(served.results)._suptitle.get_text()
    saved, = re.findall(r"latency in vllm 0\.26\.0 ([+-][\d.]+) %", " ".join(title.split()))
    assert float(saved) == pytest.approx(-50, abs=0.5)
    card = (served.folder / "checkpoints" / FP8 / "README.md").read_text(encoding="utf-8")
    assert "Served by vllm 0.26.0" in card and f"| {W8A8}" not in card


def test_until_all_were_tried_the_own_loop_decides(served):
    rows = [dict(row) for row in served.results["variants"]]
    rows[1]["served"] = None  # As of a run without a server.
    results = dict(served.results, variants=rows)
    for one in advise(results)[:2]:
        assert "in this script, on a CPU" in one["why"] and "vllm" not in one["why"]
    tables = quant_lab.render_tables(results, rows)
    assert tables.count(FP8) == 5, "quality, speed, batches, prompts, cost"
    for row in rows:
        row["served"] = None
    assert "Served by" not in quant_lab.render_tables(results, rows)


def test_what_is_finished_is_kept_and_served_again_when_asked_for(served, tmp_path, capsys):
    lab = go_on(served, tmp_path)
    for label in lab.options.variants:
        quant_lab.run_variant(label, lab)
    assert "quantizing" not in capsys.readouterr().out
    assert json.dumps(lab.rows, sort_keys=True) == json.dumps(served.lab.rows, sort_keys=True)
    assert [note["label"] for note in serve(lab)] == [BASE, FP8, W8A8, BASE]


@pytest.mark.parametrize("free, changes, wanted", [
    (10, {}, 1), (9.9, {}, 2), (5, {}, 2), (4.9, {}, 4), (1, {}, 4), (1, dict(gpus=3), 2),
    (1, dict(gpus=1), 1)])
def test_a_checkpoint_gets_as_many_gpus_as_it_takes(served, tmp_path, monkeypatch, free, changes,
                                                   wanted):
    """Of five GPUs a power of two, seven tenths of whose free memory hold 7 MB of weights."""
    lab = go_on(served, tmp_path, "--variants", FP8)
    lab.rows = {BASE: lab.rows[BASE] | dict(weight_bytes=7_000_000)}
    lab.options = replace(lab.options, **changes)
    monkeypatch.setattr(quant_lab.torch.cuda, "device_count", lambda: 5)
    monkeypatch.setattr(quant_lab, "find_free", lambda gpu: free * 1e6 + 1)
    notes = serve(lab)
    assert {note["gpus"] for note in notes} == {wanted}
    row, = read_strict(lab.output / "results.json")["variants"]
    assert row["served"]["tensor_parallel_size"] == wanted and row["served"]["error"] is None
    table = quant_lab.render_tables(served.results, [row]).split("\n\n")[-1]
    assert "GPUs |" in table and f"| {wanted} |" in " ".join(table.split())


def test_one_that_fails_or_hangs_is_an_error_and_the_row_stays(
        served, tmp_path, capsys, monkeypatch):
    """Another engine serves all anew; what failed makes the next run measure all again."""
    monkeypatch.setattr(quant_lab, "PATIENCE", 3)
    monkeypatch.setenv("STAND_IN", json.dumps(dict(version="0.27.1rc1")))
    lab = go_on(served, tmp_path)
    notes = serve(lab, version="0.27.1rc1", fails=[FP8], hangs=[W8A8])
    assert [note["label"] for note in notes] == [BASE, FP8, W8A8, BASE]
    out = capsys.readouterr().out
    assert f"{W8A8}  in vllm 0.27.1rc1, for 3 s at most" in out
    base, fp8, w8a8 = (lab.rows[label] for label in (BASE, FP8, W8A8))
    assert all(row["status"] == "ok" and row["error"] is None for row in lab.rows.values())
    assert base["served"]["error"] is None and base["served"]["drift"] < 1e-9
    assert fp8["served"]["error"] == (
        f"ValueError: 1 validation error no kernel for this one; vllm-{FP8}.log has more")
    assert "no kernel for this one" in (lab.output / f"vllm-{FP8}.log").read_text()
    assert re.fullmatch(
        rf"TimeoutExpired: .* timed out after [23]\S* seconds; vllm-{W8A8}\.log has more",
        w8a8["served"]["error"])
    results = read_strict(lab.output / "results.json")
    assert results["variants"][1]["served"]["error"] == fp8["served"]["error"]
    notes = " ".join(quant_lab.render_notes(results).split())
    assert "FP8 dynamic: not served: ValueError: 1 validation error no kernel for this one" in notes
    assert "SmoothQuant W8A8: not served: `TimeoutExpired: " in notes
    assert f" seconds; vllm-{W8A8}.log has more`" in notes
    assert quant_lab.render_tables(
        results, results["variants"]).split("\n\n")[-3].count("failed") == 2 * 3
    assert [(one["variant"], one["ties"]) for one in advise(results)] == [
        *[(BASE, [])] * 3, (None, [])], "KLD of so few windows has no rank"
    assert all("in vllm 0.27.1rc1" in one["why"] for one in advise(results)[:2])
    again = serve(lab, version="0.27.1rc1")
    assert [note["label"] for note in again] == [BASE, FP8, W8A8, BASE]
    assert all(row["served"]["error"] is None for row in lab.rows.values())


def test_an_engine_that_dies_says_its_exit_code(tmp_path, python):
    with pytest.raises(ValueError, match="exit code 3: almost"):
        quant_lab.run_there(str(python), "import os\nprint('almost', flush=True)\nos._exit(3)",
                            tmp_path / "log")


def test_a_baseline_that_drifts_makes_all_noisy(served, tmp_path):
    lab = go_on(served, tmp_path, "--variants", FP8)
    for row in lab.rows.values():
        row["served"] = None
    del lab.rows[W8A8]
    assert [note["label"] for note in serve(lab, slower=1.06)] == [BASE, FP8, BASE]
    rows = read_strict(lab.output / "results.json")["variants"]
    assert [row["served"]["drift"] for row in rows] == pytest.approx([0.06, 0.06])
    tables = quant_lab.render_tables(served.results, rows)
    assert "baseline again last: 6.0 % off." in " ".join(tables.split())
    assert tables.split("\n\n")[-3].count("noisy") == 2 * 3
    for one in advise(dict(served.results, variants=rows))[:2]:
        assert one["variant"] and "vllm" not in one["why"], "this script's loop decides"
    assert serve(lab) != [], "the next run measures again"
    assert max(row["served"]["drift"] for row in lab.rows.values()) < 1e-9


def test_what_cannot_be_compared_is_noisy(served, tmp_path):
    """The server refuses the baseline; or it is not measured again, as after Ctrl-C."""
    lab = go_on(served, tmp_path)
    for row in lab.rows.values():
        row["served"] = None
    serve(lab, fails=[BASE])
    assert [row["served"]["drift"] for row in lab.rows.values()] == [None] * 3
    rows = read_strict(lab.output / "results.json")["variants"]
    tables = quant_lab.render_tables(served.results, rows)
    assert "baseline again last: not compared." in " ".join(tables.split())
    assert tables.split("\n\n")[-3].count("noisy") == 2 * 3
    for one in advise(dict(served.results, variants=rows))[:2]:
        assert one["variant"] and "vllm" not in one["why"], "this script's loop decides"


def test_a_baseline_that_failed_leaves_the_others_to_serve(served, tmp_path):
    lab = go_on(served, tmp_path)
    lab.rows[BASE] |= dict(status="failed", error="no", divergence=None)
    lab.rows[FP8]["served"] = None
    assert [note["label"] for note in serve(lab)] == [FP8, W8A8]
    assert lab.rows[FP8]["served"]["error"] is None and lab.rows[FP8]["served"]["drift"] is None


def test_fresh_forgets_nothing_for_an_interpreter_that_is_none(served, tmp_path):
    with pytest.raises(SystemExit) as end:
        go_on(served, tmp_path, "--fresh", "--vllm", "nowhere/python")
    assert end.value.code == 2
    for kept in "results.json", f"checkpoints/{FP8}/model.safetensors":
        assert (tmp_path / "copy" / kept).exists()


@pytest.mark.parametrize("given, said, reason", [
    ("nowhere/python", {}, "No such file or directory"),
    (sys.executable, {}, "No module named 'vllm'"),
    (str(ROOT), {}, "ermission denied"),
    (None, dict(version="0.19.1"), "vLLM 0.19.1 (0.20 is the first); a GPU: True"),
    (None, dict(gpu=False), "vLLM 0.26.0 (0.20 is the first); a GPU: False")])
def test_what_cannot_serve_is_refused_before_anything_is_quantized(
        small, texts, tmp_path, python, given, said, reason):
    run = run_process(*quick_words(small, texts), "--output-dir", tmp_path / "out",
                      "--vllm", given or python, STAND_IN=json.dumps(said))
    assert run.returncode == 2, run.stdout
    line = run.stderr.strip().split("\n")[-1]
    assert line.startswith(f"quant_lab: --vllm {given or python}: ") and reason in line
    assert "give the python of an environment with vLLM" in line
    assert "quantizing" not in run.stdout and not (tmp_path / "out" / "checkpoints").exists()


def test_the_report_ends_with_what_to_deploy(served, capsys):
    *_, cell = ast.parse(SCRIPT.read_text(encoding="utf-8")).body
    lab = SimpleNamespace(output=served.folder)
    names = dict(vars(quant_lab), __name__="__main__", LAB=lab,
                 collect_results=lambda _: served.results)
    exec(compile(ast.Module([cell], []), "cell", "exec"), names)
    out = capsys.readouterr().out
    notes, advice = out.find("- FP16 baseline: "), out.find("## Which to deploy\n\n- one user")
    assert 0 < notes < advice
    assert out.rstrip().split("\n")[-1].startswith(f"    vllm serve {served.folder}/checkpoints/")
