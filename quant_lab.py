# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   accelerator: GPU
#   colab: {gpuType: T4}
# ---

# %% [markdown]
"""
# quant_lab: which quantization should I deploy?

**What is measured.** A causal language model in float16 and three compressed-tensors
checkpoints of it made by llmcompressor (FP8 dynamic, GPTQ W4A16, SmoothQuant + GPTQ
W8A8): bytes on disk and in memory; perplexity, KL divergence from the unquantized
model, agreement with it; time to the first token and per token, alone and in batches.

**Why.** A recipe's name does not tell what it costs in quality or buys in bytes and
time *on your model and your GPU*. Every variant, the baseline included, goes through
the same functions, and each is benchmarked on a fresh load from disk.

**What comes out.** Tables and a verdict on the terminal; `results.json`, `summary.md`
and the checkpoints in the output folder.

    python quant_lab.py                        the four variants, on a GPU
    python quant_lab.py --demo                 the same code, any machine, two minutes
    python quant_lab.py --variants 00_fp16_baseline 02_gptq_w4a16 --max-windows 20
"""

# %%
import argparse
import contextlib
import gc
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from functools import cache, partial
from itertools import islice, zip_longest
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
from torch.nn import functional as F

try:
    import triton
    from triton import language as tl
except ImportError:  # Comes with PyTorch for GPUs only.
    triton = None

# %% [markdown]
"""
## Recipes

One entry per variant, and nothing else to add for a new one; `m` holds llmcompressor's
modifiers, `o` the options. Only `Linear` layers are quantized: embedding and `lm_head`
stay 16-bit.

- **FP8_DYNAMIC** ([FP8 formats](https://arxiv.org/abs/2209.05433)). Weights: FP8 E4M3,
  one scale per output channel, rounded to nearest. Activations: FP8, one scale per
  token, at run time. No calibration. FP8 units from SM 8.9 (L4, RTX 40, H100).
- **GPTQ W4A16** ([GPTQ](https://arxiv.org/abs/2210.17323)). Weights: 4-bit integers,
  one scale per 128 inputs; the error of each rounding is made up for in the weights
  not yet rounded, as the calibration inputs weigh it. Activations: float16.
- **SmoothQuant + GPTQ W8A8** ([SmoothQuant](https://arxiv.org/abs/2211.10438)). Moves
  activation outliers into the weights, then rounds these to 8-bit integers by GPTQ,
  one scale per output channel. Activations: 8-bit integers, one scale per token.
  INT8 units from SM 7.5 (T4). `actorder=None`, since the default writes a key into the
  checkpoint that the compressed-tensors of vLLM 0.20 to 0.22 rejects for W8A8.
- **RTN W4A16**, the control: the format of GPTQ W4A16, each weight rounded to nearest,
  no calibration. What GPTQ buys is the difference. Runs only if `--variants` names it.
"""


# %%
@dataclass(frozen=True)
class Variant:
    """A row of the lab: the scheme's name, its recipe, whether it needs calibration."""

    scheme: str
    recipe: Callable[[SimpleNamespace, "Options"], list]
    calibrated: bool = False


LINEAR = dict(targets="Linear", ignore=["lm_head"])
VARIANTS = {
    "00_fp16_baseline": Variant("FP16", lambda m, o: []),
    "01_fp8_dynamic": Variant("FP8_DYNAMIC", lambda m, o: [
        m.QuantizationModifier(scheme="FP8_DYNAMIC", **LINEAR)]),
    "02_gptq_w4a16": Variant("W4A16", lambda m, o: [
        m.GPTQModifier(scheme="W4A16", dampening_frac=o.dampening, **LINEAR)],
        calibrated=True),
    "03_smoothquant_w8a8": Variant("W8A8", lambda m, o: [
        m.SmoothQuantModifier(smoothing_strength=o.smoothing_strength),
        m.GPTQModifier(scheme="W8A8", dampening_frac=o.dampening, actorder=None,
                       **LINEAR)],
        calibrated=True),
    "rtn_w4a16": Variant("W4A16", lambda m, o: [
        m.QuantizationModifier(scheme="W4A16", **LINEAR)]),
}
BASELINE, CONTROL = "00_fp16_baseline", "rtn_w4a16"
SHORT = dict(float16="fp16", bfloat16="bf16", float32="fp32")

# %% [markdown]
"""
## Options

Each stands here once, with a remark on when to change it; the command line is derived
from this class. What is typed wins over what `--demo` presets, and that over the
defaults. In a notebook, put the same words into the environment variable
`QUANT_LAB_ARGS` first, for instance `%env QUANT_LAB_ARGS=--demo`.
"""

# %%
ULTRACHAT, WIKITEXT = "HuggingFaceH4/ultrachat_200k", "Salesforce/wikitext"
PYTHON_HELP = "pydoc_data.topics"
PROMPTS = (
    "What is a dictionary in Python? Answer in two sentences.",
    "A train covers 60 km in 45 minutes. What is its average speed in km/h?",
    "Write a Python function that reverses the order of the words in a string.",
    "Translate into French: The library opens at nine and closes at noon.",
    "Summarize in one sentence: Bees carry pollen between flowers; so seeds can grow.",
    "List five things to pack for a day in the mountains.",
    "Which planet of the solar system has the shortest day?",
    "Name three primary colors as a JSON array of strings, and write nothing else.",
)


