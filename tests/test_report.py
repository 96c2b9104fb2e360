"""Check card, tables, verdict, picture, model cards, notebook: readable, and of results.json."""

import copy
import itertools
import json
import os
import re

import jupytext
import pytest
from conftest import COMMITTED, ROOT, SCRIPT, load_by_path, start_beside

import quant_lab

BASE, FP8, INT4, INT8 = ("00_fp16_baseline", "01_fp8_dynamic", "02_gptq_w4a16",
                         "03_smoothquant_w8a8")
CONTROL = "rtn_w4a16"
OWN_LOOP = "Fastest in this script's own loop, "


render_readme = load_by_path("render_readme")


def read(name, served=False):
    """Return committed results, as if there had been no server unless asked otherwise."""
    results = render_readme.read_results(name)
    for row in () if served else results["variants"]:
        row.pop("served", None)
    return results


@pytest.fixture(params=COMMITTED[:3])  # Of the four default variants, all finished.
def results(request):
    return read(request.param)


@pytest.fixture
def calm():
    """Return the demo's results, every timing narrow."""
    results = read("demo-cpu")
    for row in results["variants"]:
        set_spread(row, 1.02)
    return results


def rows_of(results):
    return {row["label"]: row for row in results["variants"]}


def set_spread(row, spread):
    """Make the greatest of each timing of a row so many times the least."""
    row["decode_tok_s"] = row["decode"][0]["tok_s"]  # One figure in two places.
    figures = [row["ttft_s"], row["latency_s"]]
    for one in row["decode"]:
        figures += [one["tok_s"], one["itl_ms"]]
    for figure in figures:
        low = figure["median"]
        figure |= dict(min=low, max=spread * low, samples=[low, low, spread * low])


def fail(row, error="no"):
    """Return the row of a variant that failed."""
    return quant_lab.ROW | dict(
        label=row["label"], status="failed", scheme=row["scheme"], error=error)


def read_tables(text):
    """Return the cells of the Markdown tables in a text: a dict a table, by row, by title."""
    tables = []
    for block in re.findall(r"(?m)(?:^\|.*\n?)+", text):
        head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")]
                           for line in block.strip().split("\n"))
        tables.append({line[0]: dict(zip(head[1:], line[1:], strict=True))
                       for line in lines})
    return tables


def find_cell(results, label, title):
    """Return what the tables say of a variant under a title that but one of them has."""
    text = quant_lab.render_tables(results, results["variants"])
    cell, = (table[label][title] for table in read_tables(text) if title in table[label])
    return cell


def read_result(label, results):
    """Return what is shown after a variant, and its table by title, by column."""
    text = quant_lab.render_result(label, results)
    table, = read_tables(text)
    titles = next(iter(table.values()))
    return text, {title: {name: cells[title] for name, cells in table.items()}
                  for title in titles}


def read_best(rows):
    """Return for each goal of the verdict the variants named best and the noisy ones."""
    found = {}
    for line in quant_lab.list_best(rows):
        goal, _, said = line.partition(": ")
        best, _, noisy = said.partition("; not counted, too noisy: ")
        found[goal] = set(best.split(" or ")), set(filter(None, noisy.split(", ")))
    return found


def numbers(cell):
    return [float(word.replace(",", "")) for word in re.findall(r"-?[\d,]*\.?\d+", cell)]


# The script's header, the README and other files that repeat something.


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_renderings_are_those_of_the_results(name):
    folder, results = ROOT / "results" / name, read(name, served=True)
    assert results["schema"] == quant_lab.SCHEMA
    if name != "demo-cpu":  # A GPU is not always at hand: of which commit are they?
        readme = ROOT / "results" / name.partition("/")[0] / "README.md"
        assert re.search("at commit [0-9a-f]{7}", readme.read_text("utf-8"))
    assert (folder / "summary.md").read_text("utf-8") == quant_lab.render_summary(results)
    for row in results["variants"]:
        card = folder / "checkpoints" / row["label"] / "README.md"
        if name in ("demo-cpu", "h200-smollm2-135m") and row["status"] == "ok":
            assert card.read_text("utf-8") == quant_lab.render_model_card(row, results)
    assert (folder / "summary.png").stat().st_size > 10_000


def test_readme_shows_the_committed_results():
    """Compare; stale? `python tests/render_readme.py` writes it anew."""
    text = (ROOT / "README.md").read_text("utf-8")
    assert render_readme.render_readme(text) == text
    for name in COMMITTED:
        folder, _, seed = name.partition("/")
        assert re.search(f"<!-- ({'seeds' if seed else 'tables|speed'}) {folder} -->", text)
    assert "<!-- picture demo-cpu -->" in text and "results/demo-cpu/summary.png" in text


