"""Check card, tables, advice, picture, model cards, notebook: readable, and of results.json."""

import copy
import itertools
import json
import math
import os
import re
from statistics import NormalDist

import jupytext
import pytest
from conftest import COMMITTED, ROOT, SCRIPT, load_by_path, start_beside

import quant_lab

BASE, FP8, INT4, INT8 = ("00_fp16_baseline", "01_fp8_dynamic", "02_gptq_w4a16",
                         "03_smoothquant_w8a8")
CONTROL = "rtn_w4a16"
USER, MANY, MEMORY, NOTHING = GOALS = (
    "one user waiting", "many at once", "least memory", "nothing may change")


render_readme = load_by_path("render_readme")


def read(name, served=False):
    """Return committed results, as if there had been no server unless asked otherwise."""
    results = render_readme.read_results(name)
    for row in () if served else results["variants"]:
        row["served"] = None
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
    figures = [row["ttft_s"], row["latency_s"], *(one["ttft_s"] for one in row["prefill"])]
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


def read_advice(results):
    """Return for each goal all that the advice names, the first one first, and why."""
    advice = quant_lab.advise(results)
    assert [one["goal"] for one in advice] == list(GOALS)
    return {one["goal"]: ([one["variant"], *one["ties"]] if one["variant"] else [], one["why"])
            for one in advice}


def flatten(text):
    return " ".join(text.replace("\xa0", " ").split())


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
    assert results["advice"] == quant_lab.advise(results)


def test_readme_shows_the_committed_results():
    """Compare; stale? `python tests/render_readme.py` writes it anew."""
    text = (ROOT / "README.md").read_text("utf-8")
    assert render_readme.render_readme(text) == text
    assert len(text.split("\n")) <= 181, "180 lines and what ends the last"
    for block in ("picture", "advice", "tables"):
        assert f"<!-- {block} h200-smollm2-135m" in text
    for name in COMMITTED:
        assert f"results/{name.partition('/')[0]}/" in text


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


# The card.


def test_the_card_names_what_is_run_on_what(results):
    card = quant_lab.render_card(results)
    assert max(map(len, card.split("\n"))) <= 120
    assert all(line.startswith("    ") for line in card.split("\n"))
    flat, machine = " ".join(card.split()), results["machine"]
    for fact in (results["model_name"], results["config"]["dtype"], machine["name"],
                 f"{machine['memory_bytes'] / 2**30:.1f} GiB", results["config"]["execution"], *(
                     f"{name} {version}" for name, version in results["versions"].items()
                     if version), *(
                     word for word in results["command"] if word.startswith("--"))):
        assert fact in flat
    assert f"{machine['threads']} threads" in flat
    assert (f"driver {machine['driver']}" in flat) == (machine["device"] == "cuda")
    assert bool(machine["compute_capability"]) == (machine["device"] == "cuda")


def test_the_command_on_the_card_gives_the_same_options(results):
    options = json.loads(json.dumps(vars(quant_lab.parse_options(results["command"][2:]))))
    lengths, config = options.pop("prompt_lengths"), dict(results["config"])
    taken = config.pop("prompt_lengths")  # Those within the context.
    assert options == config and taken == lengths[: len(taken)]
    for row in results["variants"]:
        assert [one["prompt_tokens"] for one in row["prefill"]] == taken


@pytest.mark.parametrize("name", ["a$b_$c", "x" * 200, "W" * 70, "<b>|\x1b[31m\n# no\n- no"])
def test_names_do_no_harm(name):
    yaml = pytest.importorskip("yaml")
    results = read("demo-cpu") | dict(model_name=name, base_model=name, license=name)
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
    for row in results["variants"][:3]:
        _, head, body = quant_lab.render_model_card(row, results).split("---\n", 2)
        head = yaml.safe_load(head)
        assert head["base_model"] == head["license"] == name
        assert head["model-index"][0]["name"] == f"{name}, {row['scheme']}"
        texts.append(body)
    for text in texts:
        assert "\x1b" not in text and "/home/me" not in text
        lines = [line for line in text.split("\n") if line[:4] != "    "]  # No code.
        assert "<" not in re.sub("`[^`]*`", "", "\n".join(lines))
        assert not [line for line in lines if re.match(r"\s*([#-] no\b|```|<)", line)]
    figure, renderer = draw(results)
    for text in figure._suptitle, figure._supxlabel:
        box = text.get_window_extent(renderer)
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
    "MB": lambda row: row["weight_bytes"] / 1e6,
    "perplexity": lambda row: row["perplexity_interval"],
    "ratio": lambda row: row["perplexity_ratio"], "KLD": lambda row: row["kld"],
    "top-1 %": lambda row: row["top1_agreement"], "tokens": lambda row: row["divergence"],
    "tokens/s": lambda row: row["decode"][0]["tok_s"],
    "TTFT ms": lambda row: [1000 * x for x in list(row["ttft_s"].values())[:3]],
    "latency s": lambda row: row["latency_s"],
    "weights MB": lambda row: row["weights_memory_bytes"] / 1e6,
    "peak MB": lambda row: row["peak_memory_bytes"] and row["peak_memory_bytes"] / 1e6,
    "KV tokens": lambda row: row["kv_tokens"],
    "users of 8,192": lambda row: row["kv_tokens"] and row["kv_tokens"] // 8192,
    "quantize s": lambda row: row["quantize_seconds"]}
IN_A_SERVER = {title: WANTED[title] for title in (
    "tokens/s", "TTFT ms", "latency s", "KV tokens")} | {
        "GPUs": lambda row: row["tensor_parallel_size"],
        "same tokens": WANTED["tokens"], "kernel": lambda row: row["kernel"] or "–"}


def want(title, row):
    """Return what a cell is to show, of a row or of what a server gave for it."""
    found = re.fullmatch(r"batch (\d+) tok/s|TTFT of ([\d,]+) ms", title)
    if not found:
        return (IN_A_SERVER if "kernel" in row else WANTED)[title](row)
    if found[1]:
        one, = (one for one in row["decode"] if one["batch"] == int(found[1]))
        return one.get("error") or one["tok_s"]
    one, = (one for one in row["prefill"]
            if one["prompt_tokens"] == int(found[2].replace(",", "")))
    return one["error"] or [1000 * x for x in list(one["ttft_s"].values())[:3]]


