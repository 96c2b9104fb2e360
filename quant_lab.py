# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   accelerator: GPU
#   colab: {gpuType: T4}
# ---

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "llmcompressor>=0.14.0.1,<0.15", "compressed-tensors>=0.19,<0.20",
#     "transformers>=5.15,<5.18", "accelerate>=1.15", "datasets>=4.8.4",
#     "torch>=2.10,<2.14", "matplotlib>=3.8", "pytest>=8", "jupytext>=1.16",
# ]
# ///

# %% [markdown]
"""
# quant_lab: which quantization should I deploy?

A causal language model in float16 and three compressed-tensors checkpoints of it made
by llmcompressor go through the same functions. Measured are bytes on disk and in
memory, quality (perplexity, KL divergence from the unquantized model, agreement with
it) and time. Tables and a verdict come out on the terminal; `results.json`,
`summary.md`, a picture and checkpoints with model cards in the output folder.

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
import multiprocessing
import os
import platform
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from functools import cache, partial
from itertools import islice, product, zip_longest
from pathlib import Path
from types import SimpleNamespace


STOPPED = ("\ninterrupted; run again, without --fresh, to go on: "
           "what is finished is kept\n")


def interrupted(*_) -> None:
    """On Ctrl-C, end at once with exit code 130 and a line on how to go on."""
    try:  # A print may have been what it hit; a reader of a pipe, gone.
        with contextlib.suppress(RuntimeError, OSError, ValueError):
            sys.__stdout__.flush()
        os.write(1, STOPPED.encode())
    finally:
        os._exit(130)  # No library may swallow it or wait for its threads.


if __name__ == "__main__" and "ipykernel" not in sys.modules:
    signal.signal(signal.SIGINT, interrupted)
elif __name__ == "__mp_main__":  # A process of `run_apart`, which its parent ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

# %%
import psutil  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from tqdm import tqdm  # noqa: E402

try:
    import triton
    from triton import language as tl
except ImportError:  # Comes with PyTorch for GPUs only.
    triton = None

# %% [markdown]
"""
## Recipes

One entry per variant, and nothing else to add for a new one; `m` holds llmcompressor's
modifiers, `o` the options. [FP8](https://arxiv.org/abs/2209.05433) and the control,
`rtn_w4a16`, round to nearest. [GPTQ](https://arxiv.org/abs/2210.17323) makes up for the
error of each rounding in the weights not yet rounded, as the calibration inputs weigh
it. [SmoothQuant](https://arxiv.org/abs/2211.10438) first moves activation outliers into
the weights; `actorder=None` there, since the default writes a key into the checkpoint
that the compressed-tensors of vLLM 0.20 to 0.22 rejects for W8A8.
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
        m.GPTQModifier(scheme="W4A16", dampening_frac=o.dampening, **LINEAR)], True),
    "03_smoothquant_w8a8": Variant("W8A8", lambda m, o: [
        m.SmoothQuantModifier(smoothing_strength=o.smoothing_strength),
        m.GPTQModifier(scheme="W8A8", dampening_frac=o.dampening, actorder=None,
                       **LINEAR)], True),
    "rtn_w4a16": Variant("W4A16", lambda m, o: [
        m.QuantizationModifier(scheme="W4A16", **LINEAR)]),
}
BASELINE, CONTROL = "00_fp16_baseline", "rtn_w4a16"
SHORT = dict(float16="fp16", bfloat16="bf16", float32="fp32")

# %% [markdown]
"""
## Options and machine

Each option stands here once, with a remark on when to change it; the command line is
derived from it. What is typed wins over what `--demo` presets. In a notebook, put the
same words into the environment first, as in `%env QUANT_LAB_ARGS=--demo`.
"""

# %%
ULTRACHAT, WIKITEXT = "HuggingFaceH4/ultrachat_200k", "Salesforce/wikitext"
DATA = "calibration_data", "eval_text"
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


def option(default, remark: str, *limits):
    """A field of Options: default, remark, the least (and greatest) or the choices."""
    return field(default=default, metadata=dict(remark=remark, limits=limits))


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
                            "packed", "emulated")
    no_compile: bool = option(False, "a quick look at speed; a CPU never compiles")
    dtype: str = option("float16", "bfloat16 or float32 if float16 overflows", *SHORT)
    device: str = option("auto", "cpu runs anywhere", "auto", "cuda", "cpu")
    seed: int = option(42, "to see what the choice of chats changes", 0, 2**32 - 1)
    plain_text: bool = option(False, "no chat template, for a base model")
    demo: bool = option(False, "a tiny model and Python's own help: no GPU, no network")
    fresh: bool = option(False, "forget finished work in the output folder")


DEMO = dict(model="tests/tiny-qwen2", calibration_data=PYTHON_HELP,
            eval_text=PYTHON_HELP, calibration_samples=32, calibration_length=512,
            window=512, batch_sizes=(1, 8))


# %%
def stop(*lines: str):
    """Say on stderr what is wrong with the input and the way out; exit with 2."""
    print("quant_lab: " + "\n".join(map(plain, lines)), file=sys.stderr)
    raise SystemExit(2)


def describe(error: BaseException) -> str:
    """The root cause of an exception, on one line of at most 200 characters."""
    while error.__cause__:
        error = error.__cause__
    text = plain(f"{type(error).__name__}: {error}").rstrip(". ")
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
    here = script and Path(name).resolve() == Path(script).resolve()
    if here and (words or "IPython" not in sys.modules):
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
    flags = {"--" + f.name.replace("_", "-"): f for f in fields(Options)}
    for flag, f in flags.items():
        kind, limits = type(f.default), f.metadata["limits"]
        how = (dict(action="store_true") if kind is bool else
               dict(nargs="+", type=type(f.default[0])) if kind is tuple else
               dict(type=kind, choices=limits if kind is str and limits else None))
        shown = "" if f.default == "" or kind is bool else " [%(default)s]"
        parser.add_argument(flag, default=f.default, help=f.metadata["remark"] + shown,
                            **how)
    parser.set_defaults(**(DEMO if "--demo" in words else {}))
    options = Options(**vars(parser.parse_args(words)))
    asked = ",".join(options.variants).split(",")
    if unknown := [label for label in asked if label not in VARIANTS]:
        stop(f"--variants {unknown[0]!r}: choose from {', '.join(VARIANTS)}")
    for flag, f in flags.items():
        value, limits = getattr(options, f.name), f.metadata["limits"]
        if not limits or isinstance(value, str):
            continue
        low, high = (*limits, math.inf)[:2]
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if not low <= one <= high:
                stop(f"{flag} {one}: must be at least {low}"
                     + ("" if high == math.inf else f" and at most {high}"))
    return replace(options, variants=tuple(v for v in VARIANTS if v in asked),
                   batch_sizes=tuple(sorted({1, *options.batch_sizes})))


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
        # The Triton kernels of llmcompressor are for later chips than a T4.
        os.environ.update(LLMCOMPRESSOR_DISABLE_GPTQ_TRITON="1", CT_ENFORCE_EAGER="1")
    return torch.device("cuda", 0), "the first CUDA GPU"


def now(device: torch.device) -> float:
    """Seconds of the clock, once the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@cache
def measure_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, that copying a large tensor reaches."""
    source = torch.ones(10**9 if device.type == "cuda" else 10**8, device=device,
                        dtype=torch.int8)
    target, seconds = source.clone(), []
    for _ in range(10):
        start = now(device)
        target.copy_(source)
        seconds.append(now(device) - start)
    return 2 * len(source) / statistics.median(seconds)


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


def plain(text: str) -> str:
    """One line without control characters, for the terminal and for Markdown."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def quote(text: str) -> str:
    """Foreign text in Markdown: code, where it holds anything that means something.

    What could begin a block stays behind the word before when lines are filled.
    """
    text = re.sub(r" (?=[<#>~=+*_|-]|\d+[.)])", "\u00a0", plain(text).replace("`", "'"))
    return f"`{text}`" if re.search(r"[^\w\s.,:;()/'-]|://|www\.", text) else text


# %%
def find_folder(name: str) -> Path | None:
    """The folder of this name, here or beside the script; None for a name on a hub."""
    here = Path(globals().get("__file__", "")).parent
    with contextlib.suppress(OSError, RuntimeError):  # No name of a file, no such user.
        return next(filter(Path.is_dir, (Path(name).expanduser(), here / name)), None)


def describe_run(options: Options, machine: dict, versions: dict, words: list) -> dict:
    """The head of results.json."""
    folder = find_folder(options.model)
    return dict(schema=1, command=["python", "quant_lab.py", *words],
                base_model=None if folder else options.model,
                model_name=folder.resolve().name if folder else options.model,
                config=asdict(options), machine=machine, versions=versions)


def name_model(results: dict) -> str:
    """The model as a hub or its folder calls it."""
    return plain(results.get("model_name", Path(results["config"]["model"]).name))


def name_source(text: str) -> str:
    """A data set of a hub as it is called, of a path the last part."""
    return text if text in (WIKITEXT, ULTRACHAT, PYTHON_HELP) else Path(text).name


# %%
def render_card(results: dict) -> str:
    """What is run on what: lines of at most 116 columns."""
    config, machine, versions = (results[k] for k in ("config", "machine", "versions"))
    changed = []
    for name, value in config.items():
        words = list(value) if isinstance(value, (list, tuple)) else [value]
        if name not in ("model", "variants", "output_dir") and (
                tuple(words) if len(words) > 1 else value) != getattr(Options, name):
            words = map(name_source, words) if name in DATA else words
            changed += ["--" + name.replace("_", "-"), *words]
    gpu = machine["compute_capability"]
    labels = [row["label"] for row in results.get("variants", ())] or config["variants"]
    facts = dict(
        model=f"{name_model(results)} in {config['dtype']}, {config['execution']}",
        variants=", ".join(labels),
        options=shlex.join(str(w) for w in changed if w is not True) or "defaults",
        machine=f"{machine['name']}, {machine['memory_bytes'] / 2**30:.1f} GiB"
        + (f", SM {gpu}, driver {machine['driver']}" if gpu else ""),
        versions=", ".join(f"{name} {v}" for name, v in versions.items() if v))
    return "\n".join(textwrap.fill(
        plain(fact), 116, initial_indent=f"{name:13}", subsequent_indent=" " * 13,
        break_on_hyphens=False) for name, fact in facts.items())


def lock_folder(folder: Path) -> None:
    """Keep other runs out until this process ends; OSError if one is there."""
    try:
        import fcntl
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    except (ImportError, OSError):  # Windows, say.
        return
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise OSError("another run, or an open notebook, holds it") from None
    except OSError:
        pass  # A file system without locks.


def prepare_output(options: Options, machine: dict) -> Path:
    """Make the output folder; one that cannot be written exits with 2."""
    device = "cpu" if machine["device"] == "cpu" else machine["name"]
    slug = f"{Path(options.model).resolve().name}-{device}"
    output = options.output_dir or "results/" + re.sub(r"[^A-Za-z0-9._]+", "-", slug)
    with usable("--output-dir", output, "name a folder that can be written to"):
        output = Path(output).expanduser()
        (output / "checkpoints").mkdir(parents=True, exist_ok=True)
        (output / "log.txt").touch()
        lock_folder(output)
    print(f"output       {output}; what the libraries say goes to log.txt there")
    return output

# %% [markdown]
"""
## Model and text

