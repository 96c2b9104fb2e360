"""Card, picture, model cards, notebook, README: renderings of results.json, and readable."""

import copy
import itertools
import json
import os
import re
import sys
import tomllib

import jupytext
import pytest
from conftest import ROOT, SCRIPT, load_by_path

import quant_lab

COMMITTED = ["demo-cpu", "h100-0.5b"]


def read(name):
    return json.loads((ROOT / "results" / name / "results.json").read_text("utf-8"))


@pytest.fixture(params=COMMITTED)
def results(request):
    return read(request.param)


def spoil(results):
    """The demo with a failed variant and the control, which has the size of another."""
    results = copy.deepcopy(results)
    rows = results["variants"]
    rows[-1] = quant_lab.ROW | dict(label=rows[-1]["label"], status="failed", error="no",
                                    scheme="W8A8")
    rows.append(copy.deepcopy(rows[-2]) | dict(label="rtn_w4a16"))
    return results


def test_the_scripts_own_requirements_are_those_of_the_file():
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", SCRIPT.read_text("utf-8"))[1]
    metadata = tomllib.loads("".join(line[2:] or "\n" for line in block.splitlines(True)))
    lines = (ROOT / "requirements.txt").read_text("utf-8").split("\n")
    wanted = [line.partition("#")[0].strip() for line in lines]
    assert metadata["dependencies"] == [line for line in wanted if line]
    assert metadata["requires-python"] == ">=3.11"


def test_readme_shows_the_committed_results():
    """Stale? `python tests/render_readme.py` writes it anew."""
    text = (ROOT / "README.md").read_text("utf-8")
    assert load_by_path("render_readme").render_readme(text) == text
    for name in ("demo-cpu", "h100-0.5b"):
        assert f"<!-- tables {name} -->" in text
    assert "<!-- picture demo-cpu -->" in text and "results/demo-cpu/summary.png" in text


def test_what_the_readme_says_of_7b_is_what_was_printed():
    lines = (ROOT / "results" / "h100-7b" / "decode.txt").read_text("utf-8").split("\n")[1:]
    found = {line.split()[1]: [float(line.split()[k]) for k in (3, 5)]
             for line in lines if line}
    base, readme = found["plain"], (ROOT / "README.md").read_text("utf-8")
    table = (ROOT / "results" / "h100-7b" / "README.md").read_text("utf-8")
    for kind, name in dict(fp8="FP8", int8="W8A8", int4="W4A16").items():
        ttft, step = found[kind]
        assert f"| {name} | {ttft:.2f} | {base[0] / ttft:.2f} | {step:.3f} | " \
               f"{base[1] / step:.2f} |" in table
        assert f"{base[0] / ttft:.2f}" in readme and f"{base[1] / step:.2f}" in readme


def test_what_the_readme_says_in_prose_of_the_h100():
    base, _, int4, int8 = read("h100-0.5b")["variants"]
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    held = [f"{row['weights_memory_bytes'] / 1e6:.0f}" for row in (int4, int8, base)]
    assert "{} MB in W4A16 and {} MB in 8 bits instead of {}".format(*held) in readme
    one = base["decode"][0]
    copying = 1000 * one["step_bytes"] / base["copy_bandwidth"]
    assert f"{copying:.2f} of the {one['itl_ms']['median']:.2f} ms" in readme


def test_card_comes_first_and_names_what_is_run(results):
    card = quant_lab.render_card(results)
    assert max(map(len, card.split("\n"))) <= 120
    flat = " ".join(card.split())
    name = results.get("model_name", results["config"]["model"])
    for fact in (name, results["machine"]["name"], *(
            f"{name} {version}" for name, version in results["versions"].items() if version),
            *(row["label"] for row in results["variants"])):
        assert fact in flat
    assert f"{results['machine']['memory_bytes'] / 2**30:.1f} GiB" in flat
    changed = {name for name, value in results["config"].items() if
               (tuple(value) if isinstance(value, list) else value)
               != getattr(quant_lab.Options, name)}
    said = set(re.findall(r"--([a-z-]+)", flat.partition("machine ")[0]))
    assert said == {name.replace("_", "-") for name in
                    changed - {"model", "variants", "output_dir"}}


@pytest.mark.parametrize("name", ["a$b_$c", "x" * 200, "<b>|\x1b[31m\n# no"])
def test_names_do_no_harm(name):
    results = copy.deepcopy(read("demo-cpu")) | dict(model_name=name)
    results["config"] |= dict(model=name, eval_text=f"/home/me/{name}/text.md",
                              calibration_data=f"/home/me/{name}/chats.jsonl")
    texts = [quant_lab.render_summary(results), *(
        quant_lab.render_model_card(row, results) for row in results["variants"])]
    for text in texts:
        assert "\x1b" not in text and "/home/me" not in text and "\n# no" not in text
    figure, renderer = draw(results)
    box = figure._suptitle.get_window_extent(renderer)
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def figures_of(row):
    """All that a table may show of a row, as text, by key."""
    cells = row | {f"{key}@{one['batch']}": value for one in row["decode"] or ()
                   for key, value in one.items()}
    return {quant_lab.show(cells[key], digits, unit) if cells.get(key) is not None else
            ("–" if row["status"] == "ok" else "failed")
            for columns in quant_lab.list_tables(dict(batch_sizes=[1, 8, 32]))
            for _, key, digits, unit in columns}