def test_the_table_of_the_rehearsal_follows_from_its_looks():
    """Seconds of each step, those that the GPU was busy, and what both are to a T4."""
    folder, steps, slower = ROOT / "results" / "t4-rehearsal", {}, 15
    begins = [(re.search(r"^[\d:]+", line)[0], line.split("s  ")[-1].strip()) for line in (
        folder / "printed.txt").read_text("utf-8").split("\n") if re.search(r" \d+ s  ", line)]
    looks = [line.split() for line in (folder / "looks.csv").read_text("utf-8").splitlines()]
    for look, following in zip(looks, looks[1:]):
        step = max((x for x in begins if x[0] <= look[0]), default=("", "start, set-up"),
                   key=lambda x: x[0])[1]
        spent, busy = float(following[1]) - float(look[1]), int(look[2]) / 100
        sums = steps.setdefault(step, [0, 0, 0, 0])
        for place, x in enumerate((1, busy, max(1, slower * busy), 1 + (slower - 1) * busy)):
            sums[place] += spent * x
    assert len(begins) == 13
    wanted = [*steps.values(), [sum(column) for column in zip(*steps.values())]]
    table = (folder / "README.md").read_text("utf-8").partition("| --- |")[2]
    found = [numbers(row) for row in re.findall(r"^\|[^|]*[a-z][^|]*(\|.*)", table, re.M)]
    for row, sums in zip(found, wanted, strict=True):
        for shown, x, digits in zip(row, sums, (1, 1, 0, 0), strict=True):
            assert shown == pytest.approx(x, abs=0.51 * 10**-digits)


def test_the_table_of_7b_is_what_was_printed():
    lines = (ROOT / "results" / "h100-7b" / "decode.txt").read_text("utf-8").split("\n")[1:]
    found = {line.split()[1]: [float(line.split()[k]) for k in (3, 5)]
             for line in lines if line}
    table = (ROOT / "results" / "h100-7b" / "README.md").read_text("utf-8")
    for kind, name in dict(plain="float16", fp8="FP8", int8="W8A8", int4="W4A16").items():
        wanted = [y for k in (0, 1) for y in (
            f"{found[kind][k]:.{2 + k}f}", f"{found['plain'][k] / found[kind][k]:.2f}")]
        assert f"| {name} | {' | '.join(wanted)} |" in table


# The card.


def test_the_card_names_what_is_run_on_what(results):
    card = quant_lab.render_card(results)
    assert max(map(len, card.split("\n"))) <= 120
    assert all(line.startswith("    ") for line in card.split("\n"))
    flat, machine = " ".join(card.split()), results["machine"]
    for fact in (results["model_name"], results["config"]["dtype"], machine["name"],
                 f"{machine['memory_bytes'] / 2**30:.1f} GiB", *(
                     f"{name} {version}" for name, version in results["versions"].items()
                     if version), *(
                     word for word in results["command"] if word.startswith("--"))):
        assert fact in flat
    assert f"{machine['threads']} threads" in flat
    assert (f"driver {machine['driver']}" in flat) == (machine["device"] == "cuda")


@pytest.mark.parametrize("capability, lacks", [
    ("7.5", "units for bfloat16 and FP8: FP8"), ("8.0", "units for FP8: FP8"), ("8.9", None),
    ("9.0", None), ("10.0", None), ("12.1", None), (None, None)])
def test_the_card_says_which_units_a_gpu_lacks(results, capability, lacks):
    results["machine"]["compute_capability"] = capability
    card = " ".join(quant_lab.render_card(results).split())
    assert ("lacks" in card) == bool(lacks) and (lacks or "") in card
    assert ("says nothing of a card that has them" in card) == bool(lacks)


def test_the_command_on_the_card_gives_the_same_options(results):
    options = quant_lab.parse_options(results["command"][2:])
    assert json.loads(json.dumps(vars(options))) == dict(vllm="") | results["config"]


@pytest.mark.parametrize("name", ["a$b_$c", "x" * 200, "W" * 70, "<b>|\x1b[31m\n# no\n- no"])
def test_names_do_no_harm(name):
    yaml = pytest.importorskip("yaml")
    results = read("demo-cpu") | dict(model_name=name, base_model=name)
    paths = dict(model=name, eval_text=f"/home/me/{name}/text.md",
                 calibration_data=f"/home/me/{name}/chats.jsonl")
    results["config"] |= paths
    results["command"] += [word for option, path in paths.items() for word in (
        f"--{option.replace('_', '-')}", path)]
    rows = rows_of(results)
    for one in rows[FP8]["divergence"]["completions"]:
        one["completion"] = f"{name}\n\n# no\n```\n</pre>"
    results["variants"][3] = fail(rows[INT8], f"{name}: no")
    texts = [quant_lab.render_summary(results), *(
        quant_lab.render_result(label, results) for label in rows)]
    for row in results["variants"]:
        _, head, body = quant_lab.render_model_card(row, results).split("---\n", 2)
        assert yaml.safe_load(head)["base_model"] == name
        texts.append(body)
    for text in texts:
        assert "\x1b" not in text and "/home/me" not in text
        lines = [line for line in text.split("\n") if line[:4] != "    "]  # No code.
        assert "<" not in re.sub("`[^`]*`", "", "\n".join(lines))
        assert not [line for line in lines if re.match(r"\s*([#-] no|```|<)", line)]
    figure, renderer = draw(results)
    box = figure._suptitle.get_window_extent(renderer)
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width


