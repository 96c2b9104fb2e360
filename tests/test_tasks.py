"""Tasks by lm-eval: the same answers as its own command line, pairs, intervals, faults."""

import functools
import json
import math
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import BESIDE, LABELS, ROOT, load_by_path, quick_words, read_strict

import quant_lab

lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval")
BASE, FP8, W4A16, _ = LABELS
FOLDER, LIMIT = ROOT / "tests" / "demo" / "tasks", 24
YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
CHOICE = """output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITING = """output_type: generate_until
doc_to_text: "{{question}} Name only the color."
doc_to_target: answer
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - name: word
    filter:
      - {function: regex, regex_pattern: "\\\\b(the|red|blue|green|a|module)\\\\b"}
      - {function: take_first}
"""
GROUP = """group: {name}
task: [choosing, arithmetic_of_yaml]
aggregate_metric_list: [{{metric: acc_norm, weight_by_size: true}}]
"""


@pytest.fixture(autouse=True, scope="module")
def quick_index():
    """Leave out the index of lm-eval's 14,000 tasks, which takes five seconds."""
    from lm_eval import tasks

    with pytest.MonkeyPatch.context() as patch:
        quick = functools.partial(tasks.TaskManager, include_defaults=False)
        patch.setattr(tasks, "TaskManager", lambda **more: quick(**{**more, "include_defaults": False}))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks of YAML that choose and write, and a group of two of unlike size."""
    folder = tmp_path_factory.mktemp("tasks")
    few = folder / "few.json"
    few.write_text("".join((FOLDER / "arithmetic.jsonl").open().readlines()[:20]))
    for name, file, rest in (("choosing", FOLDER / "colors.jsonl", CHOICE),
                             ("arithmetic_of_yaml", few, CHOICE),
                             ("writing", FOLDER / "colors.jsonl", WRITING)):
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, file=file) + rest)
    (folder / "by_size.yaml").write_text(GROUP.format(name="by_size"))
    return folder


@pytest.fixture(scope="module")
def words(texts, tmp_path_factory, quick_collection, folder):
    """Words of a run of the demo's model, which is trained: baseline, FP8, INT4."""
    out = tmp_path_factory.mktemp("out")
    model = ROOT / "tests" / "tiny-qwen2"
    words = [*quick_words(model, texts), "--output-dir", out, "--variants", FP8, W4A16,
             "--tasks-path", folder, "--task-limit", LIMIT, "--dtype", "float32"]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def done(words):
    """Run it with the tasks, and lm-eval's own command line beside it."""
    lab = quant_lab.set_up([*words, "--tasks", "choosing", "by_size", "writing"])
    for label in lab.options.variants:
        quant_lab.run_variant(label, lab)
    return lab


def ask(lab, label, name, *more):
    """Return what lm-eval's command line says of a checkpoint: results, and its samples."""
    from lm_eval.__main__ import cli_evaluate

    folder = lab.output / "checkpoints" / label
    out = lab.output / f"asked-{label}-{name}"
    sys.argv = [
        "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "4",
        "--model_args", f"pretrained={folder},dtype=float32", "--tasks", name,
        "--include_path", lab.options.tasks_path, "--limit", str(LIMIT),
        "--log_samples", "--output_path", str(out), *more]
    cli_evaluate()
    results, = [read_strict(file) for file in out.rglob("results_*.json")]
    samples = {file.stem.split("_20")[0].removeprefix("samples_"): [
        json.loads(line) for line in file.open()] for file in out.rglob("samples_*.jsonl")}
    return results, samples


@pytest.fixture(scope="module")
def asked(done):
    """Ask the command line beside the other tests."""
    calls = [(W4A16, "choosing"), (FP8, "by_size"),
             (FP8, "writing", "--apply_chat_template")]
    return {call[:2]: BESIDE.submit(ask, done, *call) for call in calls}


def test_a_row_has_the_tasks_asked_for_with_all_keys(done):
    results = read_strict(done.output / "results.json")
    for row in results["variants"]:
        assert list(row["tasks"]) == ["choosing", "by_size", "writing"], row["notes"]
        for name, task in row["tasks"].items():
            assert {"metric", "value", "low", "high", "recovery", "difference", "flips",
                    "documents"} <= task.keys()
            assert task["documents"] == len(task["scores"]) == LIMIT + 20 * (name == "by_size")
            assert 0 <= task["low"] <= task["value"] <= task["high"] <= 1
            assert task["value"] == pytest.approx(sum(task["scores"]) / task["documents"])