def option(default, remark: str, low=None, high=math.inf, choices=None):
    """A field of Options: its default, remark, and inclusive range or choices."""
    return field(default=default, metadata=dict(
        remark=remark, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class Options:
    """What can be changed, and when to."""

    model: str = option("Qwen/Qwen2.5-0.5B-Instruct", "hub id or folder of a causal LM")
    variants: tuple = option(tuple(v for v in VARIANTS if v != CONTROL),
                             f"fewer for a quick look; {CONTROL} as a control")
    output_dir: str = option("", "where to write, if not results/<model>-<device>")
    calibration_data: str = option(
        ULTRACHAT, 'a .jsonl of {"messages": [...]} closer to your traffic')
    calibration_samples: int = option(256, "more if modules fall back to rounding", 1)
    calibration_length: int = option(1024, "tokens a sample; less to save memory", 8)
    eval_text: str = option(WIKITEXT, "a text file (UTF-8) of your domain")
    window: int = option(2048, "tokens; 2048 compares with papers", 2)
    max_windows: int = option(0, "20 for a quick look; 0 scores the whole text", 0)
    kld_tokens: int = option(8192, "more for a narrower interval; they fill a file", 1)
    dampening: float = option(0.01, "0.1 if modules fall back to rounding", 0, 1)
    smoothing_strength: float = option(0.8, "less leaves more to activations", 0, 1)
    new_tokens: int = option(64, "length of the completions", 2)
    batch_sizes: tuple = option((1, 8, 32), "sequences decoded at once; 1 always is", 1)
    repeats: int = option(5, "more if the range of the timings is wide", 1)
    execution: str = option("packed", "emulated is what plain transformers does",
                            choices=("packed", "emulated"))
    no_compile: bool = option(False, "a quick look at speed; a CPU never compiles")
    dtype: str = option("float16", "bfloat16 or float32 if float16 overflows",
                        choices=("float16", "bfloat16", "float32"))
    device: str = option("auto", "cpu runs anywhere", choices=("auto", "cuda", "cpu"))
    seed: int = option(42, "to see what the choice of chats changes", 0, 2**32 - 1)
    demo: bool = option(False, "a tiny model and Python's own help: no GPU, no network")
    fresh: bool = option(False, "forget finished work in the output folder")


DEMO = dict(model="tests/tiny-qwen2", calibration_data=PYTHON_HELP,
            eval_text=PYTHON_HELP, calibration_samples=32, calibration_length=512,
            window=512, batch_sizes=(1, 8))


# %%
def stop(*lines: str):
    """Say on stderr what is wrong with the input and the way out; exit with 2."""
    print("quant_lab: " + "\n".join(lines), file=sys.stderr)
    raise SystemExit(2)


def describe(error: BaseException) -> str:
    """The root cause of an exception, on one line of at most 200 characters."""
    while error.__cause__:
        error = error.__cause__
    text = f"{type(error).__name__}: {error}".rstrip(".\n ")
    return textwrap.shorten(text, 200, placeholder=" ...")


@contextlib.contextmanager
def usable(flag: str, value: str, advice: str):
    """Turn any exception of the block into exit code 2 and a line that names both."""
    try:
        yield
    except Exception as error:
        stop(f"{flag} {value}: {describe(error)}; {advice}")


def read_words() -> list[str]:
    """The command line's words; where a notebook runs this, those of QUANT_LAB_ARGS."""
    script, (name, *words) = globals().get("__file__"), sys.argv
    if script and Path(name).resolve() == Path(script).resolve():
        if words or "IPython" not in sys.modules:
            return words
    try:
        return shlex.split(os.environ.get("QUANT_LAB_ARGS", ""))
    except ValueError as error:
        stop(f"QUANT_LAB_ARGS: {error}; write it as on a command line")


# %%
def parse_options(words: list[str]) -> Options:
    """Options from command-line words; a bad name or value exits with 2."""
    parser = argparse.ArgumentParser(
        prog="quant_lab.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: stop(f"{message}; --help lists the options")
    flags = {f: "--" + f.name.replace("_", "-") for f in fields(Options)}
    for f, flag in flags.items():
        kind, shown = type(f.default), f.default != "" and type(f.default) is not bool
        how = dict(action="store_true") if kind is bool else (
            dict(nargs="+", type=type(f.default[0])) if kind is tuple else
            dict(type=kind, choices=f.metadata["choices"]))
        parser.add_argument(flag, default=f.default, **how, help=f.metadata["remark"]
                            + (" [%(default)s]" if shown else ""))
    parser.set_defaults(**(DEMO if "--demo" in words else {}))
    options = Options(**vars(parser.parse_args(words)))
    asked = [label for word in options.variants for label in word.split(",")]
    if unknown := [label for label in asked if label not in VARIANTS]:
        stop(f"--variants {unknown[0]!r}: choose from {', '.join(VARIANTS)}")
    for f, flag in flags.items():
        low, high = f.metadata["low"], f.metadata["high"]
        value = getattr(options, f.name)
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if low is not None and not low <= one <= high:
                stop(f"{flag} {one}: must be at least {low}"
                     + ("" if high == math.inf else f" and at most {high}"))
    return replace(options, variants=tuple(v for v in VARIANTS if v in asked),
                   batch_sizes=tuple(sorted({1, *options.batch_sizes})))


# %%
if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # A completion may be in any script.
    WORDS = read_words()
    OPTIONS = parse_options(WORDS)

# %% [markdown]
"""
## Machine

Figures mean nothing without the hardware and the versions beside them. Automatic
choices are printed with their reason. A T4 (SM 7.5) has neither bfloat16 nor FP8 units:
all stays float16 there, and llmcompressor's Triton kernels, written for later chips,
give way to its plain PyTorch ones.
"""


# %%
def choose_device(options: Options) -> tuple[torch.device, str]:
    """The device and the reason for it; without a usable one, exit with 2."""
    if options.device == "cpu":
        return torch.device("cpu"), "asked for"
    if not torch.cuda.is_available():
        if options.demo and options.device == "auto":
            return torch.device("cpu"), "no CUDA GPU, and the demo needs none"
        stop("no CUDA GPU found; all but --demo and --device cpu need one.",
             "In Colab: Runtime > Change runtime type > T4 GPU, then run again.",
             "Without a GPU: python quant_lab.py --demo (the same code, a tiny model).")
    if torch.cuda.get_device_capability() < (8, 0):
        if options.dtype == "bfloat16":
            stop("--dtype bfloat16: this GPU only emulates it; take float16 or float32")
        os.environ.update(LLMCOMPRESSOR_DISABLE_GPTQ_TRITON="1", CT_ENFORCE_EAGER="1")
    return torch.device("cuda", 0), "the first CUDA GPU"


# %%
def describe_machine(device: torch.device) -> dict:
    """Device, name, compute capability, memory in bytes, driver (None on a CPU)."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        asked = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        driver = subprocess.getoutput(asked) if shutil.which("nvidia-smi") else ""
        return dict(device="cuda", name=gpu.name, memory_bytes=gpu.total_memory,
                    compute_capability=f"{gpu.major}.{gpu.minor}",
                    driver=driver.partition("\n")[0] or None)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = [*re.findall(r"model name\s*: (.+)", info), platform.machine()][0]
    return dict(device="cpu", name=f"{name}, {os.cpu_count()} cores", driver=None,
                compute_capability=None, memory_bytes=psutil.virtual_memory().total)


def list_versions() -> dict[str, str | None]:
    """Versions of Python, CUDA and the packages that make the figures."""
    packages = ("torch", "transformers", "llmcompressor", "compressed-tensors",
                "accelerate", "datasets", "tokenizers", "safetensors")
    return {"python": platform.python_version(), "cuda": torch.version.cuda,
            **{p.replace("-", "_"): importlib.metadata.version(p) for p in packages}}


def prepare_output(options: Options, machine: dict) -> Path:
    """Make the output folder; one that cannot be written exits with 2."""
    device = "cpu" if machine["device"] == "cpu" else machine["name"]
    slug = f"{Path(options.model).resolve().name}-{device}"
    output = options.output_dir or "results/" + re.sub(r"[^A-Za-z0-9._]+", "-", slug)
    with usable("--output-dir", output, "name a folder that can be written to"):
        output = Path(output).expanduser()
        (output / "checkpoints").mkdir(parents=True, exist_ok=True)
        (output / "log.txt").touch()
    print(f"output       {output}; what the libraries say goes to log.txt there\n")
    return output


# %%
if __name__ == "__main__":
    DEVICE, reason = choose_device(OPTIONS)
    MACHINE, VERSIONS = describe_machine(DEVICE), list_versions()
    print("options (* is not the default)")
    for name, value in asdict(OPTIONS).items():
        mark = " " if value == getattr(Options, name) else "*"
        print(f"{mark} {name:20}", *(value if isinstance(value, tuple) else [value]))
    print(f"\ndevice       {DEVICE}, {reason}: {MACHINE['name']}, "
          f"{MACHINE['memory_bytes'] / 2**30:.1f} GiB")
    print(f"dtype        {OPTIONS.dtype}:", "asked for" if OPTIONS.dtype != "float16"
          else "the 16-bit type that every GPU has, a T4 too")
    print("attention    sdpa: the eager form overflows float16 in Qwen2")

# %% [markdown]
"""
## Model and text

From the hub comes only what is needed: the model's safetensors and tokenizer, the test
split of WikiText, and of UltraChat (over a gigabyte) the beginning as a stream, four
times as many chats as asked for to draw from. A second run finds it all in the caches.

Recipes look at *calibration* text, chats in the model's own template, shuffled with the
seed and cut to a length. Quality is scored on *evaluation* text. The demo takes both
from the topics of Python's own help: an eighth of them is held out and scored, the rest
calibrates, and trained the tiny model (`tests/make_checkpoint.py`).
"""


# %%
def read_json(file: Path) -> dict:
    """Content of a JSON file; {} where there is none or it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=int)
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def open_model(options: Options) -> tuple[Path, object, int]:
    """A model's folder (fetched unless it is one), tokenizer and context length.

    Exits with 2 unless it is an unquantized causal LM in safetensors, for chat.
    """
    from huggingface_hub import snapshot_download
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    name, here = options.model, Path(globals().get("__file__", "")).parent
    kinds = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    with usable("--model", name, "give a folder or a hub id (needs network, access)"):
        places = Path(name).expanduser(), here / name
        folder = next(filter(Path.is_dir, places), None)
        if folder is None and name.startswith((".", "/", "~")):
            raise FileNotFoundError("no such folder")
        folder = folder or Path(snapshot_download(
            name, allow_patterns=kinds, ignore_patterns=["*/*", "consolidated*"]))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        index = read_json(folder / "model.safetensors.index.json").get("weight_map", {})
        for file in set(index.values()) or {"model.safetensors"}:
            safe_open(folder / file, "pt")  # Raises if it is cut off.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not tokenizer("word").input_ids:
            raise FileNotFoundError("its tokenizer is empty, are files missing?")
        if getattr(config, "quantization_config", None):
            raise ValueError("is quantized already, give the model it was made from")
        if not tokenizer.chat_template:
            raise ValueError("has no chat template, give an instruct model or add one")
        prompt = max(tokenize_prompt(tokenizer, p).input_ids.shape[1] for p in PROMPTS)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    context = context or 2**31
    if prompt + options.new_tokens > context:
        stop(f"--new-tokens {options.new_tokens}: with the longest prompt, {prompt}, "
             f"over the model's context of {context}; choose fewer")
    return folder, tokenizer, context


def tokenize_prompt(tokenizer, prompt: str) -> dict[str, torch.Tensor]:
    """A prompt in the chat template: input_ids and attention_mask, each [1, n]."""
    return tokenizer.apply_chat_template(
        [dict(role="user", content=prompt)], add_generation_prompt=True,
        return_tensors="pt", return_dict=True)


# %%
def stream_rows(dataset: str, config: str, split: str, column: str, rows=None) -> list:
    """A column of a hub data set in Parquet: the first `rows` of a split, or all.

    load_dataset(streaming=True) reads far more than these rows, and can abort an
    interpreter that exits soon after (datasets#7566).
    """
    from datasets import Dataset, disable_progress_bars, load_dataset_builder
    from huggingface_hub import HfFileSystem
    from pyarrow.parquet import ParquetFile

    def read():
        for file in load_dataset_builder(dataset, config).config.data_files[split]:
            with HfFileSystem().open(file, cache_type="none") as stream:
                for batch in ParquetFile(stream).iter_batches(256, columns=[column]):
                    yield from batch.to_pylist()

    disable_progress_bars()
    name = f"quant_lab-{dataset}-{config}-{split}-{column}-{rows}".replace("/", "-")
    kept = Dataset.from_generator(lambda: islice(read(), rows), fingerprint=name)
    return list(kept[column])


def read_chats(file: Path) -> list[list[dict]]:
    """Conversations of a .jsonl; ValueError names the first line that is not one."""
    chats = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            turns = json.loads(line)["messages"]
            roles = {isinstance(t["content"], str) and t["role"] for t in turns}
            if not roles or roles - {"system", "user", "assistant", "tool"}:
                raise ValueError
        except (ValueError, TypeError, KeyError):
            raise ValueError(f'line {number} is not {{"messages": [{{"role": "user", '
                             '"content": "..."}, ...]}') from None
        chats.append(turns)
    return chats


# %%
def python_help() -> tuple[list[list[dict]], str]:
    """Calibration chats and held-out evaluation text of the topics of Python's help.

    Topics quote each other: a paragraph that shares a line (of 40 characters or more)
    with the held-out text is in no chat. Underlines of headings are left out.
    """
    from pydoc_data.topics import topics

    texts = {name: re.sub(r"\n[^\w\s]{4,}\n", "\n", topics[name].strip())
             for name in sorted(topics)}
    held = [name for name in texts if zlib.crc32(name.encode()) % 8 == 6]
    evaluation = "\n\n".join(texts.pop(name) for name in held)
    lines = {s for line in evaluation.split("\n") if len(s := line.strip()) >= 40}
    chats = []
    for name, text in texts.items():
        kept = [paragraph for paragraph in text.split("\n\n")
                if lines.isdisjoint(line.strip() for line in paragraph.split("\n"))]
        for part, begin in enumerate(range(0, len(kept), 4), 1):
            chats.append([
                dict(role="user", content=f"Explain {name} in Python, part {part}."),
                dict(role="assistant", content="\n\n".join(kept[begin : begin + 4]))])
    return chats, evaluation


# %%
def load_calibration(options: Options, tokenizer, context: int) -> list[list[int]]:
    """Token ids of the calibration chats; data that cannot be used exits with 2."""
    source, wanted = options.calibration_data, options.calibration_samples
    length = min(options.calibration_length, context)
    with usable("--calibration-data", source, "give a .jsonl (default: needs network)"):
        if source == PYTHON_HELP:
            chats = python_help()[0]
        elif source == ULTRACHAT:
            chats = stream_rows(source, "default", "train_sft", "messages", 4 * wanted)
        else:
            chats = read_chats(Path(source).expanduser())
        if not chats:
            raise ValueError("holds no conversation")
        random.Random(options.seed).shuffle(chats)
        samples = tokenizer(
            [tokenizer.apply_chat_template(c, tokenize=False) for c in chats[:wanted]],
            add_special_tokens=False, truncation=True, max_length=length).input_ids
    print(f"calibration  {len(samples)} chats of {source}, "
          f"{sum(map(len, samples)):,} tokens, at most {length} each"
          + (f" (all there are; {wanted} asked for)" if len(samples) < wanted else ""))
    return samples


def load_evaluation(options: Options, tokenizer, context: int) -> torch.Tensor:
    """Token ids [n] of the evaluation text; one that cannot be used exits with 2."""
    source, window = options.eval_text, options.window
    with usable("--eval-text", source, "give a UTF-8 text (default: needs network)"):
        if source == PYTHON_HELP:
            text = python_help()[1]
        elif source == WIKITEXT:
            text = "\n\n".join(stream_rows(source, "wikitext-2-raw-v1", "test", "text"))
        else:
            text = Path(source).expanduser().read_text(encoding="utf-8-sig")
        ids = torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.long)
    if window > context:
        stop(f"--window {window}: the model's context is {context} tokens; take that")
    if len(ids) < window:
        stop(f"--eval-text {source}: {len(ids)} tokens are less than one --window, "
             f"{window}; give more text or a smaller window")
    windows = min(len(ids) // window, options.max_windows or len(ids))
    print(f"evaluation   {source}: {len(ids):,} tokens, {windows} windows of {window}")
    return ids


# %%
@dataclass(frozen=True)
class Lab:
    """What all variants share."""

    options: Options
    device: torch.device
    machine: dict
    versions: dict
    output: Path
    model: Path
    tokenizer: object
    eval_ids: torch.Tensor
    samples: list[list[int]]
    context: int = 2**31


if __name__ == "__main__":
    MODEL, TOKENIZER, CONTEXT = open_model(OPTIONS)
    EVAL_IDS = load_evaluation(OPTIONS, TOKENIZER, CONTEXT)
    calibrated = any(VARIANTS[label].calibrated for label in OPTIONS.variants)
    SAMPLES = load_calibration(OPTIONS, TOKENIZER, CONTEXT) if calibrated else []
    OUTPUT = prepare_output(OPTIONS, MACHINE)
    LAB = Lab(OPTIONS, DEVICE, MACHINE, VERSIONS, OUTPUT, MODEL, TOKENIZER, EVAL_IDS,
              SAMPLES, CONTEXT)

# %% [markdown]
"""
## Quantize

llmcompressor's six beats: model in float16, calibration data, recipe, `oneshot`, save
compressed, tokenizer beside it. The baseline goes the same way with an empty recipe, so
one writer writes all the bytes that are compared. A checkpoint is written beside its
place and renamed when complete, and used again only if nothing that shaped it changed.

GPTQ inverts one matrix per layer. Where that fails, llmcompressor rounds the layer to
nearest instead and says so in one line of its log: that line is counted here.
"""


# %%
def fingerprint(*parts) -> str:
    """16 hexadecimal digits that change when any of the JSON-like parts does."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_files(files) -> dict[str, str]:
    """SHA-256 of each of the paths that is a file."""
    return {file.name: hashlib.file_digest(file.open("rb"), "sha256").hexdigest()
            for file in files if file.is_file()}


def write_json(file: Path, content: dict) -> None:
    """Write strict JSON in one step: a reader sees the old file or the new one."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    file.with_suffix(".partial").write_text(text + "\n", encoding="utf-8")
    file.with_suffix(".partial").replace(file)


@contextlib.contextmanager
def chatter_to(log: Path):
    """Send what the libraries print, progress bars included, to the log."""
    with (log.open("a", encoding="utf-8") as stream,
          contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream)):
        yield


def load_model(folder: Path, options: Options):
    """A causal LM in eval mode on the CPU; ValueError if weights are missing."""
    from transformers import AutoModelForCausalLM

    gc.collect()  # The model before is in reference cycles.
    with contextlib.suppress(RuntimeError):  # Said in the row, if the GPU is lost.
        torch.cuda.empty_cache()
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, options.dtype), attn_implementation="sdpa",
        output_loading_info=True, trust_remote_code=False)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder.name} lacks {len(missing)} weights, as {missing[0]}")
    return model.eval()