@pytest.mark.parametrize("words", [
    ["--model", "/home/me/model"], ["--model=/home/me/model"], ["--model", "../me/model"],
    ["--model", "~/me/model"]])
def test_the_card_keeps_folders_of_the_machine_to_itself(results, words):
    results["command"] = ["python", "quant_lab.py", *words]
    card = quant_lab.render_card(results)
    assert "model" in card.partition("command")[2] and "me/" not in card


# Tables.


WANTED = {
    "MB": lambda row: row["weight_bytes"] / 1e6, "size": lambda row: row["size_ratio"],
    "perplexity": lambda row: row["perplexity_interval"],
    "ratio": lambda row: row["perplexity_ratio"], "KLD": lambda row: row["kld"],
    "top-1 %": lambda row: row["top1_agreement"], "tokens": lambda row: row["divergence"],
    "TTFT ms": lambda row: [1000 * x for x in list(row["ttft_s"].values())[:3]],
    "latency s": lambda row: row["latency_s"], "tokens/s": lambda row: row["decode_tok_s"],
    "bandwidth %": lambda row: 100 * row["decode"][0]["bandwidth_fraction"],
    "batch 8 tok/s": lambda row: row["decode"][1]["tok_s"],
    "batch 32 tok/s": lambda row: row["decode"][2]["tok_s"],
    "weights MB": lambda row: row["weights_memory_bytes"] / 1e6,
    "peak MB": lambda row: row["peak_memory_bytes"] and row["peak_memory_bytes"] / 1e6,
    "quantize s": lambda row: row["quantize_seconds"],
    "load s": lambda row: row["load_seconds"], "compile s": lambda row: row["compile_seconds"]}


@pytest.mark.parametrize("results", COMMITTED, indirect=True)
def test_every_cell_of_every_table_is_a_figure_of_its_row(results):
    seen = set()
    for table in read_tables(quant_lab.render_summary(results)):
        assert list(table) == [row["label"] for row in results["variants"]]
        for row in results["variants"]:
            for title, cell in table[row["label"]].items():
                seen.add(title)
                if row["status"] == "failed":
                    assert cell == "failed", title
                    continue
                figure = WANTED[title](row)
                if figure is None:
                    assert cell == "–", title
                    continue
                if isinstance(figure, dict):
                    figure = list(figure.values())[:3]
                middle, *ends = figure if isinstance(figure, list) else [figure]
                if "±" in cell:
                    ends = [(ends[1] - ends[0]) / 2]
                elif ends and ends[0] == ends[1]:
                    ends = []  # Said once.
                wanted = ends if "noisy" in cell else [middle, *ends]
                for shown, value in zip(numbers(cell), wanted, strict=True):
                    digits = max(len(x) for x in re.findall(r"\.(\d+)", cell) or [""])
                    assert shown == pytest.approx(value, abs=0.51 * 10**-digits), title
    batches = results["config"]["batch_sizes"]
    assert seen == {title for title in WANTED if not re.search(r"\d", title.replace("-1", ""))
                    or int(re.search(r"\d+", title)[0]) in batches}


def test_many_batches_make_more_tables_not_wider_ones():
    results = read("demo-cpu")
    wide = read("h100-0.5b")["variants"][0]
    labels = [*rows_of(results)][:3]
    results["variants"] = [copy.deepcopy(wide) | dict(label=label) for label in labels]
    results["config"]["batch_sizes"] = sizes = [1, 2, 4, 8, 16, 32, 64]
    for row in results["variants"]:
        row["decode"] = [row["decode"][-1] | dict(batch=batch) for batch in sizes]
    results["variants"].append(fail(dict(label=INT8, scheme="W8A8")))
    text = quant_lab.render_tables(results, results["variants"])
    assert max(map(len, text.split("\n"))) <= 120
    titles = [title for table in read_tables(text) for title in table[INT8]]
    for batch in sizes[1:]:
        assert titles.count(f"batch {batch} tok/s") == 1
    assert len(titles) == len(set(titles))


def test_the_caption_says_what_begins_a_window():
    results = read("demo-cpu")
    results["inputs"]["window_begin"] = ""
    assert "begun" not in quant_lab.render_tables(results, results["variants"])
    results["inputs"]["window_begin"] = "<bos>"
    said = " ".join(quant_lab.render_tables(results, results["variants"]).split())
    assert "in windows of 512, each begun with `<bos>`;" in said


def test_tables_of_failures_alone(results):
    results["variants"] = [fail(row) for row in results["variants"]]
    for table in read_tables(quant_lab.render_summary(results)):
        assert all(set(cells.values()) == {"failed"} for cells in table.values())