def test_every_cell_of_every_table_is_a_figure_of_its_row(results):
    summary, seen = quant_lab.render_summary(results), 0
    for row in results["variants"]:
        known = figures_of(row)
        for line in summary.split("\n"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if line.startswith("|") and cells[0] == row["label"]:
                assert set(cells[1:]) <= known
                seen += len(cells) - 1
    assert seen == len(results["variants"]) * sum(
        map(len, quant_lab.list_tables(results["config"])))


def test_verdict_begins_with_what_to_take_for_what(results):
    rows = results["variants"]
    by = {row["label"]: row for row in rows}
    said = dict(line.split(": ") for line in quant_lab.list_best(rows))
    smallest = min(row["weight_bytes"] for row in rows)
    assert set(said["Smallest"].split(" or ")) == {
        row["label"] for row in rows if row["weight_bytes"] < 1.01 * smallest}
    last = len(rows[0]["decode"]) - 1
    for number, what in (0, "one sequence"), (last, f"a batch of {[1, 8, 32][last]}"):
        names = said[f"Fastest for {what}"].split(" or ")
        fastest = max(row["decode"][number]["tok_s"]["min"] for row in rows)
        for row in rows:
            near = row["decode"][number]["tok_s"]["max"] * 1.01 >= 0.99 * fastest
            assert near == (row["label"] in names)
    if len(rows) > 2:
        closest = min(rows[1:], key=lambda row: row["kld"]["mean"])["label"]
        assert closest in said["Closest to the original by KLD"].split(" or ")


def test_many_batches_make_more_tables_not_wider_ones():
    results = spoil(read("demo-cpu"))
    wide = read("h100-0.5b")["variants"][0]
    results["variants"] = [wide | dict(label=row["label"]) for row in results["variants"]]
    results["config"]["batch_sizes"] = sizes = [1, 2, 4, 8, 16, 32, 64]
    for row in results["variants"]:
        row["decode"] = [row["decode"][-1] | dict(batch=batch) for batch in sizes]
    body = quant_lab.render_body(results, 1)
    assert max(map(len, body.split("\n"))) <= 120
    for batch in sizes[1:]:
        assert len(re.findall(rf"\| +batch {batch} \|", body)) == 1
        assert len(re.findall(rf"\| +bandwidth {batch} % \|", body)) == 1


def test_ranges_that_meet_are_not_ranked():
    rows = copy.deepcopy(read("demo-cpu")["variants"])
    for row in rows[1:]:
        row["decode"][0]["tok_s"]["max"] = rows[0]["decode"][0]["tok_s"]["min"]
    line, = (line for line in quant_lab.list_best(rows) if "one sequence" in line)
    assert line.count(" or ") == 3
    rows[2]["status"] = "failed"
    assert rows[2]["label"] not in " ".join(quant_lab.list_best(rows))
    assert quant_lab.list_best(rows[:1]) == []
    for row in rows:
        row["decode"][1] = dict.fromkeys(row["decode"][1]) | dict(batch=8, error="OOM")
        row["kld"] = row["kld"] | dict(low=None, high=None)
    said = quant_lab.list_best(rows)
    assert len(said) == 2 and "one sequence" in said[1], "no batch fitted, no intervals"
    draw(read("demo-cpu") | dict(variants=rows))


def draw(results):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = quant_lab.draw_summary(results)
    renderer = FigureCanvasAgg(figure)
    renderer.draw()
    return figure, renderer.get_renderer()


@pytest.mark.parametrize("spoilt", [False, True])
def test_nothing_in_the_picture_overlaps(results, spoilt):
    figure, renderer = draw(spoil(results) if spoilt else results)
    boxes = []
    for axes in figure.axes:
        ticks = [label for axis, (low, high) in (
            (axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim())))
            for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels())
            if low <= place <= high]
        texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *ticks,
                 *axes.get_legend().get_texts()]
        boxes += [(text.get_text(), text.get_window_extent(renderer))
                  for text in texts if text.get_text()]
    boxes.append(("title", figure._suptitle.get_window_extent(renderer)))
    width, height = figure.bbox.size
    for name, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1, name
        assert box.y1 <= height + 1, name
    for (one, a), (two, b) in itertools.combinations(boxes, 2):
        apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, f"{one!r} on {two!r}"


