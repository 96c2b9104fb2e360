import importlib.util
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "quant_lab.py"
TINY = ROOT / "tests" / "tiny-qwen2"
SHARED = ROOT.parent / "shared" / "data"

os.environ["HF_HUB_OFFLINE"] = "1"  # Tests that want the stand-in hub say so themselves.
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")
    config.addinivalue_line("markers", "slow: minutes long, run by `-m slow` alone")


def pytest_collection_modifyitems(config, items):
    import torch

    if "slow" not in config.option.markexpr:
        items[:] = [item for item in items if "slow" not in item.keywords]

    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture
def run_script(monkeypatch, capfd):
    """Run the script in this process as `python quant_lab.py WORDS` would."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        capfd.readouterr()
        code, names = 0, {}
        try:
            names = runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err, names=names)

    return run


def load_by_path(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A random Qwen2 of one layer, 128 wide: the quickest that all recipes take."""
    return make_small(tmp_path_factory.mktemp("small"), hidden=128)


def make_small(folder, hidden, **changes):
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(1)
    config = Qwen2Config(**{**dict(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id), **changes})
    model = Qwen2ForCausalLM(config).half()
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=20, repetition_penalty=1.5,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A text of some 700 tokens and a file of 12 chats, the quickest inputs."""
    import json

    folder = tmp_path_factory.mktemp("texts")
    (folder / "eval.txt").write_text("A list holds values in order. " * 80, encoding="utf-8")
    lines = [json.dumps({"messages": [
        {"role": "user", "content": f"What does number {n} hold?"},
        {"role": "assistant", "content": f"It holds {n * n}, the square of {n}. " * 12},
    ]}) for n in range(12)]
    (folder / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def quick(small, texts, tmp_path):
    """Words of a complete run that takes seconds."""
    return ["--model", small, "--eval-text", texts / "eval.txt", "--window", 64,
            "--calibration-data", texts / "chats.jsonl", "--calibration-length", 64,
            "--new-tokens", 4, "--repeats", 2, "--batch-sizes", 1, "--device", "cpu",
            "--output-dir", tmp_path / "out"]


@pytest.fixture
def lab(quick, tmp_path):
    """Build the lab of the quick run; words are options on top."""

    import torch

    import quant_lab

    def build(*words):
        options = quant_lab.parse_options([str(word) for word in (*quick, *words)])
        device = torch.device("cpu")
        machine = quant_lab.describe_machine(device)
        output = quant_lab.prepare_output(options, machine)
        folder, tokenizer, context = quant_lab.open_model(options)
        return quant_lab.Lab(
            options, device, machine, quant_lab.list_versions(), output, folder, tokenizer,
            quant_lab.load_evaluation(options, tokenizer, context),
            quant_lab.load_calibration(options, tokenizer, context))

    return build