# Noise.


@pytest.mark.parametrize("spread, noisy", [(1.29, False), (1.31, True)])
@pytest.mark.parametrize("label", [BASE, INT4])
def test_a_noisy_timing_is_marked_and_not_ranked(calm, label, spread, noisy):
    row = rows_of(calm)[label]
    set_spread(row, spread)
    for one in row["decode"]:  # Faster than any other.
        for key, low in ("tok_s", 1e6), ("itl_ms", 1e-6):
            one[key] |= dict(median=low, min=low, max=low * spread)
    for title in ("TTFT ms", "latency s", "tokens/s", "batch 8 tok/s"):
        cell = find_cell(calm, label, title)
        assert ("noisy" in cell) == noisy
        assert len(numbers(cell)) == (2 if noisy else 3), "least and greatest stay"
        other = find_cell(calm, FP8, title)
        assert "noisy" not in other
    best = read_best(calm["variants"])
    for goal in (OWN_LOOP + "one sequence", OWN_LOOP + "a batch of 8"):
        names, too_noisy = best[goal]
        assert (label in names, label in too_noisy) == (not noisy, noisy)
        assert names and names != {"unknown"}
    assert label not in best["Smallest"][1]
    verdict = " ".join(quant_lab.render_verdict(calm["variants"]).split())
    assert ("not counted, too noisy" in verdict) == noisy
    shown = FP8 if label == BASE else label
    _, table = read_result(shown, calm)
    assert ("noisy" in table["tokens/s"][label]) == noisy
    assert bool(numbers(table["tokens/s"]["ratio"])) != noisy
    assert numbers(table["MB"]["ratio"]) and numbers(table["weights MB"]["ratio"])
    ratio, text = quant_lab.relate(
        rows_of(calm)[shown], rows_of(calm)[BASE], "decode_tok_s")
    assert (ratio == 0, "noisy" in text) == (noisy, noisy)
    bars = read_bars(calm)
    for title in ("tokens/s, one sequence", "tokens/s, batch of 8"):
        width, text = bars[title][shown]
        assert ("noisy" in text, width == 0) == (noisy, noisy)
        width, text = bars[title][INT8]
        assert ("noisy" in text) == (noisy and label == BASE), "only against a noisy one"


def test_only_timings_are_noisy(calm):
    """Set wide intervals of quality: they are wide, and ranked."""
    for shift, row in enumerate(calm["variants"][1:]):
        windows = [0.01 if (n + shift) % 3 else 0.28 for n in range(30)]
        row["kld"] |= dict(mean=0.1, low=0.01, high=1.0, windows=windows)
    assert read_best(calm["variants"])["Closest to the reference by KLD"] == (
        {FP8, INT4, INT8}, set())
    assert "noisy" not in find_cell(calm, FP8, "KLD")


def test_kld_is_compared_window_by_window(calm):
    """What all share cancels: intervals that overlap, and yet one is below the others."""
    texts = [0.05 + 0.9 * (n % 7 == 0) + 0.01 * (n % 5) for n in range(30)]
    for add, row in enumerate(calm["variants"][1:]):
        windows = [x + 0.004 * add + 0.001 * (n * add % 3) for n, x in enumerate(texts)]
        row["kld"] |= dict(mean=sum(windows) / 30, low=0.01, high=0.9, windows=windows)
    closest = "Closest to the reference by KLD"
    assert read_best(calm["variants"])[closest] == ({FP8}, set())
    for row in calm["variants"][1:3]:
        row["kld"]["windows"] = row["kld"]["windows"][:11]
    calm["variants"][3] = fail(calm["variants"][3])
    assert read_best(calm["variants"])[closest] == ({"unknown"}, set())


def test_1_3_times_is_not_yet_noisy(calm):
    row = rows_of(calm)[FP8]
    row["ttft_s"] |= dict(median=1.1, min=1.0, max=1.3, samples=[1.0, 1.1, 1.3])
    assert "noisy" not in find_cell(calm, FP8, "TTFT ms")


# What is shown after each variant.