def test_the_picture_shows_the_figures(results):
    figure, _ = draw(results)
    left, middle, right = figure.axes
    base = results["variants"][0]
    values = [patch.get_width() for patch in middle.patches]
    wanted = [row["decode_tok_s"]["median"] / base["decode_tok_s"]["median"]
              for row in results["variants"]]
    assert values[: len(wanted)] == pytest.approx(wanted)
    assert [patch.get_width() for patch in right.patches][: len(wanted)] == pytest.approx(
        [row["weights_memory_bytes"] / base["weights_memory_bytes"]
         for row in results["variants"]])
    legend = [text.get_text() for text in left.get_legend().get_texts()]
    for row, line in zip(results["variants"], legend):
        change = 100 * row["perplexity_ratio"]["value"] - 100
        assert line == f"{row['label']}: {row['size_ratio']:.3f} of the bytes, {change:+.2f} %"
    shades = [sum(int(shade[i : i + 2], 16) for i in (1, 3, 5)) for shade in quant_lab.SHADES]
    assert min(b - a for a, b in itertools.pairwise(shades)) > 100, "apart in grey, too"


def test_failures_show_in_the_picture():
    figure, _ = draw(spoil(read("demo-cpu")))
    left, middle, right = figure.axes
    assert [text.get_text() for text in middle.texts].count("failed") == 3
    assert "03_smoothquant_w8a8: failed" in [
        text.get_text() for text in left.get_legend().get_texts()]
    alone = read("demo-cpu")
    alone["variants"] = alone["variants"][1:2]
    alone["variants"][0]["size_ratio"] = None
    for one in (alone, alone | dict(variants=[quant_lab.ROW | dict(
            label="00_fp16_baseline", status="failed", error="no")])):
        assert "nothing to compare" in [
            text.get_text() for text in draw(one)[0].axes[1].texts]


def test_model_cards_are_what_the_hub_reads(results):
    yaml = pytest.importorskip("yaml")
    hub = copy.deepcopy(results)
    hub["config"]["model"] = hub["base_model"] = "Qwen/Qwen2.5-0.5B-Instruct"
    for row in results["variants"]:
        scheme = row["scheme"]
        for one, base in ((results, None), (hub, "Qwen/Qwen2.5-0.5B-Instruct")):
            card = quant_lab.render_model_card(row, one)
            _, head, body = card.split("---\n", 2)
            head = yaml.safe_load(head)
            assert head.get("base_model") == base
            assert head.get("base_model_relation") == (
                "quantized" if base and scheme != "FP16" else None)
            assert head["library_name"] == "transformers"
            assert set(head.get("tags", ())) == (set() if scheme == "FP16" else {
                "compressed-tensors", "llmcompressor", scheme.lower()})
            for line in ("AutoModelForCausalLM.from_pretrained(folder", "vllm serve",
                         "--tensor-parallel-size 2", one["machine"]["name"]):
                assert line in body
            assert quant_lab.render_tables(one, [results["variants"][0], row][
                row is results["variants"][0]:]) in body
            assert ("chats of" in body) == (scheme in ("W4A16", "W8A8"))


def test_committed_renderings_are_those_of_the_results():
    for name in COMMITTED:
        folder, results = ROOT / "results" / name, read(name)
        assert (folder / "summary.md").read_text("utf-8") == quant_lab.render_summary(results)
        for row in results["variants"]:
            card = folder / "checkpoints" / row["label"] / "README.md"
            if name == "demo-cpu":
                assert card.read_text("utf-8") == quant_lab.render_model_card(row, results)
        assert (folder / "summary.png").stat().st_size > 10_000


def test_bars_of_progress_are_for_terminals(monkeypatch, capsys):
    assert quant_lab.show_progress("scoring", range(3)).disable, "pytest's output is none"

    class Terminal:
        text = ""

        def isatty(self):
            return True

        def write(self, text):
            Terminal.text += text

        def flush(self):
            pass

    monkeypatch.setattr(sys, "__stdout__", Terminal())
    bar = quant_lab.show_progress("scoring", range(3))
    bar.update()
    assert Terminal.text == "", "nothing within the first seconds"
    bar.delay, bar.start_t = 0, bar.start_t - 60
    bar.update()
    bar.refresh()
    assert "scoring" in Terminal.text and "2/3" in Terminal.text
    bar.close()


def test_the_notebook_runs_in_a_real_kernel(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("QUANT_LAB_ARGS", f"--demo --device cpu --output-dir {tmp_path}")
    notebook = jupytext.read(SCRIPT)
    notebook.metadata["kernelspec"]["name"] = "python3"
    nbclient.NotebookClient(
        notebook, timeout=600, resources=dict(metadata=dict(path=str(ROOT)))).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    kinds = set().union(*(output.get("data", {}) for output in shown))
    assert {"image/png", "text/markdown"} <= kinds
    said = "".join(out["text"] for out in shown if out.get("name") == "stderr")
    assert not said or "ipywidgets" in said and said.count("Warning") == 1, said
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert [row["status"] for row in results["variants"]] == ["ok"] * 4
    assert quant_lab.render_body(results, 8) in [
        output["data"]["text/markdown"] for output in shown
        if "text/markdown" in output.get("data", {})]
    for kind in ("png", "svg"):
        assert os.path.getsize(tmp_path / f"summary.{kind}") > 10_000