From the hub comes only what is needed: the model's safetensors and tokenizer, the test
split of WikiText, the beginning of UltraChat. Recipes look at *calibration* chats in
the model's own template; quality is scored on *evaluation* text. The demo takes both
from Python's own help: an eighth of its topics is held out and scored, the rest
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


def fingerprint(*parts) -> str:
    """16 hexadecimal digits that change when any of the JSON-like parts does."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_files(files) -> dict[str, str]:
    """SHA-256 of each of the paths that is a file."""
    return {file.name: hashlib.file_digest(file.open("rb"), "sha256").hexdigest()
            for file in files if file.is_file()}


def is_spoilt(blob: Path) -> bool:
    """Whether a file of the hub's cache, which is named by its hash, holds another.

    SHA-256 of large files, of others Git's SHA-1 of a blob.
    """
    if not re.fullmatch("[0-9a-f]{40}([0-9a-f]{24})?", blob.name) or not blob.is_file():
        return False
    if len(blob.name) == 64:
        return hash_files([blob])[blob.name] != blob.name
    content = blob.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != blob.name


def read_checked(file: Path, say=print) -> dict:
    """What `write_json` wrote; {} where there is none or, which is said, not that."""
    content = read_json(file)
    if content.pop("checksum", None) == fingerprint(content):
        return content
    if file.exists():
        say(f"{file.name} was cut off, altered or of another version: not used")
    return {}


def write_json(file: Path, content: dict) -> None:
    """Write strict JSON with a checksum in one step: readers see the old or the new."""
    content = content | dict(checksum=fingerprint(content))
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    file.with_suffix(".partial").write_text(text + "\n", encoding="utf-8")
    file.with_suffix(".partial").replace(file)


# %%
def open_model(options: Options) -> tuple[Path, object, int]:
    """Folder (fetched if need be), tokenizer and context length of a chat model."""
    from huggingface_hub import snapshot_download
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging
    logging.set_verbosity_error()  # Warnings quote what stands in a model's files.
    name, folder = options.model, find_folder(options.model)
    kinds = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    with usable("--model", name, "give a folder or a hub id (needs network, access)"):
        if folder is None and name.startswith((".", "/", "~")):
            raise FileNotFoundError("no such folder")
        fetch = partial(snapshot_download, name, allow_patterns=kinds,
                        ignore_patterns=["*/*", "consolidated*"])
        if folder is None:
            folder = Path(fetch())
            spoilt = list(filter(is_spoilt, map(Path.resolve, folder.iterdir())))
            for blob in spoilt:
                print(f"cut off or altered, to be fetched again: {blob}")
                blob.unlink()
            folder = Path(fetch()) if spoilt else folder
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
        if options.plain_text:
            begin = tokenizer("word").input_ids[0] == tokenizer.bos_token_id
            tokenizer.chat_template = "{{ bos_token }}" * begin + (
                "{% for turn in messages %}{{ turn['content'] }}"
                "{% if not loop.last %}\n\n{% endif %}{% endfor %}")
        if not tokenizer.chat_template:
            raise ValueError("has no chat template, give an instruct model, or "
                             "--plain-text to take prompts and chats without one")
        prompt = max(tokenize_prompt(tokenizer, p).input_ids.shape[1] for p in PROMPTS)
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or 2**31
    if prompt + options.new_tokens > context:
        stop(f"--new-tokens {options.new_tokens}: with the longest prompt, {prompt}, "
             f"over the model's context of {context}; choose fewer")
    return folder, tokenizer, context


def tokenize_prompt(tokenizer, prompt: str) -> dict[str, Tensor]:
    """A prompt in the chat template: input_ids and attention_mask, each [1, n]."""
    return tokenizer.apply_chat_template(
        [dict(role="user", content=prompt)], add_generation_prompt=True,
        return_tensors="pt", return_dict=True)


# %%
def stream_rows(dataset: str, config: str, split: str, column: str, rows=None) -> list:
    """A column of a hub data set in Parquet: the first `rows` of a split, or all."""
    # Streaming by load_dataset reads more, and can abort on exit (datasets#7566).
    from datasets import config as settings
    from datasets import disable_progress_bars, load_dataset_builder
    from huggingface_hub import HfFileSystem
    from pyarrow.parquet import ParquetFile

    def read():
        for file in load_dataset_builder(dataset, config).config.data_files[split]:
            with HfFileSystem().open(file, cache_type="none") as stream:
                for batch in ParquetFile(stream).iter_batches(256, columns=[column]):
                    yield from batch.to_pylist()

    disable_progress_bars()
    name = f"quant_lab-{dataset}-{config}-{split}-{column}-{rows}".replace("/", "-")
    file = Path(settings.HF_DATASETS_CACHE) / f"{name}.json"
    kept = read_checked(file, lambda text: print(f"{text}, to be fetched again"))
    if not kept:
        kept = {column: [row[column] for row in islice(read(), rows)]}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, kept)
    return kept[column]


# %%
def read_chats(file: Path) -> list[list[dict]]:
    """Conversations of a .jsonl; ValueError names the first line that is not one."""
    chats, known = [], {"system", "user", "assistant", "tool"}
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            turns = json.loads(line)["messages"]
            roles = {isinstance(t["content"], str) and t["role"] for t in turns}
            if roles - known or not any(t["content"].strip() for t in turns):
                raise ValueError
        except (ValueError, TypeError, KeyError):
            raise ValueError(f'line {number} is not {{"messages": [{{"role": "user", '
                             '"content": "..."}, ...]}') from None
        chats.append(turns)
    return chats


def python_help() -> tuple[list[list[dict]], str]:
    """Calibration chats and held-out evaluation text of the topics of Python's help."""
    from pydoc_data.topics import topics
    texts = {name: re.sub(r"\n[^\w\s]{4,}\n", "\n", topics[name].strip())
             for name in sorted(topics)}
    held = [name for name in texts if zlib.crc32(name.encode()) % 8 == 6]
    evaluation = "\n\n".join(map(texts.pop, held))
    # Topics quote each other: no chat may share a long line with the held-out text.
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
        chats = (
            python_help()[0] if source == PYTHON_HELP else
            stream_rows(source, "default", "train_sft", "messages", 4 * wanted)
            if source == ULTRACHAT else read_chats(Path(source).expanduser()))
        if not chats:
            raise ValueError("holds no conversation")
        random.Random(options.seed).shuffle(chats)
        samples = tokenizer.apply_chat_template(
            chats[:wanted], truncation=True, max_length=length).input_ids
    print(f"calibration  {len(samples)} chats of {source}, "
          f"{sum(map(len, samples)):,} tokens, at most {length} each"
          + (f" (all there are; {wanted} asked for)" if len(samples) < wanted else ""))
    return samples


def load_evaluation(options: Options, tokenizer, context: int) -> Tensor:
    """Token ids [n] of the evaluation text; one that cannot be used exits with 2."""
    source, window = options.eval_text, options.window
    with usable("--eval-text", source, "give a UTF-8 text (default: needs network)"):
        text = (
            python_help()[1] if source == PYTHON_HELP else
            "\n\n".join(stream_rows(source, "wikitext-2-raw-v1", "test", "text"))
            if source == WIKITEXT else Path(source).expanduser().read_text("utf-8-sig"))
        ids = torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.long)
    if window > context:
        stop(f"--window {window}: the model's context is {context} tokens; take that")
    if len(ids) < window:
        stop(f"--eval-text {source}: {len(ids)} tokens are less than one --window, "
             f"{window}; give more text or a smaller window")
    windows = min(len(ids) // window, options.max_windows or len(ids))
    print(f"evaluation   {source}: {len(ids):,} tokens, {windows} windows of {window}")
    return ids


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors of a checkpoint."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# %%
@dataclass(frozen=True)
class Lab:
    """What all variants share; eval_ids [n] and samples are token ids."""

    options: Options
    device: torch.device
    machine: dict
    versions: dict
    output: Path
    model: Path
    tokenizer: object
    eval_ids: Tensor
    samples: list[list[int]]
    context: int = 2**31


def expect_minutes(lab: Lab) -> int:
    """A rule of thumb for the whole lab, fitted to a CPU and an H100."""
    o, cuda = lab.options, lab.device.type == "cuda"
    size, layers = weight_bytes(lab.model), read_json(lab.model / "config.json").get(
        "num_hidden_layers", 32)
    copying = measure_bandwidth(lab.device)
    pass_seconds = size / copying / (60 if cuda else 3)  # Of one token among many.
    windows = min(len(lab.eval_ids) // o.window, o.max_windows or len(lab.eval_ids))
    score = windows * o.window * pass_seconds
    said = len(PROMPTS) * o.new_tokens * (layers / 1000 + size / copying)
    calibrate = 3 * sum(map(len, lab.samples)) * pass_seconds + layers * (
        0.4 if cuda else 3)
    seconds = score + said + sum(
        score + said + (60 if cuda else 5 + said) + v.calibrated * calibrate
        for v in map(VARIANTS.get, o.variants))
    return math.ceil(seconds / 60)


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # A completion may be in any script.
    WORDS = read_words()
    OPTIONS = parse_options(WORDS)
    DEVICE, reason = choose_device(OPTIONS)
    MACHINE, VERSIONS = describe_machine(DEVICE), list_versions()
    print(render_card(describe_run(OPTIONS, MACHINE, VERSIONS, WORDS)))
    print(f"device       {DEVICE}: {reason}", flush=True)
    MODEL, TOKENIZER, CONTEXT = open_model(OPTIONS)
    EVAL_IDS = load_evaluation(OPTIONS, TOKENIZER, CONTEXT)
    calibrated = any(VARIANTS[label].calibrated for label in OPTIONS.variants)
    SAMPLES = load_calibration(OPTIONS, TOKENIZER, CONTEXT) if calibrated else []
    OUTPUT = prepare_output(OPTIONS, MACHINE)
    LAB = Lab(OPTIONS, DEVICE, MACHINE, VERSIONS, OUTPUT, MODEL, TOKENIZER, EVAL_IDS,
              SAMPLES, CONTEXT)
    with usable("--device", str(DEVICE), "is its memory taken by another process?"):
        print(f"expected     about {expect_minutes(LAB)} min, by a rule of thumb; less "
              "if part is finished\n", flush=True)

# %% [markdown]
"""
## Quantize

[llmcompressor](https://docs.vllm.ai/projects/llm-compressor) writes the baseline too,
with an empty recipe, so one writer writes all the bytes that are compared. A checkpoint
is renamed to its place when complete, and used again only if nothing that shaped it
changed. Where GPTQ cannot invert a layer's matrix, llmcompressor rounds the layer to
nearest and says so in one line of its log: that line is counted here.
"""


# %%
def read_checkpoint(folder: Path, key: str, say=print) -> dict | None:
    """What is known of a checkpoint; None unless it has this key and is as written."""
    note = read_checked(folder / "quant_lab.json", say)
    if note.get("fingerprint") != key:
        return None
    files = note["files"]
    if note["row"]["weight_bytes"] != weight_bytes(folder) or files != hash_files(
            folder / name for name in files):
        say("checkpoint cut off or altered: not used")
        return None
    return note["row"]


@contextlib.contextmanager
def chatter_to(log: Path):
    """Send what the libraries print, progress bars included, to the log."""
    with (log.open("a", encoding="utf-8") as stream,
          contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream)):
        yield


# %%
def free_memory() -> None:
    """Let go of the model before, which is in reference cycles."""
    gc.collect()
    with contextlib.suppress(RuntimeError):  # Said in the row, if the GPU is lost.
        torch.cuda.empty_cache()


def lacks_memory(error: BaseException | None) -> bool:
    """Whether an allocator's refusal, of the GPU or of the host, is behind it."""
    refusal = re.compile(
        "out of memory|can(no|')t allocate memory|bad_alloc|ALLOC_FAILED", re.I)
    return error is not None and (
        isinstance(error, (torch.OutOfMemoryError, MemoryError))
        or bool(refusal.search(str(error)))
        or lacks_memory(error.__cause__ or error.__context__))


def fit(step: str, advice: str, *forms: Callable):
    """What the first form returns that fits into memory; each is smaller than before.

    MemoryError says which step did not fit, and what to change.
    """
    for form in forms:
        try:
            return form()
        except Exception as error:
            if not lacks_memory(error):
                raise
            traceback.print_exc()  # Goes to the log.
            said = describe(error)
        free_memory()  # Not before: the exception held what is to be freed.
    tried = " in its smaller form either" if len(forms) > 1 else ""
    raise MemoryError(f"{step} did not fit into memory{tried}: {advice} ({said})")


def show_progress(what: str, items) -> tqdm:
    """A bar on a terminal if the items take over 10 s; nothing if output is a file."""
    out = sys.__stdout__  # Not the log.
    return tqdm(items, desc=what, delay=10, leave=False, ncols=100, file=out,
                disable=not (out and out.isatty()))


# %%
def load_model(folder: Path, options: Options):
    """A causal LM in eval mode on the CPU; ValueError if weights are missing."""
    from transformers import AutoModelForCausalLM
    free_memory()
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, options.dtype), attn_implementation="sdpa",
        output_loading_info=True, trust_remote_code=False, use_safetensors=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder.name} lacks {len(missing)} weights, as {missing[0]}")
    return model.eval()