def test_a_result_stands_beside_the_baseline(results):
    rows = rows_of(results)
    base = rows[BASE]
    for label in (FP8, INT4, INT8):
        text, table = read_result(label, results)
        row = rows[label]
        for title, cells in table.items():
            assert list(cells) == [BASE, label, "ratio"]
            for one in (BASE, label):
                assert cells[one] == find_cell(results, one, title)
        for title, mine, theirs in (
                ("MB", row["weight_bytes"], base["weight_bytes"]),
                ("weights MB", row["weights_memory_bytes"], base["weights_memory_bytes"])):
            ratio, = numbers(table[title]["ratio"])
            assert ratio == pytest.approx(mine / theirs, abs=6e-4)
        speed = [one["decode_tok_s"] for one in (row, base)]
        if not any(one["max"] > 1.3 * one["min"] for one in speed):
            ratio, = numbers(table["tokens/s"]["ratio"])
            assert ratio == pytest.approx(speed[0]["median"] / speed[1]["median"], abs=6e-4)
        ratio, interval = numbers(table["perplexity"]["ratio"])[0], row["perplexity_ratio"]
        assert ratio == pytest.approx(interval["value"], abs=6e-5)
        assert re.search(r"±|\(.*–.*\)", table["perplexity"]["ratio"]), "its interval"
        assert set(table) >= {"MB", "perplexity", "KLD", "tokens/s", "weights MB"}
        assert " ".join(row["runs_as"].split()) in " ".join(text.split())
        assert max(map(len, text.split("\n"))) <= 120
        assert row["divergence"]["completions"][0]["prompt"] in text
        flat = " ".join(text.replace("\xa0", " ").split())
        for one in (base, row):
            completion = one["divergence"]["completions"][0]
            assert (f"- {one['label']}, {completion['same_tokens']} tokens the same: "
                    in flat)
            assert " ".join(completion["completion"].replace("`", "'").split()) in flat


def test_the_baselines_own_result(calm):
    text, table = read_result(BASE, calm)
    assert all(list(cells) == [BASE, "ratio"] for cells in table.values())
    for title in ("MB", "perplexity", "tokens/s", "weights MB"):
        assert numbers(table[title]["ratio"])[0] == 1
    assert rows_of(calm)[BASE]["runs_as"] in text


def test_the_result_of_a_failure_is_its_reason(calm):
    calm["variants"][1] = fail(calm["variants"][1], "ValueError: it is 100 wide")
    text = quant_lab.render_result(FP8, calm)
    assert FP8 in text and "failed" in text and "it is 100 wide" in text
    assert "|" not in text


def test_a_variant_not_asked_for_says_how(calm):
    text = quant_lab.render_result(CONTROL, calm)
    assert CONTROL in text and "--variants" in text and "\n" not in text


@pytest.mark.parametrize("without", ["no row", "failed"])
def test_a_result_without_a_baseline(calm, without):
    base, *others = calm["variants"]
    calm["variants"] = others if without == "no row" else [fail(base), *others]
    for row in others:
        row["size_ratio"] = None
    text, table = read_result(INT4, calm)
    for title in ("MB", "KLD", "tokens/s", "weights MB"):
        assert list(table[title]) == [INT4, "ratio"]
        assert numbers(table[title][INT4]) and table[title]["ratio"] == "–"
    assert numbers(table["perplexity"]["ratio"]), "that is over the reference's"
    assert rows_of(calm)[INT4]["runs_as"] in " ".join(text.split())


# Verdict.


def test_verdict_begins_with_what_to_take_for_what(results):
    rows = results["variants"]
    said = read_best(rows)
    smallest = min(row["weight_bytes"] for row in rows)
    assert said["Smallest"][0] == {
        row["label"] for row in rows if row["weight_bytes"] < 1.01 * smallest}
    batch = max(results["config"]["batch_sizes"])
    for number, what in (0, "one sequence"), (-1, f"a batch of {batch}"):
        names, noisy = said[OWN_LOOP + what]
        figures = {row["label"]: row["decode"][number]["tok_s"] for row in rows}
        assert noisy == {label for label, one in figures.items()
                         if one["max"] > 1.3 * one["min"]}
        fastest = max(one["min"] for label, one in figures.items() if label not in noisy)
        assert names == {label for label, one in figures.items() if label not in noisy
                         and one["max"] * 1.01 >= 0.99 * fastest}
    closest = min(rows[1:], key=lambda row: row["kld"]["mean"])["label"]
    assert closest in said["Closest to the reference by KLD"][0]
    verdict = quant_lab.render_verdict(rows)
    assert max(map(len, verdict.split("\n"))) <= 120
    assert all(line in " ".join(verdict.split()) for line in quant_lab.list_best(rows))


def find_lines(rows, label):
    """Return what the verdict says of a variant after the list of the best."""
    verdict = "\n" + quant_lab.render_verdict(rows)
    for line in quant_lab.list_best(rows):
        verdict = verdict.replace("\n" + quant_lab.fill(line, "- "), "")
    return " ".join(" ".join(line.split()) for line in verdict.split("\n- ") if label in line)