@pytest.mark.parametrize("name", COMMITTED)
def test_every_cell_of_every_table_is_a_figure_of_its_row(name):
    results, seen = read(name, served=True), ([], [])
    text = quant_lab.render_tables(results, results["variants"]).partition("Tasks, by")[0]
    texts = text.partition("Served by")
    for place, text in enumerate(texts[::2]):
        for table in read_tables(text):
            assert list(table) == [row["label"] for row in results["variants"]]
            for row in results["variants"]:
                timed = row["served"] if place else row
                seen[place].extend(table[row["label"]] if row["label"] == BASE else ())
                for title, cell in table[row["label"]].items():
                    check_cell(title, cell, row["status"], timed)
    batches = [f"batch {n} tok/s" for n in results["config"]["batch_sizes"][1:]]
    lengths = [f"TTFT of {n:,} ms" for n in results["config"]["prompt_lengths"]]
    assert sorted(seen[0]) == sorted([*WANTED, *batches, *lengths])
    served = any(row["served"] for row in results["variants"])
    assert sorted(seen[1]) == sorted([*IN_A_SERVER, *batches] if served else [])


def check_cell(title, cell, status, row):
    if status == "failed" or row["error"]:
        assert cell == "failed", title
        return
    figure = want(title, row)
    if figure is None or isinstance(figure, str):
        assert cell == (figure or "–"), title
        return
    if isinstance(figure, dict):
        figure = list(figure.values())[:3]
    middle, *ends = figure if isinstance(figure, list) else [figure]
    if re.search("tok/s|tokens/s|TTFT|latency", title):
        noisy = ends[1] > 1.3 * ends[0] or (row.get("drift") or 0) > 0.05
        assert ("noisy" in cell) == noisy, title
    if "±" in cell:
        ends = [(ends[1] - ends[0]) / 2]
    elif ends and ends[0] == ends[1]:
        ends = []  # Said once.
    wanted = ends if "noisy" in cell else [middle, *ends]
    for shown, value in zip(numbers(cell), wanted, strict=True):
        digits = max(len(x) for x in re.findall(r"\.(\d+)", cell) or [""])
        assert shown == pytest.approx(value, abs=0.51 * 10**-digits), title


def test_all_batches_are_one_table_and_all_lengths_another():
    """Only these two are wide, and only where more than the default ones were asked for."""
    results = read("demo-cpu")
    wide = read("h100-0.5b")["variants"][0]
    labels = [*rows_of(results)][:3]
    results["variants"] = [copy.deepcopy(wide) | dict(label=label) for label in labels]
    sizes, lengths = [1, 2, 4, 8, 16, 32, 64], [2 * 4**n for n in range(8)]
    for row in results["variants"]:
        row["decode"] = [row["decode"][-1] | dict(batch=batch) for batch in sizes]
        row["prefill"] = [dict(prompt_tokens=n, error=None, ttft_s=row["ttft_s"])
                          for n in (*lengths, 128, 512, 2048)]
    results["variants"].append(fail(dict(label=INT8, scheme="W8A8")))
    usual = quant_lab.Options()
    for sizes, lengths in ((usual.batch_sizes, usual.prompt_lengths), (sizes, lengths),
                           ([1], lengths), (sizes, []), ([1], [])):
        results["config"] |= dict(batch_sizes=list(sizes), prompt_lengths=list(lengths))
        text = quant_lab.render_tables(results, results["variants"])
        found = [list(table[INT8]) for table in read_tables(text)]
        batches = [f"batch {batch} tok/s" for batch in sizes[1:]]
        prompts = [f"TTFT of {length:,} ms" for length in lengths]
        assert found[2:-1] == [titles for titles in (batches, prompts) if titles]
        titles = sum(found, [])
        assert len(titles) == len(set(titles))
        for block in text.split("\n\n"):
            many = len(re.findall("batch|TTFT of", block.split("\n")[0])) > 3
            assert many or max(map(len, block.split("\n"))) <= 120


def test_the_caption_says_what_begins_a_window():
    results = read("demo-cpu")
    for begin, said in ("", "BOS none;"), ("<bos>", "BOS `<bos>`;"):
        results["inputs"]["window_begin"] = begin
        text = " ".join(quant_lab.render_tables(results, results["variants"]).split())
        assert f"in windows of 512, {said} ±" in text


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
    row["latency_s"] |= dict(median=1e-6, min=1e-6, max=1e-6 * spread)
    for one in row["decode"]:  # Faster than any other.
        for key, low in ("tok_s", 1e6), ("itl_ms", 1e-6):
            one[key] |= dict(median=low, min=low, max=low * spread)
    for title in ("TTFT ms", "latency s", "tokens/s", "batch 8 tok/s"):
        cell = find_cell(calm, label, title)
        assert ("noisy" in cell) == noisy
        assert len(numbers(cell)) == (2 if noisy else 3), "least and greatest stay"
        other = find_cell(calm, FP8, title)
        assert "noisy" not in other
    calm["machine"]["device"] = "cuda"
    calm["config"]["max_loss"] = 9
    advice = read_advice(calm)
    for goal in (USER, MANY):
        names, why = advice[goal]
        assert (names == [label]) == (not noisy) and (label in names) != noisy
        assert (f"too noisy to rank: {label}" in why) == noisy and names
        assert ("times the baseline's" in why) == (label != BASE and not noisy)
    assert not any("noisy" in advice[goal][1] for goal in (MEMORY, NOTHING))
    said = flatten(quant_lab.render_advice(calm))
    assert said.count(f"too noisy to rank: {label}") == 2 * noisy
    shown = FP8 if label == BASE else label
    _, table = read_result(shown, calm)
    assert ("noisy" in table["tokens/s"][label]) == noisy
    assert (table["tokens/s"]["over it"] == "–") == noisy
    assert numbers(table["MB"]["over it"])[0] > 0 < numbers(table["weights MB"]["over it"])[0]
    for key in "latency_s", "tok_s@1", "itl_ms@8":
        assert (quant_lab.relate(rows_of(calm)[shown], rows_of(calm)[BASE], key) == 0) == noisy
    assert set(read_lines(calm)) == set(rows_of(calm)), "the other figures stay"