def build_recipe(label: str, options: Options) -> list:
    """New llmcompressor modifiers of a variant; none for the baseline."""
    from llmcompressor.modifiers import gptq, quantization, transform
    modifiers = vars(gptq) | vars(quantization) | vars(transform)
    return VARIANTS[label].recipe(SimpleNamespace(**modifiers), options)


# %%
def apply_recipe(model, recipe: list, samples: list[list[int]], lab: Lab,
                 **smaller) -> int:
    """Run `oneshot` on the model in place; returns how many modules fell back."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines import data_free, sequential
    from loguru import logger
    from torch.fx import _symbolic_trace
    traced = _symbolic_trace._wrapped_fns_to_patch
    # Left alone, both take the first accelerator, whatever --device says.
    for module in data_free.pipeline, sequential.pipeline:
        module.get_main_device = lambda: lab.device
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    warnings, known = [], dict(traced)
    layers = getattr(model.config, "num_hidden_layers", 1)
    bar = show_progress("calibrating", range(layers * len(recipe)))  # Each, anew.

    def follow(message: str):
        if found := re.search(r"layers\.(\d+)\.", message):
            bar.update((int(found[1]) - bar.n) % layers)

    logger.remove()
    logger.add(lab.output / "log.txt", level="INFO")
    logger.add(follow, level="INFO", format="{message}")
    logger.add(warnings.append, level="WARNING", format="{message}")
    chats = dict(
        dataset=Dataset.from_dict(dict(
            input_ids=samples, attention_mask=[[1] * len(ids) for ids in samples])),
        num_calibration_samples=len(samples), shuffle_calibration_samples=False,
        max_seq_length=max(map(len, samples))) if samples else {}
    try:
        oneshot(model=model, recipe=recipe, processor=lab.tokenizer, **chats, **smaller)
    finally:
        logger.remove()
        bar.close()
        traced.clear()  # Or what was traced would keep the model for ever.
        traced.update(known)
    if not any(hasattr(module, "quantization_scheme") for module in model.modules()):
        raise ValueError("the recipe found no Linear layer to quantize")
    return sum(map(int, re.findall(r"inversion failed for (\d+)/", "".join(warnings))))


# %%
def check_widths(model, scheme: str) -> None:
    """ValueError if the weights that share a scale do not divide a Linear's width."""
    from compressed_tensors.quantization import preset_name_to_scheme
    group = preset_name_to_scheme(scheme, ["Linear"]).weights.group_size or 1
    for name, linear in model.named_modules():
        if (isinstance(linear, torch.nn.Linear) and name not in LINEAR["ignore"]
                and linear.in_features % group):
            raise ValueError(f"{name} is {linear.in_features} wide, no multiple of the "
                             f"{group} weights that share a scale: take FP8 or W8A8")


def make_checkpoint(label: str, lab: Lab, beside: Path, **smaller) -> dict:
    """Write a variant into the folder; seconds of the recipe, modules fallen back."""
    from llmcompressor import reset_session
    torch.manual_seed(lab.options.seed)
    model, recipe = load_model(lab.model, lab.options), build_recipe(label, lab.options)
    samples = lab.samples if VARIANTS[label].calibrated else []
    start = time.perf_counter()
    try:
        fallbacks, seconds = 0, 0.0
        if recipe:
            check_widths(model, VARIANTS[label].scheme)
            fallbacks = apply_recipe(model, recipe, samples, lab, **smaller)
            seconds = time.perf_counter() - start
        try:
            model.generation_config.validate(strict=True)
        except ValueError:  # Older models set a temperature without asking to sample.
            model.generation_config.do_sample = True
        shutil.rmtree(beside, ignore_errors=True)
        model.save_pretrained(beside)
    finally:
        reset_session()  # Not before: saving adds recipe.yaml from the session.
    lab.tokenizer.save_pretrained(beside)
    if lab.options.plain_text:  # Not the model's own.
        (beside / "chat_template.jinja").unlink(missing_ok=True)
    return dict(quantize_seconds=seconds, rtn_fallbacks=fallbacks,
                retried=bool(smaller))


def quantize_variant(label: str, key: str, lab: Lab) -> dict:
    """Write `checkpoints/<label>` and, in its quant_lab.json, its part of the row."""
    folder = lab.output / "checkpoints" / label
    beside = folder.with_suffix(".partial")
    forms = [partial(make_checkpoint, label, lab, beside)]
    if VARIANTS[label].calibrated:  # Linear by Linear instead of layer by layer.
        forms.append(partial(*forms, sequential_targets=["Linear"]))
    row = fit("quantizing", "less --calibration-length or a smaller --model", *forms)
    row |= dict(weight_bytes=weight_bytes(beside),
                checkpoint=f"checkpoints/{label}")
    write_json(beside / "quant_lab.json", dict(
        fingerprint=key, row=row, files=hash_files(beside.iterdir())))
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    return row

# %% [markdown]
"""
## Packed execution

Plain transformers unpacks a compressed checkpoint to 16 bits on its first forward, and
simulates the rounding of activations (`--execution emulated`). Here a Linear stays
packed and chooses by format, GPU and rows, the tokens at once:

- **In registers** for one row, where the time goes into reading weights: a Triton
  kernel unpacks them on the way into the product. float16 goes through the same one,
  so that variants differ in nothing but the format.
- **Tensor cores** for several rows: 8-bit times 8-bit, then scaled. INT8 from SM 7.5
  (T4), FP8 from SM 8.9.
- **Dequantized** otherwise: a 16-bit copy, one layer at a time.

Activations are rounded per token as compressed-tensors does it: on a CPU the logits
equal the emulated ones bit for bit. `runs_as` names what ran.
"""


# %%
CODES = dict(int8=torch.int8, fp8=torch.float8_e4m3fn)


def read_e4m3(code: Tensor) -> Tensor:
    """float16 values of finite FP8 E4M3 codes held as int8: moves the bit fields."""
    return ((code.to(torch.int16) << 7) & ~(1 << 14)).view(torch.float16) * 2**8


def round_e4m3(x: Tensor) -> Tensor:
    """x, within ±448, rounded to the nearest FP8 E4M3 value, ties to even."""
    power = (x.float().view(torch.int32) & 0x7F800000).view(torch.float32)
    step = power.clamp(min=2**-6) / 8  # Three bits follow the leading one.
    return (torch.round(x / step) * step).to(x.dtype)


def quantize(kind: str, x, native: bool) -> tuple[Tensor, Tensor]:
    """x over its scale in 8 bits; the scale [..., 1], one per token.

    native: whether kernels know FP8; without, its values come in x's dtype.
    """
    scale = x.abs().amax(-1, keepdim=True) / (127.5 if kind == "int8" else 448)
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    if kind == "int8":
        return (x / scale).clamp(-128, 127).round().to(torch.int8), scale
    x = (x / scale).clamp(-448, 448)
    return x.to(torch.float8_e4m3fn) if native else round_e4m3(x), scale


def regroup(words: Tensor, groups: int) -> Tensor:
    """INT4 words [out, in / 8] with each group's inputs in another order.

    A checkpoint's word holds eight neighbours, the first in the lowest bits. Here, the
    n words of a group hold inputs 0 to n - 1 in their lowest bits, then the next n.
    """
    places = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    bits = (words[..., None] >> places & 15).view(len(words), groups, 8, -1)
    return (bits.transpose(2, 3) << places).sum(-1, dtype=torch.int32).flatten(1)


def dequantize(kind: str, weight, scale) -> Tensor:
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
        line, column = weight + row[:, None] * width, tl.arange(0, BLOCK)[None, :]
        total = tl.zeros([ROWS, BLOCK], tl.int32 if KIND == "int8" else tl.float32)
        for begin in tl.range(0, width, BLOCK, num_stages=3 if KIND == "fp8" else 1):
            at = begin + column
            inside = at < width
            w = tl.load(line + at, mask=inside, other=0)
            if KIND == "int4":
                high, part = w >> 24, tl.zeros([ROWS, BLOCK], tl.float32)
                eights = tl.zeros([1, BLOCK], tl.float32)
                for i in tl.static_range(8):
                    # Read as float32, an integer n below 2**24 is n * 2**-149: the four
                    # bits need no shift, no conversion, only a mask. What their place
                    # adds, 16**i, x takes off; 2**100 keeps the products normal.
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
        result = tl.sum(total, 1).to(tl.float32) * (
            2.0**49 if KIND == "int4" else 256.0 if KIND == "codes" else 1.0)
        if x_scale is not None:
            result *= tl.load(scale + row).to(tl.float32) * tl.load(x_scale)
        if bias is not None:
            result += tl.load(bias + row).to(tl.float32)
        tl.store(y + row, result)


# %%
if triton:
    @triton.jit
    def round_kernel(x, y, scale, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
        top = tl.zeros([16 * BLOCK], tl.float32)
        for begin in range(0, width, 16 * BLOCK):  # Each program finds the scale.
            at = begin + tl.arange(0, 16 * BLOCK)
            value = tl.load(x + at, mask=at < width, other=0).to(tl.float32)
            top = tl.maximum(top, tl.abs(value))
        limit = 127.5 if KIND == "int8" else 448.0
        unit = (tl.max(top) / limit).to(scale.dtype.element_ty)
        tl.store(scale, unit)
        unit = tl.where(unit == 0, 1.0, unit.to(tl.float32))
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < width, other=0).to(tl.float32) / unit
        value = value.to(x.dtype.element_ty).to(tl.float32)
        if KIND == "int8":  # Such a sum has no room for a fraction.
            value = (tl.clamp(value, -128.0, 127.0) + 1.5 * 2**23) - 1.5 * 2**23
        tl.store(y + at, value.to(y.dtype.element_ty), mask=at < width)

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


