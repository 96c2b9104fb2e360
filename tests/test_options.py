"""Check the form of the script, its notebook, options, every refusal by code and line."""

import ast
import io
import json
import re
import shutil
import subprocess
import sys
import tokenize

import jupytext
import pytest
import torch
from conftest import LABELS, ROOT, SCRIPT, make_small

import quant_lab


def test_import_does_nothing_visible(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import quant_lab, torch\n"
        "heavy = {'llmcompressor', 'datasets', 'matplotlib', 'transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not {'LAB', 'RESULTS'} & set(vars(quant_lab))")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def read_form():
    """Return the script's text, its syntax tree, its prose, and the notebook's cells."""
    text = SCRIPT.read_text(encoding="utf-8")
    body = ast.parse(text).body
    prose = [node for node in body if is_string(node)]
    return text, body, prose, jupytext.read(SCRIPT)


def is_string(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_notebook_has_the_same_code(tmp_path):
    _, body, prose, notebook = read_form()
    jupytext.write(notebook, tmp_path / "quant_lab.ipynb")
    cells = json.loads((tmp_path / "quant_lab.ipynb").read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    wanted = [ast.dump(node) for node in body if node not in prose]
    assert [ast.dump(node) for cell in code for node in ast.parse(cell).body] == wanted
    assert len(prose) == sum(cell["cell_type"] == "markdown" for cell in cells)
    assert not [f"{cell[:40]!r} ..." for cell in code if len(cell.split("\n")) > 60]
    metadata = notebook.metadata
    assert metadata["accelerator"] == "GPU" and metadata["colab"]["gpuType"] == "T4"


def test_no_comment_comes_alive_in_the_notebook():
    """Compare line by line: jupytext takes `# copy` or `# %word` for a command."""
    text, _, prose, notebook = read_form()
    lines = text.split("\n")
    for node in prose:
        lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    head = lines.index("# ---", 1) + 1  # The notebook's metadata.
    wanted = [line for line in lines[head:] if line and not line.startswith("# %%")]
    assert [line for cell in notebook.cells if cell.cell_type == "code"
            for line in cell.source.split("\n") if line] == wanted


def test_the_script_stays_readable():
    text, body, prose, notebook = read_form()
    strings = list(prose)
    for node in ast.walk(ast.Module(body, [])):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and is_string(node.body[0]):
            strings.append(node.body[0])
            first = node.body[0].value.value.split()[0]
            assert first not in ("A", "An", "The", "What", "Whether"), node.name
            assert first[0].isupper() and not first.endswith("ing"), node.name
    told = {n for node in strings for n in range(node.lineno, node.end_lineno + 1)}
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT,
              tokenize.DEDENT, tokenize.ENDMARKER)
    code = {n for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type not in silent
            for n in range(token.start[0], token.end[0] + 1)} - told
    said = sum(len(cell.source.split("\n")) for cell in notebook.cells
               if cell.cell_type == "markdown")
    lines = text.rstrip("\n").split("\n")
    assert max(map(len, lines)) <= 88
    assert said >= len(code) / 5, (said, len(code))
    assert len(code) <= 1450, len(code)
    assert len(lines) <= 2000, len(lines)


def test_nothing_runs_before_the_runs():
    text, body, *_ = read_form()
    runs = text.split("\n").index('"""# The runs') + 1
    for node in body:
        if isinstance(node, (ast.If, ast.For, ast.While, ast.With)):
            assert ast.unparse(node).startswith("if __name__ == '__main__':")
            assert node.lineno > runs


def test_typed_beats_demo_beats_default():
    plain = quant_lab.parse_options([])
    assert plain == quant_lab.Options()
    assert (plain.model, plain.window, plain.calibration_samples) == (
        "Qwen/Qwen2.5-0.5B-Instruct", 2048, 256)
    demo = quant_lab.parse_options(["--demo"])
    assert demo.window != plain.window and demo.repeats == plain.repeats
    both = quant_lab.parse_options(["--window", "100", "--demo", "--seed", "7"])
    assert (both.window, both.seed, both.model) == (100, 7, demo.model)
    assert quant_lab.parse_options(["--demo", "--window", "2048"]).window == 2048


@pytest.mark.parametrize("words", [
    ["03_smoothquant_w8a8", "00_fp16_baseline"], ["03_smoothquant_w8a8,00_fp16_baseline"]])
def test_variants_run_in_the_order_of_the_table(words):
    options = quant_lab.parse_options(["--variants", *words])
    assert options.variants == ("00_fp16_baseline", "03_smoothquant_w8a8")


def test_recipes_on_request_are_not_run_unless_named():
    requested = ["rtn_w4a16", "awq_w4a16", "w8a16", "fp8_block"]
    assert list(quant_lab.VARIANTS) == [*LABELS, *requested]
    for words in ([], ["--demo"]):
        assert list(quant_lab.parse_options(words).variants) == LABELS


@pytest.mark.parametrize("words, labels", [
    (["fp8"], LABELS[1:2]), (["w4a16"], LABELS[2:3]), (["gptq"], LABELS[2:3]),
    (["w8a8"], LABELS[3:]), (["smooth"], LABELS[3:]), (["rtn"], ["rtn_w4a16"]),
    (["awq"], ["awq_w4a16"]), (["w8a16"], ["w8a16"]), (["block"], ["fp8_block"]),
    (["fp8_block,fp8"], [LABELS[1], "fp8_block"]), (["rtn", "gptq"], [LABELS[2], "rtn_w4a16"]),
    (["baseline"], []), (["all"], [*quant_lab.VARIANTS][1:])])
def test_a_unique_part_of_a_label_is_enough(words, labels):
    """The baseline, to which all others are compared, always runs."""
    options = quant_lab.parse_options(["--variants", *words])
    assert list(options.variants) == [LABELS[0], *labels]


@pytest.mark.parametrize("word", ["ftp8", "w", "0", ""])
def test_no_label_or_a_part_of_several_lists_the_choices(capsys, word):
    with pytest.raises(SystemExit) as end:
        quant_lab.parse_options(["--variants", "gptq", word])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and repr(word) in said
    for label in ("all", *quant_lab.VARIANTS):
        assert re.search(rf"\b{label}\b", said)


@pytest.mark.parametrize("words, name, value", [
    (["--dtype", "bfloat16"], "dtype", "bfloat16"), (["--gpus", "2"], "gpus", 2),
    (["--batch-sizes", "1,8"], "batch_sizes", (1, 8)),
    (["--batch-sizes", "8,2", "4"], "batch_sizes", (1, 2, 4, 8)),
    (["--batch-sizes", "8"], "batch_sizes", (1, 8)),
    (["--prompt-lengths", "2048,128"], "prompt_lengths", (128, 2048)),
    (["--prompt-lengths", "64", "9,64", "1"], "prompt_lengths", (1, 9, 64)),
    (["--prompt-lengths", "512"], "prompt_lengths", (512,)),
    ([], "prompt_lengths", (128, 512, 2048)),
    (["--demo"], "prompt_lengths", (128, 512, 2048)),
    (["--max-loss", "0.5"], "max_loss", 0.5), (["--max-loss", "3"], "max_loss", 3.0),
    ([], "max_loss", 2.0),
    (["--group-size", "32"], "group_size", 32)])
def test_what_users_type(words, name, value):
    assert getattr(quant_lab.parse_options(words), name) == value


@pytest.mark.parametrize("typed", ["--max-window", "--windw", "--groupsize=64"])
def test_a_misspelt_option_is_named(capsys, typed):
    """An option is never guessed from a part of its name."""
    with pytest.raises(SystemExit) as end:
        quant_lab.parse_options([typed, "3"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and typed in said
    assert "--help lists the options" in said


def refused(run, *names, lines=1):
    assert run.code == 2, run.out + run.err
    for inside in ("Traceback", "<function", "functools", " object at 0x", "ValueError:"):
        assert inside not in run.out + run.err
    said = run.err.strip().split("\n")
    assert len(said) == lines and said[0].startswith("quant_lab: "), run.err
    for name in names:
        assert str(name) in run.err


@pytest.mark.parametrize("words, names", [
    (["--windw", "64"], ["--windw", "--help"]),
    (["--win", "64"], ["--win", "--help"]),
    (["--unheard-of", "64"], ["--unheard-of", "--help"]),
    (["stray"], ["stray"]),
    (["--window", "many"], ["--window", "many"]),
    (["--window", "1"], ["--window 1", "2"]),
    (["--dampening", "much"], ["--dampening", "much"]),
    (["--dtype", "int4"], ["--dtype", "int4", "float16"]),
    (["--device", "tpu"], ["--device", "tpu"]),
    (["--variants", "04_wishful"], ["04_wishful", "02_gptq_w4a16"]),
    (["--variants"], ["--variants"]),
    (["--batch-sizes"], ["--batch-sizes"]),
    (["--batch-sizes", "1,x"], ["--batch-sizes", "x"]),
    (["--prompt-lengths"], ["--prompt-lengths"]),
    (["--prompt-lengths", "128,x"], ["--prompt-lengths", "x", "whole numbers"]),
    (["--prompt-lengths", "1.5"], ["--prompt-lengths", "1.5", "whole numbers"]),
    (["--prompt-lengths", "128,0"], ["--prompt-lengths 0", "1"]),
    (["--max-loss", "little"], ["--max-loss", "little"]),
    (["--max-loss"], ["--max-loss"]),
    (["--group-size", "100"], ["--group-size", "100", "128"]),
    (["--kld-tokens", "100"], ["--kld-tokens"]),
])
def test_bad_words(run_script, words, names):
    refused(run_script(*words), *names)


@pytest.mark.parametrize("flag, word, low, high", [
    ("--max-windows", -1, 0, None), ("--window", 1, 2, None), ("--repeats", 0, 1, None),
    ("--new-tokens", 1, 2, None), ("--batch-sizes", 0, 1, None), ("--gpus", -1, 0, None),
    ("--calibration-samples", 0, 1, None),
    ("--calibration-length", 7, 8, None), ("--dampening", "nan", 0, 1),
    ("--dampening", "-0.1", 0, 1), ("--smoothing-strength", 1.5, 0, 1),
    ("--seed", -1, 0, 2**32 - 1), ("--seed", 2**32, 0, 2**32 - 1),
    ("--prompt-lengths", 0, 1, None),
    ("--max-loss", "-0.1", 0, None), ("--max-loss", "nan", 0, None)])
def test_a_number_out_of_its_limits_is_refused_with_them(
        flag, word, low, high, capsys):
    with pytest.raises(SystemExit) as end:
        quant_lab.parse_options([flag, str(word)])
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "\n" not in said
    for part in (flag, word, low, high):
        assert part is None or re.search(rf"(?<![\d.]){re.escape(str(part))}(?![\d.])", said)
    for limit in (low, high):  # The limits themselves are allowed.
        if limit is not None:
            quant_lab.parse_options([flag, str(limit)])


@pytest.mark.parametrize("flag", ["--max-loss", "--dampening", "--smoothing-strength"])
@pytest.mark.parametrize("word", ["inf", "1e999"])
def test_a_number_that_json_does_not_know_is_refused(flag, word, capsys):
    with pytest.raises(SystemExit) as end:
        quant_lab.parse_options([flag, word])
    assert end.value.code == 2 and flag in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("words", [[], ["--device", "cuda"]])
def test_no_gpu(run_script, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_script(*words)
    refused(run, "Colab", "T4", "--demo")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("has_gpu, words, device", [
    (True, [], "cuda"), (True, ["--demo"], "cuda"), (True, ["--device", "cuda"], "cuda"),
    (True, ["--device", "cpu"], "cpu"), (False, ["--demo"], "cpu"),
    (False, ["--device", "cpu"], "cpu"), (False, [], None),
    (False, ["--demo", "--device", "cuda"], None)])
def test_a_gpu_is_taken_where_there_is_one(monkeypatch, has_gpu, words, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    options = quant_lab.parse_options(words)
    if device:
        assert quant_lab.choose_device(options).type == device
    else:
        with pytest.raises(SystemExit) as end:
            quant_lab.choose_device(options)
        assert end.value.code == 2
    assert options.dtype == "float16", "also where it could be another: a T4 has no bfloat16"


def test_model_that_is_not_there(run_script, quick):
    refused(run_script(*quick, "--model", "no/such-model"), "--model no/such-model")
    refused(run_script(*quick, "--model", "./no/such/folder"), "./no/such/folder")
    refused(run_script(*quick, "--model", "x" * 300), "--model xxx")


def damage_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "model.bin")


def damage_half_the_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def damage_no_config(folder):
    (folder / "config.json").unlink()


def damage_not_causal(folder):
    (folder / "config.json").write_text('{"model_type": "t5"}')


def damage_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def damage_no_template(folder):
    (folder / "chat_template.jinja").unlink()


def damage_already_quantized(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


def damage_missing_shard(folder):
    index = {"metadata": {}, "weight_map": {
        "lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def damage_template_that_raises(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")


def make_gguf(folder):
    for file in folder.iterdir():
        file.unlink()
    (folder / "model-q4_k_m.gguf").write_bytes(b"GGUF" + b"\0" * 100)


def make_adapter(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct"}')


def make_bert(folder):
    from transformers import BertConfig, BertForMaskedLM

    BertForMaskedLM(BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32)).save_pretrained(folder)


def make_embedding(folder):
    (folder / "modules.json").write_text(json.dumps([
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling",
         "type": "sentence_transformers.models.Pooling"}]))


@pytest.mark.parametrize("make, file, reason, way_out", [
    (make_gguf, "", "no safetensors", "save_pretrained makes them"),
    (make_gguf, "model-q4_k_m.gguf", "no safetensors", "save_pretrained makes them"),
    (make_adapter, "", "LoRA adapter", "merge"),
    (damage_no_weights, "", "no safetensors", "save_pretrained makes them"),
    (make_bert, "", "BertForMaskedLM", "causal LM"),
    (make_embedding, "", "embedding model", "no text"),
    (damage_already_quantized, "", "quantized already", "original")])
def test_what_is_no_whole_causal_model_is_refused_with_the_way_out(
        run_script, quick, small, tmp_path, make, file, reason, way_out):
    shutil.copytree(small, tmp_path / "model")
    make(tmp_path / "model")
    run = run_script(*quick, "--model", tmp_path / "model" / file)
    refused(run, tmp_path / "model" / file, reason, way_out)
    assert "network" not in run.err and "Error" not in run.err
    assert not (tmp_path / "out").exists(), "a refused run leaves nothing"


def damage_remote_code(folder):
    code = f"open({str(folder / 'ran')!r}, 'w')\n"
    (folder / "conf.py").write_text(code)
    (folder / "config.json").write_text(json.dumps(
        {"model_type": "unheard-of", "auto_map": {"AutoConfig": "conf.Config"}}))


@pytest.mark.parametrize("damage, says", [
    (damage_no_weights, "safetensors"), (damage_half_the_weights, "Safetensor"),
    (damage_missing_shard, "00002-of-00002"), (damage_remote_code, "--model"),
    (damage_template_that_raises, "no users here"),
    (damage_no_config, "--model"), (damage_not_causal, "--model"),
    (damage_no_tokenizer, "--model"), (damage_no_template, "chat template"),
    (damage_already_quantized, "quantized already")])
def test_model_folder_that_cannot_be_used(run_script, quick, small, tmp_path, damage, says):
    shutil.copytree(small, tmp_path / "model")
    damage(tmp_path / "model")
    refused(run_script(*quick, "--model", tmp_path / "model"), tmp_path / "model", says)
    assert not (tmp_path / "model" / "ran").exists(), "code of the model has run"


@pytest.mark.parametrize("content, says", [
    ("", "line 1"), ("\n\n", "line 1"), ("[]", "no chat"),
    ('{"messages": [{"role": "user", "content": "hi"}]}\nnot json', "line 2"),
    ('{"text": "hi"}\n{"text": " "}', "line 2"), ('["hi"]', "entry 1"),
    ('{"messages": []}', "line 1"), ('{"messages": ["hi"]}', "line 1"),
    ('{"messages": 3}', "line 1"), ('"hi"', "line 1"), ("3", "line 1"),
    ('{"messages": [{"role": "user", "content": 3}]}', "line 1"),
    ('{"messages": [{"role": "pirate", "content": "arr"}]}', "line 1"),
    (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', "utf-8"),
])
def test_chat_file_that_cannot_be_used(run_script, quick, tmp_path, content, says):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(run_script(*quick, "--calibration-data", file), file, says)
    assert not (tmp_path / "out").exists(), "a refused run leaves nothing"


def test_files_that_are_not_there(run_script, quick, tmp_path):
    for option in ("--calibration-data", "--eval-text"):
        refused(run_script(*quick, option, tmp_path / "none.txt"), option, "none.txt")


def test_text_shorter_than_a_window(run_script, quick, tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    refused(run_script(*quick, "--eval-text", tmp_path / "short.txt"), "short.txt",
            "--window")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    refused(run_script(*quick, "--eval-text", tmp_path / "binary.txt"), "binary.txt")


def test_window_past_the_context(run_script, quick, tmp_path):
    folder = make_small(tmp_path / "model", hidden=128, max_position_embeddings=30)
    refused(run_script(*quick, "--model", folder), "--new-tokens 4", "30")
    folder = make_small(tmp_path / "longer", hidden=128, max_position_embeddings=50)
    refused(run_script(*quick, "--model", folder), "--window 64", "50")


def test_a_model_without_a_context_length_has_no_limit(small, tmp_path):
    """Bloom's position encoding (ALiBi) has none, nor has its config."""
    shutil.copytree(small, tmp_path / "open")
    (tmp_path / "open" / "config.json").write_text(
        '{"model_type": "bloom", "hidden_size": 64, "n_layer": 1, "n_head": 2}')
    options = quant_lab.Options(model=str(tmp_path / "open"))
    assert quant_lab.open_model(options)[2] >= 2**31


def test_hub_that_cannot_be_reached(run_script, quick):
    for option, value in (("--model", quant_lab.Options.model),
                          ("--calibration-data", quant_lab.ULTRACHAT),
                          ("--eval-text", quant_lab.WIKITEXT)):
        refused(run_script(*quick, option, value), option, value)


def test_output_that_cannot_be_written(run_script, quick, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "~nobody-of-that-name"):
        refused(run_script(*quick, "--output-dir", folder), "--output-dir", folder)


def test_help_is_the_title_and_names_every_option(run_script):
    run = run_script("--help")
    title = quant_lab.__doc__.strip().split("\n")[0].removeprefix("# ")
    assert run.code == 0 and run.err == ""
    assert run.out.startswith("usage: quant_lab.py [options]\n\n" + title + "\n")
    for name in quant_lab.Options.__dataclass_fields__:
        assert f"--{name.replace('_', '-')} " in run.out


def test_help_groups_options_by_what_they_are_about(run_script):
    """Each option stands in one group, with its default as one types it."""
    out = run_script("--help").out
    parts = re.split(r"(?m)^(options|what to run|data|measurement|output and advice):\n", out)
    groups = {title: re.findall(r"(?m)^  (--[\w-]+)", text)
              for title, text in zip(parts[1::2], parts[2::2])}
    assert list(groups) == ["options", "what to run", "data", "measurement",
                            "output and advice"]
    assert groups.pop("options") == [], "but for --help, which has two names"
    assert [flag for flags in groups.values() for flag in flags] == [
        "--" + name.replace("_", "-") for name in quant_lab.Options.__dataclass_fields__]
    for title, flags in {
            "what to run": ("--model", "--variants", "--dtype", "--device", "--demo"),
            "data": ("--calibration-data", "--seed", "--eval-text", "--max-windows"),
            "measurement": ("--new-tokens", "--batch-sizes", "--prompt-lengths", "--repeats"),
            "output and advice": ("--output-dir", "--max-loss", "--fresh")}.items():
        assert set(flags) <= set(groups[title]), title
    said = " ".join(out.split())
    for default in ("[1 8 32]", "[128 512 2048]", f"[{' '.join(LABELS)}]", "[2.0]", "[42]"):
        assert default in said, default
    tuples = re.findall(r"\([^()]*,[^()]*\)", "".join(parts[1:]))
    assert not tuples and "=" not in parts[0].partition("\n")[0]
    assert not re.search(r"[`*]|(?m:^#)|==SUPPRESS==|\[\]|\[False\]", out), "no Markdown"
    assert max(map(len, out.split("\n"))) <= 100


def test_calibration_is_shuffled_templated_cut_and_counted(
        small, texts, tmp_path, capsys):
    tokenizer = quant_lab.open_model(quant_lab.Options(model=str(small)))[1]
    chats = [json.loads(line)["messages"]
             for line in (texts / "chats.jsonl").read_text().split("\n")]

    def load(**changes):
        changes = {"calibration_data": str(texts / "chats.jsonl"), **changes}
        found = quant_lab.load_calibration(quant_lab.Options(**changes), tokenizer, 2048)
        assert found["attention_mask"] == [[1] * len(ids) for ids in found["input_ids"]]
        return found["input_ids"]

    samples = load(calibration_samples=5, calibration_length=50)
    assert "calibration  5 of 5 chats of " in capsys.readouterr().out
    starts = [tokenizer("<|im_start|>user\n" + chat[0]["content"] + "<|im_end|>\n",
                        add_special_tokens=False).input_ids for chat in chats]
    found = [next(i for i, start in enumerate(starts) if sample[: len(start)] == start)
             for sample in samples]
    assert len(set(found)) == 5 and found != sorted(found)
    assert all(len(sample) == 50 for sample in samples)
    assert samples == load(calibration_samples=5, calibration_length=50)
    assert samples != load(calibration_samples=5, calibration_length=50, seed=1)
    marked = (texts / "chats.jsonl").read_text(encoding="utf-8").encode("utf-8-sig")
    (tmp_path / "marked.jsonl").write_bytes(marked.replace(b"\n", b"\r\n"))
    assert load(calibration_data=str(tmp_path / "marked.jsonl")) == load()
    capsys.readouterr()
    assert len(load(calibration_length=2000)) == 12
    said = " ".join(capsys.readouterr().out.split())
    assert said == f"calibration 12 of 256 chats of {texts / 'chats.jsonl'}"


def write_chats(file, entries):
    """Write entries one a line; return the words."""
    file.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    return ["--calibration-data", str(file), "--calibration-length", "64"]


def load_chats(tokenizer, words):
    return quant_lab.load_calibration(quant_lab.parse_options(words), tokenizer, 2048)


@pytest.fixture(scope="module")
def tokenizer(small):
    return quant_lab.open_model(quant_lab.Options(model=str(small)))[1]


PLAIN = [[dict(role=role, content=f"{word} {n}") for role, word in (
    ("system", "Be kind"), ("user", "What is"), ("assistant", "It is"),
    ("user", "And minus"), ("assistant", "Less than"))] for n in range(4)]
SHAREGPT = dict(system="system", user="human", assistant="gpt")


def to_parts(text):
    first, _, rest = text.partition(" ")
    return [{"type": "text", "text": first}, {"type": "text", "text": rest}]


@pytest.mark.parametrize("convert, plain", [
    (lambda chat: {"messages": chat, "id": 3}, PLAIN),
    (lambda chat: {"messages": [
        {"role": turn["role"], "content": to_parts(turn["content"])} for turn in chat]},
     [[turn | dict(content="\n".join(turn["content"].split(" ", 1))) for turn in chat]
      for chat in PLAIN]),
    (lambda chat: {"messages": [*chat, {
        "role": "assistant", "content": None, "tool_calls": [{
            "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "3"}]},
     [[*chat, dict(role="assistant", content=""), dict(role="tool", content="3")]
      for chat in PLAIN]),
    (lambda chat: {"conversations": [
        {"from": SHAREGPT[turn["role"]], "value": turn["content"]} for turn in chat]}, PLAIN),
    (lambda chat: {
        "prompt": chat[1]["content"], "completion": chat[2]["content"]},
     [chat[1:3] for chat in PLAIN]),
    (lambda chat: {"prompt": chat[:2], "completion": chat[2:]}, PLAIN)])
def test_formats_of_chats_are_those_of_messages(tokenizer, tmp_path, convert, plain):
    wanted = load_chats(tokenizer, write_chats(
        tmp_path / "plain.jsonl", [{"messages": chat} for chat in plain]))
    assert [chat and sorted(chat) for chat in [wanted["input_ids"]]] == [sorted(
        tokenizer.apply_chat_template(chat, truncation=True, max_length=64,
                                      return_dict=True).input_ids for chat in plain)]
    entries = [convert(chat) for chat in PLAIN]
    assert load_chats(tokenizer, write_chats(tmp_path / "chats.jsonl", entries)) == wanted
    for indent in None, 1:
        (tmp_path / "chats.json").write_text(json.dumps(entries, indent=indent))
        found = load_chats(tokenizer, ["--calibration-data", str(tmp_path / "chats.json"),
                                       "--calibration-length", "64"])
        assert found == wanted


def test_text_calibrates_as_it_is(tokenizer, tmp_path):
    found = load_chats(tokenizer, write_chats(
        tmp_path / "texts.jsonl", [{"text": "Some text of five or more words."}]))
    assert found["input_ids"] == [tokenizer("Some text of five or more words.").input_ids]


def test_a_file_of_several_formats_is_read_line_by_line(tokenizer, tmp_path, capsys):
    found = load_chats(tokenizer, write_chats(tmp_path / "mixed.jsonl", [
        {"messages": PLAIN[0]}, {"text": "Hello"}, {"messages": PLAIN[1]},
        {"conversations": [{"from": "human", "value": "Hi"}]}]))
    chats = [PLAIN[0], PLAIN[1], [dict(role="user", content="Hi")]]
    wanted = [tokenizer.apply_chat_template(chat, truncation=True, max_length=64,
                                            return_dict=True).input_ids for chat in chats]
    assert sorted(found["input_ids"]) == sorted([tokenizer("Hello").input_ids, *wanted])
    line, = [x for x in capsys.readouterr().out.split("\n") if "calibration" in x]
    assert line == f"calibration  4 of 256 chats of {tmp_path / 'mixed.jsonl'}"


@pytest.mark.parametrize("entry, wanted", [
    ({"messages": PLAIN[0]}, PLAIN[0]), ({"text": "as it is"}, "as it is"),
    ({"prompt": "Add", "completion": "3"}, [
        dict(role="user", content="Add"), dict(role="assistant", content="3")])])
def test_a_chat_is_its_turns_and_a_text_is_itself(tmp_path, entry, wanted):
    found = quant_lab.read_chat(entry)
    if isinstance(wanted, list):
        found = [{key: turn[key] for key in ("role", "content")} for turn in found]
    assert found == wanted
    write_chats(tmp_path / "one.jsonl", [entry])
    assert quant_lab.read_chats(str(tmp_path / "one.jsonl")) == [quant_lab.read_chat(entry)]


@pytest.mark.parametrize("entry, names", [
    ({"instruction": "Add", "output": "3"}, ["instruction", "output"]),
    ({"question": "Why?", "answer": "So."}, ["question", "answer"]),
    ({"prompt": "Add", "chosen": "3", "rejected": "4"}, ["prompt", "chosen", "rejected"]),
    ({"conversations": [{"from": "pirate", "value": "arr"}]}, ["pirate"]),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]},
     ["assistant"]),
    ({"text": 3}, []), ({"messages": [{"role": "user", "content": [3]}]}, [])])
def test_a_format_that_is_not_known_is_refused_by_line_and_keys(
        run_script, quick, tmp_path, entry, names):
    words = write_chats(tmp_path / "odd.jsonl", [{"messages": PLAIN[0]}, entry])
    refused(run_script(*quick, *words), "--calibration-data", "line 2", *names)
    (tmp_path / "odd.json").write_text(json.dumps([{"messages": PLAIN[0]}, entry], indent=1))
    refused(run_script(*quick, "--calibration-data", tmp_path / "odd.json"), "entry 2", *names)


PICKY = """{% if messages[0].role == "system" %}{{ raise_exception("no system turn here") }}\
{% endif %}{% for turn in messages %}{% if (turn.role == "user") != (loop.index0 % 2 == 0) %}\
{{ raise_exception("roles must alternate") }}{% endif %}[{{ turn.content }}]{% endfor %}"""


def test_chats_that_the_template_refuses_are_skipped_and_counted(small, tmp_path, capsys):
    tokenizer = quant_lab.open_model(quant_lab.Options(model=str(small)))[1]
    tokenizer.chat_template = PICKY
    good = [{"messages": chat[1:]} for chat in PLAIN[:2]]
    bad = [{"messages": PLAIN[2]}, {"messages": PLAIN[3][1:2] * 2}, {"messages": PLAIN[3][2:3]}]
    wanted = load_chats(tokenizer, write_chats(tmp_path / "good.jsonl", good))
    capsys.readouterr()
    found = load_chats(tokenizer, write_chats(tmp_path / "mixed.jsonl", good + bad))
    said = capsys.readouterr().out
    assert sorted(found["input_ids"]) == sorted(wanted["input_ids"])
    assert len(found["attention_mask"]) == 2
    counts = re.findall(r"refused (\d+)", said)
    assert "2 of 256 chats" in said and sum(map(int, counts)) == 3
    assert "no system turn here" in said or "roles must alternate" in said
    found = load_chats(tokenizer, ["--calibration-samples", "1", *write_chats(
        tmp_path / "mixed.jsonl", good + bad)])
    assert len(found["input_ids"]) == 1 and found["input_ids"][0] in wanted["input_ids"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        load_chats(tokenizer, write_chats(tmp_path / "bad.jsonl", bad[:1]))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert "no system turn here" in said and "template" in said and "ValueError" not in said
    assert "network" not in said


def test_the_tokenizer_leaves_calibration_as_it_came(small, texts, quick, tmp_path):
    """What cuts the chats is a state of a fast tokenizer that its file would keep."""
    lab = quant_lab.set_up([str(word) for word in quick])
    lab.tokenizer.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text("utf-8"))
    assert saved == json.loads((small / "tokenizer.json").read_text("utf-8"))
    assert saved["truncation"] is None


def test_a_chat_that_renders_to_nothing_is_left_out(small, tmp_path, capsys):
    """Leave out a chat of a system turn alone where the template skips these."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small)
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    chats = [[{"role": "user", "content": "What is a list?"}],
             [{"role": "system", "content": "Be brief."}]]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats), "utf-8")
    options = quant_lab.Options(calibration_data=str(file))
    samples = quant_lab.load_calibration(options, tokenizer, 512)
    assert len(samples["input_ids"]) == 1 and all(samples["input_ids"])
    assert "refused 1" in capsys.readouterr().out