# %%
def build_recipe(label: str, options: Options) -> list:
    """New llmcompressor modifiers of a variant; none for the baseline."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    return VARIANTS[label].recipe(SimpleNamespace(
        GPTQModifier=GPTQModifier, QuantizationModifier=QuantizationModifier,
        SmoothQuantModifier=SmoothQuantModifier), options)


def apply_recipe(model, recipe: list, samples: list[list[int]], lab: Lab) -> int:
    """Run `oneshot` on the model in place; returns how many modules fell back.

    Source: https://docs.vllm.ai/projects/llm-compressor
    """
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.core import reset_session
    from llmcompressor.pipelines.data_free import pipeline as data_free
    from llmcompressor.pipelines.sequential import pipeline as sequential
    from loguru import logger

    # Left alone, both take the first accelerator, whatever --device says.
    data_free.get_main_device = sequential.get_main_device = lambda: lab.device
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    warnings: list[str] = []
    logger.remove()
    logger.add(lab.output / "log.txt", level="INFO")
    logger.add(warnings.append, level="WARNING", format="{message}")
    chats = dict(
        dataset=Dataset.from_dict(dict(
            input_ids=samples, attention_mask=[[1] * len(ids) for ids in samples])),
        num_calibration_samples=len(samples), shuffle_calibration_samples=False,
        max_seq_length=max(map(len, samples))) if samples else {}
    try:
        oneshot(model=model, recipe=recipe, processor=lab.tokenizer, **chats)
    finally:
        reset_session()
        logger.remove()
    if not any(hasattr(module, "quantization_scheme") for module in model.modules()):
        raise ValueError("the recipe found no Linear layer to quantize")
    return sum(map(int, re.findall(r"inversion failed for (\d+)/", "".join(warnings))))


# %%
def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors of a checkpoint."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def read_checkpoint(folder: Path, key: str) -> dict | None:
    """What is known of a checkpoint, or None unless it is whole and has this key."""
    note, size = read_json(folder / "quant_lab.json"), weight_bytes(folder)
    whole = note.get("fingerprint") == key and note.get("weight_bytes") == size
    return dict(checkpoint=f"checkpoints/{folder.name}", weight_bytes=size,
                quantize_seconds=note["quantize_seconds"],
                rtn_fallbacks=note["rtn_fallbacks"]) if whole else None


def quantize_variant(label: str, key: str, lab: Lab) -> None:
    """Write `checkpoints/<label>` and, in its quant_lab.json, its part of the row."""
    folder = lab.output / "checkpoints" / label
    torch.manual_seed(lab.options.seed)
    model, recipe = load_model(lab.model, lab.options), build_recipe(label, lab.options)
    samples = lab.samples if VARIANTS[label].calibrated else []
    start = time.perf_counter()
    fallbacks = apply_recipe(model, recipe, samples, lab) if recipe else 0
    seconds = time.perf_counter() - start if recipe else 0.0
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # Older models set a temperature without asking to sample.
        model.generation_config.do_sample = True
    beside = folder.with_suffix(".partial")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    lab.tokenizer.save_pretrained(beside)
    write_json(beside / "quant_lab.json", dict(
        fingerprint=key, quantize_seconds=seconds, rtn_fallbacks=fallbacks,
        weight_bytes=weight_bytes(beside)))
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)

# %% [markdown]
"""
## Packed execution

Plain transformers unpacks a compressed checkpoint to 16 bits on its first forward, and
simulates the rounding of activations (`--execution emulated`). Here a Linear keeps the
checkpoint's tensors and chooses by format, GPU and rows (tokens at once):

- **In registers** for one row, where the time goes into reading weights: one Triton
  kernel reads them packed and unpacks them on the way into the product. float16 goes
  through the same kernel, so that the variants differ in nothing but the format.
- **Tensor cores** for several rows: 8-bit times 8-bit, the product is scaled. INT8 from
  SM 7.5 (T4), FP8 from SM 8.9.
- **Dequantized** otherwise: a 16-bit copy, one layer at a time.

Activations are rounded per token by the operations of compressed-tensors: on a CPU the
logits equal the emulated ones bit for bit. `runs_as` names what ran.
"""


# %%
def read_e4m3(code: torch.Tensor) -> torch.Tensor:
    """Values, float16, of finite FP8 E4M3 codes held as int8.

    Kernels below SM 8.9 know no FP8: this moves the fields to where float16 has them.
    """
    return ((code.to(torch.int16) << 7) & ~(1 << 14)).view(torch.float16) * 2**8


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """x, within ±448, rounded to the nearest FP8 E4M3 value, ties to even."""
    power = (x.float().view(torch.int32) & 0x7F800000).view(torch.float32)
    step = power.clamp(min=2**-6) / 8  # Three bits follow the leading one.
    return (torch.round(x / step) * step).to(x.dtype)


def quantize(kind: str, x, native: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x over its scale in 8 bits; the scale [..., 1], one per token.

    native: whether kernels know FP8; without, its values come in x's dtype.
    """
    top = x.abs()
    if x.shape[-1] > 4096 and x.shape[-1] % 32 == 0:  # In parallel where a row is long.
        top = top.unflatten(-1, (32, -1)).amax(-1)
    scale = top.amax(-1, keepdim=True) / (127.5 if kind == "int8" else 448)
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    if kind == "int8":
        return (x / scale).clamp(-128, 127).round().to(torch.int8), scale
    x = (x / scale).clamp(-448, 448)
    return x.to(torch.float8_e4m3fn) if native else round_e4m3(x), scale