def test_the_verdict_says_what_to_beware_of(calm):
    base, fp8, int4, int8 = rows = calm["variants"]
    for row, low, high in (fp8, 0.99, 1.0123), (int4, 1.01, 1.0123), (int8, None, None):
        row["perplexity_ratio"] = dict(value=1.011, low=low, high=high)
        row["kld"] = fp8["kld"]
    alike, worse, short = (find_lines(rows, label) for label in (FP8, INT4, INT8))
    assert "1.0123" in alike and "window" not in alike, "1 is within its interval"
    assert worse != alike.replace(FP8, INT4), "1 is not within that of the other"
    assert "too few windows" in short
    rows[3] = fail(int8, "MemoryError: scoring did not fit")
    assert "MemoryError: scoring did not fit" in find_lines(rows, INT8)
    before = quant_lab.render_verdict(rows)
    assert "--dampening" not in before and "warning" not in before
    int4["notes"] = ["groups of 32: 128 does not divide 96", "9 stay 16-bit"]
    for note in int4["notes"]:
        assert note in find_lines(rows, INT4) and note not in find_lines(rows, FP8)
    int4["rtn_fallbacks"], base["kld"]["mean"] = 17, 0.5
    assert re.search("warning.* 17 .*--dampening", find_lines(rows, INT4))
    assert "0.5" in find_lines(rows, BASE), "not the reference"


def test_ranges_that_meet_are_not_ranked(calm):
    rows = calm["variants"]
    for row in rows[1:]:
        row["decode_tok_s"] = row["decode"][0]["tok_s"] = rows[0]["decode_tok_s"]
        row["decode"][0]["itl_ms"] = rows[0]["decode"][0]["itl_ms"]
    assert read_best(rows)[OWN_LOOP + "one sequence"][0] == {BASE, FP8, INT4, INT8}
    rows[2]["status"] = "failed"
    assert INT4 not in " ".join(quant_lab.list_best(rows))
    assert quant_lab.list_best(rows[:1]) == []
    rows[2]["status"] = "ok"
    for row in rows:
        row["decode"][1] = dict.fromkeys(row["decode"][1]) | dict(batch=8, error="OOM")
        row["kld"] = row["kld"] | dict(low=None, high=None, windows=[0.1, 0.2])
    best = read_best(rows)
    assert not any("batch" in goal for goal in best), "no batch fitted"
    assert best["Closest to the reference by KLD"][0] == {"unknown"}
    assert find_cell(calm, FP8, "batch 8 tok/s") == "OOM"


# The picture.


def draw(results):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = quant_lab.draw_summary(results)
    renderer = FigureCanvasAgg(figure)
    renderer.draw()
    return figure, renderer.get_renderer()


def read_bars(results):
    """Return width and text of the bars by the panel's title, by variant."""
    found, labels = {}, [row["label"] for row in results["variants"]]
    for panel in draw(results)[0].axes:
        series, = panel.containers
        found[panel.get_title()] = bars = {}
        for label, patch in zip(labels, series.patches, strict=True):
            middle = patch.get_y() + patch.get_height() / 2
            text, = (text.get_text() for text in panel.texts
                     if abs(text.xy[1] - middle) < 0.05)
            bars[label] = patch.get_width(), text
    return found


def read_names(figure, labels):
    """Return what stands in the picture below the name of each variant."""
    found = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert [text.split("\n")[0] for text in found] == list(labels)
    return {label: text[len(label):] for label, text in zip(labels, found)}


def fail_last(results):
    """Let a variant fail; add the control, which has the size of another."""
    rows = results["variants"]
    rows[-1] = fail(rows[-1])
    rows.append(copy.deepcopy(rows[-2]) | dict(label=CONTROL))


def fail_all(results):
    results["variants"] = [fail(row) for row in results["variants"]]


def leave_one(results):
    results["variants"] = results["variants"][1:2]
    results["variants"][0]["size_ratio"] = None


def tie_all(results):
    rows = results["variants"]
    results["variants"] = [copy.deepcopy(rows[0]) | dict(label=label)
                           for label in (BASE, FP8, INT4, INT8, CONTROL)]
    for row in results["variants"]:
        set_spread(row, 1.2)


def disturb_all(results):
    tie_all(results)
    for row in results["variants"]:
        set_spread(row, 2)


def run_six(results):
    """Two variants more than there are by default."""
    rows = results["variants"]
    for number, label in enumerate((CONTROL, "fp8_block")):
        rows.append(copy.deepcopy(rows[-1]) | dict(
            label=label, weight_bytes=(number + 2) * rows[0]["weight_bytes"]))


def lose_speed(results):
    """Leave one row without speed, as where it cannot be measured."""
    results["variants"][2] |= dict.fromkeys(
        ("ttft_s", "latency_s", "decode_tok_s", "decode", "copy_bandwidth"))


def lose_much(results):
    results["variants"][2]["perplexity_ratio"] = dict(value=5e3, low=1e2, high=9e4)


def fit_no_batch(results):
    for row in results["variants"]:
        row["decode"][1:] = [dict.fromkeys(one) | dict(batch=one["batch"], error="OOM")
                             for one in row["decode"][1:]]
        row["perplexity_ratio"] |= dict(low=None, high=None)


@pytest.mark.parametrize("spoil", [
    lambda results: None, fail_last, fail_all, leave_one, tie_all, disturb_all, lose_much,
    fit_no_batch, run_six, lose_speed])