def test_only_timings_are_noisy(calm):
    """Set wide intervals of quality: they are wide, and ranked."""
    calm["config"]["max_loss"] = 9
    for shift, row in enumerate(calm["variants"][1:]):
        windows = [0.01 if (n + shift) % 3 else 0.28 for n in range(30)]
        row["kld"] |= dict(mean=0.1, low=0.01, high=1.0, windows=windows)
    names, why = read_advice(calm)[NOTHING]
    assert set(names) == {FP8, INT4, INT8} and "noisy" not in why
    assert "noisy" not in find_cell(calm, FP8, "KLD")


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
            assert list(cells) == [BASE, label, "over it"]
            for one in (BASE, label):
                assert cells[one] == find_cell(results, one, title)
        for title, mine, theirs in (
                ("MB", row["weight_bytes"], base["weight_bytes"]),
                ("weights MB", row["weights_memory_bytes"], base["weights_memory_bytes"])):
            ratio, = numbers(table[title]["over it"])
            assert ratio == pytest.approx(mine / theirs, abs=6e-4)
        speed = [one["decode"][0]["tok_s"] for one in (row, base)]
        if not any(one["max"] > 1.3 * one["min"] for one in speed):
            ratio, = numbers(table["tokens/s"]["over it"])
            assert ratio == pytest.approx(speed[0]["median"] / speed[1]["median"], abs=6e-4)
        ratio, interval = numbers(table["ratio"]["over it"])[0], row["perplexity_ratio"]
        assert ratio == pytest.approx(interval["value"], abs=6e-4)
        assert re.search(r"±|\(.*–.*\)", table["ratio"][label]), "its interval"
        assert list(table) == ["MB", "ratio", "KLD", "tokens/s", "weights MB"]
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
    assert all(list(cells) == [BASE, "over it"] for cells in table.values())
    for title in ("MB", "ratio", "tokens/s", "weights MB"):
        assert numbers(table[title]["over it"]) == [1]
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
    text, table = read_result(INT4, calm)
    for title in ("MB", "ratio", "KLD", "tokens/s", "weights MB"):
        assert list(table[title]) == [INT4, "over it"]
        assert numbers(table[title][INT4]) and table[title]["over it"] == "–"
    assert rows_of(calm)[INT4]["runs_as"] in flatten(text)


# Advice.


def set_time(row, user=None, many=None):
    """Set the range of the latency, in s, and of steps of all batches, in ms."""
    if user:
        row["latency_s"] = quant_lab.summarize(list(user))
    for one in row["decode"] if many else ():
        one["itl_ms"] = quant_lab.summarize(list(many))
        one["tok_s"] = quant_lab.summarize([1000 * one["batch"] / x for x in many])


def stage(device="cuda"):
    """Return results in which all qualify, and no times or memory can be told apart.

    By KLD the order is INT8, FP8, INT4, the baseline aside.
    """
    results = read("demo-cpu")
    results["machine"]["device"] = device
    for row, kld in zip(results["variants"], (0, 0.02, 0.03, 0.01), strict=True):
        set_time(row, (1.0, 1.02), (4.0, 4.08))
        set_quality(row, 1.001, [kld + 0.001 * (n % 2) * bool(kld) for n in range(30)])
        if row["label"] == BASE:
            row["perplexity_ratio"] = dict(value=1.0, low=1.0, high=1.0)
        row["weights_memory_bytes"] = 10**7
    return results


def set_quality(row, high, windows):
    """Set the upper end of the perplexity ratio, and KLD by its windows."""
    row["perplexity_ratio"] = dict(value=high and high - 0.001 or 1.0, low=high and high - 0.002,
                                   high=high)
    values = quant_lab.torch.tensor(windows).double()[:, None]
    row["kld"] |= quant_lab.estimate(values, name="mean") | dict(windows=windows)


def serve(results, drift=0.01, quick=None):
    """Let all have been served, in the same times, but one in half of them."""
    batches = results["config"]["batch_sizes"]
    for row in results["variants"]:
        pace = 0.5 if row["label"] == quick else 1
        row["served"] = quant_lab.SERVED | dict(
            engine="vllm 0.26.0", drift=drift, kv_tokens=81920, divergence=row["divergence"],
            ttft_s=quant_lab.summarize([0.1 * pace]), decode=[dict(batch=n) for n in batches])
        set_time(row["served"], (2 * pace, 2.02 * pace), (8 * pace, 8.08 * pace))


def test_what_all_share_is_a_tie_of_all():
    advice = read_advice(stage())
    for goal in (USER, MANY, MEMORY):
        assert advice[goal][0] == [BASE, INT8, FP8, INT4], "the closest by KLD comes first"
    assert advice[NOTHING][0] == [INT8], "the baseline is no answer to that"
    assert quant_lab.choose_variant(stage())[0] == BASE


@pytest.mark.parametrize("low, tied", [
    (1.01 * 0.5 / 0.99 - 1e-6, True), (1.01 * 0.5 / 0.99 + 1e-6, False)])
@pytest.mark.parametrize("goal, name", [(USER, "user"), (MANY, "many")])
def test_ranges_that_meet_are_not_ranked(goal, name, low, tied):
    """Two of them, each widened by 1 %; the median of the tied one is far behind."""
    results = stage()
    rows = rows_of(results)
    set_time(rows[INT4], **{name: (0.45, 0.5)})
    set_time(rows[FP8], **{name: (low, 0.65)})
    names, why = read_advice(results)[goal]
    assert names == ([FP8, INT4] if tied else [INT4]), "the closer one by KLD comes first"
    first, base = (rows[label]["latency_s" if goal == USER else "decode"]
                   for label in (names[0], BASE))
    if goal == USER:
        wanted = first["median"], first["median"] / base["median"]
        assert "s in this script's loop" in why
    else:
        wanted = [first[-1]["tok_s"]["median"]] * 2
        wanted[1] /= base[-1]["tok_s"]["median"]
        assert "tokens/s in batches of 8, in this script's loop" in why
    assert numbers(why)[0] == pytest.approx(wanted[0], rel=2e-3)
    assert f"; {wanted[1]:.2f} times the baseline's" in why


def test_a_batch_that_did_not_fit_all_is_ranked_among_those_it_fitted():
    results = stage()
    rows = rows_of(results)
    for label in (BASE, FP8, INT8):
        rows[label]["decode"][1] = dict(batch=8, tok_s=None, itl_ms=None, error="OOM")
    names, why = read_advice(results)[MANY]
    assert names == [INT4] and "batches of 8" in why and "the baseline's" not in why
    assert find_cell(results, FP8, "batch 8 tok/s") == "OOM"
    set_time(rows[INT4], many=(2.0, 2.04))
    rows[INT4]["decode"][1] = dict(rows[FP8]["decode"][1])
    names, why = read_advice(results)[MANY]
    assert names == [INT4] and "batches of 1," in why, "no batch fitted"