def test_the_demos_model_is_neither_at_chance_nor_perfect(done):
    task = done.rows[BASE]["tasks"]["choosing"]
    assert 0.3 < task["value"] < 0.9


@pytest.mark.parametrize("label, name, group, metric", [
    (FP8, "choosing", "by_size", "acc_norm,none"), (W4A16, "choosing", "choosing", "acc_norm,none"),
    (FP8, "writing", "writing", "exact_match,word"),
])
def test_answers_are_those_of_lm_evals_command_line(done, asked, label, name, group, metric):
    """It loads the checkpoint by plain transformers, which emulates: same documents, answers."""
    task = done.rows[label]["tasks"][name]
    results, samples = asked[label, group].result()
    key, kind = metric.split(",")
    assert (task["metric"], task["filter"]) == (key, kind)
    assert task["scores"] == [x[key] for x in samples[name] if x["filter"] == kind]
    assert task["value"] == results["results"][name][metric]


def test_a_groups_value_is_lm_evals(done, asked):
    task = done.rows[FP8]["tasks"]["by_size"]
    results, samples = asked[FP8, "by_size"].result()
    both = [x["acc_norm"] for name in ("choosing", "arithmetic_of_yaml") for x in samples[name]]
    assert task["metric"] == "acc_norm" and task["scores"] == both
    assert task["value"] == pytest.approx(results["results"]["by_size"]["acc_norm,none"])


def test_differences_are_paired_by_document(done):
    from scipy import stats

    for label in (FP8, W4A16):
        for name, task in done.rows[label]["tasks"].items():
            base = done.rows[BASE]["tasks"][name]
            gaps = [x - y for x, y in zip(task["scores"], base["scores"])]
            assert task["difference"]["value"] == pytest.approx(sum(gaps) / len(gaps))
            assert task["flips"] == dict(lost=gaps.count(-1), gained=gaps.count(1))
            if base["value"]:
                assert task["recovery"] == pytest.approx(100 * task["value"] / base["value"])
            # Bonett and Price (2012) of the fourfold table's counts, with Student's t.
            n, lost, gained = len(gaps) + 2, gaps.count(-1) + 1, gaps.count(1) + 1
            p, q = gained / n, lost / n
            half = stats.t.ppf(0.975, n - 1) * math.sqrt((p + q - (p - q) ** 2) / (n - 1))
            assert task["difference"]["low"] == pytest.approx(p - q - half, abs=1e-3 * half)
            assert task["difference"]["high"] == pytest.approx(p - q + half, abs=1e-3 * half)
    base = done.rows[BASE]["tasks"]["choosing"]
    assert base["difference"] == dict(value=0.0, low=0.0, high=0.0)
    assert base["recovery"] == 100 and base["flips"] == dict(lost=0, gained=0)


@pytest.mark.parametrize("n", [50, 200])
@pytest.mark.parametrize("lost, gained", [(0.0, 0.0), (0.01, 0.01), (0.05, 0.01), (0.2, 0.1)])
def test_intervals_cover_the_truth(n, lost, gained):
    """Of simulated documents; where nothing ever flips, always."""
    draw, hits, rounds = random.Random(f"{n} {lost} {gained}"), 0, 1000
    for _ in range(rounds):
        gaps = torch.tensor(draw.choices(
            [-1.0, 1.0, 0.0], [lost, gained, 1 - lost - gained], k=n)).double()
        interval = quant_lab.imagine(gaps, [-1, 1])
        hits += interval["low"] <= gained - lost <= interval["high"]
    assert hits / rounds > 0.935


@pytest.mark.parametrize("n", [50, 200])
@pytest.mark.parametrize("right", [0.02, 0.25, 0.6, 0.97])
def test_intervals_of_values_cover_the_truth(n, right):
    draw, hits, rounds = random.Random(f"{n} {right}"), 0, 1000
    for _ in range(rounds):
        scores = torch.tensor([float(draw.random() < right) for _ in range(n)]).double()
        interval = quant_lab.imagine(scores, [0, 0, 1, 1])
        hits += interval["low"] <= right <= interval["high"]
    assert hits / rounds > 0.935