def test_nothing_in_the_picture_overlaps(results, spoil):
    spoil(results)
    figure, renderer = draw(results)
    boxes = [("title", figure._suptitle.get_window_extent(renderer))]
    for axes in figure.axes:
        ticks = [label for axis, (low, high) in (
            (axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim())))
            for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels())
            if low <= place <= high]
        texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *ticks]
        boxes += [(text.get_text(), text.get_window_extent(renderer))
                  for text in texts if text.get_text() and text.get_visible()]
        frame = axes.get_window_extent(renderer)
        lines = [line.get_window_extent(renderer) for line in axes.lines]
        for text in axes.texts:
            box = text.get_window_extent(renderer)
            crossed = any(line.x1 > box.x0 and line.x0 < box.x1 for line in lines)
            assert text.get_bbox_patch() or not crossed, f"a line through {text.get_text()}"
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1, text.get_text()
            assert frame.y0 <= box.y0 and box.y1 <= frame.y1, text.get_text()
    width, height = figure.bbox.size
    for name, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1, name
        assert box.y1 <= height + 1, name
    for (one, a), (two, b) in itertools.combinations(boxes, 2):
        apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, f"{one!r} on {two!r}"


def test_one_sequence_alone_is_drawn_once(results):
    results["config"]["batch_sizes"] = [1]
    assert list(read_bars(results)) == ["bytes on disk", "in memory", "tokens/s, one sequence"]


def test_the_picture_shows_the_figures(results):
    rows = rows_of(results)
    base, batch = rows[BASE], max(results["config"]["batch_sizes"])
    bars = read_bars(results)
    assert len(bars) == 4
    for label, row in rows.items():
        for title, key in (("bytes on disk", "weight_bytes"),
                           ("in memory", "weights_memory_bytes")):
            width, text = bars[title][label]
            assert width == pytest.approx(row[key] / base[key])
            assert numbers(text) == [pytest.approx(width, abs=6e-4)]
        for title, place in ("one sequence", 0), (f"batch of {batch}", -1):
            pair = [one["decode"][place]["tok_s"] for one in (row, base)]
            width, text = bars[f"tokens/s, {title}"][label]
            if any(one["max"] > 1.3 * one["min"] for one in pair):
                assert width == 0 and "noisy" in text
                continue
            assert width == pytest.approx(pair[0]["median"] / pair[1]["median"])
            assert numbers(text) == [pytest.approx(width, abs=6e-4)]
    figure, _ = draw(results)
    for label, said in read_names(figure, rows).items():
        assert numbers(said)[0] == pytest.approx(
            rows[label]["perplexity_ratio"]["value"], abs=6e-5)
    for name in (results["model_name"], results["machine"]["name"],
                 *quant_lab.list_best(results["variants"])):
        assert name in figure._suptitle.get_text()


@pytest.mark.parametrize("spread", [1.02, 2])
def test_failures_show_in_the_picture(calm, spread):
    fail_last(calm)
    set_spread(calm["variants"][0], spread)  # A noisy baseline hides no failure.
    for bars in read_bars(calm).values():
        assert bars[INT8] == (0, "failed") and bars[CONTROL] == bars[INT4]
    names = read_names(draw(calm)[0], rows_of(calm))
    assert [label for label, said in names.items() if "failed" in said] == [INT8]


def test_six_variants_are_all_in_the_picture(results):
    run_six(results)
    labels = [row["label"] for row in results["variants"]]
    assert list(read_names(draw(results)[0], labels)) == labels and len(labels) == 6
    for bars in read_bars(results).values():
        assert list(bars) == labels
    bars = read_bars(results)["bytes on disk"]
    assert [bars[label][0] for label in labels[4:]] == [2, 3]


def test_a_variant_without_speed_keeps_its_other_figures(calm):
    lose_speed(calm)
    bars = read_bars(calm)
    for title, figures in bars.items():
        assert (figures[INT4] == (0, "–")) == ("tokens/s" in title)
        assert figures[INT8][0] > 0
    for title, there in (("KLD", True), ("weights MB", True), ("tokens/s", False),
                         ("TTFT ms", False), ("batch 8 tok/s", False)):
        cell = find_cell(calm, INT4, title)
        assert bool(numbers(cell)) == there and "failed" not in cell
    best = read_best(calm["variants"])
    assert INT4 in best["Smallest"][0]
    for goal in (OWN_LOOP + "one sequence", OWN_LOOP + "a batch of 8"):
        names, noisy = best[goal]
        assert INT4 not in names | noisy and names != {"unknown"}


def test_without_a_baseline_the_picture_compares_nothing(results):
    leave_one(results)
    alone, = results["variants"]
    for bars in read_bars(results).values():
        assert bars[alone["label"]] == (0, "–")


# Model cards.