@pytest.mark.parametrize("below, tied", [(1.01 / 0.99 - 1e-6, True), (1.01 / 0.99 + 1e-6, False)])
def test_memory_within_two_percent_is_a_tie(below, tied):
    results = stage()
    rows = rows_of(results)
    rows[INT4]["weights_memory_bytes"] = 4 * 10**6
    rows[FP8]["weights_memory_bytes"] = 4 * 10**6 * below
    names, why = read_advice(results)[MEMORY]
    assert names == ([FP8, INT4] if tied else [INT4])
    assert ("4.1 MB of weights; 0.41 times" if tied else "4.0 MB of weights; 0.40 times") in why


def test_kld_is_compared_window_by_window():
    """What all share cancels: intervals that overlap, and yet one is below the others."""
    results = stage()
    _, fp8, int4, int8 = results["variants"]
    texts = [0.05 + 0.9 * (n % 7 == 0) + 0.01 * (n % 5) for n in range(30)]
    for add, row in enumerate((fp8, int4, int8)):
        set_quality(row, 1.001, [
            x + 0.004 * add + 0.001 * (n * add % 3) for n, x in enumerate(texts)])
    assert int8["kld"]["low"] < fp8["kld"]["mean"] < int8["kld"]["high"]
    assert read_advice(results)[NOTHING][0] == [FP8]
    swing = [x + (0.02 if n % 2 else -0.019) for n, x in enumerate(texts)]
    set_quality(int8, 1.001, swing)  # Higher by less than the windows differ.
    assert read_advice(results)[NOTHING][0] == [FP8, INT8]
    results["variants"][1] = fail(fp8)
    assert read_advice(results)[NOTHING][0] == [INT8]


@pytest.mark.parametrize("most, qualify", [
    (0, []), (0.99, []), (1.01, [FP8]), (2.9, [FP8]), (3.1, [FP8, INT4]), (9, [INT8, FP8, INT4])])
def test_max_loss_moves_who_qualifies(most, qualify):
    """By the upper end of the interval, not the middle; the baseline always does."""
    results = stage()
    for row, high in zip(results["variants"][1:], (1.01, 1.03, 1.05)):
        set_quality(row, high, row["kld"]["windows"])
    results["config"]["max_loss"] = most
    advice = read_advice(results)
    for goal in (USER, MANY, MEMORY):
        assert advice[goal][0] == [BASE, *qualify]
    assert advice[NOTHING][0] == (qualify[:1] or [BASE])
    said = flatten(quant_lab.render_notes(results))
    for high in (1, 3, 5):
        assert f"perplexity {high:+.1f} % at most, {most:g} % allowed" in said
    for label, row in rows_of(results).items():
        hollow = label not in (BASE, *qualify)
        assert (read_lines(results)[label][0].get_markerfacecolor() == "white") == hollow


def test_none_that_qualifies_keeps_what_there_is():
    results = stage()
    for row in results["variants"][1:]:
        row["weight_bytes"] = 0.75 * results["variants"][0]["weight_bytes"]
        set_time(row, (0.5, 0.51), (2.0, 2.04))  # Faster, and yet.
        row["weights_memory_bytes"] = 10**6
        set_quality(row, 1.04, row["kld"]["windows"])
    assert all(names == [BASE] for names, _ in read_advice(results).values())
    pick, sentence = quant_lab.choose_variant(results)
    assert (pick, sentence) == (BASE, "Keep float16, nothing wins within 2 %")
    said = flatten(quant_lab.render_advice(results))
    assert f"**{sentence}.**" in said
    assert said.endswith("vllm serve checkpoints/00_fp16_baseline")


def test_too_few_windows_for_intervals_qualify_nothing():
    """Say so, and neither name an infinite loss nor a disagreement of what is not known."""
    results = stage()
    for row in results["variants"]:
        row["weights_memory_bytes"] -= 10**6 * (row["label"] != BASE)
        set_quality(row, None, row["kld"]["windows"][:11])
    advice = read_advice(results)
    assert all(advice[goal][0] == [BASE] for goal in (USER, MANY, MEMORY))
    assert advice[NOTHING] == ([], "nothing that could be ranked")
    assert quant_lab.choose_variant(results)[0] == BASE
    assert quant_lab.choose_variant(results)[1].startswith("Keep float16")
    said = flatten(quant_lab.render_advice(results))
    assert "- nothing may change: **unknown**, nothing that could be ranked" in said
    said = flatten(quant_lab.render_notes(results))
    assert "inf " not in said
    assert "disagrees" not in said
    assert draw(results)


def test_a_baseline_that_failed_leaves_the_others_to_choose_from():
    results = stage()
    rows = rows_of(results)
    set_time(rows[INT8], (0.5, 0.51), (2.0, 2.04))
    results["variants"][0] = fail(rows[BASE])
    advice = read_advice(results)
    assert advice[USER][0] == advice[MANY][0] == [INT8]
    assert advice[MEMORY][0] == [INT8, FP8, INT4]
    assert not any("the baseline's" in why for _, why in advice.values())
    assert quant_lab.choose_variant(results) == (INT8, "SmoothQuant W8A8")
    said = flatten(quant_lab.render_advice(results))
    assert said.endswith(f"vllm serve checkpoints/{INT8}")
    for row in rows.values():
        set_quality(row, 1.04, row["kld"]["windows"])
    said = flatten(quant_lab.render_advice(results))
    assert "vllm serve" not in said, "there is nothing to serve"


def test_a_variant_that_failed_is_named_by_its_reason_alone():
    results = stage()
    rows = rows_of(results)
    for row in rows[INT8], rows[FP8]:
        set_time(row, (0.5, 0.51), (2.0, 2.04))
    results["variants"][3] = fail(rows[INT8], "ValueError: it is 100 wide")
    advice = read_advice(results)
    assert [advice[goal][0] for goal in (USER, MANY, NOTHING)] == [[FP8]] * 3
    assert INT8 not in str(advice) and quant_lab.choose_variant(results)[0] == FP8
    assert "- SmoothQuant W8A8: failed: ValueError: it is 100 wide\n" in (
        quant_lab.render_notes(results) + "\n")


def test_all_that_failed_leave_nothing_to_say():
    results = stage()
    fail_all(results)
    assert all(one == ([], "nothing that could be ranked")
               for one in read_advice(results).values())
    said = flatten(quant_lab.render_advice(results))
    assert said.count("**unknown**") == 4
    assert "vllm serve" not in said, "there is nothing to serve"
    assert flatten(quant_lab.render_notes(results)).count("failed: no") == 4


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_baseline_alone_is_kept(device):
    results = stage(device)
    results["variants"] = results["variants"][:1]
    assert all(names == [BASE] for names, _ in read_advice(results).values())
    assert quant_lab.choose_variant(results) == (
        BASE, "Keep float16, nothing wins within 2 %")


