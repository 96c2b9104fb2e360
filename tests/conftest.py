"""Share what several test files need: paths, small models and texts, ways to run the lab."""

import gc
import importlib.util
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "quant_lab.py"
TINY = ROOT / "tests" / "tiny-qwen2"
SHARED = ROOT.parent / "shared" / "data"
LABELS = ["00_fp16_baseline", "01_fp8_dynamic", "02_gptq_w4a16", "03_smoothquant_w8a8"]
CONTROL = "rtn_w4a16"
COMMITTED = ["demo-cpu", "h100-0.5b", "h200-7b", "h200-smollm2-135m", "h200-smollm2-135m/seed-7"]
# Fixtures that wait for what runs beside the tests, one after the other.
LATE = {"demo", "from_hub", "killed", "notebook"}
# A process, forked before the first test, as tests change environment, limits and functions.
BESIDE = ProcessPoolExecutor(1, get_context("fork"))

os.environ["OMP_NUM_THREADS"] = "1"  # Threads cost a tiny model more than they save.
os.environ["HF_HUB_OFFLINE"] = "1"  # Tests that want the stand-in hub say so themselves.
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")
    config.addinivalue_line("markers", "slow: minutes long, run by `-m slow` alone")


def pytest_collection_modifyitems(config, items):
    import torch

    if "slow" not in config.option.markexpr:
        items[:] = [item for item in items if "slow" not in item.keywords]
    items.sort(key=lambda item: bool(LATE & set(item.fixturenames)))
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


def pytest_sessionfinish():
    BESIDE.shutdown(wait=False, cancel_futures=True)  # After -x, what waits is not begun.


def load_by_path(name):
    """Return a module of tests/ by its name."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_strict(file):
    """Return the content of a JSON file; ValueError if it holds NaN or Infinity."""
    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    return json.loads(Path(file).read_text(encoding="utf-8"), parse_constant=refuse)


def run_process(*words, folder=ROOT, script=SCRIPT, python=sys.executable, **environment):
    """Run the script in a process of its own; a variable that is None is unset."""
    variables = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    return subprocess.run(
        [str(python), str(script), *map(str, words)], capture_output=True, text=True,
        encoding="utf-8", env=variables, stdin=subprocess.DEVNULL, cwd=folder)


def run_all(lab):
    """Run all variants of a lab as the script's cells do; return the results."""
    import quant_lab

    for label in quant_lab.VARIANTS:
        quant_lab.run_variant(label, lab)
    return quant_lab.collect_results(lab)


@pytest.fixture(scope="session")
def quick_collection():
    """Let garbage collection, of which each load asks one, skip the imported modules."""
    from datasets import Dataset  # noqa: F401
    from llmcompressor import oneshot  # noqa: F401

    gc.freeze()


@pytest.fixture
def run_script(monkeypatch, capfd):
    """Run the script in this process as `python quant_lab.py WORDS` would."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        capfd.readouterr()
        code, names, handler = 0, {}, signal.getsignal(signal.SIGINT)
        try:
            names = runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        finally:
            signal.signal(signal.SIGINT, handler)
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err, names=names)

    return run


def load_emulated(folder, dtype):
    """Return the model of a folder on the CPU as plain transformers runs it."""
    import torch

    import quant_lab

    options = quant_lab.Options(dtype=dtype, execution="emulated")
    return quant_lab.place_model(folder, options, torch.device("cpu"))


def vary(lab, **changes):
    """Return a lab that differs in these."""
    return SimpleNamespace(**vars(lab) | changes)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A random Qwen2 of one layer, 128 wide: the quickest that all recipes take."""
    return make_small(tmp_path_factory.mktemp("small"), hidden=128)


def make_small(folder, hidden, **changes):
    """Write a random Qwen2 of one layer with the tiny model's tokenizer; return its folder."""
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
    folder = tmp_path_factory.mktemp("texts")
    (folder / "eval.txt").write_text("A list holds values in order. " * 80, encoding="utf-8")
    lines = [json.dumps({"messages": [
        {"role": "user", "content": f"What does number {n} hold?"},
        {"role": "assistant", "content": f"It holds {n * n}, the square of {n}. " * 12},
    ]}) for n in range(12)]
    (folder / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def quick(small, texts, tmp_path, quick_collection):
    """Words of a complete run that takes seconds."""
    return [*quick_words(small, texts), "--output-dir", tmp_path / "out"]


def quick_words(small, texts):
    """Return the words of the quick run but for its output folder."""
    return ["--model", small, "--eval-text", texts / "eval.txt", "--window", 64,
            "--calibration-data", texts / "chats.jsonl", "--calibration-length", 64,
            "--new-tokens", 4, "--repeats", 2, "--batch-sizes", 1, "--prompt-lengths", 8,
            "--device", "cpu"]


@pytest.fixture
def lab(quick):
    """Set up the lab of the quick run; words are options on top."""
    import quant_lab

    return lambda *words: quant_lab.set_up([str(word) for word in (*quick, *words)])


@pytest.fixture(scope="session")
def finished_run(small, texts, tmp_path_factory, quick_collection):
    """Finish the quick run once."""
    import quant_lab

    folder = tmp_path_factory.mktemp("finished")
    words = [*quick_words(small, texts), "--output-dir", folder]
    run_all(quant_lab.set_up([str(word) for word in words]))
    return folder


@pytest.fixture
def finished(finished_run, tmp_path):
    """Copy the finished quick run to where `quick` and `lab` go on; return the folder."""
    return shutil.copytree(finished_run, tmp_path / "out")


def start_beside(request, fixture, work, *arguments):
    """Start what takes long beside the tests if one asks for its fixture."""
    if any(fixture in item.fixturenames for item in request.session.items):
        return BESIDE.submit(work, *arguments)


@pytest.fixture(scope="session", autouse=True)
def running_demo(request, tmp_path_factory):
    """Start the whole demo beside the first tests if one asks for it.

    It runs on the CPU with as many threads as PyTorch takes, which do not spin while they
    wait: that would slow the other tests down, and changes no figure.
    """
    return start_beside(request, "demo", run_demo, tmp_path_factory.mktemp("demo"))


def run_demo(folder):
    import torch

    device = ["--device", "cpu"] if torch.cuda.is_available() else []
    return folder, run_process("--demo", "--output-dir", folder, *device,
                               OMP_NUM_THREADS=None, OMP_WAIT_POLICY="PASSIVE")


@pytest.fixture(scope="session")
def demo(running_demo):
    """Return what the demo printed and wrote."""
    folder, done = running_demo.result()
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(out=done.stdout, err=done.stderr, folder=folder,
                           results=read_strict(folder / "results.json"))