def regroup(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """INT4 words [out, in / 8], reordered within each group of inputs.

    Eight neighbours, lowest bits first, share a word of a checkpoint. Here, word j of the
    n of a group has its inputs j, n + j, 2 n + j and so on: neighbours in neighbours.
    """
    places = torch.arange(0, 32, 4, dtype=torch.int32, device=weight.device)
    bits = (weight[..., None] >> places & 15).view(len(weight), groups, 8, -1)
    return (bits.transpose(2, 3) << places).sum(-1, dtype=torch.int32).flatten(1)


def dequantize(kind: str, weight, scale) -> torch.Tensor:
    """The weight [out, in] of a PackedLinear in the dtype of its scale."""
    if kind == "int4":  # Stored with 8 added.
        places = torch.arange(0, 32, 4, dtype=torch.int32, device=weight.device)
        bits = weight.view(*scale.shape, 1, -1) >> places[:, None] & 15
        return ((bits - 8).to(scale.dtype) * scale[..., None, None]).flatten(1)
    return (read_e4m3(weight) if kind == "fp8" else weight).to(scale.dtype) * scale


# %%
if triton:
    @triton.jit
    def row_kernel(x, weight, scale, x_scale, bias, y, rows, width, GROUP: tl.constexpr,
                   KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        row = tl.minimum(row, rows - 1)  # The last ones may be done twice.
        total = tl.zeros([ROWS, BLOCK], tl.int32 if KIND == "int8" else tl.float32)
        for begin in range(0, width, BLOCK):
            at = begin + tl.arange(0, BLOCK)[None, :]
            inside = at < width
            w = tl.load(weight + row[:, None] * width + at, mask=inside, other=0)
            if KIND == "int4":
                high, part = w >> 24, tl.zeros([ROWS, BLOCK], tl.float32)
                eights = tl.zeros([1, BLOCK], tl.float32)
                for i in tl.static_range(8):
                    # Read as float32, an integer n below 2**24 is n * 2**-149: the four
                    # bits need no shift, no conversion, only a mask.
                    bits = (w if i < 6 else high) & (15 << 4 * (i % 6))
                    value = tl.load(x + at // GROUP * (8 * GROUP) + at % GROUP
                                    + i * GROUP, mask=inside, other=0).to(tl.float32)
                    part += bits.to(tl.float32, bitcast=True) * (
                        value * 2.0 ** (100 - 4 * (i % 6)))
                    eights += value * (8 * 2.0**-49)
                total += (part - eights) * tl.load(
                    scale + row[:, None] * (width // GROUP) + at // GROUP,
                    mask=inside, other=0).to(tl.float32)
            else:
                value = tl.load(x + at, mask=inside, other=0.0)
                if KIND == "int8":  # Four products and their sum.
                    total = tl.inline_asm_elementwise(
                        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, value, total],
                        dtype=tl.int32, is_pure=True, pack=1)
                else:
                    if KIND == "fp8":
                        w = w.to(tl.float8e4nv, bitcast=True).to(tl.float16)
                    elif KIND == "codes":  # As read_e4m3 does; 2**8 comes last.
                        w = ((w.to(tl.int16) << 7) & -16385).to(
                            tl.float16, bitcast=True)
                    total += w.to(tl.float32) * value.to(tl.float32)
        result = tl.sum(total, 1).to(tl.float32)
        if KIND == "int4":
            result *= 2.0**49
        if x_scale is not None:
            result *= tl.load(scale + row).to(tl.float32) * tl.load(x_scale).to(
                tl.float32) * (256 if KIND == "codes" else 1)
        if bias is not None:
            result += tl.load(bias + row).to(tl.float32)
        tl.store(y + row, result)


def row_shape(kind: str, rows: int, width: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program of row_kernel, found by trying on an H100."""
    if kind == "plain":
        return (2, 1024, 4) if width <= 2048 else (2, 2048, 8)
    if kind == "int4":
        return (4, 128, 1) if width <= 128 or rows > 8192 else (4, 512, 4)
    if kind == "int8":
        return (2, 512, 2) if width > 256 else (8, 128, 1) if rows > 8192 else (2, 256, 1)
    return (1, 2048, 4) if width > 2048 > rows else (2, 1024, 2)


@torch.library.custom_op("quant_lab::multiply_row", mutates_args=())
def multiply_row(kind: str, x: torch.Tensor, weight: torch.Tensor,
                 scale: torch.Tensor | None, x_scale: torch.Tensor | None,
                 bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """x times a packed weight, scaled, plus bias: [1, out]."""
    if kind == "int8":
        x, weight = x.view(torch.int32), weight.view(torch.int32)
    rows, width = weight.shape
    lines, block, warps = row_shape(kind, rows, width)
    y = x.new_empty(1, rows, dtype=dtype)
    row_kernel[(triton.cdiv(rows, lines),)](
        x, weight, scale, x_scale, bias, y, rows, width,
        width // scale.shape[1] if kind == "int4" else 1, kind, lines, block,
        num_warps=warps)
    return y


if triton:
    @triton.jit
    def int8_kernel(x, weight, scale, x_scale, bias, y, n, rows, width, M: tl.constexpr,
                    N: tl.constexpr, BLOCK: tl.constexpr):
        a = tl.program_id(0) * M + tl.arange(0, M)[:, None]
        b = tl.program_id(1) * N + tl.arange(0, N)[None, :]
        total = tl.zeros([M, N], tl.int32)
        for begin in range(0, width, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            left = tl.load(x + a % n * width + at[None, :],
                           mask=at[None, :] < width, other=0)
            right = tl.load(weight + b % rows * width + at[:, None],
                            mask=at[:, None] < width, other=0)
            total = tl.dot(left, right, total, out_dtype=tl.int32)
        result = total.to(tl.float32) * tl.load(scale + b % rows).to(tl.float32)
        result *= tl.load(x_scale + a % n).to(tl.float32)
        if bias is not None:
            result += tl.load(bias + b % rows).to(tl.float32)
        tl.store(y + a * rows + b, result, mask=(a < n) & (b < rows))


def rows_shape(n: int, rows: int) -> tuple[int, int, int, int, int]:
    """Tile, warps and stages of int8_kernel for n rows, found by trying on an H100."""
    if n <= 64:
        return (16 if n <= 16 else 32, 32, 256, 4, 4)
    return (128, 128, 128, 4, 3) if n * rows > 2**21 else (64, 128, 128, 4, 4)


@torch.library.custom_op("quant_lab::multiply_int8", mutates_args=())
def multiply_int8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
                  x_scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [n, in] times an INT8 weight on tensor cores, scaled, plus bias: [n, out]."""
    (n, width), rows = x.shape, len(weight)
    m, tile, block, warps, stages = rows_shape(n, rows)
    y = scale.new_empty(n, rows)
    int8_kernel[(triton.cdiv(n, m), triton.cdiv(rows, tile))](
        x, weight, scale, x_scale, bias, y, n, rows, width, m, tile, block,
        num_warps=warps, num_stages=stages)
    return y


@torch.library.custom_op("quant_lab::multiply_fp8", mutates_args=())
def multiply_fp8(x: torch.Tensor, weight: torch.Tensor, factor: float,
                 dtype: torch.dtype) -> torch.Tensor:
    """x [n, in] @ weight [out, in].T, both FP8, over a factor against overflow.

    An operator of its own, since torch.compile cannot trace F.scaled_mm in torch 2.11.
    """
    by = F.ScalingType.TensorWise
    one = torch.ones((), device=x.device)
    return F.scaled_mm(x, weight.t(), one / factor, by, one, by, output_dtype=dtype)


multiply_row.register_fake(lambda kind, x, weight, scale, x_scale, bias, dtype: (
    x.new_empty(1, len(weight), dtype=dtype)))
multiply_int8.register_fake(lambda x, weight, scale, x_scale, bias: (
    scale.new_empty(len(x), len(weight))))
multiply_fp8.register_fake(lambda x, weight, factor, dtype: (
    x.new_empty(len(x), len(weight), dtype=dtype)))


# %%
class PackedLinear(torch.nn.Module):
    """A Linear on the tensors of its checkpoint.

    kind: int4, int8, fp8 or plain. weight [out, in] as int8 (FP8: its codes), int4
    [out, in / 8], eight per int32, or 16-bit; scale [out, groups], one group unless
    int4. sm: the GPU's compute capability, (0, 0) on a CPU.
    """

    def __init__(self, kind: str, weight, scale, bias, sm: tuple[int, int]):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.kind, self.scale, self.bias, self.sm = kind, scale, bias, sm
        self.native = sm == (0, 0) or sm >= (8, 9)  # Whether kernels know FP8.

    def route(self, rows: int) -> str:
        """How so many rows are multiplied; the reason, if they are dequantized."""
        needs = dict(int8=(7, 5), fp8=(8, 9)).get(self.kind, (0, 0))
        fits = not any(n % 16 for n in self.weight.shape[rows == 1 :])
        if rows == 1 and triton and self.sm > (0, 0) and fits:
            return f"{self.kind}→{'int32' if self.kind == 'int8' else 'fp32'} in registers"
        if self.kind == "plain":
            return "plain"
        if rows > 1 and self.kind != "int4" and self.sm >= needs and fits:
            return f"{self.kind} tensor cores"
        why = ("a CPU" if self.sm == (0, 0) else "16 does not divide its width"
               if not fits else "no Triton" if rows == 1 else
               "PyTorch multiplies no int4" if self.kind == "int4" else
               "tensor cores need SM %d.%d" % needs)
        return f"dequantized to {SHORT[str(self.scale.dtype)[6:]]} ({why})"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, shape = x.numel() // x.shape[-1], (*x.shape[:-1], len(self.weight))
        way, weight, scale = self.route(rows), self.weight, None
        if way == "plain":
            return F.linear(x, weight, self.bias)
        dtype, kind = x.dtype, self.kind
        if kind in ("int8", "fp8"):
            x, scale = quantize(kind, x, self.native)
        if way.startswith("dequantized"):
            x = x if scale is None else x.to(dtype) * scale
            return F.linear(x, dequantize(kind, weight, self.scale), self.bias)
        x = x.reshape(rows, -1)
        if way.endswith("registers"):
            kind = "codes" if kind == "fp8" and not self.native else kind
            return multiply_row(
                kind, x, weight, self.scale, scale, self.bias, dtype).view(shape)
        scale = scale.reshape(rows, 1)
        factor = 1
        if kind == "int8" and triton and self.sm >= (8, 0):
            return multiply_int8(x, weight, self.scale, scale, self.bias).view(shape)
        if kind == "int8":  # _int_mm wants more than 16 rows.
            x = F.pad(x, (0, 0, 0, 32 - rows)) if rows <= 16 else x
            y = torch._int_mm(x, weight.t())[:rows]
        else:  # By a power of two, which rounds nothing, below the overflow of 16 bits.
            factor = 2.0 ** math.ceil(math.log2(448 * 448 * weight.shape[1] / 65504))
            y = multiply_fp8(x, weight.view(x.dtype), factor, dtype)
        y = y.float() * (scale.float() * factor * self.scale.float().t())
        return (y if self.bias is None else y + self.bias.float()).to(dtype).view(shape)


# %%
class Share(torch.nn.Module):
    """Its part [begin, end) of a PackedLinear that several with one input share."""

    def __init__(self, shared: PackedLinear, begin: int, end: int):
        super().__init__()
        self.shared, self.begin, self.end = shared, begin, end

    def forward(self, x):
        known = getattr(self.shared, "known", None) or (None, None)
        y = known[1] if known[0] is x else self.shared(x)
        self.shared.known = None if self.end == len(self.shared.weight) else (x, y)
        return y[..., self.begin : self.end]


SHARING = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def pack_linear(linear: torch.nn.Module, sm: tuple[int, int]) -> PackedLinear:
    """A PackedLinear; ValueError for formats that none of the recipes writes."""
    scheme = getattr(linear, "quantization_scheme", None)
    if scheme is None:
        return PackedLinear("plain", linear.weight, None, linear.bias, sm)
    kind = "fp8" if scheme.weights.type == "float" else f"int{scheme.weights.num_bits}"
    stored = getattr(linear, "weight_packed", getattr(linear, "weight", None))
    kept = dict(int4=torch.int32, int8=torch.int8, fp8=torch.int8).get(kind)
    if not kept or not scheme.weights.symmetric or hasattr(linear, "weight_g_idx"):
        raise ValueError("this format runs with --execution emulated only")
    weight, scale = stored.data.view(kept), linear.weight_scale
    weight = regroup(weight, scale.shape[1]) if kind == "int4" else weight
    return PackedLinear(kind, weight, scale, linear.bias, sm)


def pack_model(model, sm: tuple[int, int]) -> None:
    """Put a PackedLinear in the place of each quantized Linear; on a GPU, of all."""
    if hook := getattr(model, "ct_decompress_hook", None):
        hook.remove()
        del model.ct_decompress_hook
    for name, module in list(model.named_modules()):
        plain = sm > (0, 0) and isinstance(module, torch.nn.Linear)
        if plain or getattr(module, "quantization_scheme", None):
            model.set_submodule(name, pack_linear(module, sm))
    for parent in list(model.modules()) if sm > (0, 0) else ():
        for names in SHARING:
            parts = [getattr(parent, name, None) for name in names]
            share_input(parent, names, parts)


def share_input(parent, names, parts) -> None:
    """Join PackedLinears of one kind and width: one product where there were three."""
    alike = {isinstance(p, PackedLinear) and (p.kind, p.weight.shape[1], p.bias is None)
             for p in parts}
    if len(alike) > 1 or False in alike:
        return
    joined = [None if getattr(parts[0], what) is None else torch.nn.Parameter(
        torch.cat([getattr(p, what).data for p in parts]), requires_grad=False)
        for what in ("weight", "scale", "bias")]
    shared, end = PackedLinear(parts[0].kind, *joined, parts[0].sm), 0
    for name, part in zip(names, parts):
        setattr(parent, name, Share(shared, end, end := end + len(part.weight)))

# %% [markdown]
"""
## Measure quality

**Perplexity**, as in the GPTQ paper: the text is tokenized once and cut into windows of
`--window` tokens that do not overlap; in each, every token but the first is scored; a
rest shorter than a window is not. Perplexity is e to the mean negative log-likelihood.
It compares only with figures of the same text, window and tokenizer.

**Ratio, KL divergence, same top token, first difference** hold a variant against the
*reference*: the model as it came, in `--dtype`, measured before all variants. The
baseline, saved and loaded anew, is held against it too: what differs there is noise. KL
divergence, from the reference's next-token distribution to the variant's, needs the
logits of both for the same tokens. So that two models never have to fit at once, the
reference's wait in a temporary file of at most 5 GB: those of `--kld-tokens` scored
positions, spread evenly over the text.

**Intervals** (95 %) take neither tokens nor windows as independent: what stands in one
article errs together. Consecutive windows are joined into at most 30 blocks, and the
spread is that of the blocks. The ratio is taken window by window, so that what makes a
text hard for both models cancels. An interval speaks for the choice of text; other
calibration chats, seeds, kernels or tasks it does not cover.
"""


# %%
LOGITS_FILE_BYTES, BLOCKS = 5e9, 30


@torch.no_grad()
def score_text(model, ids: torch.Tensor, options: Options, visit) -> torch.Tensor:
    """Negative log-likelihoods [windows, window - 1] in nats of the token ids [n].

    Calls `visit(window's number, logits [k, vocabulary])` with those to be compared, of
    all models the same in the same order. Raises FloatingPointError for logits that are
    not finite. Source: https://arxiv.org/abs/2210.17323
    """
    window = options.window
    windows = ids[: len(ids) // window * window].view(-1, window)
    windows = windows[: options.max_windows or None].to(model.device)
    losses = torch.zeros(len(windows), window - 1)
    compared = torch.zeros_like(losses, dtype=torch.bool)
    for number, row in enumerate(windows):
        logits = model(row[None], use_cache=False).logits[0, :-1]
        if number == 0:
            fit = int(LOGITS_FILE_BYTES // logits[0].nbytes)
            count = min(options.kld_tokens, fit, losses.numel())
            compared.view(-1)[torch.arange(count) * losses.numel() // count] = True
        # In slices, since 2,048 x 151,936 logits take 1.2 GB in float32.
        for begin in range(0, window - 1, 128):
            part, here = logits[begin : begin + 128], slice(begin, begin + 128)
            if not part.isfinite().all():
                raise FloatingPointError("logits are not finite, in float16 mostly by "
                                         "overflow: try --dtype bfloat16 or float32")
            losses[number, here] = F.cross_entropy(
                part.float(), row[1:][here], reduction="none")
            if (chosen := compared[number, here]).any():
                visit(number, part[chosen.to(part.device)])
    return losses.double()


# %%
def complete_prompts(model, lab: Lab) -> list[list[int]]:
    """Greedy completions of PROMPTS: token ids, at most --new-tokens each."""
    completions = []
    for prompt in PROMPTS:
        inputs = tokenize_prompt(lab.tokenizer, prompt).to(lab.device)
        tokens = model.generate(
            **inputs, do_sample=False, max_new_tokens=lab.options.new_tokens)
        completions.append(tokens[0, inputs["input_ids"].shape[1]:].tolist())
    return completions


def place_model(folder: Path, lab: Lab):
    """A causal LM on the lab's device, its defaults for sampling put aside."""
    from transformers import GenerationConfig

    model = load_model(folder, lab.options).to(lab.device)
    if lab.options.execution == "packed":
        cuda = lab.device.type == "cuda"
        pack_model(model, torch.cuda.get_device_capability() if cuda else (0, 0))
    # A new object: whatever generate is not told comes from the model's own defaults.
    model.generation_config = GenerationConfig(
        eos_token_id=model.generation_config.eos_token_id or lab.tokenizer.eos_token_id,
        pad_token_id=lab.tokenizer.pad_token_id or lab.tokenizer.eos_token_id)
    return model


def measure_reference(lab: Lab) -> SimpleNamespace | Exception:
    """What the model as it came says, for all variants to be held against.

    losses [windows, window - 1] in nats; logits [compared tokens, vocabulary] in the
    model's dtype, as a file; completions. Or why that cannot be measured.
    """
    try:
        model, file = place_model(lab.model, lab), tempfile.TemporaryFile()
        losses = score_text(
            model, lab.eval_ids, lab.options, lambda number, logits: file.write(
                logits.cpu().view(torch.uint8).numpy().data))
        return SimpleNamespace(
            losses=losses, logits=file, completions=complete_prompts(model, lab))
    except Exception as error:
        traceback.print_exc()  # Goes to the log.
        return RuntimeError(f"the unquantized model: {describe(error)}")


# %%
def estimate(values: torch.Tensor, windows: torch.Tensor, scale=float) -> dict:
    """Mean of values [n] and its 95 % interval: value, low, high, put on a scale.

    windows [n] tells which window each is from; of one or two, low and high are None.
    The standard error is that of a ratio of sums over clusters (Cochran, Sampling
    Techniques, 1977, section 6.3), Student's t a series (Abramowitz and Stegun 26.7.5).
    """
    mean, (_, places) = values.mean().item(), windows.unique(return_inverse=True)
    count = int(places.max()) + 1
    freedom = min(count, BLOCKS) - 1
    if freedom < 2:
        return dict(value=scale(mean), low=None, high=None)
    sums = torch.bincount(places * (freedom + 1) // count, values - mean)
    error = math.sqrt(sums.square().sum() * (1 + 1 / freedom)) / len(values)
    # 1.960 is that of the normal distribution.
    t = sum(c / freedom**k for k, c in enumerate((1.960, 2.372, 2.822, 2.556, 1.589)))
    return dict(value=scale(mean), low=scale(mean - t * error),
                high=scale(mean + t * error))


# %%
def measure_quality(model, lab: Lab, reference: SimpleNamespace) -> dict:
    """Perplexity; against the reference KLD in nats, agreement in %, same tokens."""
    numbers, divergences, agreements = [], [], []

    def compare(number, logits):
        known = torch.frombuffer(bytearray(reference.logits.read(logits.nbytes)),
                                 dtype=logits.dtype).view_as(logits).to(logits.device)
        p, q = (F.log_softmax(x.double(), dim=-1) for x in (known, logits))
        numbers.extend([number] * len(logits))
        divergences.append((p.exp() * (p - q)).sum(-1).cpu())
        agreements.append((known.argmax(-1) == logits.argmax(-1)).double().cpu())

    reference.logits.seek(0)
    losses = score_text(model, lab.eval_ids, lab.options, compare)
    windows = torch.arange(len(losses)).repeat_interleave(losses.shape[1])
    perplexity = estimate(losses.flatten(), windows, math.exp)
    ratio = estimate((losses - reference.losses).flatten(), windows, math.exp)
    windows, kld = torch.tensor(numbers), torch.cat(divergences)
    spread = estimate(kld, windows, lambda x: max(x, 0.0))
    top1 = estimate(torch.cat(agreements), windows, lambda x: min(100 * x, 100.0))
    longest, completions = lab.options.new_tokens, []
    for prompt, tokens, known in zip(
            PROMPTS, complete_prompts(model, lab), reference.completions):
        differ = [a != b for a, b in zip_longest(tokens, known)]
        completions.append(dict(
            prompt=prompt, same_tokens=differ.index(True) if any(differ) else longest,
            completion=lab.tokenizer.decode(tokens, skip_special_tokens=True)))
    same = estimate(torch.tensor([float(c["same_tokens"]) for c in completions]),
                    torch.arange(len(PROMPTS)))
    return dict(
        perplexity=perplexity["value"], perplexity_interval=perplexity,
        perplexity_ratio=ratio, tokens_scored=losses.numel(),
        window_losses=losses.mean(1).tolist(), top1_agreement=top1,
        kld=dict(mean=spread.pop("value"), **spread, median=kld.quantile(0.5).item(),
                 p99=kld.quantile(0.99).item(), tokens=len(kld)),
        divergence=dict(mean=same.pop("value"), **same, completions=completions))

# %% [markdown]
"""
## Measure speed

Greedy decoding as servers do it: a static cache, tokens that never leave the GPU, all
decoder layers compiled as one function, prefill and step as CUDA graphs. A prompt of
512 tokens of the evaluation text is continued by exactly `--new-tokens` tokens.

- **TTFT**, time to the first token: the prefill of the prompt, one sequence.
- **ITL**, inter-token latency: seconds after the first token per token after it, for 1,
  8 and 32 copies of the sequence (`--batch-sizes`). **tokens/s** is batch over ITL.
- **Memory**: of the weights, after running; at the peak, while one sequence decodes.
- **Bandwidth**: the bytes that a step reads (weights, but not an embedding that is only
  looked up; cache) over ITL, as a part of what copying 1 GB reaches in the same run.
  The rest to 100 % is overhead.

Median (min–max) of `--repeats` runs after a warm-up, the device synchronized before
each look at the clock. A CPU does not compile, nor do `--no-compile` and `emulated`.
"""


# %%
def summarize(samples: list[float]) -> dict:
    """Median, least and greatest of the samples, and these."""
    return dict(median=statistics.median(samples), min=min(samples), max=max(samples),
                samples=samples)


def now(device: torch.device) -> float:
    """Seconds of the clock, once the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@cache
def measure_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, that copying a large tensor reaches."""
    size, seconds = 10**9 if device.type == "cuda" else 10**8, []
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = source.clone()
    for _ in range(10):
        start = now(device)
        target.copy_(source)
        seconds.append(now(device) - start)
    return 2 * size / statistics.median(seconds)


# %%
class LayerCache:
    """Keys and values of one layer in tensors that stay where they are."""

    def __init__(self, length: int):
        self.length, self.keys, self.values, self.position = length, None, None, None

    def update(self, keys, values, *_, **__):
        if self.keys is None:
            self.keys, self.values = (
                x.new_zeros(*x.shape[:2], self.length, x.shape[3]) for x in (keys, values))
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        return self.keys, self.values


if triton:
    @triton.jit
    def attend_kernel(query, keys, values, mask, y, tops, totals, scaling, length,
                      GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
        head, part = tl.program_id(0), tl.program_id(1)
        at, column = part * BLOCK + tl.arange(0, BLOCK), tl.arange(0, SIZE)
        inside = at[:, None] < length
        here = (head // GROUP * length + at[:, None]) * SIZE + column[None, :]
        key = tl.load(keys + here, mask=inside, other=0).to(tl.float32)
        value = tl.load(values + here, mask=inside, other=0).to(tl.float32)
        q = tl.load(query + head * SIZE + column).to(tl.float32) * scaling
        hidden = tl.load(mask + at, mask=at < length, other=-float("inf"))
        score = tl.sum(key * q[None, :], 1) + hidden.to(tl.float32)
        top = tl.maximum(tl.max(score), -1e30)  # All may be hidden.
        weight, place = tl.exp(score - top), head * tl.num_programs(1) + part
        tl.store(tops + place, top)
        tl.store(totals + place, tl.sum(weight))
        tl.store(y + place * SIZE + column, tl.sum(weight[:, None] * value, 0))


ATT = (64, 4)


@torch.library.custom_op("quant_lab::attend_parts", mutates_args=())
def attend_parts(
        query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor,
        scaling: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of one row to parts of the keys, before it is divided by its total.

    query [1, heads, 1, size], keys and values [1, heads, n, size]; returns [heads,
    parts, size] and, [heads, parts, 1] both, the highest score and the total.
    """
    (_, heads, _, size), length = query.shape, keys.shape[2]
    parts = triton.cdiv(length, ATT[0])
    y, tops, totals = (query.new_empty(heads, parts, n, dtype=torch.float32)
                       for n in (size, 1, 1))
    attend_kernel[(heads, parts)](
        query, keys, values, mask, y, tops, totals, scaling, length,
        heads // keys.shape[1], size, ATT[0], num_warps=ATT[1])
    return y, tops, totals


attend_parts.register_fake(lambda query, keys, values, mask, scaling: tuple(
    query.new_empty(query.shape[1], -(-keys.shape[2] // ATT[0]), n, dtype=torch.float32)
    for n in (query.shape[3], 1, 1)))


def attend(module, query, key, value, attention_mask, scaling=None, **named):
    """Attention of transformers' interface; [batch, heads, rows, size] of each.

    For one row, the heads that share a key stand in as its rows: nothing is copied.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.shape[2] > 1:  # From nothing: causal, and no mask.
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)
    if triton and query.is_cuda and len(query) == 1 and query.shape[3] in (64, 128, 256):
        y, tops, totals = attend_parts(query, key, value, attention_mask, scaling)
        fade = (tops - tops.amax(1, keepdim=True)).exp()
        y = (y * fade).sum(1) / (totals * fade).sum(1)
        return y.to(query.dtype)[None, None], None
    rows = query.reshape(len(key), key.shape[1], -1, query.shape[3])
    y = F.scaled_dot_product_attention(
        rows, key, value, attn_mask=attention_mask, scale=scaling)
    return y.reshape(len(y), 1, query.shape[1], -1), None


def compile_layers(model, compiled: bool) -> None:
    """Make all decoder layers run as one function, compiled for one row and for more."""
    from transformers import AttentionInterface

    AttentionInterface.register("quant_lab", attend)
    model.set_attn_implementation("quant_lab")
    layers = model.get_decoder().layers
    row = many = eager = type(layers[0]).forward
    if compiled:
        torch._dynamo.reset()
        row = torch.compile(eager, fullgraph=True, options=ONE)
        many = torch.compile(eager, fullgraph=True, options=MANY)

    def run(layer, number, hidden, *inputs, past_key_values, **named):
        mine, alone = past_key_values[number], hidden.shape[:2] == (1, 1)
        forward = eager if mine.keys is None else row if alone else many
        return forward(layer, hidden, *inputs, past_key_values=mine, **named)

    for number, layer in enumerate(layers):
        layer.forward = partial(run, layer, number)


MANY = ONE = {"unroll_reductions_threshold": 33}


# %%
class Decoder:
    """Greedy decoding of `batch` copies of a prompt, ids [1, n].

    first: a Decoder of one copy, whose cache is copied. seconds: what preparing took,
    compiling included. token: ids [batch, 1], the newest.
    """

    def __init__(self, model, prompt, new_tokens, compiled, first=None, batch=1):
        begin, device = now(model.device), model.device
        self.model, self.prompt, self.start = model, prompt, prompt.shape[1]
        length = math.ceil((self.start + new_tokens) / 16) * 16  # Masks are aligned.
        self.token = prompt[:, -1:].repeat(batch, 1)
        self.position = torch.full((1,), self.start, device=device)
        self.mask = torch.zeros(1, 1, 1, length, dtype=model.dtype, device=device)
        self.cache = [LayerCache(length) for _ in model.get_decoder().layers]
        if first is None:
            compile_layers(model, compiled)
            self.prefill()  # Uncompiled: it makes the cache.
            self.prefill = self.record(self.prefill, compiled)
            self.prefill()
        for mine, known in zip(self.cache, first.cache if first else ()):
            mine.keys, mine.values = (
                x.repeat(batch, 1, 1, 1) for x in (known.keys, known.values))
        self.step = self.record(self.step, compiled)
        self.seconds = now(device) - begin

    def advance(self, ids, position, mask) -> None:
        """Run the model; the most probable next token replaces the newest."""
        for layer in self.cache:
            layer.position = position
        logits = self.model(
            input_ids=ids, position_ids=position[None], attention_mask=mask,
            past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token.copy_(logits.argmax(-1))

    def prefill(self) -> None:
        """Put the prompt into the cache."""
        places = torch.arange(self.start, device=self.model.device)
        self.advance(self.prompt, places, None)

    def step(self) -> None:
        """Decode one token of each sequence."""
        self.mask.index_fill_(3, self.position, 0)
        self.advance(self.token, self.position, self.mask)
        self.position += 1

    def rewind(self) -> None:
        """Forget all tokens after the prompt."""
        self.position.fill_(self.start)
        self.mask[..., self.start :] = -math.inf

    def record(self, act: Callable, compiled: bool) -> Callable:
        """The act, twice warmed up; compiled on a GPU, the replay of a CUDA graph."""
        for _ in range(2):
            self.rewind()
            act()
        self.rewind()
        if self.token.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        if not self.token.is_cuda or not compiled:
            return act
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            act()
        return graph.replay

    def run(self, steps: int) -> tuple[float, float]:
        """Seconds of the prefill, if of one copy, and of the steps after it."""
        alone, device = len(self.token) == 1, self.model.device
        self.rewind()
        start = now(device)
        if alone:
            self.prefill()
        first = now(device)
        for _ in range(steps):
            self.step()
        return first - start, now(device) - first


# %%
@torch.no_grad()
def measure_speed(model, prompt: torch.Tensor, options: Options, compiled: bool):
    """Speed and memory of continuing a prompt [1, n]; a batch may be "OOM"."""
    steps, decode, alone, seconds = options.new_tokens - 1, [], None, 0
    bandwidth, embedding = measure_bandwidth(model.device), model.get_input_embeddings()
    tied = embedding.weight is model.get_output_embeddings().weight
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for x in (*model.parameters(), *model.buffers())}
    weights = sum(held.values())
    for batch in options.batch_sizes:
        try:
            decoder = Decoder(model, prompt, steps + 1, compiled, alone, batch)
            runs = [decoder.run(steps) for _ in range(1 + options.repeats)][1:]
        except torch.OutOfMemoryError:
            if alone is None:
                raise
            decode.append(dict(batch=batch, tok_s=None, itl_ms=None, step_bytes=None,
                               bandwidth_fraction=None, error="OOM"))
            continue
        itl, seconds = [late / steps for _, late in runs], seconds + decoder.seconds
        if alone is None:
            alone, cuda = decoder, model.device.type == "cuda"
            peak = torch.cuda.max_memory_allocated() if cuda else None
            single = dict(ttft_s=summarize([first for first, _ in runs]),
                          latency_s=summarize([sum(run) for run in runs]),
                          decode_tok_s=summarize([1 / x for x in itl]))
        read = weights - (0 if tied else embedding.weight.nbytes) + sum(
            layer.keys.nbytes + layer.values.nbytes for layer in decoder.cache)
        decode.append(dict(
            batch=batch, tok_s=summarize([batch / x for x in itl]),
            itl_ms=summarize([1000 * x for x in itl]), step_bytes=read,
            bandwidth_fraction=read / statistics.median(itl) / bandwidth))
    return dict(**single, decode=decode, weights_memory_bytes=weights,
                peak_memory_bytes=peak, compile_seconds=seconds if compiled else None,
                copy_bandwidth=bandwidth, prompt_tokens=prompt.shape[1])


# %%
def name_routes(label: str, model, prompt: int, options: Options):
    """How the Linears ran, phase by phase."""
    if label == BASELINE or options.execution == "emulated":
        return ("" if label == BASELINE else "dequantized to ") + SHORT[options.dtype]
    packed = [m for m in model.modules()
              if isinstance(m, PackedLinear) and m.kind != "plain"]
    rows = dict(prefill=prompt, decode=1) | {
        f"batch {batch}": batch for batch in options.batch_sizes if batch > 1}
    phases = {}  # How it ran: the phases of which that is true.
    for phase, count in rows.items():
        ways = " and ".join(sorted({m.route(count) for m in packed}))
        phases.setdefault(ways, []).append(phase)
    return " · ".join(f"{', '.join(names)} {ways}" for ways, names in phases.items())


def wants_compiling(lab: Lab) -> bool:
    """Whether decoding is to be compiled."""
    options = lab.options
    return (lab.device.type == "cuda" and not options.no_compile
            and options.execution == "packed")


def benchmark_variant(label: str, lab: Lab, reference: SimpleNamespace) -> dict:
    """Quality, speed and memory of a checkpoint, loaded from disk."""
    options, start = lab.options, now(lab.device)
    model = place_model(lab.output / "checkpoints" / label, lab)
    loaded, compiled = now(lab.device) - start, wants_compiling(lab)
    quality = measure_quality(model, lab, reference)
    first = quality["divergence"]["completions"][0]
    length = min(512, lab.context - options.new_tokens)
    prompt = lab.eval_ids.repeat(length // len(lab.eval_ids) + 1)[None, :length]
    prompt, how = prompt.to(lab.device), "compiled" if compiled else "not compiled"
    try:
        speed = measure_speed(model, prompt, options, compiled)
    except Exception as error:
        if not compiled or isinstance(error, torch.OutOfMemoryError):
            raise
        traceback.print_exc()  # Goes to the log.
        compiled, how = False, f"not compiled, it failed: {describe(error)}"
        model = None  # Never two at once.
        model = place_model(lab.output / "checkpoints" / label, lab)
        speed = measure_speed(model, prompt, options, compiled)
    routes = name_routes(label, model, length, options)
    return dict(
        **quality, **speed, load_seconds=loaded, runs_as=f"{routes} · {how}",
        sample={name: first[name] for name in ("prompt", "completion")})

# %% [markdown]
"""
## Run

Variant by variant: quantize, then benchmark. One that fails leaves a row with its
reason, and the others go on. `results.json` is written after each, so that a run that
was cut off goes on where it was. A finished row is taken over only if nothing that
shaped it has changed: options, model files, texts, versions, machine.
"""


# %%
ROW = dict.fromkeys((
    "label", "status", "error", "scheme", "checkpoint", "weight_bytes", "size_ratio",
    "quantize_seconds", "rtn_fallbacks", "perplexity", "perplexity_interval",
    "perplexity_ratio", "tokens_scored", "window_losses", "kld", "top1_agreement",
    "divergence", "load_seconds", "compile_seconds", "weights_memory_bytes",
    "peak_memory_bytes", "ttft_s", "latency_s", "decode_tok_s", "decode",
    "copy_bandwidth", "prompt_tokens", "runs_as", "sample", "fingerprint"))


def make_keys(lab: Lab) -> dict[str, tuple[str, str]]:
    """Per label the fingerprint of what shapes its checkpoint, and of its row."""
    o, keys = lab.options, {}
    machine = [lab.machine[name] for name in ("device", "name", "compute_capability")]
    common = hash_files(lab.model.iterdir()), lab.versions, machine, o.dtype, o.seed
    chats = (hash_files([Path(o.calibration_data).expanduser()]), o.calibration_data,
             o.calibration_samples, o.calibration_length)
    measured = (lab.eval_ids.tolist(), o.window, o.max_windows, o.kld_tokens,
                o.new_tokens, o.repeats, PROMPTS, BLOCKS, LOGITS_FILE_BYTES,
                o.execution, o.no_compile, o.batch_sizes)
    for label, variant in VARIANTS.items():
        made = fingerprint(common, label, repr(build_recipe(label, o)),
                           chats if variant.calibrated else None)
        keys[label] = made, fingerprint(made, measured)
    return keys


def run_variant(label: str, keys: tuple[str, str], lab: Lab, reference) -> dict:
    """The row of a variant; its status is "failed" if anything went wrong."""
    row = ROW | dict(label=label, status="failed", scheme=VARIANTS[label].scheme,
                     fingerprint=keys[1])
    log, folder = lab.output / "log.txt", lab.output / "checkpoints" / label
    try:
        if isinstance(reference, Exception):
            raise reference
        if not read_checkpoint(folder, keys[0]):
            with chatter_to(log):
                quantize_variant(label, keys[0], lab)
        row |= read_checkpoint(folder, keys[0])
        print(f"      {row['weight_bytes'] / 1e6:,.1f} MB, quantized in "
              f"{row['quantize_seconds']:.1f} s", flush=True)
        with chatter_to(log):
            row |= benchmark_variant(label, lab, reference)
        row["status"] = "ok"
        print(f"      perplexity {row['perplexity']:.3f}, KLD {row['kld']['mean']:.5f}"
              f", {row['decode_tok_s']['median']:.1f} tokens/s", flush=True)
    except Exception as error:
        row["error"] = describe(error)
        print(f"      failed: {row['error']}", flush=True)
        with log.open("a", encoding="utf-8") as stream:
            traceback.print_exc(file=stream)
        shutil.rmtree(folder.with_suffix(".partial"), ignore_errors=True)
    return row


# %%
def finished_rows(lab: Lab, keys: dict[str, tuple[str, str]]) -> dict[str, dict]:
    """Rows of an earlier run that nothing has changed since, by label."""
    before, rows = read_json(lab.output / "results.json").get("variants"), {}
    for row in before if isinstance(before, list) else []:
        for label, (made, measured) in keys.items():
            if (isinstance(row, dict) and row.keys() == ROW.keys()
                    and row["fingerprint"] == measured and row["status"] == "ok"
                    and read_checkpoint(lab.output / "checkpoints" / label, made)):
                rows[label] = row
    return rows


def run_lab(lab: Lab, words: list[str]) -> dict:
    """Run what is not finished; returns the content of results.json."""
    if lab.options.fresh:
        (lab.output / "results.json").unlink(missing_ok=True)
        for label in VARIANTS:
            shutil.rmtree(lab.output / "checkpoints" / label, ignore_errors=True)
    with chatter_to(lab.output / "log.txt"):
        keys = make_keys(lab)
    rows, wanted = finished_rows(lab, keys), lab.options.variants
    reference = None
    if not rows.keys() >= set(wanted):
        print("[reference] the model as it came", flush=True)
        start = time.perf_counter()
        with chatter_to(lab.output / "log.txt"):
            reference = measure_reference(lab)
        took, left = time.perf_counter() - start, [v for v in wanted if v not in rows]
        seconds = sum(2 * took + 40 * wants_compiling(lab)
                      + 3 * took * VARIANTS[label].calibrated for label in left)
        print(f"      {took:.0f} s; roughly {math.ceil(seconds / 60)} min to go, for "
              "each variant twice that, compiling, and thrice for calibration")
    for number, label in enumerate(wanted, 1):
        print(f"[{number}/{len(wanted)}] {label}"
              + (": finished before" if label in rows else ""), flush=True)
        if label not in rows:
            rows[label] = run_variant(label, keys[label], lab, reference)
        base = rows.get(BASELINE, ROW)["weight_bytes"]
        for row in rows.values():
            size = row["weight_bytes"]
            row["size_ratio"] = size / base if size and base else None
        results = dict(
            schema=1, created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=["python", "quant_lab.py", *words], config=asdict(lab.options),
            machine=lab.machine, versions=lab.versions,
            variants=[rows[label] for label in VARIANTS if label in rows])
        write_json(lab.output / "results.json", results)
    return results


# %%
if __name__ == "__main__":
    try:
        RESULTS = run_lab(LAB, WORDS)
    except KeyboardInterrupt:
        print("\ninterrupted; run again to go on, what is finished is kept")
        sys.exit(130)

# %% [markdown]
"""
## Report

One rendering of `results.json`: `summary.md` has it whole, the terminal with the first
prompt's completions only. A dash means: not measured.

The verdict is computed: a difference counts where the interval excludes none. A figure
outside the band inferred from published ones of a known model is warned of.
"""


# %%
QUALITY = (("MB", "weight_bytes", 1, 1e-6), ("size", "size_ratio", 3, 1),
           ("perplexity", "perplexity_interval", 2, 1),
           ("ratio", "perplexity_ratio", 4, 1), ("KLD", "kld", 5, 1),
           ("top-1 %", "top1_agreement", 1, 1), ("tokens", "divergence", 0, 1))
SPEED = (("TTFT ms", "ttft_s", 1, 1000), ("latency s", "latency_s", 3, 1),
         ("tokens/s", "decode_tok_s", 1, 1))
COST = (("weights MB", "weights_memory_bytes", 1, 1e-6),
        ("peak MB", "peak_memory_bytes", 1, 1e-6),
        ("quantize s", "quantize_seconds", 1, 1), ("load s", "load_seconds", 1, 1),
        ("compile s", "compile_seconds", 1, 1))


def list_tables(config: dict) -> list[tuple]:
    """The columns of the tables: title, key (after @, of a batch), digits, unit."""
    batches = [batch for batch in config["batch_sizes"] if batch > 1]
    return [QUALITY, SPEED + tuple(
        (f"batch {batch}", f"tok_s@{batch}", 0, 1) for batch in batches),
        COST + tuple((f"bandwidth {batch} %", f"bandwidth_fraction@{batch}", 0, 100)
                     for batch in (1, *batches))]


def show(value: float | str | dict, digits: int, unit: float = 1) -> str:
    """A figure; a timing's median (min–max), an estimate ± half its interval."""
    if isinstance(value, str):
        return plain(value)
    if not isinstance(value, dict):
        return f"{unit * value:,.{digits if abs(unit * value) < 1000 else 0}f}"
    if "samples" in value:
        median, low, high = (
            show(value[k], digits, unit) for k in ("median", "min", "max"))
        return f"{median} ({low}–{high})"
    mean, low, high = value.get("mean", value.get("value")), value["low"], value["high"]
    if low is None:
        return show(mean, digits)
    if abs(high + low - 2 * mean) > 0.2 * (high - low) / 2:  # Not the middle.
        return f"{show(mean, digits)} ({show(low, digits)}–{show(high, digits)})"
    return f"{show(mean, digits)} ± {show((high - low) / 2, digits)}"


def render_table(rows: list[dict], columns: tuple) -> str:
    """The rows as a Markdown table, aligned for the terminal too."""
    table = [["variant", *(title for title, *_ in columns)]]
    for row in rows:
        cells = row | {f"{key}@{batch['batch']}": batch.get("error") if x is None else x
                       for batch in row["decode"] or () for key, x in batch.items()}
        missing = "–" if row["status"] == "ok" else "failed"
        table.append([row["label"], *(
            missing if cells.get(key) is None else show(cells[key], digits, unit)
            for _, key, digits, unit in columns)])
    widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return "\n".join(
        f"| {first:{widths[0]}} | "
        + " | ".join(cell.rjust(w) for cell, w in zip(others, widths[1:])) + " |"
        for first, *others in table)


# %%
# Inferred from published figures of one protocol: the baseline's perplexity, ratios.
KNOWN = ("Qwen2.5-0.5B-Instruct", WIKITEXT, 2048, 0)
BANDS = {
    "00_fp16_baseline": (13.9, 14.6), "01_fp8_dynamic": (0.98, 1.02),
    "02_gptq_w4a16": (1.08, 1.20), "03_smoothquant_w8a8": (0.96, 1.04)}


def render_warnings(results: dict) -> list[str]:
    """Failures, fallbacks, noise, figures outside the band of the known model."""
    config, rows = results["config"], results["variants"]
    known = KNOWN == (Path(config["model"]).name, config["eval_text"], config["window"],
                      config["max_windows"])
    said = [f"{r['label']} failed: {plain(r['error'])}" for r in rows if r["error"]]
    for row in filter(lambda row: row["status"] == "ok", rows):
        label, value = row["label"], row["perplexity_ratio"]["value"]
        if row["rtn_fallbacks"]:
            said.append(f"Warning: {row['rtn_fallbacks']} modules of {label} fell back "
                        "to round-to-nearest: more --dampening or chats may help.")
        if label == BASELINE:
            value = row["perplexity"]
            if row["kld"]["mean"]:
                said.append("Warning: the baseline differs from itself, KLD "
                            f"{row['kld']['mean']:.1e}: this machine's noise.")
        low, high = BANDS.get(label, (0, math.inf))
        if known and not low <= value <= high:
            said.append(f"Warning: {label} is at {value:.3f}, outside of the {low} to "
                        f"{high} inferred from published figures of this model.")
    return said


# %%
def render_verdict(rows: list[dict]) -> list[str]:
    """What the figures say, each sentence guarded by its interval."""
    rows = {row["label"]: row for row in rows if row["status"] == "ok"}
    quantized = {k: row["perplexity_ratio"] for k, row in rows.items() if k != BASELINE}
    if not quantized:
        return ["No quantized variant was measured: nothing to compare."]
    if None in (ratio["low"] for ratio in quantized.values()):
        said = ["Too few windows for an interval: no difference can be claimed."]
    elif alike := [k for k, r in quantized.items() if r["low"] <= 1 <= r["high"]]:
        names = " and ".join(f"{k} (at most {quantized[k]['high']:.4f})" for k in alike)
        told = all(rows[k]["kld"]["low"] for k in alike)  # Neither 0 nor unknown.
        said = [f"In perplexity ratio, {names} cannot be told from the baseline"
                + ("; KLD tells the difference." if told else ".")]
    else:
        said = ["In perplexity, every quantized variant differs from the baseline."]
    for label, ratio in quantized.items():
        size, same = rows[label]["size_ratio"], rows[label]["top1_agreement"]
        saves = f"saves {100 - 100 * size:.1f} % of the bytes, " if size else ""
        said.append(f"{label} {saves}multiplies perplexity by {show(ratio, 4)} and "
                    f"keeps the most probable token in {show(same, 1)} % of places.")
    if {"02_gptq_w4a16", CONTROL} <= rows.keys():  # By KLD: perplexity's errors cancel.
        gptq, control = (rows[label]["kld"] for label in ("02_gptq_w4a16", CONTROL))
        apart = None not in (gptq["low"], control["low"]) and (
            gptq["high"] < control["low"] or control["high"] < gptq["low"])
        found = "cannot be told from" if not apart else (
            "beat" if gptq["mean"] < control["mean"] else "did worse than")
        said.append(f"GPTQ {found} round-to-nearest in the same format: KLD "
                    f"{show(gptq, 5)} against {show(control, 5)}.")
    elif "02_gptq_w4a16" in rows:
        said.append(f"What GPTQ buys over plain rounding, {CONTROL} would show.")
    return said


def plain(text: str) -> str:
    """One line without control characters, for the terminal and for Markdown."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def render_completions(rows: list[dict], number: int) -> list[str]:
    """The variants' completions of a prompt side by side, indented as Markdown code."""
    rows = [row for row in rows if row["divergence"]]
    width, columns = 112 // max(len(rows), 1) - 3, []
    for row in rows:
        said = row["divergence"]["completions"][number]
        columns.append([row["label"][:width], f"{said['same_tokens']} tokens alike",
                        "-" * width, *textwrap.wrap(plain(said["completion"]), width)])
    return [f"**{PROMPTS[number]}**", "", *(
        "    " + " | ".join(f"{cell:{width}}" for cell in line).rstrip()
        for line in zip_longest(*columns, fillvalue="")), ""]


# %%
def render_summary(results: dict, prompts: int) -> str:
    """Machine, tables, verdict, completions of the first prompts, command, versions."""
    machine, rows, config = results["machine"], results["variants"], results["config"]
    fill = partial(textwrap.fill, width=110, break_on_hyphens=False)
    scored, compared = max([(row["tokens_scored"], row["kld"]["tokens"])
                            for row in rows if row["kld"]], default=(0, 0))
    quality = (
        f"Quality on {config['eval_text']}: {scored:,} tokens scored in windows of "
        f"{config['window']:,}, the first of each unscored; KLD and top-1 at "
        f"{compared:,} of them. ±: half a 95 % interval. size, ratio: bytes and "
        "perplexity over the baseline's. Against the unquantized model: KLD: KL "
        "divergence, nats. top-1: same most probable token. tokens: number until "
        f"greedy completions of {len(PROMPTS)} prompts differ, {config['new_tokens']} "
        "if never. MB: 10^6 bytes of safetensors.")
    prompt = next((row["prompt_tokens"] for row in rows if row["decode"]), 0)
    speed = (
        f"Speed, median (min–max) of {config['repeats']}: TTFT: first token after a "
        f"prompt of {prompt} tokens. latency: {config['new_tokens']} tokens. tokens/s: "
        "after the first, one sequence or a batch.")
    cost = ("Cost: weights in memory after running, peak memory while decoding, and of "
            "the bandwidth of copying, measured beside, what decoding reaches.")
    ran = [f"- {row['label']}: {row['runs_as']}" for row in rows if row["runs_as"]]
    notes = render_verdict(rows) + render_warnings(results)
    lines = [
        f"# quant_lab: {config['model']}", "", f"{machine['name']}, "
        f"{machine['memory_bytes'] / 2**30:.1f} GiB. {results['created']}.", "",
        *(line for text, columns in zip((quality, speed, cost), list_tables(config))
          for line in (fill(text), "", render_table(rows, columns), "")),
        "Run as:", "", *(fill(line, subsequent_indent="  ") for line in ran), "",
        "## Verdict", "",
        *(fill("- " + note, subsequent_indent="  ") for note in notes), "",
        "## Greedy completions", ""]
    for number in range(prompts):
        lines += render_completions(rows, number)
    lines += ["## Made with", "", "    " + shlex.join(results["command"]), "", fill(
        ", ".join(f"{name} {v}" for name, v in results["versions"].items() if v)), ""]
    return "\n".join(lines)


# %%
if __name__ == "__main__":
    SUMMARY = render_summary(RESULTS, len(PROMPTS))
    (OUTPUT / "summary.md").write_text(SUMMARY, encoding="utf-8")
    print("\n" + render_summary(RESULTS, 1))
    print(f"wrote results.json, summary.md, log.txt and checkpoints/ in {OUTPUT}")
    if any(row["status"] == "failed" for row in RESULTS["variants"]):
        sys.exit(1)