def test_on_a_cpu_memory_alone_decides():
    results = stage("cpu")
    rows = rows_of(results)
    set_time(rows[FP8], (0.5, 0.51), (2.0, 2.04))
    rows[INT4]["weights_memory_bytes"] = 10**6
    advice = read_advice(results)
    assert [advice[goal][0] for goal in (USER, MANY, MEMORY)] == [[FP8], [FP8], [INT4]]
    assert all("in this script, on a CPU, where no format has kernels" in advice[goal][1]
               for goal in (USER, MANY))
    pick, sentence = quant_lab.choose_variant(results)
    assert pick == INT4 and sentence.startswith("GPTQ W4A16, ")
    assert "latency" not in sentence
    results["machine"]["device"] = "cuda"
    pick, sentence = quant_lab.choose_variant(results)
    assert pick == FP8 and ", latency in this script's loop -" in sentence


def test_most_goals_decide_and_the_first_in_a_draw():
    results = stage()
    rows = rows_of(results)
    set_time(rows[INT8], (0.5, 0.51))
    set_time(rows[FP8], many=(2.0, 2.04))
    rows[INT4]["weights_memory_bytes"] = 10**6
    assert quant_lab.choose_variant(results)[0] == INT8, "a draw of three"
    rows[FP8]["weights_memory_bytes"] = 10**6
    pick, sentence = quant_lab.choose_variant(results)
    assert pick == FP8, "a tie counts for each of it"
    assert flatten(quant_lab.render_advice(results)).endswith(
        f"**{sentence}.** vllm serve checkpoints/{FP8}")
    assert "- least memory: **FP8 dynamic or GPTQ W4A16**, 1.0 MB of weights" in (
        quant_lab.render_advice(results))


def test_the_sentence_says_how_what_is_chosen_differs():
    results = stage()
    rows = rows_of(results)
    set_time(rows[FP8], (0.76, 0.76), (2.0, 2.0))
    rows[BASE]["weight_bytes"], rows[FP8]["weight_bytes"] = 1000, 625
    rows[BASE]["perplexity_ratio"] = dict(value=1.0, low=1.0, high=1.0)
    rows[FP8]["perplexity_ratio"] = dict(value=0.9954, low=0.99, high=1.001)
    assert quant_lab.choose_variant(results) == (
        FP8, "FP8 dynamic, size -37.5 %, perplexity -0.5 %, latency in this script's loop -24.8 %")
    rows[FP8]["weight_bytes"] = 1100
    rows[FP8]["perplexity_ratio"]["value"] = 1.0154
    set_time(rows[FP8], (1.2, 2.0))  # Noisy: how much is not said.
    assert quant_lab.choose_variant(results)[0] != FP8
    set_time(rows[FP8], (1.3, 1.326), (0.1, 0.1))
    rows[FP8]["weights_memory_bytes"] = 1
    assert quant_lab.choose_variant(results)[1] == (
        "FP8 dynamic, size +10.0 %, perplexity +1.5 %, latency in this script's loop +30.0 %")


# Advice, as served.


def test_what_was_served_decides_by_the_server():
    results = stage()
    rows = rows_of(results)
    set_time(rows[FP8], (0.1, 0.1), (0.1, 0.1))
    serve(results, quick=INT4)
    advice = read_advice(results)
    assert advice[USER][0] == advice[MANY][0] == [INT4]
    assert "1.005 (1.000–1.010) s in vllm 0.26.0; 0.50 times the baseline's" in advice[USER][1]
    assert "in batches of 8, in vllm 0.26.0; 2.00 times the baseline's" in advice[MANY][1]
    assert advice[MEMORY][0] == [BASE, INT8, FP8, INT4]
    assert "latency in vllm 0.26.0 -50.0 %" in quant_lab.choose_variant(results)[1]
    rows[BASE]["served"]["latency_s"] = quant_lab.summarize([2.0, 2.7])
    names, why = read_advice(results)[USER]
    assert names == [INT4] and f"too noisy to rank: {BASE}" in why and "times the" not in why


@pytest.mark.parametrize("drift, decides", [(0.049, True), (0.051, False), (None, False)])
def test_a_server_that_drifted_decides_nothing(drift, decides):
    results = stage()
    set_time(rows_of(results)[FP8], (0.1, 0.1), (0.1, 0.1))
    serve(results, drift, quick=INT4)
    advice = read_advice(results)
    where = "in vllm 0.26.0" if decides else "in this script's loop"
    for goal in (USER, MANY):
        names, why = advice[goal]
        assert names == [INT4 if decides else FP8] and where in why and "noisy" not in why
    assert quant_lab.choose_variant(results)[0] == (INT4 if decides else FP8)
    less = -50 if decides else 100 * (0.1 / 1.01 - 1)
    assert f"latency {where} {less:+.1f} %" in flatten(draw(results)[0]._suptitle.get_text())


def test_on_a_cpu_a_server_decides():
    """It had a GPU: its times count, as those of the loop do not."""
    results = stage("cpu")
    serve(results, quick=INT4)
    advice = read_advice(results)
    assert advice[USER][0] == advice[MANY][0] == [INT4] and "CPU" not in str(advice)
    assert quant_lab.choose_variant(results)[0] == INT4


def test_what_could_not_be_served_is_left_out():
    results = stage()
    rows = rows_of(results)
    set_time(rows[FP8], (0.1, 0.1), (0.1, 0.1))
    rows[FP8]["weights_memory_bytes"] = 10**6
    serve(results)
    rows[FP8]["served"] = quant_lab.SERVED | dict(
        engine="vllm 0.26.0", error="ValueError: no kernel", drift=0.01)
    advice = read_advice(results)
    assert all(FP8 not in names for names, _ in advice.values())
    assert "vllm 0.26.0" in advice[USER][1] and "vllm 0.26.0" in advice[MANY][1]
    said = flatten(quant_lab.render_notes(results))
    assert "- FP8 dynamic: not served: ValueError: no kernel; runs as: " in said
    assert said.count("not served") == 1


def test_until_all_were_tried_in_the_server_the_own_loop_decides():
    """Leave nothing out that was added in a run without a server."""
    results = stage()
    rows = rows_of(results)
    set_time(rows[INT8], (0.1, 0.1), (0.1, 0.1))
    serve(results, quick=INT4)
    rows[INT8]["served"] = None
    advice = read_advice(results)
    assert advice[USER][0] == advice[MANY][0] == [INT8]
    assert "vllm" not in advice[USER][1] + advice[MANY][1]