def test_model_cards_are_what_the_hub_reads(results):
    yaml = pytest.importorskip("yaml")
    hub = copy.deepcopy(results)
    hub["config"]["model"] = hub["base_model"] = "Qwen/Qwen2.5-0.5B-Instruct"
    for row in results["variants"]:
        scheme = row["scheme"]
        for one, base in ((results, None), (hub, "Qwen/Qwen2.5-0.5B-Instruct")):
            card = quant_lab.render_model_card(row, one)
            nothing, head, body = card.split("---\n", 2)
            head = yaml.safe_load(head)
            assert nothing == "" and head.get("base_model") == base
            assert head.get("base_model_relation") == (
                "quantized" if base and scheme != "FP16" else None)
            assert head["library_name"] == "transformers"
            assert set(head.get("tags") or ()) == (
                set() if scheme == "FP16" else {"compressed-tensors", "llmcompressor"})
            for fact in (scheme, one["machine"]["name"], "vllm serve", "recipe.yaml"):
                assert fact in body
            for table in read_tables(body):
                assert list(table) == list(dict.fromkeys([BASE, row["label"]]))


# On a terminal, and in a notebook.


class Output:
    """Stand for the place that output goes to."""

    def __init__(self, terminal):
        self.text, self.isatty = "", lambda: terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("terminal, seconds, again", [(True, 10, 1), (False, 60, 60)])
def test_what_takes_long_says_how_long_it_still_takes(monkeypatch, terminal, seconds, again):
    """Draw a bar on a terminal, which redraws it; add a line a minute to anything else."""
    output, clock = Output(terminal), [1000.0]
    monkeypatch.setattr(quant_lab, "OUTPUT", output)
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    bar = quant_lab.show_progress("scoring", range(400))
    assert not bar.disable and bar.maxinterval == seconds
    bar._time = lambda: clock[0]

    def work(duration):
        seen = output.text.count("scoring")
        for _ in range(10 * duration):
            clock[0] += 0.1
            bar.update(0.1)
        return output.text.count("scoring") - seen

    bar.start_t = bar.last_print_t = clock[0]
    assert work(seconds - 1) == 0 and output.text == "", "nothing for what is quick"
    assert work(again + 2) >= 1
    last = output.text.strip().splitlines()[-1].split("\r")[-1]
    assert "/400" in last and re.search(r"<\d\d:\d\d", last), "time left"
    assert ("\n" in output.text) == (not terminal)
    assert work(again + 1) >= 1
    bar.close()


def read_output(cell):
    """Return the text that a reader sees below a cell of a notebook."""
    return "\n".join(
        output["text"] if output["output_type"] == "stream" else
        output["data"].get("text/markdown", output["data"].get("text/plain", ""))
        for output in cell["outputs"])


@pytest.fixture(scope="session", autouse=True)
def running_notebook(request, tmp_path_factory):
    """Start the notebook beside the other tests if one asks for it."""
    return start_beside(request, "notebook", run_notebook, tmp_path_factory.mktemp("notebook"))


@pytest.fixture
def notebook(running_notebook):
    """Return the executed notebook and the folder that it wrote to."""
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    return running_notebook.result()


def run_notebook(folder):
    import nbclient

    words = ("--demo --device cpu --max-windows 3 --repeats 2 --new-tokens 4 --batch-sizes 2 "
             "--calibration-samples 2 --calibration-length 32 "
             f"--variants {BASE} {FP8} {INT4} {INT8} {CONTROL} --output-dir '{folder}'")
    notebook = jupytext.read(SCRIPT)
    notebook.metadata["kernelspec"]["name"] = "python3"
    nbclient.NotebookClient(
        notebook, timeout=600, resources=dict(metadata=dict(path=str(ROOT)))).execute(
            env=dict(os.environ, QUANT_LAB_ARGS=words))
    return notebook, folder


def test_the_notebook_runs_in_a_real_kernel(notebook):
    notebook, folder = notebook
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    runs = [cell for cell in code if 'if __name__ == "__main__":' in cell.source]
    assert len(runs) == 8 and not [cell.source for cell in code
                                   if cell["outputs"] and cell not in runs]
    results = json.loads((folder / "results.json").read_text("utf-8"))
    assert [row["status"] for row in results["variants"]] == ["ok"] * 5
    for cell, label in zip(runs[1:6], (BASE, FP8, INT4, INT8, CONTROL), strict=True):
        assert quant_lab.render_result(label, results) in read_output(cell)
        table, = read_tables(read_output(cell))
        assert numbers(table[label]["MB"]) and numbers(table[label]["tokens/s"])
    assert quant_lab.render_card(results) in read_output(runs[0])
    summary = runs[-1]["outputs"]
    assert quant_lab.render_tables(results, results["variants"]) in read_output(runs[-1])
    assert any("image/png" in output.get("data", {}) for output in summary)
    assert quant_lab.render_verdict(results["variants"]) in summary[-1]["data"][
        "text/markdown"]
    said = "".join(output["text"] for cell in code for output in cell["outputs"]
                   if output.get("name") == "stderr")
    assert not said or "ipywidgets" in said and said.count("Warning") == 1, said
    assert (folder / "summary.png").stat().st_size > 10_000