def test_the_paired_interval_is_far_narrower_than_that_of_two_values():
    draw = random.Random(7)
    base = torch.tensor([float(draw.random() < 0.6) for _ in range(200)]).double()
    mine = base.clone()
    mine[:6] = 1 - mine[:6]
    paired = quant_lab.imagine(mine - base, [-1, 1])
    alone = [quant_lab.imagine(x, [0, 0, 1, 1]) for x in (mine, base)]
    unpaired = math.hypot(*(x["high"] - x["low"] for x in alone))
    assert paired["high"] - paired["low"] < 0.4 * unpaired


def test_what_is_finished_is_kept_and_only_what_lacks_is_asked(done, words, monkeypatch):
    asked = []
    real = quant_lab.do_task
    monkeypatch.setattr(quant_lab, "do_task", lambda lm, tasks, *more: (
        asked.extend(task.task_name for task in tasks), real(lm, tasks, *more))[1])
    monkeypatch.setattr(quant_lab, "measure_row", None)
    before = read_strict(done.output / "results.json")
    lab = quant_lab.set_up([*words, "--tasks", "choosing", "arithmetic_of_yaml"])
    quant_lab.run_variant(BASE, lab)
    quant_lab.run_variant(FP8, lab)
    assert asked == ["arithmetic_of_yaml"] * 2
    after = read_strict(done.output / "results.json")
    for old, new in zip(before["variants"][:2], after["variants"]):
        assert old["tasks"].items() <= new["tasks"].items()
        assert list(new["tasks"]) == [*old["tasks"], "arithmetic_of_yaml"]
    lab = quant_lab.set_up([*words, "--tasks", "arithmetic_of_yaml", "--task-limit", "12"])
    quant_lab.run_variant(BASE, lab)
    assert lab.rows[BASE]["tasks"]["arithmetic_of_yaml"]["documents"] == 12


def test_a_task_that_fails_says_so_and_is_tried_again(done, words, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA out of memory")

    label, name = W4A16, "arithmetic_of_yaml"
    lab = quant_lab.set_up([*words, "--tasks", name])
    with monkeypatch.context() as patch:
        patch.setattr(quant_lab, "do_task", fail)
        quant_lab.run_variant(BASE, lab)
        quant_lab.run_variant(label, lab)
    results = read_strict(lab.output / "results.json")
    row, = [row for row in results["variants"] if row["label"] == label]
    assert row["status"] == "ok" and name not in row["tasks"]
    assert "no arithmetic_of_yaml: RuntimeError: CUDA out of memory" in (
        quant_lab.render_notes(results))
    quant_lab.run_variant(BASE, lab)
    quant_lab.run_variant(label, lab)
    assert lab.rows[label]["tasks"][name]["documents"] == 20
    assert not any("memory" in note for note in lab.rows[label]["notes"])


@pytest.mark.parametrize("words, says", [
    (["--tasks", "no_such_task"], ["--tasks no_such_task", "no_such_task", "lm-eval ls tasks"]),
    (["--tasks", "of_a_hub"], ["--tasks of_a_hub", "allenai/ai2_arc"]),
    (["--tasks", "colors", "--tasks-path", "nowhere"], ["--tasks colors"]),
])
def test_a_task_that_cannot_be_had_ends_with_one_line(
        lab, capsys, monkeypatch, tmp_path, words, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / "hub.yaml"
    file.write_text("task: of_a_hub\ndataset_path: allenai/ai2_arc\n" + CHOICE)
    words = [*words] if "--tasks-path" in words else [*words, "--tasks-path", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        lab(*words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert all(word in error for word in says), error


def test_without_lm_eval_a_line_says_how_to_get_it(lab, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(SystemExit) as end:
        lab("--tasks", "arc_easy")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "pip install lm-eval" in error


def test_the_committed_questions_are_those_of_their_rules():
    maker = load_by_path("make_questions")
    for rule in maker.arithmetic, maker.alphabet, maker.recall, maker.colors:
        there = [json.loads(line) for line in (FOLDER / f"{rule.__name__}.jsonl").open()]
        assert there == maker.make(rule)
        assert all(line["choices"].count(line["answer"]) == 1 for line in there)
    options = quant_lab.Options(
        tasks=("colors", "arithmetic_written"), tasks_path=str(FOLDER))
    tasks = quant_lab.load_tasks(options, Path(os.devnull))
    assert [len(task.eval_docs) for (task,) in tasks.values()] == [200, 200]