# Notes.


@pytest.mark.parametrize("kld", [0.0, 0.0066, 0.0584])
def test_what_kld_is_worth_stands_beside_perplexity(kld):
    results = stage()
    set_quality(results["variants"][2], 1.01, [kld] * 30)
    assert (f"perplexity +1.0 % at most, 2 % allowed; KLD {100 * (math.exp(kld) - 1):.1f} %"
            ) in flatten(quant_lab.render_notes(results))


def test_the_notes_say_what_to_beware_of(calm):
    base, fp8, int4, int8 = calm["variants"]
    int4["notes"], int4["rtn_fallbacks"] = ["groups of 64: 128 does not divide 576",
                                            "16-bit: model.x"], 17
    int8["served"] = quant_lab.SERVED | dict(error="OSError: <gone>")
    notes = [" ".join(line.split()) for line in (
        "\n" + quant_lab.render_notes(calm)).split("\n- ")[1:]]
    assert [note.partition(":")[0] for note in notes] == [
        "FP16 baseline", "FP8 dynamic", "GPTQ W4A16", "SmoothQuant W8A8"]
    assert notes[0] == f"FP16 baseline: runs as: {base['runs_as']}"
    assert re.fullmatch(
        re.escape(f"FP8 dynamic: runs as: {fp8['runs_as']}; perplexity +1.3 % at most, "
                  "2 % allowed; KLD ") + r"\d+\.\d %", notes[1])
    assert notes[2].startswith(
        "GPTQ W4A16: groups of 64: 128 does not divide 576; 16-bit: model.x; warning: 17 "
        "modules fell back to rounding: --dampening; runs as: ")
    assert "SmoothQuant W8A8: not served: `OSError: <gone>`; runs as: " in notes[3]
    assert max(map(len, quant_lab.render_notes(calm).split("\n"))) <= 120


def test_committed_advice_follows_from_the_rows(results):
    """Say it anew, by hand: the least time, the least memory, of those that qualify."""
    rows, cuda = results["variants"], results["machine"]["device"] == "cuda"
    good = [row for row in rows if row["perplexity_ratio"]["high"] <= 1.02]
    batch, advice = max(results["config"]["batch_sizes"]), read_advice(results)
    for goal, take in ((USER, lambda row: row["latency_s"]), (MANY, lambda row: next(
            one["itl_ms"] for one in row["decode"] if one["batch"] == batch))):
        figures = {row["label"]: take(row) for row in good if take(row)}
        least = min(x["max"] for x in figures.values() if x["max"] <= 1.3 * x["min"])
        assert set(advice[goal][0]) == {label for label, x in figures.items() if (
            x["max"] <= 1.3 * x["min"] and 0.99 * x["min"] <= 1.01 * least)}
        assert ("on a CPU" in advice[goal][1]) != cuda
    least = min(row["weights_memory_bytes"] for row in good)
    assert set(advice[MEMORY][0]) == {
        row["label"] for row in good if row["weights_memory_bytes"] <= least * 1.01 / 0.99}
    closest = min(good[1:], key=lambda row: row["kld"]["mean"])["label"]
    assert advice[NOTHING][0][0] == closest
    text = quant_lab.render_advice(results)
    assert max(map(len, text.split("\n"))) <= 120
    pick, sentence = quant_lab.choose_variant(results)
    assert sentence in flatten(text) and text.endswith(f"\n\n    vllm serve checkpoints/{pick}")
    summary = quant_lab.render_summary(results)
    for part in (text, quant_lab.render_notes(results)):
        assert part in summary


# The picture.


def draw(results):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = quant_lab.draw_summary(results)
    renderer = FigureCanvasAgg(figure)
    renderer.draw()
    return figure, renderer.get_renderer()


def read_ticks(axes, renderer):
    """Return the labels of the ticks that are drawn: those within a pixel of the frame."""
    frame = axes.get_window_extent(renderer)
    found = []
    for place, label in zip(axes.get_xticks(), axes.get_xticklabels()):
        x, _ = axes.transData.transform((place, axes.get_ylim()[0]))
        found += [label] if frame.x0 - 1 <= x <= frame.x1 + 1 else []
    for place, label in zip(axes.get_yticks(), axes.get_yticklabels()):
        _, y = axes.transData.transform((axes.get_xlim()[0], place))
        found += [label] if frame.y0 - 1 <= y <= frame.y1 + 1 else []
    return found


def read_lines(results):
    """Return the line of each variant in the picture, and what the legend says of it."""
    figure = quant_lab.draw_summary(results)
    (axes,), (legend,) = figure.axes, figure.legends
    names = {quant_lab.name_variant(row["label"]): row["label"] for row in results["variants"]}
    said = [text.get_text() for text in legend.get_texts()]
    assert said == [line.get_label() for line in axes.lines] and len(said) == len(names)
    return {names[text.partition(",")[0]]: (line, text) for line, text in zip(axes.lines, said)}


def fail_last(results):
    """Let a variant fail; add the control, which has the size of another."""
    rows = results["variants"]
    rows[-1] = fail(rows[-1])
    rows.append(copy.deepcopy(rows[-2]) | dict(label=CONTROL))


def fail_first(results):
    results["variants"][0] = fail(results["variants"][0])


def fail_all(results):
    results["variants"] = [fail(row) for row in results["variants"]]


def leave_one(results):
    results["variants"] = results["variants"][1:2]


def leave_baseline(results):
    results["variants"] = results["variants"][:1]


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


def run_eight(results):
    """All variants there are."""
    rows = results["variants"]
    for number, label in enumerate([*quant_lab.VARIANTS][4:]):
        rows.append(copy.deepcopy(rows[-1]) | dict(
            label=label, weights_memory_bytes=(number + 2) * rows[0]["weights_memory_bytes"]))


def lose_speed(results):
    """Leave one row without speed, as where it cannot be measured."""
    results["variants"][2] |= dict.fromkeys(
        ("ttft_s", "latency_s", "prefill", "decode", "kv_tokens", "kv_bytes_per_token"))


def lose_much(results):
    results["variants"][2]["perplexity_ratio"] = dict(value=5e3, low=1e2, high=9e4)


def fit_no_batch(results):
    for row in results["variants"]:
        row["decode"][1:] = [dict.fromkeys(one) | dict(batch=one["batch"], error="OOM")
                             for one in row["decode"][1:]]
        row["perplexity_ratio"] |= dict(low=None, high=None)