def row_shape(kind: str, rows: int, width: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program of row_kernel: the fastest on an H100."""
    many, few = rows > 8192, rows < 2048
    if kind == "plain":
        return (2, 1024, 4) if width <= 2048 else (2, 2048, 8)
    if kind == "int4":
        return (4, 128, 1) if many else (2, 128, 1) if width <= 128 else (
            (2, 1024, 8) if few else (4, 512, 4))
    if kind == "int8":
        return ((16, 128, 8) if many else (2, 256, 1)) if width <= 256 else (
            (2, 2048, 8) if few else (2, 512, 2))
    return (1, 2048, 4) if few and width > 2048 else (2, 1024, 2)


# %%
@torch.library.custom_op("quant_lab::multiply", mutates_args=())
def multiply(kind: str, x: Tensor, weight: Tensor, scale: Tensor | None,
             x_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [n, in] times a packed weight, scaled, plus bias: [n, out]; n > 1: INT8."""
    y = x.new_empty(n := len(x), rows := len(weight), dtype=dtype)
    if n > 1:  # Tile, warps and stages: the fastest on an H100, too.
        m, tile, block, warps, stages = (
            (16, 32, 256, 4, 4) if n <= 16 else (32, 32, 256, 4, 4) if n <= 64 else
            (64, 128, 128, 4, 4) if n * rows <= 2**21 else (128, 128, 128, 4, 3))
        int8_kernel[(triton.cdiv(n, m), triton.cdiv(rows, tile))](
            x, weight, scale, x_scale, bias, y, n, rows, x.shape[1], m, tile, block,
            num_warps=warps, num_stages=stages)
        return y
    if kind == "int8":  # Four in a word.
        x, weight = x.view(torch.int32), weight.view(torch.int32)
    group = weight.shape[1] // scale.shape[1] if kind == "int4" else 1
    lines, block, warps = row_shape(kind, *weight.shape)
    row_kernel[(triton.cdiv(rows, lines),)](
        x, weight, scale, x_scale, bias, y, *weight.shape, group, kind, lines, block,
        num_warps=warps)
    return y


@torch.library.custom_op("quant_lab::round_row", mutates_args=())
def round_row(kind: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """A wide row [1, in] as `quantize` rounds it, in one kernel."""
    y = x.new_empty(x.shape, dtype=CODES[kind])
    scale = x.new_empty(1, 1)
    round_kernel[(triton.cdiv(x.shape[1], 256),)](
        x, y, scale, x.shape[1], kind, 256, num_warps=8)
    return y, scale


# %%
@torch.library.custom_op("quant_lab::multiply_fp8", mutates_args=())
def multiply_fp8(x: Tensor, weight: Tensor, small: Tensor,
                 dtype: torch.dtype) -> Tensor:
    """x [n, in] @ weight [out, in].T, both FP8, times small twice, in dtype.

    An operator of its own, since torch.compile cannot trace F.scaled_mm in torch 2.11.
    """
    by = F.ScalingType.TensorWise
    return F.scaled_mm(x, weight.t(), small, by, small, by, output_dtype=dtype)


multiply.register_fake(lambda kind, x, weight, scale, x_scale, bias, dtype: (
    x.new_empty(len(x), len(weight), dtype=dtype)))
round_row.register_fake(lambda kind, x: (
    x.new_empty(x.shape, dtype=CODES[kind]), x.new_empty(1, 1)))
multiply_fp8.register_fake(lambda x, weight, small, dtype: (
    x.new_empty(len(x), len(weight), dtype=dtype)))


def multiply_8_bits(linear, x: Tensor, x_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x [n, in] times an 8-bit weight by PyTorch's operators, scaled, plus bias."""
    if linear.kind == "fp8":
        y = multiply_fp8(x, linear.weight.view(x.dtype), linear.small, dtype)
        y = y.float() / linear.small**2
    else:
        padding = 32 - len(x) if len(x) <= 16 else 0  # _int_mm wants more than 16 rows.
        y = torch._int_mm(F.pad(x, (0, 0, 0, padding)), linear.weight.t())
        y = y[: len(x)].float()
    y = y * (x_scale.float() * linear.scale.float().t())
    return (y if linear.bias is None else y + linear.bias.float()).to(dtype)


# %%
class PackedLinear(torch.nn.Module):
    """A Linear on the tensors of its checkpoint.

    kind: int4, int8, fp8 or plain. weight [out, in] as int8 (FP8: its codes), 16-bit
    or, int4, as `regroup` returns it; scale [out, groups], one group unless int4. sm:
    the GPU's compute capability, (0, 0) on a CPU.
    """

    def __init__(self, kind: str, weight, scale, bias, sm: tuple[int, int]):
        super().__init__()
        for name, x in dict(weight=weight, scale=scale, bias=bias).items():
            self.register_parameter(
                name, None if x is None else torch.nn.Parameter(x.data, False))
        self.kind, self.sm = kind, sm
        self.native = sm == (0, 0) or sm >= (8, 9)  # Whether kernels know FP8.
        # Twice this factor keeps the product of FP8 rows within float16.
        self.register_buffer("small", weight.new_tensor(2.0**-10, dtype=torch.float32))

    def route(self, rows: int) -> str:
        """How so many rows are multiplied; the reason, if they are dequantized."""
        needs = dict(int8=(7, 5), fp8=(8, 9)).get(self.kind, (99, 0))  # INT4: none.
        shape = self.weight.shape if rows > 1 else self.weight.shape[1:]
        fits = not any(n % 16 for n in shape)
        dtype = (self.weight if self.kind == "plain" else self.scale).dtype
        short = SHORT[str(dtype)[6:]]
        if rows == 1 and triton and fits and self.sm > (0, 0):
            kind = short if self.kind == "plain" else self.kind
            return f"{kind}→{'int32' if kind == 'int8' else 'fp32'} in registers"
        if self.kind == "plain":
            return short
        if rows > 1 and self.sm >= needs and fits:
            return f"{self.kind} tensor cores"
        why = ("a CPU" if self.sm == (0, 0) else "no Triton" if not triton else
               "16 does not divide its width" if not fits else
               "PyTorch multiplies no int4" if self.kind == "int4" else
               "tensor cores need SM %d.%d" % needs)
        return f"dequantized to {short} ({why})"

    def forward(self, x: Tensor) -> Tensor:
        shape, dtype, kind, scale = x.shape, x.dtype, self.kind, None
        x = x.reshape(-1, shape[-1])
        way = self.route(len(x))
        alone = way.endswith("registers")
        if kind in CODES:
            wide = shape[-1] > 4096 and (self.native or kind == "int8")
            x, scale = round_row(kind, x) if alone and wide else quantize(
                kind, x, self.native)
        if kind == "plain" and not alone:
            y = F.linear(x, self.weight, self.bias)
        elif way.startswith("dequantized"):
            x = x if scale is None else x.to(dtype) * scale
            y = F.linear(x, dequantize(kind, self.weight, self.scale), self.bias)
        elif alone or kind == "int8" and triton and self.sm >= (8, 0):
            kind = "codes" if kind == "fp8" and not self.native else kind
            y = multiply(kind, x, self.weight, self.scale, scale, self.bias, dtype)
        else:
            y = multiply_8_bits(self, x, scale, dtype)
        return y.view(*shape[:-1], -1)


# %%
class Share(torch.nn.Module):
    """Outputs [begin, end) of a PackedLinear that several with one input share.

    The first asked computes them all, the last forgets them; another input, anew.
    """

    def __init__(self, shared: PackedLinear, begin: int, end: int):
        super().__init__()
        self.shared, self.begin, self.end = shared, begin, end
        shared.known = None, None

    def forward(self, x):
        known, y = self.shared.known
        y = y if known is x else self.shared(x)
        last = self.end == len(self.shared.weight)
        self.shared.known = (None, None) if last else (x, y)
        return y[..., self.begin : self.end]


def pack_linear(linear: torch.nn.Module, sm: tuple[int, int]) -> PackedLinear:
    """A PackedLinear; ValueError for formats that none of the recipes writes."""
    if not (scheme := getattr(linear, "quantization_scheme", None)):
        return PackedLinear("plain", linear.weight, None, linear.bias, sm)
    kind = "fp8" if scheme.weights.type == "float" else f"int{scheme.weights.num_bits}"
    kept = dict(int4=torch.int32, int8=torch.int8, fp8=torch.int8).get(kind)
    if not kept or not scheme.weights.symmetric or hasattr(linear, "weight_g_idx"):
        raise ValueError("this format runs with --execution emulated only")
    weight = getattr(linear, "weight_packed" if kind == "int4" else "weight").view(kept)
    weight = regroup(weight, linear.weight_scale.shape[1]) if kind == "int4" else weight
    return PackedLinear(kind, weight, linear.weight_scale, linear.bias, sm)


def pack_model(model, sm: tuple[int, int]) -> None:
    """Put a PackedLinear in the place of each quantized Linear; on a GPU, of all.

    There, those that read the same become one: a product where there were three.
    """
    if hook := getattr(model, "ct_decompress_hook", None):
        hook.remove()
        del model.ct_decompress_hook
    for name, module in list(model.named_modules()):
        plain = sm > (0, 0) and isinstance(module, torch.nn.Linear)
        if plain or getattr(module, "quantization_scheme", None):
            model.set_submodule(name, pack_linear(module, sm))
            module._parameters.clear()  # Or a reference cycle would keep them.
    same = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    parents = [m for m in model.modules() if not isinstance(m, PackedLinear)]
    for parent, names in product(parents, same if sm > (0, 0) else ()):
        parts = [getattr(parent, name, None) for name in names]
        if not all(isinstance(part, PackedLinear) for part in parts) or len(
                {(p.kind, p.weight.shape[1], p.bias is None) for p in parts}) > 1:
            continue
        shared, end = PackedLinear(parts[0].kind, *(
            None if getattr(parts[0], name) is None else
            torch.cat([getattr(part, name) for part in parts])
            for name in ("weight", "scale", "bias")), sm), 0
        for name, part in zip(names, parts):
            setattr(parent, name, Share(shared, end, end := end + len(part.weight)))

# %% [markdown]
"""
## Measure quality

Perplexity as in the GPTQ paper. All else holds a variant, the baseline too (it shows
the noise), against the *reference*, the model as it came: its logits of `--kld-tokens`
positions wait in a temporary file, so that two models never have to fit at once.

What stands in one article errs together, so the 95 % intervals are those of at most 30
blocks of consecutive windows. They speak for the choice of text, not for that of chats.
"""


# %%
LOGITS_FILE_BYTES, BLOCKS = 5e9, 30


@torch.no_grad()
def score_text(model, ids: Tensor, options: Options, visit, rows=128) -> Tensor:
    """Negative log-likelihoods [windows, window - 1] in nats of the token ids [n].

    Calls `visit(window's number, logits [k, vocabulary])` with those to be compared.
    """
    window = options.window
    windows = ids.unfold(0, window, window)[: options.max_windows or None]
    losses = torch.zeros(len(windows), window - 1)
    compared = torch.zeros_like(losses, dtype=torch.bool)
    for number, row in enumerate(show_progress("scoring", windows.to(model.device))):
        logits = model(row[None], use_cache=False).logits[0, :-1]
        if number == 0:
            fit = int(LOGITS_FILE_BYTES // logits[0].nbytes)
            count = min(options.kld_tokens, fit, losses.numel())
            compared.view(-1)[torch.arange(count) * losses.numel() // count] = True
        # `rows` at once, since 2,048 x 151,936 logits take 1.2 GB in float32.
        whole = logits, row[1:], losses[number], compared[number]
        for part, targets, loss, chosen in zip(*(x.split(rows) for x in whole)):
            if not part.isfinite().all():
                raise FloatingPointError("logits are not finite, in float16 mostly by "
                                         "overflow: try --dtype bfloat16 or float32")
            loss.copy_(F.cross_entropy(part.float(), targets, reduction="none"))
            if chosen.any():
                visit(number, part[chosen.to(part.device)])
    return losses.double()


def complete_prompts(model, lab: Lab) -> list[list[int]]:
    """Greedy completions of PROMPTS: token ids, at most --new-tokens each."""
    completions = []
    for prompt in PROMPTS:
        inputs = tokenize_prompt(lab.tokenizer, prompt).to(lab.device)
        tokens = fit("completing prompts", "less --new-tokens", lambda: model.generate(
            **inputs, do_sample=False, max_new_tokens=lab.options.new_tokens))
        completions.append(tokens[0, inputs["input_ids"].shape[1]:].tolist())
    return completions


# %%
def place_model(folder: Path, lab: Lab):
    """A causal LM on the lab's device, its defaults for sampling put aside."""
    from transformers import GenerationConfig

    def place():
        model = load_model(folder, lab.options).to(lab.device)
        if lab.options.execution == "packed":
            cuda = lab.device.type == "cuda"
            pack_model(model, torch.cuda.get_device_capability() if cuda else (0, 0))
        return model

    model = fit(f"loading {folder.name}", "a smaller --model or --device cpu", place)
    # A new object: whatever generate is not told comes from the model's own defaults.
    model.generation_config = GenerationConfig(
        eos_token_id=model.generation_config.eos_token_id or lab.tokenizer.eos_token_id,
        pad_token_id=lab.tokenizer.pad_token_id or lab.tokenizer.eos_token_id)
    return model


def fit_scoring(score: Callable):
    """What `score` returns, called with the rows of logits taken at once."""
    return fit("scoring", "less --window", partial(score, 128), partial(score, 16))


def measure_reference(lab: Lab) -> SimpleNamespace | Exception:
    """Losses, compared logits (a file), completions; or why they cannot be had."""
    try:
        model, file = place_model(lab.model, lab), tempfile.TemporaryFile()

        def score(rows):
            file.seek(0)
            return score_text(model, lab.eval_ids, lab.options, lambda _, logits: (
                file.write(logits.cpu().view(torch.uint8).numpy().data)), rows)

        return SimpleNamespace(losses=fit_scoring(score), logits=file,
                               completions=complete_prompts(model, lab))
    except Exception as error:
        traceback.print_exc()  # Goes to the log.
        disk = " (TMPDIR says where its logits go)" * isinstance(error, OSError)
        return RuntimeError(f"the unquantized model: {describe(error)}{disk}")


# %%
def estimate(values: Tensor, windows: Tensor, scale=float, name="value"):
    """Mean of values [n], by this name, and its 95 % interval, low and high, scaled.

    windows [n] tells the window of each; of one or two, low and high are None. Standard
    error: of a ratio of sums over clusters (Cochran, Sampling Techniques, 1977, section
    6.3). Student's t: a series (Abramowitz and Stegun 26.7.5).
    """
    mean, (_, places) = values.mean().item(), windows.unique(return_inverse=True)
    count, low, high = int(places.max()) + 1, None, None
    freedom = min(count, BLOCKS) - 1
    if freedom >= 2:
        sums = torch.bincount(places * (freedom + 1) // count, values - mean)
        error = math.sqrt(sums.square().sum() * (1 + 1 / freedom)) / len(values)
        series = 1.960, 2.372, 2.822, 2.556, 1.589  # 1.960: the normal distribution's.
        t = sum(c / freedom**k for k, c in enumerate(series))
        low, high = scale(mean - t * error), scale(mean + t * error)
    return {name: scale(mean), "low": low, "high": high}


def measure_quality(model, lab: Lab, reference: SimpleNamespace) -> dict:
    """Perplexity; against the reference KLD in nats, agreement in %, same tokens."""
    compared, completions = [], []

    def compare(number, logits):
        known = torch.frombuffer(bytearray(reference.logits.read(logits.nbytes)),
                                 dtype=logits.dtype).view_as(logits).to(logits.device)
        p, q = (F.log_softmax(x.double(), dim=-1) for x in (known, logits))
        kld, same = (p.exp() * (p - q)).sum(-1), known.argmax(-1) == logits.argmax(-1)
        compared.append(torch.stack([torch.full_like(kld, number), kld, same]).cpu())

    def score(rows):
        reference.logits.seek(0)
        compared.clear()
        return score_text(model, lab.eval_ids, lab.options, compare, rows)

    losses = fit_scoring(score)
    windows = torch.arange(len(losses)).repeat_interleave(losses.shape[1])
    perplexity, ratio = (estimate(x.flatten(), windows, math.exp)
                         for x in (losses, losses - reference.losses))
    for prompt, tokens, known in zip(
            PROMPTS, complete_prompts(model, lab), reference.completions):
        differ = [a != b for a, b in zip_longest(tokens, known)]
        same = differ.index(True) if any(differ) else lab.options.new_tokens
        completions.append(dict(
            prompt=prompt, same_tokens=same,
            completion=lab.tokenizer.decode(tokens, skip_special_tokens=True)))
    lengths = torch.tensor([float(said["same_tokens"]) for said in completions])
    windows, kld, same = torch.cat(compared, 1)
    return dict(
        perplexity=perplexity["value"], perplexity_interval=perplexity,
        perplexity_ratio=ratio, tokens_scored=losses.numel(),
        window_losses=losses.mean(1).tolist(),
        top1_agreement=estimate(same, windows, lambda x: min(100 * x, 100.0)),
        kld=estimate(kld, windows, lambda x: max(x, 0.0), "mean") | dict(
            median=kld.quantile(0.5).item(), p99=kld.quantile(0.99).item(),
            tokens=len(kld)),
        divergence=estimate(lengths, torch.arange(len(lengths)), name="mean") | dict(
            completions=completions))

# %% [markdown]
"""
## Measure speed

Greedy decoding as servers do it: a static cache, tokens that never leave the GPU, all
decoder layers compiled as one function, prefill and step as CUDA graphs (a CPU does not
compile, nor do `--no-compile` and `emulated`). A prompt of 512 tokens is continued by
exactly `--new-tokens` tokens, alone and in batches of copies: time to the first token,
inter-token latency, memory, and the bytes that a step reads over its time, as part of
what copying 1 GB reaches. Each look at the clock waits for the device, and on a GPU
each variant has a process of its own, for a reason that `run_apart` gives.
"""


# %%
def summarize(samples: list[float]) -> dict:
    """Median, least and greatest of the samples, and these."""
    return dict(median=statistics.median(samples), min=min(samples), max=max(samples),
                samples=samples)


# %%
class LayerCache:
    """Keys and values of one layer, in tensors that stay where they are."""

    def __init__(self, length: int):
        self.length, self.keys, self.values, self.position = length, None, None, None

    def update(self, keys, values, *_, **__):
        if self.keys is None:
            self.keys, self.values = (x.new_zeros(*x.shape[:2], self.length, x.shape[3])
                                      for x in (keys, values))
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        return self.keys, self.values


if triton:
    @triton.jit
    def attend_kernel(query, keys, values, mask, y, tops, totals, scaling, length,
                      GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
        head, part = tl.program_id(0), tl.program_id(1)
        at, column = part * BLOCK + tl.arange(0, BLOCK), tl.arange(0, SIZE)
        here = (head // GROUP * length + at[:, None]) * SIZE + column[None, :]
        inside = at[:, None] < length
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

    @triton.jit
    def combine_kernel(y, tops, totals, result, parts, SIZE: tl.constexpr,
                       PARTS: tl.constexpr):
        head, part, column = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, SIZE)
        place, inside = head * parts + part, part < parts
        top = tl.load(tops + place, mask=inside, other=-float("inf"))
        fade = tl.exp(top - tl.max(top))
        total = tl.sum(fade * tl.load(totals + place, mask=inside, other=0))
        value = tl.load(y + place[:, None] * SIZE + column[None, :],
                        mask=inside[:, None], other=0)
        tl.store(result + head * SIZE + column,
                 tl.sum(fade[:, None] * value, 0) / total)


# %%
@torch.library.custom_op("quant_lab::attend_row", mutates_args=())
def attend_row(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor,
               scaling: float) -> Tensor:
    """Attention of one row, 64 keys to a program, as in flash decoding.

    query [1, heads, 1, size], keys and values [1, heads, n, size], mask [1, 1, 1, n],
    added; returns [1, 1, heads, size]. Source: https://arxiv.org/abs/2311.01282
    """
    (_, heads, _, size), length = query.shape, keys.shape[2]
    parts = triton.cdiv(length, 64)
    y, tops, totals = (query.new_empty(heads, parts, n, dtype=torch.float32)
                       for n in (size, 1, 1))
    attend_kernel[(heads, parts)](query, keys, values, mask, y, tops, totals, scaling,
                                  length, heads // keys.shape[1], size, 64)
    result = query.new_empty(1, 1, heads, size)
    combine_kernel[(heads,)](y, tops, totals, result, parts, size,
                             triton.next_power_of_2(parts))
    return result


attend_row.register_fake(lambda query, *_: query.new_empty(1, 1, *query.shape[1::2]))


def attend(module, query, key, value, attention_mask, scaling=None, **named):
    """Attention in transformers' interface; query, key, value [batch, heads, n, size].

    Of several sequences, the heads that share a key stand in as rows: no key is copied.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    if named.get("softcap") or named.get("s_aux") is not None or (
            named.get("sliding_window") or math.inf) < key.shape[2]:
        raise ValueError("speed of models with sliding windows, soft caps or attention "
                         "sinks is not measured")
    if query.shape[2] > 1:  # The whole prompt: causal, and no mask.
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)
    if triton and query.is_cuda and len(key) == 1 and key.shape[3] in (64, 128, 256):
        return attend_row(query, key, value, attention_mask, scaling), None
    rows = query.reshape(len(key), key.shape[1], -1, query.shape[3])
    y = F.scaled_dot_product_attention(
        rows, key, value, attn_mask=attention_mask, scale=scaling)
    return y.reshape(len(y), 1, query.shape[1], -1), None


# %%
def compile_layers(model, compiled: bool) -> None:
    """Make all decoder layers one function, compiled for one row and for many."""
    from transformers import AttentionInterface

    AttentionInterface.register("quant_lab", attend)
    model.set_attn_implementation("quant_lab")
    layers = model.get_decoder().layers
    row = many = eager = type(layers[0]).forward
    if compiled:
        torch._dynamo.reset()
        row, many = (torch.compile(eager, fullgraph=True, options={
            "coordinate_descent_tuning": tuned}) for tuned in (True, False))

    def run(layer, number, hidden, *inputs, past_key_values, **named):
        mine, alone = past_key_values[number], hidden.shape[:2] == (1, 1)
        forward = eager if mine.keys is None else row if alone else many
        return forward(layer, hidden, *inputs, past_key_values=mine, **named)

    for number, layer in enumerate(layers):
        layer.forward = partial(run, layer, number)


def record(act: Callable, rewind: Callable, device, compiled: bool):
    """The act, twice warmed up, and its peak memory in bytes (None on a CPU).

    Compiled on a GPU, the act is the replay of a CUDA graph.
    """
    for _ in range(2):
        rewind()
        act()
    rewind()
    if device.type == "cpu":
        return act, None
    torch.cuda.reset_peak_memory_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph) if compiled else contextlib.nullcontext():
        act()
    rewind()
    return graph.replay if compiled else act, torch.cuda.max_memory_allocated()


# %%
class Decoder:
    """Greedy decoding of `batch` copies of a prompt, ids [1, n].

    first: a Decoder of one copy, whose cache is copied. seconds: of preparing, with
    compiling. peaks: of memory, in bytes. token: ids [batch, 1], the newest.
    """

    def __init__(self, model, prompt, new_tokens, compiled, first=None, batch=1):
        device, start, begin = model.device, prompt.shape[1], now(model.device)
        length = math.ceil((start + new_tokens) / 16) * 16  # Masks are aligned.
        self.model, self.token = model, prompt[:, -1:].repeat(batch, 1)
        self.position = torch.full((1,), start, device=device)
        self.mask = torch.zeros(1, 1, 1, length, dtype=model.dtype, device=device)
        self.cache = [LayerCache(length) for _ in model.get_decoder().layers]
        self.inputs, self.peaks = (prompt, torch.arange(start, device=device), None), []
        if first is None:
            compile_layers(model, compiled)
            prefill = partial(self.advance, *self.inputs)
            prefill()  # Uncompiled: it makes the cache.
            self.prefill, *self.peaks = record(prefill, self.rewind, device, compiled)
            self.prefill()
        for mine, known in zip(self.cache, first.cache if first else ()):
            mine.keys, mine.values = (
                x.repeat(batch, 1, 1, 1) for x in (known.keys, known.values))
        self.step, peak = record(self.step, self.rewind, device, compiled)
        self.peaks.append(peak)
        self.seconds = now(device) - begin

    def advance(self, ids, position, mask) -> None:
        """Run the model; the most probable next token replaces the newest."""
        for layer in self.cache:
            layer.position = position
        logits = self.model(
            input_ids=ids, position_ids=position[None], attention_mask=mask,
            past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token.copy_(logits.argmax(-1))

    def step(self) -> None:
        """Decode one token of each sequence."""
        self.mask.index_fill_(3, self.position, 0)
        self.advance(self.token, self.position, self.mask)
        self.position += 1

    def rewind(self) -> None:
        """Forget all tokens after the prompt."""
        self.position.fill_(self.inputs[0].shape[1])
        self.mask[..., self.inputs[0].shape[1] :] = -math.inf

    def run(self, steps: int) -> tuple[float, float]:
        """Seconds of the prefill, if of one copy, and of the steps after it."""
        self.rewind()
        start = now(self.token.device)
        if len(self.token) == 1:
            self.prefill()
        first = now(self.token.device)
        for _ in range(steps):
            self.step()
        return first - start, now(self.token.device) - first


# %%
def held_bytes(model) -> int:
    """Bytes of the weights in memory, of what several share once."""
    storages = [x.untyped_storage() for x in (*model.parameters(), *model.buffers())]
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


@torch.no_grad()
def measure_speed(model, prompt: Tensor, options: Options, compiled: bool,
                  bandwidth: float) -> dict:
    """Speed and memory of continuing a prompt [1, n]; a batch may be "OOM"."""
    steps, first, decode, seconds = options.new_tokens - 1, None, [], 0
    weights, looked_up = held_bytes(model), model.get_input_embeddings().weight
    tied = looked_up.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    for batch in options.batch_sizes:
        try:
            decoder = None  # Lets go of the one before, unless it is the first.
            decoder = Decoder(model, prompt, steps + 1, compiled, first, batch)
            runs = [decoder.run(steps) for _ in range(1 + options.repeats)][1:]
        except Exception as error:
            if not lacks_memory(error):
                raise
            if first is None:
                raise MemoryError("decoding one sequence did not fit into memory: less "
                                  f"--new-tokens ({describe(error)})") from None
            decode.append(dict.fromkeys(decode[0]) | dict(batch=batch, error="OOM"))
            continue
        itl, seconds = [late / steps for _, late in runs], seconds + decoder.seconds
        read = weights - (0 if tied else looked_up.nbytes) + sum(
            layer.keys.nbytes + layer.values.nbytes for layer in decoder.cache)
        decode.append(dict(
            batch=batch, tok_s=summarize([batch / x for x in itl]),
            itl_ms=summarize([1000 * x for x in itl]), step_bytes=read,
            bandwidth_fraction=read / statistics.median(itl) / bandwidth))
        if first is None:
            first = decoder
            single = dict(
                ttft_s=summarize([early for early, _ in runs]), decode=decode,
                latency_s=summarize([sum(run) for run in runs]),
                decode_tok_s=decode[0]["tok_s"],
                peak_memory_bytes=max(filter(None, decoder.peaks), default=None))
    return dict(
        **single, weights_memory_bytes=held_bytes(model), copy_bandwidth=bandwidth,
        compile_seconds=seconds if compiled else None, prompt_tokens=prompt.shape[1])


def name_routes(label: str, model, prompt: int, options: Options) -> str:
    """How the Linears ran, phase by phase."""
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    if not packed:
        return ("" if label == BASELINE else "dequantized to ") + SHORT[options.dtype]
    rows = dict(prefill=prompt, decode=1) | {
        f"batch {batch}": batch for batch in options.batch_sizes if batch > 1}
    phases = {}  # How it ran: the phases of which that is true.
    for phase, count in rows.items():
        ways = {m.route(count) for m in packed
                if m.kind != "plain" or label == BASELINE}
        phases.setdefault(" and ".join(sorted(ways)), []).append(phase)
    return " · ".join(f"{', '.join(names)} {ways}" for ways, names in phases.items())


# %%
def wants_compiling(lab: Lab) -> bool:
    """Whether decoding is to be compiled."""
    return (lab.device.type == "cuda" and not lab.options.no_compile
            and lab.options.execution == "packed")


def time_variant(label: str, prompt: list[int], bandwidth: float, lab: Lab,
                 compiled: bool) -> dict:
    """Speed and memory of a checkpoint; what "failed", if it was to be compiled."""
    with chatter_to(lab.output / "log.txt"):
        try:
            model = place_model(lab.output / "checkpoints" / label, lab)
            speed = measure_speed(model, torch.tensor([prompt], device=lab.device),
                                  lab.options, compiled, bandwidth)
        except Exception as error:
            if not compiled:
                raise
            traceback.print_exc()
            return dict(failed=describe(error))
    ways = name_routes(label, model, len(prompt), lab.options)
    how = "compiled" if compiled else "not compiled"
    if compiled and "__file__" not in globals():
        how += ", in one process with the others"
    return speed | dict(runs_as=f"{ways} · {how}")


def answer(function: Callable[[], dict], pipe) -> None:
    """Send what the function returns; die with the parent."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    pipe.send(function())


def run_apart(function: Callable[[], dict]) -> dict:
    """What the function returns, in a process of its own; in a notebook, in this one.

    On an H100 the first model that a process compiles decodes some 14 % faster than
    each later one, be it the same again: every variant is the first of a process.
    """
    if "__file__" not in globals():
        return function()
    spawn = multiprocessing.get_context("spawn")  # CUDA cannot be forked.
    ours, theirs = spawn.Pipe(duplex=False)
    child = spawn.Process(target=answer, args=(function, theirs))
    child.start()
    theirs.close()  # Or its death would not end the wait.
    try:
        return ours.recv()
    except EOFError:
        return dict(failed="its process died, maybe for want of memory")
    finally:
        child.kill()
        child.join()


# %%
def benchmark_variant(label: str, lab: Lab, reference: SimpleNamespace,
                      say=lambda text: None) -> dict:
    """Quality, speed and memory of a checkpoint, loaded from disk."""
    start, compiled = now(lab.device), wants_compiling(lab)
    model = place_model(lab.output / "checkpoints" / label, lab)
    loaded = now(lab.device) - start
    quality, model = measure_quality(model, lab, reference), None
    free_memory()
    say(f"scored in {now(lab.device) - start:10,.0f} s · perplexity "
        f"{show(quality['perplexity_interval'], 2)} · KLD {show(quality['kld'], 5)}")
    start = time.perf_counter()
    length = min(512, lab.context - lab.options.new_tokens)
    prompt = lab.eval_ids.repeat(length // len(lab.eval_ids) + 1)[:length].tolist()
    measure = partial(time_variant, label, prompt, measure_bandwidth(lab.device),
                      replace(lab, eval_ids=None, samples=[]))
    speed = run_apart(partial(measure, True)) if compiled else measure(False)
    if failed := speed.get("failed"):
        speed = measure(False)
        speed["runs_as"] += f", it failed: {quote(failed)}"
    say(f"timed in {time.perf_counter() - start:11,.0f} s · "
        f"{show(speed['decode_tok_s'], 1)} tokens/s · TTFT "
        f"{show(speed['ttft_s']['median'], 1, 1000)} ms")
    first = quality["divergence"]["completions"][0]
    return dict(**quality, **speed, load_seconds=loaded,
                sample={name: first[name] for name in ("prompt", "completion")})

# %% [markdown]
"""
## Run

A variant that fails leaves a row with its reason, and the others go on. `results.json`
is written after each; a later run takes a finished row over if options, model files,
texts, versions and machine are the same.
"""


# %%
ROW = dict.fromkeys((
    "label", "status", "error", "scheme", "checkpoint", "weight_bytes", "size_ratio",
    "quantize_seconds", "rtn_fallbacks", "retried", "perplexity", "perplexity_interval",
    "perplexity_ratio", "tokens_scored", "window_losses", "kld", "top1_agreement",
    "divergence", "load_seconds", "compile_seconds", "weights_memory_bytes",
    "peak_memory_bytes", "ttft_s", "latency_s", "decode_tok_s", "decode",
    "copy_bandwidth", "prompt_tokens", "runs_as", "sample", "fingerprint"))


PROTOCOL = 2  # Raised when measuring changes: rows of before are measured again.


def make_keys(label: str, lab: Lab, model: dict) -> tuple[str, str]:
    """The fingerprints of what shapes a variant's checkpoint, and of its row."""
    o, machine = lab.options, lab.machine
    chats = VARIANTS[label].calibrated and (
        o.calibration_data, o.calibration_samples, o.calibration_length,
        hash_files([Path(o.calibration_data).expanduser()]))
    made = fingerprint(model, label, repr(build_recipe(label, o)), o.dtype, o.seed,
                       lab.versions, chats, o.plain_text, machine["device"],
                       machine["name"], machine["compute_capability"])
    return made, fingerprint(
        made, lab.eval_ids.tolist(), PROMPTS, BLOCKS, LOGITS_FILE_BYTES, o.window,
        o.max_windows, o.kld_tokens, o.new_tokens, o.repeats, o.execution, o.no_compile,
        o.batch_sizes, PROTOCOL, machine["driver"], "__file__" in globals())


def run_variant(label: str, keys: tuple[str, str], lab: Lab, reference, say) -> dict:
    """The row of a variant; its status is "failed" if anything went wrong."""
    row = ROW | dict(label=label, status="failed", scheme=VARIANTS[label].scheme,
                     fingerprint=keys[1])
    folder = lab.output / "checkpoints" / label
    with chatter_to(lab.output / "log.txt"):
        try:
            if isinstance(reference, Exception):
                raise reference
            row |= read_checkpoint(folder, keys[0], say) or quantize_variant(
                label, keys[0], lab)
            say(f"quantized in {row['quantize_seconds']:7,.0f} s · "
                f"{row['weight_bytes'] / 1e6:,.1f} MB")
            row |= benchmark_variant(label, lab, reference, say) | dict(status="ok")
        except Exception as error:
            shutil.rmtree(folder.with_suffix(".partial"), ignore_errors=True)
            row["error"] = describe(error)
            say(textwrap.shorten(f"failed: {row['error']}", 90, placeholder=" ..."))
            with contextlib.suppress(OSError):  # The disk may be full.
                traceback.print_exc()
    return row


# %%
def take_over(lab: Lab, keys: dict, head: dict) -> dict[str, dict]:
    """Finished rows of results.json by label, if they may stand beside new ones."""
    before, rows = read_checked(lab.output / "results.json"), {}
    done = [row for row in before.get("variants", ()) if row["status"] == "ok"]
    for row in done:
        made, measured = keys.get(row["label"], ("", ""))
        # Of those wanted, `run_variant` says it.
        say = (lambda text: None) if row["label"] in lab.options.variants else partial(
            print, row["label"])
        if row.keys() == ROW.keys() and row["fingerprint"] == measured and (
                read_checkpoint(lab.output / row["checkpoint"], made, say)):
            rows[row["label"]] = row
    if other := [row["label"] for row in done if row["fingerprint"] != keys.get(
            row["label"], ("", ""))[1]]:
        changed = [f"{name} {before[part].get(name)} → {value}"
                   for part in ("config", "machine", "versions")
                   for name, value in json.loads(json.dumps(head[part])).items()
                   if before[part].get(name) != value
                   and name not in ("variants", "output_dir", "fresh", "memory_bytes")]
        reason = ", ".join(changed) or "model files, texts or the protocol"
        print(textwrap.fill(plain(f"measured before, not kept: {', '.join(other)}; "
                                  f"changed since: {reason}"), 116))
    return rows


def check_disk(lab: Lab, labels: list[str], keys: dict) -> None:
    """Exit with 2 unless what is to be made fits, each checkpoint as large as FP16."""
    o, folder = lab.options, lab.output / "checkpoints"
    temporary = tempfile.gettempdir()
    for half in folder.glob("*.partial"):
        shutil.rmtree(half, ignore_errors=True)
    made = [v for v in labels if read_json(folder / v / "quant_lab.json").get(
        "fingerprint") != keys[v][0]]
    wide = 4 if o.dtype == "float32" else 2
    need = len(made) * weight_bytes(lab.model) * wide / 2
    logits = bool(labels) * min(LOGITS_FILE_BYTES, wide * len(lab.tokenizer) * min(
        o.kld_tokens, len(lab.eval_ids)))
    need += logits * (os.stat(temporary).st_dev == os.stat(folder).st_dev)
    for name, place, wanted in (("--output-dir", lab.output, need),
                                ("TMPDIR", temporary, logits)):
        if wanted > (free := shutil.disk_usage(place).free):
            stop(f"{name} {place}: {free / 1e9:,.2f} GB are free, {len(made)} "
                 f"checkpoints and logits may take {wanted / 1e9:,.2f}; make room, "
                 "name another folder or run fewer --variants")


# %%
def run_lab(lab: Lab, words: list[str]) -> dict:
    """Run what is not finished; returns the content of results.json."""
    log, checkpoints = lab.output / "log.txt", lab.output / "checkpoints"
    if lab.options.fresh:
        (lab.output / "results.json").unlink(missing_ok=True)
        for label in VARIANTS:
            shutil.rmtree(checkpoints / label, ignore_errors=True)
    with chatter_to(log):
        model = hash_files(lab.model.iterdir())
        keys = {label: make_keys(label, lab, model) for label in VARIANTS}
    wanted, reference = lab.options.variants, None
    head = describe_run(lab.options, lab.machine, lab.versions, words)
    rows = take_over(lab, keys, head)
    check_disk(lab, [label for label in wanted if label not in rows], keys)
    if not rows.keys() >= set(wanted):
        start = time.perf_counter()
        with chatter_to(log):
            reference = measure_reference(lab)
        done = "failed" if isinstance(reference, Exception) else "scored"
        print(f"{'the model as it came':26} {done} in "
              f"{time.perf_counter() - start:10,.0f} s", flush=True)
    for number, label in enumerate(wanted, 1):
        say = partial(print, f"[{number}/{len(wanted)}] {label:20}", file=sys.stdout,
                      flush=True)  # Here sys.stdout is not yet the log.
        if label in rows:
            say("finished before")
        else:
            rows[label] = run_variant(label, keys[label], lab, reference, say)
        base = rows.get(BASELINE, ROW)["weight_bytes"]
        for row in rows.values():
            size = row["weight_bytes"]
            row["size_ratio"] = size / base if size and base else None
        results = head | dict(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            variants=[rows[v] for v in VARIANTS if v in rows])
        write_json(lab.output / "results.json", results)
    return results

# %% [markdown]
"""
## Report

All is rendered from `results.json`: tables and verdict on the terminal, `summary.md`,
the picture, a model card for each checkpoint. A difference counts where intervals share
no value; where they do, several variants are named.
"""


# %%
QUALITY = (("MB", "weight_bytes", 1, 1e-6), ("size", "size_ratio", 3, 1),
           ("perplexity", "perplexity_interval", 2, 1),
           ("ratio", "perplexity_ratio", 4, 1), ("KLD", "kld", 5, 1),
           ("top-1 %", "top1_agreement", 1, 1), ("tokens", "divergence", 0, 1))


def list_tables(config: dict) -> list[tuple]:
    """The columns of the tables: title, key (after @, of a batch), digits, unit."""
    more = [batch for batch in config["batch_sizes"] if batch > 1]
    batches = [tuple(column for n in more[at : at + 2] for column in (
        (f"batch {n}", f"tok_s@{n}", 0, 1),
        (f"bandwidth {n} %", f"bandwidth_fraction@{n}", 0, 100)))
        for at in range(0, len(more), 2)]
    return [QUALITY, (
        ("TTFT ms", "ttft_s", 1, 1000), ("latency s", "latency_s", 3, 1),
        ("tokens/s", "decode_tok_s", 1, 1),
        ("bandwidth %", "bandwidth_fraction@1", 0, 100)), *batches, (
        ("weights MB", "weights_memory_bytes", 1, 1e-6),
        ("peak MB", "peak_memory_bytes", 1, 1e-6),
        ("quantize s", "quantize_seconds", 1, 1), ("load s", "load_seconds", 1, 1),
        ("compile s", "compile_seconds", 1, 1))]


def show(value: float | str | dict, digits: int, unit: float = 1) -> str:
    """A figure; a timing's median (min–max), an estimate ± half its interval."""
    if isinstance(value, str):
        return plain(value)
    if not isinstance(value, dict):
        return f"{unit * value:,.{digits if abs(unit * value) < 1000 else 0}f}"
    mean, low, high, *_ = value.values()
    if low is None:
        return show(mean, digits, unit)
    if "samples" in value or abs(high + low - 2 * mean) > 0.1 * (high - low):
        return "{} ({}–{})".format(*(show(x, digits, unit) for x in (mean, low, high)))
    return f"{show(mean, digits, unit)} ± {show((high - low) / 2, digits, unit)}"


def render_table(rows: list[dict], columns: tuple) -> str:
    """The rows as a Markdown table, aligned for the terminal too; –: not measured."""
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
BANDS = {"00_fp16_baseline": (13.9, 14.6), "01_fp8_dynamic": (0.98, 1.02),
         "02_gptq_w4a16": (1.08, 1.20), "03_smoothquant_w8a8": (0.96, 1.04)}


def render_warnings(results: dict) -> list[str]:
    """Failures, fallbacks, noise, figures outside the band of the known model."""
    config, said = results["config"], []
    known = ("Qwen2.5-0.5B-Instruct", WIKITEXT, 2048, 0) == (
        Path(config["model"]).name, config["eval_text"], config["window"],
        config["max_windows"])
    for row in results["variants"]:
        label, base = row["label"], row["label"] == BASELINE
        if row["error"]:
            said.append(f"{label} failed: {quote(row['error'])}")
            continue
        if row["rtn_fallbacks"]:
            said.append(f"Warning: {row['rtn_fallbacks']} modules of {label} fell back "
                        "to round-to-nearest: more --dampening or chats may help.")
        if row.get("retried"):
            said.append(f"Note: for want of memory, {label} was quantized Linear by "
                        "Linear instead of layer by layer.")
        if base and (noise := row["kld"]["mean"]):
            said.append(f"Warning: the baseline differs from itself, KLD {noise:.1e}.")
        value = row["perplexity"] if base else row["perplexity_ratio"]["value"]
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


# %%
def render_completions(rows: list[dict], number: int) -> str:
    """The variants' completions of a prompt side by side, indented as Markdown code."""
    said = {row["label"]: row["divergence"]["completions"][number]
            for row in rows if row["divergence"]}
    width = 112 // max(len(said), 1) - 3
    columns = [[label[:width], f"tokens alike: {one['same_tokens']}", "-" * width,
                *textwrap.wrap(plain(one["completion"]), width)]
               for label, one in said.items()]
    return "\n".join([f"**{PROMPTS[number]}**", "", *(
        "    " + " | ".join(f"{cell:{width}}" for cell in line).rstrip()
        for line in zip_longest(*columns, fillvalue=""))])


def render_tables(results: dict, rows: list[dict]) -> str:
    """The tables of some rows, each below how its figures were measured."""
    config, tables = results["config"], list_tables(results["config"])
    done = next((row for row in rows if row["status"] == "ok"), ROW | dict(
        tokens_scored=0, kld=dict(tokens=0), prompt_tokens=0))
    captions = (
        f"Quality on {quote(name_source(config['eval_text']))}: "
        f"{done['tokens_scored']:,} tokens scored in windows of {config['window']:,}, "
        f"the first of each not; KLD and top-1 at {done['kld']['tokens']:,} of them. "
        "±: half a 95 % interval. "
        "size, ratio: bytes and perplexity over the baseline's. Against the original: "
        "KLD: KL divergence, nats. top-1: same most probable token. tokens: number "
        f"until greedy completions of {len(PROMPTS)} prompts differ, "
        f"{config['new_tokens']} if never. MB: 10^6 bytes of safetensors.",
        f"Speed of one sequence, median (min–max) of {config['repeats']}: TTFT: first "
        f"token after a prompt of {done['prompt_tokens']} tokens. latency: "
        f"{config['new_tokens']} tokens. tokens/s: after the first. bandwidth: what "
        "decoding reaches of the bandwidth of copying, measured beside.",
        *["tokens/s and bandwidth of several sequences at once."] * (len(tables) - 3),
        "Cost: weights in memory after running, peak memory in a prefill or a step.")
    return "\n\n".join(
        textwrap.fill(plain(caption), 110, break_on_hyphens=False) + "\n\n"
        + render_table(rows, table) for caption, table in zip(captions, tables))


# %%
def render_body(results: dict, prompts: int) -> str:
    """Tables, what ran, verdict, completions of the first prompts."""
    rows = results["variants"]
    point = partial(textwrap.fill, width=110, break_on_hyphens=False,
                    initial_indent="- ", subsequent_indent="  ")
    ran = [f"{row['label']}: {row['runs_as']}" for row in rows if row["runs_as"]]
    notes = list_best(rows) + render_verdict(rows) + render_warnings(results)
    completions = [render_completions(rows, number) for number in range(prompts)]
    return "\n\n".join([
        render_tables(results, rows),
        *(["Run as:", "\n".join(map(point, ran))] if ran else []),
        "## Verdict", "\n".join(map(point, notes)),
        "## Greedy completions", *completions])


def render_summary(results: dict) -> str:
    """summary.md: card, picture, tables, verdict, all completions, command."""
    return "\n\n".join([
        f"# quant_lab: {quote(results['config']['model'])}",
        textwrap.indent(render_card(results) + f"\nmeasured     {results['created']}",
                        " " * 4),
        "![Size and quality, speed, memory](summary.png)",
        render_body(results, len(PROMPTS)), "## Made with",
        "    " + plain(shlex.join(results["command"])) + "\n"])


# %%
def list_best(rows: list[dict]) -> list[str]:
    """Which variant to take for what; several, where their ranges share a value."""
    done = [row for row in rows if row["status"] == "ok"]
    quantized = [row for row in done if row["label"] != BASELINE]

    def best(what, rows, read, sign=1):
        ends = [(*sorted(sign * x for x in read(row)), row["label"]) for row in rows]
        near = min(high for _, high, _ in ends)
        names = [name for low, _, name in ends if low <= near]
        return f"{what}: {' or '.join(names)}"

    said = []
    if len(done) > 1:  # Within 1 %: scales of another shape, no more.
        said.append(best("Smallest", done, lambda row: [
            row["weight_bytes"] * (1 + apart) for apart in (-0.005, 0.005)]))
    if len(quantized) > 1 and None not in (row["kld"]["low"] for row in quantized):
        said.append(best("Closest to the original by KLD", quantized, lambda row: [
            row["kld"][end] for end in ("low", "high")]))
    measured = [number for row in done for number, one in enumerate(row["decode"])
                if one["tok_s"]]
    for number in sorted({0, max(measured)}) if len(done) > 1 else ():
        able = [row for row in done if row["decode"][number]["tok_s"]]
        batch = done[0]["decode"][number]["batch"]
        said.append(best(  # Within 2 %: another process or day may turn that round.
            f"Fastest for a batch of {batch}" if number else "Fastest for one sequence",
            able, lambda row: [row["decode"][number]["tok_s"][end] * (1 + apart)
                               for end, apart in (("min", -0.01), ("max", 0.01))], -1))
    return said


def relate(row: dict, base: dict, read: Callable[[dict], float]) -> float | None:
    """A figure of the row over the baseline's; None unless both were measured."""
    try:
        return read(row) / read(base)
    except (KeyError, TypeError):
        return None


# %%
SHADES, MARKERS = ("#1b3a57", "#6f9bc1", "#cfe0ee"), "osD^v"


def draw_bars(axes, rows: list[dict], base: dict, title: str, bars: dict) -> None:
    """Horizontal bars of each row, relative to the baseline, with their values."""
    related = {name: [relate(row, base, read) for row in rows]
               for name, read in bars.items()}
    related = {name: values for name, values in related.items() if any(values)}
    for number, (name, values) in enumerate(related.items()):
        for place, (row, value) in enumerate(zip(rows, values)):
            y = place + 0.27 * (number - (len(related) - 1) / 2)
            axes.barh(y, value or 0, 0.25, color=SHADES[number], edgecolor="black",
                      linewidth=0.6, label="" if place else name)
            axes.text((value or 0) + 0.02, y, f"{value:.2f}" if value else (
                "not measured" if row["status"] == "ok" else "failed"), va="center",
                bbox=dict(facecolor="white", edgecolor="none", pad=0.4), zorder=3)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_title(title)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    known = [value for values in related.values() for value in values if value]
    axes.set_xlim(0, 1.3 * max([1, *known]))
    if known:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=len(bars),
                    frameon=False, handlelength=1, columnspacing=1)
    else:
        axes.text(0.1, (len(rows) - 1) / 2, "nothing to compare")


# %%
def draw_loss(axes, rows: list[dict]) -> None:
    """Each row's size and perplexity; of one size, the later stand to the right."""
    for number, (row, marker) in enumerate(zip(rows, MARKERS)):
        size, ratio = row["size_ratio"], row["perplexity_ratio"] or {}
        value, low, high = (100 * (ratio.get(end) or math.nan) - 100
                            for end in ("value", "low", "high"))
        found = "failed" if row["status"] != "ok" else "no baseline"
        if row["status"] == "ok" and size:
            found = f"{size:.3f} of the bytes, {value:+.2f} %"
        before = sum(size is not None and abs((other["size_ratio"] or 9) - size) < 0.01
                     for other in rows[:number])
        axes.errorbar((size or math.nan) + 0.015 * before, value,
                      [[value - low], [high - value]], fmt=marker, capsize=4,
                      markersize=9, color=SHADES[0], markerfacecolor=SHADES[2],
                      label=f"{row['label']}: {found}")
    axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
    axes.margins(0.15)
    axes.set_xlabel("bytes on disk, baseline = 1 (left is smaller)")
    axes.set_ylabel("perplexity over the original's in %, 95 % interval")
    axes.set_title("Size and loss of quality")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)


def draw_summary(results: dict):
    """The matplotlib figure of summary.png: size and quality, speed, memory."""
    from matplotlib.figure import Figure

    rows = results["variants"]
    base = next((row for row in rows if row["label"] == BASELINE), ROW)
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.2, 1, 0.7])
    draw_loss(left, rows)
    batches = [one["batch"] for one in base["decode"] or [dict(batch=1)]]
    several = {} if len(batches) == 1 else {
        f"batch {batches[-1]}": lambda row: row["decode"][-1]["tok_s"]["median"]}
    slow = all("not compiled" in row["runs_as"] for row in rows if row["runs_as"])
    unit = SHORT[results["config"]["dtype"]].upper()
    draw_bars(middle, rows, base, f"Speed, {unit} = 1 (long is fast" + (
        "; nothing compiled)" if slow else ")"), {
        "one sequence": lambda row: row["decode_tok_s"]["median"], **several,
        "first token": lambda row: 1 / row["ttft_s"]["median"]})
    draw_bars(right, rows, base, f"Memory, {unit} = 1", {
        "weights": lambda row: row["weights_memory_bytes"],
        "peak": lambda row: row["peak_memory_bytes"]})
    right.set_yticklabels([])
    title = f"{name_model(results)[-60:]} on {plain(results['machine']['name'])}"
    figure.suptitle("\n".join([title, *list_best(rows)]), parse_math=False)
    return figure


# %%
def describe_checkpoint(row: dict, results: dict) -> tuple[dict, str]:
    """A checkpoint's metadata on the hub, and how it was made."""
    config, quantized = results["config"], row["label"] != BASELINE
    head = dict(library_name="transformers", pipeline_tag="text-generation")
    if base := results.get("base_model"):
        head |= dict(base_model=base)
        head |= dict(base_model_relation="quantized") if quantized else {}
    if not quantized:
        return head, "The original, saved anew: the others are held against it."
    data = "on nothing."
    if VARIANTS[row["label"]].calibrated:
        data = (f"on at most {config['calibration_samples']} chats of "
                f"{quote(name_source(config['calibration_data']))}, of each at most "
                f"{config['calibration_length']:,} tokens, seed {config['seed']}.")
    head["tags"] = ["compressed-tensors", "llmcompressor", row["scheme"].lower()]
    return head, (f"{row['scheme']} of compressed-tensors, made as recipe.yaml says by "
                  f"llmcompressor {results['versions']['llmcompressor']}, calibrated "
                  + data)


# %%
PROMPT_CODE = """\
chat = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True,
                                       return_tensors="pt", return_dict=True)"""


def render_model_card(row: dict, results: dict) -> str:
    """README.md of a checkpoint's folder, in the format of the hub's model cards."""
    label, name = row["label"], quote(name_model(results))
    rows = [one for one in results["variants"] if one["label"] in (BASELINE, label)]
    head, made = describe_checkpoint(row, results)
    prompt = ('inputs = tokenizer("Hello!", return_tensors="pt")'
              if results["config"].get("plain_text") else PROMPT_CODE)
    lines = "\n".join(f"{name}: {json.dumps(value)}" for name, value in head.items())
    return f"""---
{lines}
---

# {name}, {row["scheme"]}

{textwrap.fill(f"{name}. {made}", 88, break_on_hyphens=False)}
The licence is that of the original. The weights are safetensors; no remote code runs.

## Measured

{textwrap.indent(render_card(results), "    ")}

{render_tables(results, rows)}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # This folder, or where it was uploaded to.
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto")
{prompt}
print(tokenizer.decode(model.generate(**inputs.to(model.device), max_new_tokens=64)[0]))
```

takes `transformers`, `accelerate` and, quantized, `compressed-tensors`; there quantized
weights are unpacked to 16 bits when they run. vLLM reads the format, too, from an
environment of its own, since it needs other versions; over several GPUs where their
number divides heads and groups of inputs (not part of what was measured):

```sh
python -m venv serve && serve/bin/pip install vllm
serve/bin/vllm serve .
serve/bin/vllm serve . --tensor-parallel-size 2
```
"""


# %%
def write_report(results: dict, output: Path) -> None:
    """Model cards into the checkpoints' folders; summary.md, .png and .svg."""
    for row in results["variants"]:
        card = output / "checkpoints" / row["label"] / "README.md"
        if row["status"] == "ok" and card.parent.is_dir():
            card.write_text(render_model_card(row, results), encoding="utf-8")
        else:
            card.unlink(missing_ok=True)
    (output / "summary.md").write_text(render_summary(results), encoding="utf-8")
    figure = draw_summary(results)
    figure.savefig(output / "summary.png", dpi=140)
    figure.savefig(output / "summary.svg")


@contextlib.contextmanager
def saving_to(output: Path):
    """Turn a refusing disk into exit code 2 and one line, an interrupt into 130."""
    try:
        return (yield)
    except BrokenPipeError:  # Nobody reads what is printed.
        os._exit(1)
    except OSError as error:
        stop(f"--output-dir {output}: {describe(error)}; what is finished is kept, "
             "make room or name another folder and run again")
    except KeyboardInterrupt as error:  # In a notebook, which keeps what it saw.
        traceback.clear_frames(error.__traceback__)
    free_memory()
    print(STOPPED)
    sys.exit(130)


if __name__ == "__main__":
    with saving_to(OUTPUT):
        RESULTS = run_lab(LAB, WORDS)
    if "ipykernel" in sys.modules:
        from IPython.display import Image, Markdown, display
        display(Markdown(render_body(RESULTS, len(PROMPTS))))
    else:
        print("\n" + render_body(RESULTS, 1))
    with saving_to(OUTPUT):
        write_report(RESULTS, OUTPUT)
    if "ipykernel" in sys.modules:
        display(Image(OUTPUT / "summary.png"))
    print("\nwrote results.json, summary.md, summary.png, summary.svg, log.txt and "
          f"checkpoints with model cards\nto {OUTPUT}")
    if any(row["status"] == "failed" for row in RESULTS["variants"]):
        sys.exit(1)