def serve_all(results):
    serve(results, quick=INT4)
    if len(results["variants"]) > 1:
        results["variants"][1]["served"] = quant_lab.SERVED | dict(error="no")


def serve_eight(results):
    run_eight(results)
    serve_all(results)


@pytest.mark.parametrize("spoil", [
    lambda results: None, fail_last, fail_first, fail_all, leave_one, leave_baseline, tie_all,
    disturb_all, lose_much, fit_no_batch, run_eight, lose_speed, serve_all, serve_eight])
def test_nothing_in_the_picture_overlaps(results, spoil):
    spoil(results)
    figure, renderer = draw(results)
    axes, = figure.axes
    frame, ticks = axes.get_window_extent(renderer), read_ticks(axes, renderer)
    texts = [figure._suptitle, figure._supxlabel, axes.title, axes.xaxis.label,
             axes.yaxis.label, *ticks]
    boxes = [(text.get_text(), text.get_window_extent(renderer))
             for text in texts if text.get_text() and text.get_visible()]
    legend, = figure.legends
    boxes.append(("legend", legend.get_window_extent(renderer)))
    assert boxes[-1][1].x0 >= frame.x1
    for line in [line for line in axes.lines if len(line.get_xdata())]:
        x, y = axes.transData.transform(line.get_xydata()).T
        assert frame.y0 <= min(y) and max(y) <= frame.y1
        assert frame.x0 + 4 <= x[0] <= frame.x1 - 4, "room for a dot"
    width, height = figure.bbox.size
    for name, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1, name
        assert box.y1 <= height + 1, name
    for (one, a), (two, b) in itertools.combinations(boxes, 2):
        apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, f"{one!r} on {two!r}"


@pytest.mark.parametrize("spoil", [lambda results: None, leave_baseline, fail_last])
@pytest.mark.parametrize("name", COMMITTED)
def test_kld_has_round_ticks_and_none_below_zero(name, spoil):
    results = read(name)
    spoil(results)
    figure, renderer = draw(results)
    axes, = figure.axes
    ticks = [label.get_text() for label in read_ticks(axes, renderer)
             if label.get_ha() == "right"]
    assert ticks and axes.get_yscale() == "symlog"
    for tick in ticks:
        assert re.fullmatch(r"\$\\mathdefault\{(0|10\^\{-?\d\})\}\$", tick), tick


def test_the_title_says_where_latency_was_timed():
    """On a CPU, only of a server; where not all were tried there, the loop decides."""
    def read(results):
        title = flatten(quant_lab.draw_summary(results)._suptitle.get_text())
        return re.findall(r"latency in (.+?) [+-]", title)

    for device, own in ("cuda", ["this script's loop"]), ("cpu", []):
        results = stage(device)
        set_time(rows_of(results)[FP8], (0.1, 0.1), (0.1, 0.1))
        rows_of(results)[FP8]["weights_memory_bytes"] = 1
        assert read(results) == own
        serve(results, quick=INT4)
        assert read(results) == ["vllm 0.26.0"]
        rows_of(results)[FP8]["served"] = None
        assert read(results) == own


@pytest.mark.parametrize("name", COMMITTED)
def test_the_picture_shows_the_figures(name):
    results = read(name, served=True)
    rows, lines = rows_of(results), read_lines(results)
    assert set(lines) == set(rows)
    for label, row in rows.items():
        point, said = lines[label]
        loss, kld = 100 * (row["perplexity_ratio"]["value"] - 1), row["kld"]
        assert said == (f"{quant_lab.name_variant(label)}, {row['weight_bytes'] / 1e6:,.1f} MB\n"
                        f"perplexity {loss:+.1f} %")
        assert set(point.get_xdata()) == {row["weight_bytes"] / 1e6}
        assert list(point.get_ydata()) == [kld["low"], kld["mean"], kld["high"]]
        assert point.get_markevery() == [1]
        assert (point.get_markerfacecolor() == "white") == (
            row["perplexity_ratio"]["high"] > 1.02)


@pytest.mark.parametrize("name", COMMITTED)
def test_title_and_footer_say_what_follows_and_of_what(name):
    results = read(name, served=True)
    figure = quant_lab.draw_summary(results)
    assert flatten(figure._suptitle.get_text()) == quant_lab.choose_variant(results)[1]
    footer = flatten(figure._supxlabel.get_text())
    for fact in (results["model_name"][-30:], results["machine"]["name"], results["created"]):
        assert fact in footer
    axes, = figure.axes
    assert "hollow: not surely within 2 %" in axes.get_xlabel()


@pytest.mark.parametrize("spoil", [run_eight, fail_last, serve_eight])
def test_a_variant_is_told_by_color_and_by_mark(results, spoil):
    """In grey, too: eight of each."""
    spoil(results)
    rows, lines = rows_of(results), read_lines(results)
    drawn = [line for label, (line, _) in lines.items() if rows[label]["status"] == "ok"]
    for looks in ([line.get_color() for line in drawn], [line.get_marker() for line in drawn]):
        assert len(set(looks)) == len(drawn)
    for line in drawn:
        assert line.get_markeredgecolor() == line.get_color()
        assert line.get_markerfacecolor() in ("white", line.get_color())


def test_failures_show_in_the_picture(calm):
    fail_last(calm)
    lines = read_lines(calm)
    assert [label for label, (line, _) in lines.items() if not len(line.get_xdata())] == [INT8]
    assert lines[INT8][1] == "SmoothQuant W8A8, failed"
    assert set(lines) == {BASE, FP8, INT4, INT8, CONTROL}


def test_eight_variants_are_all_in_the_picture(results):
    run_eight(results)
    assert set(read_lines(results)) == set(quant_lab.VARIANTS)


def test_a_variant_without_speed_keeps_its_other_figures(calm):
    calm["machine"]["device"], calm["config"]["max_loss"] = "cuda", 9
    lose_speed(calm)
    assert len(read_lines(calm)[INT4][0].get_xdata()) == 3
    for title, there in (("KLD", True), ("weights MB", True), ("tokens/s", False),
                         ("TTFT ms", False), ("batch 8 tok/s", False),
                         ("TTFT of 128 ms", False), ("KV tokens", False)):
        cell = find_cell(calm, INT4, title)
        assert bool(numbers(cell)) == there and "failed" not in cell
    advice = read_advice(calm)
    assert INT4 in advice[MEMORY][0]
    for goal in (USER, MANY):
        names, why = advice[goal]
        assert INT4 not in names and INT4 not in why and names


@pytest.mark.parametrize("spoil", [leave_one, fail_first])
def test_without_a_baseline_the_picture_has_perplexity(results, spoil):
    """It is that over the original's, which needs no row of a baseline."""
    spoil(results)
    for label, (_, said) in read_lines(results).items():
        row = rows_of(results)[label]
        if row["status"] == "ok":
            assert numbers(said.partition("perplexity ")[2])[0] == pytest.approx(
                100 * (row["perplexity_ratio"]["value"] - 1), abs=0.051)


# Model cards.


def test_model_cards_are_what_the_hub_reads(results):
    yaml = pytest.importorskip("yaml")
    hub = copy.deepcopy(results)
    hub["model_name"] = hub["base_model"] = "Qwen/Qwen2.5-0.5B-Instruct"
    hub["license"] = "other"
    for row in results["variants"]:
        scheme = row["scheme"]
        for one, base in ((results, None), (hub, "Qwen/Qwen2.5-0.5B-Instruct")):
            card = quant_lab.render_model_card(row, one)
            nothing, head, body = card.split("---\n", 2)
            head = yaml.safe_load(head)
            assert nothing == "" and head.get("base_model") == base
            assert head["library_name"] == "transformers"
            assert set(head.get("tags") or ()) == (
                set() if scheme == "FP16" else {"compressed-tensors", "llmcompressor"})
            assert head.get("license") == one["license"] == ("other" if base else None)
            measured, = head["model-index"]
            assert measured["name"] == f"{one['model_name']}, {scheme}"
            measured, = measured["results"]
            text = one["config"]["eval_text"].rpartition("/")[2]
            assert measured["task"] == dict(type="text-generation")
            assert measured["dataset"] == dict(name=text, type=text)
            assert measured["metrics"] == [dict(type="perplexity", value=row["perplexity"])]
            body = flatten(body)
            recovery = 100 * rows_of(one)[BASE]["perplexity"] / row["perplexity"]
            for fact in (scheme, one["machine"]["name"], "vllm serve",
                         f"Recovery of perplexity: {recovery:.2f} %"):
                assert fact in body
            assert "Licence and uses are those of the original. " in body
            for table in read_tables(card):
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
    assert results["advice"] == quant_lab.advise(results)
    last = summary[-1]["data"]["text/markdown"]
    assert last.startswith("## Which to deploy\n\n- one user waiting: ") and (
        quant_lab.render_advice(results, folder / "checkpoints") in last)
    assert quant_lab.render_notes(results) in read_output(runs[-1])
    said = "".join(output["text"] for cell in code for output in cell["outputs"]
                   if output.get("name") == "stderr")
    assert not said or "ipywidgets" in said and said.count("Warning") == 1, said
    assert (folder / "summary.png").stat().st_size > 10_000


# Tasks.


def do(results, name, right, lost, gained, label):
    """Let a variant of hand-made rows do a task of 200 documents beside the baseline."""
    scores = [float(n < right) for n in range(200)]
    mine = [1 - x if n < lost or 200 - gained <= n else x for n, x in enumerate(scores)]
    done = dict(metric="acc", filter="none", documents=200, limit=200, seconds=1.0)
    rows = rows_of(results)
    base = done | dict(scores=scores)
    for row, other in (rows[BASE], False), (rows[label], base):
        new = base if other is False else done | dict(scores=mine)
        row["tasks"] = {**(row["tasks"] or {}), name: new | quant_lab.compare_scores(new, other)}


def test_the_verdict_names_losses_that_are_certain_for_all_together():
    results = stage()
    results["config"]["task_limit"] = 200
    do(results, "sums", 100, 40, 5, INT4)
    do(results, "words", 150, 8, 1, FP8)  # Alone it would be: -0.035 ± 0.030.
    do(results, "words", 150, 2, 30, INT8)  # A gain is no loss.
    said = flatten(quant_lab.render_advice(results))
    low, high = (rows_of(results)[FP8]["tasks"]["words"]["difference"][key] for key in ("low", "high"))
    assert high < 0, "certain, if it were the only one"
    widest = max(row["tasks"][name]["difference"]["high"] - row["tasks"][name]["difference"]["low"]
                 for row in results["variants"] for name in row["tasks"] or {})
    wider = NormalDist().inv_cdf(1 - 0.025 / 3) / 1.96  # Of each, that all together err in 5 %.
    assert ("Tasks: of 3 comparisons these show a loss, at 95 % for all: GPTQ W4A16 in sums "
            f"(-0.175). To see .01: up to {200 * (wider * widest / 0.02) ** 2:,.0f} documents."
            ) in said
    rows_of(results)[INT4]["tasks"] = {}
    said = flatten(quant_lab.render_advice(results))
    assert "Tasks: of 2 comparisons these show a loss, at 95 % for all: " in said


def test_without_tasks_nothing_is_said_of_them():
    results = stage()
    assert "asks" not in quant_lab.render_advice(results)
    assert "Tasks" not in quant_lab.render_tables(results, results["variants"])


def test_the_table_of_tasks_has_each_row_that_did_it():
    results = stage()
    results["config"]["task_limit"] = 200
    do(results, "sums", 100, 40, 5, INT4)
    do(results, "words", 150, 8, 1, FP8)
    text = quant_lab.render_tables(results, results["variants"]).partition("Tasks, by lm-eval")[2]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n")
             if line.startswith("|")][2:]
    assert [line[:3] for line in lines] == [
        [BASE, "sums", "acc"], [INT4, "sums", "acc"], [BASE, "words", "acc"], [FP8, "words", "acc"]]
    assert lines[0][3:] == ["200", "0.500 ± 0.069", "100.0", "0.000", "0", "0"]
    assert lines[1][4:6] == ["0.325 ± 0.065", "65.0"]
    assert lines[1][6].startswith("-0.175 ± 0.0") and lines[1][7:] == ["40", "5"]
    card = quant_lab.render_model_card(rows_of(results)[INT4], results)
    assert "| sums |" in card.replace("  ", " ").replace("  ", " ")


def test_a_task_of_few_documents_is_no_fault():
    results = stage()
    results["config"]["task_limit"] = 200
    done = dict(metric="acc", filter="none", documents=2, scores=[1.0, 0.0])
    for label in BASE, INT4:
        rows_of(results)[label]["tasks"] = dict(tiny=done | quant_lab.compare_scores(
            done, label != BASE and done))
    assert "of 1 comparisons these show a loss, at 95 % for all: none" in flatten(
        quant_lab.render_summary(results))
