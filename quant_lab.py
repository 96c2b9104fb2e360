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

A quantized model takes fewer bytes. Whether it is faster on your GPU, and what it lost,
has to be measured. This script writes a causal language model in float16 and as three
compressed-tensors checkpoints made by llmcompressor, and sends all four through the
same functions: bytes, quality, speed, memory.

    python quant_lab.py                        the four variants, on a GPU
    python quant_lab.py --demo                 the same code, any machine, two minutes
    python quant_lab.py --variants 00_fp16_baseline 02_gptq_w4a16 --max-windows 20

Each run prints its variant beside the baseline; tables and a verdict come last. All of
it goes to the output folder: `results.json` with every single timing, `summary.md`, a
picture, and checkpoints with model cards.

Every variant, the baseline too, is compared with the *reference*: the model as it came.
The *baseline* is that model written and loaded again like any other variant, so what
differs there is the noise of the measurement.

The story comes first: recipes, options, model and text, quantizing, quality, speed,
rows, tables. Then machinery, to be skipped at first reading. The runs are at the end.
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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from functools import cache, partial
from itertools import islice, product, zip_longest
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

try:
    import triton
    from triton import jit, language as tl
except ImportError:  # Comes with PyTorch for GPUs only.
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda kernel: None

IN_NOTEBOOK = "__file__" not in globals()
HERE = Path.cwd() if IN_NOTEBOOK else Path(__file__).resolve().parent

# %% [markdown]
"""
## Recipes

WxAy means weights of x bits and activations of y. SM is a GPU's compute capability.

| label | weights | activations | computes in |
| --- | --- | --- | --- |
| `01_fp8_dynamic` | FP8, a scale per output | FP8, per token | SM 8.9 (L4, H100) |
| `02_gptq_w4a16` | int4, a scale per 128 inputs | 16-bit | unpacked, 16-bit |
| `03_smoothquant_w8a8` | int8, a scale per output | int8, per token | SM 7.5 (T4) |

- [FP8](https://arxiv.org/abs/2209.05433) rounds weights to nearest. It needs no data:
  the scales of activations are found while the model runs (*dynamic*).
- [GPTQ](https://arxiv.org/abs/2210.17323) rounds input by input and makes up for each
  error in the weights not yet rounded, as calibration inputs weigh it. *Dampening* is
  added to the diagonal of the matrix it inverts; more is safer and less exact.
- [SmoothQuant](https://arxiv.org/abs/2211.10438) first divides activations by a factor
  per channel and multiplies the weights by it, which moves outliers to where they do
  less harm. Its GPTQ has `actorder=None`: the default writes a key into the checkpoint
  that the compressed-tensors of vLLM 0.20 to 0.22 rejects for W8A8.
- `rtn_w4a16`, on request, rounds to nearest in the format of `02_gptq_w4a16`. The
  difference between the two is what GPTQ buys.

Embedding and `lm_head` stay 16-bit. To add a recipe, add an entry: nothing else.
"""

# %%
@dataclass(frozen=True)
class Variant:
    """Describe a row; recipe(modifiers, options) returns llmcompressor's modifiers."""

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
BASELINE, GPTQ, CONTROL = "00_fp16_baseline", "02_gptq_w4a16", "rtn_w4a16"

# %% [markdown]
"""
## Options

Each option stands here once, with a remark on when to change it; the command line is
derived from it. What is typed wins over what `--demo` presets. In a notebook, put the
same words into the environment first, as in `%env QUANT_LAB_ARGS=--demo`.
"""

# %%
ULTRACHAT, WIKITEXT = "HuggingFaceH4/ultrachat_200k", "Salesforce/wikitext"
DTYPES = dict(float16="fp16", bfloat16="bf16", float32="fp32")
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
    """Declare an option: its default, when to change it, what it may be."""
    return field(default=default, metadata=dict(
        remark=remark, low=low, high=high, choices=choices))

@dataclass(frozen=True)
class Options:
    """Hold what can be changed."""

    model: str = option("Qwen/Qwen2.5-0.5B-Instruct", "hub id or folder of a causal LM")
    variants: tuple = option(tuple(VARIANTS)[:4], f"fewer, to be quick; or {CONTROL}")
    output_dir: str = option("", "where to write, if not results/<model>-<device>")
    calibration_data: str = option(ULTRACHAT, "a .jsonl closer to your traffic")
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
    dtype: str = option("float16", "another if float16 overflows", choices=DTYPES)
    device: str = option("auto", "cpu runs anywhere", choices=("auto", "cuda", "cpu"))
    seed: int = option(42, "to see what the choice of chats changes", 0, 2**32 - 1)
    plain_text: bool = option(False, "no chat template, for a base model")
    demo: bool = option(False, "tiny model and text beside this: no GPU, no network")
    fresh: bool = option(False, "forget finished work in the output folder")

DEMO = dict(model="tests/tiny-qwen2", calibration_data="tests/demo/chats.jsonl",
            eval_text="tests/demo/eval.txt", calibration_samples=32,
            calibration_length=512, window=512, batch_sizes=(1, 8))

# %%
def read_words() -> list[str]:
    """Return the command line's words; in a notebook, those of QUANT_LAB_ARGS."""
    with usable("QUANT_LAB_ARGS", "", "write it as on a command line"):
        return (shlex.split(os.environ.get("QUANT_LAB_ARGS", "")) if IN_NOTEBOOK
                else sys.argv[1:])

def parse_options(words: list[str]) -> Options:
    """Read options from command-line words; a bad name or value exits with 2."""
    parser = argparse.ArgumentParser(
        "quant_lab.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: stop(f"{message}; --help lists the options")
    for f in fields(Options):
        several = isinstance(f.default, tuple)
        form = dict(type=type(f.default[0] if several else f.default),
                    choices=f.metadata["choices"], nargs="+" if several else None)
        if isinstance(f.default, bool):
            form = dict(action="store_true")
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **form,
                            help=f.metadata["remark"] + " [%(default)s]")
    if "--demo" in words:
        parser.set_defaults(**DEMO)
    given = vars(parser.parse_args(words))
    for f in fields(Options):
        low, high, value = f.metadata["low"], f.metadata["high"], given[f.name]
        for one in value if isinstance(f.default, tuple) else [value]:
            if low is not None and not low <= one <= high:
                stop(f"--{f.name.replace('_', '-')} {one}: not from {low} to {high}")
    labels = ",".join(given["variants"]).split(",")
    for label in set(labels) - VARIANTS.keys():
        stop(f"--variants {label!r}: choose from {', '.join(VARIANTS)}")
    return Options(**given | dict(
        variants=tuple(v for v in VARIANTS if v in labels),
        batch_sizes=tuple(sorted({1, *given["batch_sizes"]}))))

# %%
def choose_device(options: Options) -> tuple[torch.device, str]:
    """Return the device and the reason for it; without a usable one, exit with 2."""
    if options.device != "cpu" and torch.cuda.is_available():
        if torch.cuda.get_device_capability() < (8, 0):
            if options.dtype == "bfloat16":
                stop("--dtype bfloat16: this GPU only emulates it; take float16")
            # The Triton kernels of llmcompressor are for later chips than a T4.
            os.environ["LLMCOMPRESSOR_DISABLE_GPTQ_TRITON"] = "1"
            os.environ["CT_ENFORCE_EAGER"] = "1"
        return torch.device("cuda", 0), "the first CUDA GPU"
    if options.device == "cpu":
        return torch.device("cpu"), "asked for"
    if options.demo and options.device == "auto":
        return torch.device("cpu"), "no CUDA GPU, and the demo needs none"
    stop("no CUDA GPU found; all but --demo and --device cpu need one.",
         "In Colab: Runtime > Change runtime type > T4 GPU, then run again.",
         "Without a GPU: python quant_lab.py --demo (the same code, a tiny model).")

# %% [markdown]
"""
## Model and text

From the hub comes only what is needed: the model's safetensors and tokenizer, the test
split of WikiText, the beginning of UltraChat. Of a Parquet file only the row groups in
question are read: `load_dataset` would read whole shards, and streaming with it can
abort on exit (datasets#7566, seen in 5.2). What was read is kept in the hub's
cache, under `assets/quant_lab`. Code of a model never runs.

Two texts that share nothing are used. *Calibration* chats, in the model's own chat
template, are what GPTQ and SmoothQuant look at: 256 conversations, drawn with `--seed`
from the first 1,024, each cut to 1,024 tokens. *Evaluation* text is what is scored. The
demo takes both from Python's help: an eighth of its topics is held out and scored, the
rest calibrates, and trained the tiny model (`tests/make_checkpoint.py`).

Chats of your own are a .jsonl, in each line one as
`{"messages": [{"role": "user", "content": "..."}, ...]}`.
"""

# %%
def find_path(name: str) -> Path | None:
    """Return the file or folder of this name, here or beside the script, or None."""
    paths = Path(os.path.expanduser(name)), HERE / name
    return next(filter(os.path.exists, paths), None)

def tokenize_prompt(tokenizer, prompt: str) -> dict[str, Tensor]:
    """Return a prompt in the chat template: input_ids, attention_mask, each [1, n]."""
    return tokenizer.apply_chat_template(
        [dict(role="user", content=prompt)], add_generation_prompt=True,
        return_tensors="pt", return_dict=True)

# %%
def open_model(options: Options) -> tuple[Path, object, int]:
    """Return a chat model's folder (fetched if need be), tokenizer, context length."""
    import transformers
    from huggingface_hub import snapshot_download
    transformers.logging.set_verbosity_error()  # Warnings quote a model's files.
    advice = "give a folder or a hub id (needs network, access)"
    with usable("--model", options.model, advice):
        folder = find_path(options.model) or Path(snapshot_download(
            options.model, ignore_patterns=["*/*", "consolidated*"],
            allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]))
        if read_json(folder / "config.json").get("quantization_config"):
            raise ValueError("is quantized already, give the model it was made from")
        # On "meta" it takes no memory, but each file is opened and must be whole.
        transformers.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, device_map="meta", trust_remote_code=False, use_safetensors=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False)
        ids = tokenizer("word").input_ids
        if options.plain_text:  # Turns without roles, begun as the tokenizer does.
            begin = "{{ bos_token }}" if ids[:1] == [tokenizer.bos_token_id] else ""
            turns = "{{ messages | map(attribute='content') | join('\n') }}"
            tokenizer.chat_template = begin + turns
        if not ids or not tokenizer.chat_template:
            raise ValueError("no tokenizer or chat template: are files missing? A base "
                             "model needs --plain-text")
        longest = max(tokenize_prompt(tokenizer, p).input_ids.shape[1] for p in PROMPTS)
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or 2**31
    if longest + options.new_tokens > context:
        stop(f"--new-tokens {options.new_tokens}: with a prompt of {longest} over the "
             f"model's context of {context}; choose fewer")
    return folder, tokenizer, context

# %%
def fetch_column(files: str, column: str, rows: int | None = None) -> list:
    """Return the first rows, or all, of the first Parquet file that a pattern names."""
    from huggingface_hub import HfFileSystem, cached_assets_path
    from pyarrow.parquet import ParquetFile
    kept, hub = cached_assets_path("quant_lab", files) / f"{rows}.json", HfFileSystem()
    if not read_json(kept):
        first = min(hub.glob(f"datasets/{files}"))
        with hub.open(first, cache_type="none") as stream:
            batches = ParquetFile(stream).iter_batches(256, columns=[column])
            values = (row[column] for batch in batches for row in batch.to_pylist())
            write_json(kept, {column: list(islice(values, rows))})
    return read_json(kept)[column]

def read_chats(file: Path) -> list[list[dict]]:
    """Return chats of a .jsonl; the first line that is none exits with 2."""
    chats, roles = [], {"system", "user", "assistant", "tool"}
    lines = file.read_text(encoding="utf-8-sig").rstrip().split("\n")
    advice = 'no conversation {"messages": [{"role": "user", "content": "..."}, ...]}'
    for number, line in enumerate(lines, 1):
        if lines[1:] and not line.strip():
            continue
        with usable("--calibration-data", f"{file}, line {number}", advice):
            chats.append(json.loads(line)["messages"])
            texts = [turn["content"].strip() for turn in chats[-1]]
            if not any(texts) or {turn["role"] for turn in chats[-1]} - roles:
                raise ValueError("no text, or a role that is not known")
    return chats

# %%
def load_calibration(options: Options, tokenizer, context: int) -> list[list[int]]:
    """Return token ids of the calibration chats; unusable data exits with 2."""
    source, wanted = options.calibration_data, options.calibration_samples
    with usable("--calibration-data", source, "give a .jsonl (default: needs network)"):
        if source == ULTRACHAT:
            chats = fetch_column(f"{source}/data/train_sft-*", "messages", 4 * wanted)
        else:
            chats = read_chats(find_path(source) or Path(source))
        random.Random(options.seed).shuffle(chats)
        samples = tokenizer.apply_chat_template(
            chats[:wanted], truncation=True,
            max_length=min(options.calibration_length, context)).input_ids
    print(f"calibration  {len(samples)} chats of {source}, {wanted} asked for, "
          f"{sum(map(len, samples)):,} tokens")
    return samples

def load_evaluation(options: Options, tokenizer, context: int) -> Tensor:
    """Return token ids [n] of the evaluation text; an unusable one exits with 2."""
    source, window = options.eval_text, options.window
    with usable("--eval-text", source, "give a UTF-8 text (default: needs network)"):
        if source == WIKITEXT:
            rows = fetch_column(f"{source}/wikitext-2-raw-v1/test-*", "text")
            text = "\n\n".join(rows)
        else:
            text = (find_path(source) or Path(source)).read_text("utf-8-sig")
        ids = torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.long)
    if window > min(context, len(ids)):
        stop(f"--window {window}: too large for the model's context, {context} tokens, "
             f"or --eval-text {source}, {len(ids)}; take a smaller one or more text")
    windows = min(len(ids) // window, options.max_windows or len(ids))
    print(f"evaluation   {source}: {len(ids):,} tokens, {windows} windows of {window}")
    return ids

# %% [markdown]
"""
## Quantize

Six beats: load the model, build the recipe, `oneshot`, save, hash, rename.
[llmcompressor](https://docs.vllm.ai/projects/llm-compressor) writes the baseline too,
with an empty recipe, so one writer writes all the bytes that are compared. Each
modifier of a recipe takes its own pass over the calibration chats, layer by layer.

- **MB, size**: bytes of the safetensors, in units of 10^6, and over the baseline's. A
  small model does not become four times smaller in four bits: its embedding, more than
  a quarter of Qwen2.5-0.5B, stays 16-bit.
- **quantize s**: the recipe with its calibration, without loading and saving.

Where GPTQ cannot invert a layer's matrix, llmcompressor rounds that layer to nearest
and says so in one line of its log. That line is counted, and the verdict warns of it.
"""

# %%
def load_model(folder: Path, dtype: str):
    """Return a causal LM in eval mode on the CPU; ValueError if weights are missing."""
    from transformers import AutoModelForCausalLM
    free_memory()
    with memory_for(f"loading {folder.name}", "a smaller --model"):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa",
            output_loading_info=True, trust_remote_code=False, use_safetensors=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{folder.name} lacks {len(missing)} weights, as {missing[0]}")
    return model.eval()

def build_recipe(label: str, options: Options) -> list:
    """Return new llmcompressor modifiers of a variant; none for the baseline."""
    from llmcompressor.modifiers import gptq, quantization, transform
    modifiers = vars(gptq) | vars(quantization) | vars(transform)
    return VARIANTS[label].recipe(SimpleNamespace(**modifiers), options)

# %%
def quantize_variant(label: str, lab: "Lab") -> dict:
    """Write `checkpoints/<label>` and return its part of the row."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from datasets import Dataset
    from llmcompressor import oneshot
    variant, samples, data = VARIANTS[label], lab.samples, {}
    if variant.calibrated:
        masks = [[1] * len(ids) for ids in samples]
        data = dict(
            dataset=Dataset.from_dict(dict(input_ids=samples, attention_mask=masks)),
            max_seq_length=max(map(len, samples)), num_calibration_samples=len(samples),
            shuffle_calibration_samples=False)
    folder = lab.output / "checkpoints" / label
    unfinished = folder.with_suffix(".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    torch.manual_seed(lab.options.seed)
    model = load_model(lab.model_folder, lab.options.dtype)
    recipe = build_recipe(label, lab.options)
    with (llmcompressor_session(lab, model, len(recipe)) as warnings,
          memory_for("quantizing", "less --calibration-length or a smaller --model")):
        start = time.perf_counter()
        if recipe:
            group = preset_name_to_scheme(variant.scheme, []).weights.group_size or 1
            for name, linear in model.named_modules():
                if isinstance(linear, torch.nn.Linear) and linear.in_features % group:
                    raise ValueError(f"{name} is {linear.in_features} wide, no multiple"
                                     f" of a group of {group}: take FP8 or W8A8")
            oneshot(model=model, recipe=recipe, processor=lab.tokenizer, **data)
            if not any(hasattr(m, "quantization_scheme") for m in model.modules()):
                raise ValueError("the recipe found no Linear layer to quantize")
        seconds = time.perf_counter() - start if recipe else 0.0
        model.save_pretrained(unfinished)  # Adds recipe.yaml from the session.
    lab.tokenizer.save_pretrained(unfinished)
    if lab.options.plain_text:  # The template is not the model's own.
        (unfinished / "chat_template.jinja").unlink(missing_ok=True)
    failed = re.findall(r"inversion failed for (\d+)/", "".join(warnings))
    row = dict(
        quantize_seconds=seconds, rtn_fallbacks=sum(map(int, failed)),
        weight_bytes=sum(f.stat().st_size for f in unfinished.glob("*.safetensors")),
        checkpoint=f"checkpoints/{label}")
    write_json(unfinished / "quant_lab.json", dict(
        row=row, fingerprint=lab.head["fingerprint"], files=hash_files(unfinished)))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)  # In one step: a checkpoint is there or it is not.
    return row

def read_checkpoint(label: str, lab: "Lab") -> dict | None:
    """Return its part of the row if a checkpoint is there, complete and unaltered."""
    folder = lab.output / "checkpoints" / label
    note = read_json(folder / "quant_lab.json")
    if note.get("fingerprint") != lab.head["fingerprint"]:
        return None
    hashes = hash_files(folder)
    if any(hashes.get(name) != sha256 for name, sha256 in note["files"].items()):
        print(f"{label}: its checkpoint was cut off or altered, and is made again")
        return None
    return note["row"]

# %% [markdown]
"""
## Quality

**Perplexity** follows the GPTQ paper. The text is tokenized once and cut into windows
that do not overlap; every token but the first of a window is scored, a tail shorter
than a window is not. With the loss in nats of token i given those before it in the
window, perplexity = exp(mean loss). Compare it only with figures of the same text,
window and tokenizer: protocols differ by more than recipes do.

**Ratio**: perplexity over the reference's. Both score the very same tokens, so the
interval is that of the *paired* difference: how hard the text is cancels, and the
interval is far narrower than that of perplexity itself.

**KLD**: Kullback-Leibler divergence D(reference || variant) of the next-token
distributions, in nats, over the whole vocabulary. In perplexity a token that became
more likely pays for one that became less likely; in KLD both count, which makes it the
most sensitive figure here. It is taken at `--kld-tokens` positions spread over the
text, in float64. The reference's logits there wait in a temporary file (2.5 GB for
Qwen's vocabulary in float16; `TMPDIR` says where), so two models never have to fit at
once. **Top-1**: at how many of these positions the most probable token is the same.

**Tokens**: how many tokens of a greedy completion go by before the first that differs
from the reference's; the mean of eight prompts. Eight are few, and the interval says
so: read the completions, do not rank by this.

**The interval** (±: half of 95 %) speaks for the choice of text, not for that of chats.
What stands in one article errs together, so neither tokens nor windows are independent:
consecutive windows are joined into at most 30 blocks, and the spread of the blocks is
what counts. Two seeds tell what the choice of chats adds.
"""

# %%
LOGITS_FILE_BYTES, BLOCKS, CHUNK = 5e9, 30, 128

@torch.no_grad()
def score_text(model, ids: Tensor, options: Options, visit: Callable) -> Tensor:
    """Return losses [windows, window - 1], in nats, of the token ids [n].

    Calls `visit(window's number, logits [k, vocabulary])` with those to be compared,
    always in the same order. Raises FloatingPointError if logits are not finite.
    """
    windows = ids.unfold(0, options.window, options.window)
    windows = windows[: options.max_windows or None].to(model.device)
    losses = torch.zeros(len(windows), options.window - 1)
    compared = torch.zeros(losses.numel(), dtype=torch.bool)
    for number, window_ids in enumerate(show_progress("scoring", windows)):
        logits = model(window_ids[None], use_cache=False).logits[0]
        if number == 0:  # Spread the positions over the whole text.
            count = min(options.kld_tokens, int(LOGITS_FILE_BYTES // logits[0].nbytes),
                        losses.numel())
            compared[torch.arange(count) * losses.numel() // count] = True
            compared = compared.view_as(losses)
        # In chunks: 2,048 x 151,936 logits take 1.2 GB in float32.
        for begin in range(0, options.window - 1, CHUNK):
            chunk = slice(begin, min(begin + CHUNK, options.window - 1))
            part = logits[chunk]
            if not part.isfinite().all():
                raise FloatingPointError("logits are not finite, in float16 mostly by "
                                         "overflow: try --dtype bfloat16 or float32")
            losses[number, chunk] = F.cross_entropy(
                part.float(), window_ids[1:][chunk], reduction="none").cpu()
            chosen = compared[number, chunk].to(part.device)
            if chosen.any():
                visit(number, part[chosen])
    return losses.double()

# %%
@torch.no_grad()
def complete_prompts(model, tokenizer, new_tokens: int) -> list[list[int]]:
    """Return greedy completions of PROMPTS: token ids, at most `new_tokens` each."""
    from transformers import GenerationConfig
    # A new object: whatever generate is not told comes from the model's own defaults,
    # which may ask for sampling or a repetition penalty.
    model.generation_config = GenerationConfig(
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id)
    completions = []
    for prompt in show_progress("completing", PROMPTS):
        inputs = tokenize_prompt(tokenizer, prompt).to(model.device)
        with memory_for("completing prompts", "less --new-tokens"):
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
        completions.append(ids[0, inputs["input_ids"].shape[1]:].tolist())
    return completions

def measure_reference(lab: "Lab") -> SimpleNamespace:
    """Return losses, compared logits (a file), completions of the model as it came."""
    model = place_model(lab.model_folder, lab.options, lab.device)
    logits_file = tempfile.TemporaryFile()

    def keep(_, logits):
        logits_file.write(logits.cpu().view(torch.uint8).numpy().data)

    with memory_for("scoring", "less --window"):
        losses = score_text(model, lab.eval_ids, lab.options, keep)
    return SimpleNamespace(
        losses=losses, logits_file=logits_file,
        completions=complete_prompts(model, lab.tokenizer, lab.options.new_tokens))

# %%
def estimate(values: Tensor, windows: Tensor, scale=float, name="value") -> dict:
    """Return the mean of values [n], by this name, and its 95 % interval, scaled.

    windows [n] says which window each value is of; of fewer than three, low and high
    are None. Standard error: of a ratio of sums over clusters, here blocks (Cochran,
    Sampling Techniques, 1977, section 6.3), times Student's t (Abramowitz and Stegun
    26.7.5).
    """
    mean, (_, places) = values.mean().item(), windows.unique(return_inverse=True)
    count = int(places.max()) + 1
    blocks = min(count, BLOCKS)
    if blocks < 3:
        return {name: scale(mean), "low": None, "high": None}
    block_of_value = places * blocks // count
    sums = torch.bincount(block_of_value, values - mean)
    error = math.sqrt(sums.square().sum() * blocks / (blocks - 1)) / len(values)
    series = 1.960, 2.372, 2.822, 2.556, 1.589  # 1.960: the normal distribution's.
    t = sum(c / (blocks - 1)**power for power, c in enumerate(series))
    half = t * error
    return {name: scale(mean), "low": scale(mean - half), "high": scale(mean + half)}

# %%
def measure_quality(model, ids: Tensor, tokenizer, options: Options,
                    reference: SimpleNamespace) -> dict:
    """Return perplexity and, against the reference, ratio, KLD, agreement, tokens."""
    klds, agreements, windows = [], [], []
    reference.logits_file.seek(0)

    def compare(number, logits):
        stored = torch.frombuffer(bytearray(reference.logits_file.read(logits.nbytes)),
                                  dtype=logits.dtype).view_as(logits).to(logits.device)
        p, q = (F.log_softmax(x.double(), dim=-1) for x in (stored, logits))
        kld, same = (p.exp() * (p - q)).sum(-1), stored.argmax(-1) == logits.argmax(-1)
        klds.append(kld.cpu())
        agreements.append(same.double().cpu())
        windows.append(torch.full((len(kld),), number))

    with memory_for("scoring", "less --window"):
        losses = score_text(model, ids, options, compare)
    every_window = torch.arange(len(losses)).repeat_interleave(losses.shape[1])
    perplexity = estimate(losses.flatten(), every_window, math.exp)
    # Paired token by token: what makes the text hard cancels.
    ratio = estimate((losses - reference.losses).flatten(), every_window, math.exp)
    kld, same, windows = torch.cat(klds), torch.cat(agreements), torch.cat(windows)
    completions, lengths = [], []
    for prompt, mine, theirs in zip(PROMPTS, complete_prompts(
            model, tokenizer, options.new_tokens), reference.completions):
        differs = [a != b for a, b in zip_longest(mine, theirs)]
        lengths.append(differs.index(True) if any(differs) else options.new_tokens)
        completions.append(dict(
            prompt=prompt, completion=tokenizer.decode(mine, skip_special_tokens=True),
            same_tokens=lengths[-1]))
    lengths = torch.tensor(lengths, dtype=torch.float)
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
## Speed

A causal LM answers in two phases. *Prefill* reads the whole prompt at once: many rows
go through each weight, and arithmetic is what one waits for. *Decoding* then makes one
token a step: every step reads all weights for a single row, and bytes are what one
waits for. That is why fewer bits can make decoding faster and prefill slower.

A prompt of 512 tokens of the evaluation text is continued by exactly `--new-tokens`
tokens, greedy, whatever the model's own settings ask for, so no variant ends early.

- **TTFT**: time to the first token, the prefill. **Latency**: that and all new tokens.
- **tokens/s**, **batch n**: tokens after the first over the seconds they take, for one
  sequence and for n copies of it, which all cost the same. Prefill is timed for one.
- **bandwidth**: bytes that a step has to read (weights, but not an embedding that is
  only looked up; the cache) over its time, as a part of what copying 1 GB reaches on
  this machine, reads and writes counted. What dequantizing reads and writes again is
  not counted.
- **weights**: parameters and buffers in memory afterwards. **Peak**: the allocator's,
  in a prefill or a step of one sequence (GPU only).

One warm-up, then `--repeats` runs; each look at the clock waits for the device. Shown
is the median (least-greatest). Where the greatest is over 1.3 times the least, the
machine was busy with something else: the figure is marked *noisy*, and not ranked.

Decoding is what servers do, as far as PyTorch goes: a static cache, tokens that never
leave the GPU, compiled decoder layers, prefill and step as CUDA graphs. `generate`
would start each of hundreds of kernels from Python, and at this size measure Python. A
CPU does not compile, nor do `--no-compile` and `emulated`.
"""

# %%
NOISE_LIMIT = 1.3  # Greatest over least of a timing that can be ranked.

def now(device: torch.device) -> float:
    """Return the clock's seconds, once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

@cache
def measure_bandwidth(device: torch.device) -> float:
    """Return bytes per second, read and written, that copying reaches."""
    size = 10**9 if device.type == "cuda" else 10**8
    source = torch.ones(size, device=device, dtype=torch.int8)
    target, seconds = source.clone(), []
    for _ in range(10):
        start = now(device)
        target.copy_(source)
        seconds.append(now(device) - start)
    return 2 * size / statistics.median(seconds)

def summarize(samples: list[float]) -> dict:
    """Return median, least and greatest of the samples, and these."""
    return dict(median=statistics.median(samples), min=min(samples), max=max(samples),
                samples=samples)

def held_bytes(model) -> int:
    """Return bytes of the weights in memory, of what several share once."""
    storages = [x.untyped_storage() for x in (*model.parameters(), *model.buffers())]
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())

# %%
class Decoder:
    """Continue copies of a prompt, ids [1, n], greedily; token [batch, 1] is new."""
    def __init__(self, model, prompt, new_tokens, compiled, prefilled=None, batch=1):
        device, start, begin = model.device, prompt.shape[1], now(model.device)
        length = math.ceil((start + new_tokens) / 16) * 16  # SDPA wants that.
        self.model, self.token = model, prompt[:, -1:].repeat(batch, 1)
        self.position = torch.full((1,), start, device=device)
        self.mask = torch.zeros(1, 1, 1, length, dtype=model.dtype, device=device)
        self.cache = [LayerCache(length) for _ in model.get_decoder().layers]
        self.prompt, self.peaks = prompt, []  # Bytes of memory.
        if prefilled is None:
            compile_layers(model, compiled)
            self.prefill()  # Uncompiled: it makes the cache.
            self.prefill, peak = record(self.prefill, self.rewind, device, compiled)
            self.peaks.append(peak)
            self.prefill()
        else:  # A batch copies the cache of one sequence.
            for mine, theirs in zip(self.cache, prefilled.cache):
                mine.keys = theirs.keys.repeat(batch, 1, 1, 1)
                mine.values = theirs.values.repeat(batch, 1, 1, 1)
        self.step, peak = record(self.step, self.rewind, device, compiled)
        self.peaks.append(peak)
        self.seconds = now(device) - begin  # Of preparing, with compiling.

    def advance(self, ids, position, mask) -> None:
        """Run the model; its most probable next token replaces the newest."""
        for layer in self.cache:
            layer.position = position
        logits = self.model(
            input_ids=ids, position_ids=position[None], attention_mask=mask,
            past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token.copy_(logits.argmax(-1))

    def prefill(self) -> None:
        """Read the prompt and decode the first token."""
        places = torch.arange(self.prompt.shape[1], device=self.prompt.device)
        self.advance(self.prompt, places, None)

    def step(self) -> None:
        """Decode one token of each sequence."""
        self.mask.index_fill_(3, self.position, 0)
        self.advance(self.token, self.position, self.mask)
        self.position += 1

    def rewind(self) -> None:
        """Mask all places after the prompt."""
        self.position.fill_(self.prompt.shape[1])
        self.mask[..., self.prompt.shape[1] :] = -math.inf

    def run(self, steps: int) -> tuple[float, float]:
        """Return seconds of the prefill, if of one copy, and of the steps after it."""
        self.rewind()
        start = now(self.token.device)
        if len(self.token) == 1:
            self.prefill()
        prefilled = now(self.token.device)
        for _ in range(steps):
            self.step()
        return prefilled - start, now(self.token.device) - prefilled

# %%
def time_batch(decoder: Decoder, model, options: Options, bandwidth: float):
    """Return the figures of a batch's steps, and its runs: seconds of both phases."""
    steps, batch = options.new_tokens - 1, len(decoder.token)
    decoder.run(steps)  # Warm-up.
    runs = [decoder.run(steps) for _ in range(options.repeats)]
    itl = [decode / steps for _, decode in runs]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight.data_ptr() == head.weight.data_ptr()
    read = held_bytes(model) - (0 if tied else embedding.weight.nbytes) + sum(
        layer.keys.nbytes + layer.values.nbytes for layer in decoder.cache)
    return dict(
        batch=batch, tok_s=summarize([batch / x for x in itl]),
        itl_ms=summarize([1000 * x for x in itl]), step_bytes=read,
        bandwidth_fraction=read / statistics.median(itl) / bandwidth), runs

@torch.no_grad()
def measure_speed(model, prompt: Tensor, options: Options, compiled: bool,
                  bandwidth: float) -> dict:
    """Return speed and memory of continuing a prompt [1, n]; a batch may be "OOM"."""
    single, decode, seconds = None, [], 0
    for batch in options.batch_sizes:
        decoder = None  # Frees the one before, unless it is the first.
        try:
            decoder = Decoder(
                model, prompt, options.new_tokens, compiled, single, batch)
            figures, runs = time_batch(decoder, model, options, bandwidth)
            decode.append(figures)
            seconds += decoder.seconds
        except Exception as error:
            if single is None or not lacks_memory(error):
                raise
            decode.append(dict.fromkeys(decode[0]) | dict(batch=batch, error="OOM"))
        if single is None:
            single, single_runs = decoder, runs
    return dict(
        ttft_s=summarize([prefill for prefill, _ in single_runs]),
        latency_s=summarize([prefill + step for prefill, step in single_runs]),
        decode=decode, decode_tok_s=decode[0]["tok_s"], copy_bandwidth=bandwidth,
        weights_memory_bytes=held_bytes(model), prompt_tokens=prompt.shape[1],
        peak_memory_bytes=max(filter(None, single.peaks), default=None),
        compile_seconds=seconds if compiled else None)

# %% [markdown]
"""
## Rows

A variant goes from recipe to row in three steps, each from a fresh load: quantized,
scored, timed. One that fails leaves a row with its reason, and the others go on.

`results.json` is written after each row; the same command goes on where it was. A
folder holds results of *one* set of options, model files, texts, recipes, versions,
machine and number of threads: what was measured under different conditions never meets
in a table. Where anything differs the run is refused and names it, since a finished
row may have taken hours. Other changes of the script go unnoticed: `--fresh`.

On a GPU each variant is timed in a process of its own: on an H100 the first model that
a process compiles decodes some 14 % faster than each later one, the same model again
included, and why is not known. A notebook has but one process, and `runs_as` says so.

**load s** is reading the checkpoint onto the device; **compile s** compiling, warming
up and recording for all batch sizes, less where the compiler's cache on disk helps. If
compiling fails, the variant is timed uncompiled, and `runs_as` says so.
"""

# %%
ROW = dict.fromkeys((
    "label", "status", "error", "scheme", "checkpoint", "weight_bytes", "size_ratio",
    "quantize_seconds", "rtn_fallbacks", "perplexity", "perplexity_interval",
    "perplexity_ratio", "tokens_scored", "window_losses", "kld", "top1_agreement",
    "divergence", "load_seconds", "compile_seconds", "weights_memory_bytes",
    "peak_memory_bytes", "ttft_s", "latency_s", "decode_tok_s", "decode",
    "copy_bandwidth", "prompt_tokens", "runs_as", "fingerprint"))
SCHEMA = 2  # Raised when keys go or measuring changes: older results are refused.
MAY_DIFFER = "variants", "output_dir", "fresh", "memory_bytes"

@dataclass
class Lab:
    """Hold what the runs share: inputs, rows by label, the reference once measured.

    eval_ids [n] and samples are token ids; head is all of results.json but its rows.
    """

    options: Options
    device: torch.device
    output: Path
    lock: object
    model_folder: Path
    tokenizer: object
    context: int
    eval_ids: Tensor
    samples: list[list[int]]
    head: dict
    rows: dict[str, dict]
    reference: SimpleNamespace | None = None

def describe_run(options: Options, device: torch.device, model_folder: Path,
                 eval_ids: Tensor, words: list[str]) -> dict:
    """Return the head of results.json: all that shapes a figure."""
    is_local, chats = find_path(options.model), find_path(options.calibration_data)
    parts = dict(
        config=json.loads(json.dumps(asdict(options))),
        machine=describe_machine(device), versions=list_versions(),
        inputs=dict(model_files=fingerprint(hash_files(model_folder)),
                    eval_tokens=fingerprint(eval_ids.tolist()),
                    chats=chats and fingerprint(hash_files(chats)),
                    **{f"recipe of {label}": repr(build_recipe(label, options))
                       for label in VARIANTS}))
    conditions = [(part, name, value) for part, values in parts.items()
                  for name, value in values.items() if name not in MAY_DIFFER]
    return parts | dict(
        schema=SCHEMA, command=["python", "quant_lab.py", *words],
        base_model=None if is_local else options.model,
        model_name=model_folder.resolve().name if is_local else options.model,
        fingerprint=fingerprint(SCHEMA, conditions))

# %%
def take_over(output: Path, head: dict) -> dict[str, dict]:
    """Return the finished rows of results.json; refuse those of other conditions."""
    before, name_out = read_json(output / "results.json"), f"--output-dir {output}: "
    way_out = "name another --output-dir, or --fresh to forget them"
    if (output / "results.json").exists() and before.get("schema") != SCHEMA:
        stop(f"{name_out}its results are of another version of this script; {way_out}")
    rows = {row["label"]: row for row in before.get("variants", ())
            if row["status"] == "ok"}
    for part in ("config", "inputs", "machine", "versions") if rows else ():
        for name, value in head[part].items():
            old = before[part].get(name)
            if name not in MAY_DIFFER and old != value:
                flag = "--" + name.replace("_", "-") if part == "config" else name
                stop(f"{name_out}its finished rows were measured with {flag} {old}, "
                     f"not {value}; {way_out}")
    return rows

# %%
def name_routes(label: str, model, prompt_tokens: int, options: Options) -> str:
    """Return how the Linears ran, phase by phase."""
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    if not packed:
        return ("" if label == BASELINE else "dequantized to ") + DTYPES[options.dtype]
    phases = dict(prefill=prompt_tokens, decode=1)
    phases |= {f"batch {batch}": batch for batch in options.batch_sizes[1:]}
    phases_by_route = {}
    for phase, tokens in phases.items():
        routes = {m.describe_route(tokens) for m in packed
                  if m.kind != "dense" or label == BASELINE}
        phases_by_route.setdefault(" and ".join(sorted(routes)), []).append(phase)
    return " · ".join(f"{', '.join(names)} {routes}"
                      for routes, names in phases_by_route.items())

def time_variant(label: str, output: Path, prompt: list[int], options: Options,
                 device: torch.device, compiled: bool) -> dict:
    """Return speed and memory of a checkpoint, loaded anew."""
    with libraries_to(output / "log.txt"):
        model = place_model(output / "checkpoints" / label, options, device)
        with memory_for("decoding one sequence", "less --new-tokens"):
            speed = measure_speed(model, torch.tensor([prompt], device=device), options,
                                  compiled, measure_bandwidth(device))
    how = "compiled" if compiled else "not compiled"
    if compiled and IN_NOTEBOOK:
        how += ", in one process with the others"
    return speed | dict(
        runs_as=f"{name_routes(label, model, len(prompt), options)} · {how}")

def benchmark_speed(label: str, lab: Lab) -> dict:
    """Return speed and memory of a checkpoint; uncompiled if compiling fails."""
    options, device = lab.options, lab.device
    length = min(512, lab.context - options.new_tokens)
    prompt = lab.eval_ids.repeat(length // len(lab.eval_ids) + 1)[:length].tolist()
    time_it = partial(time_variant, label, lab.output, prompt, options, device)
    if device.type == "cpu" or options.no_compile or options.execution == "emulated":
        return time_it(False)
    try:
        return time_it(True) if IN_NOTEBOOK else run_apart(partial(time_it, True))
    except Exception as error:
        traceback.print_exc()  # Goes to the log.
        failure = quote(describe(error))
    speed = time_it(False)
    return speed | dict(runs_as=f"{speed['runs_as']}, it failed: {failure}")

# %%
def run_variant(label: str, lab: Lab) -> None:
    """Take a variant from recipe to row, unless it is finished; write and show it."""
    if label in lab.options.variants:
        checkpoint = read_checkpoint(label, lab)
        if label in lab.rows and checkpoint:
            print(f"{label} was finished before", flush=True)
        else:
            lab.rows[label] = measure_row(label, lab, checkpoint)
        write_outputs(lab)
    show(render_result(label, collect_results(lab)))

def measure_row(label: str, lab: Lab, checkpoint: dict | None) -> dict:
    """Return a variant's row; its status is "failed" if anything went wrong."""
    out, start = sys.stdout, time.perf_counter()  # Below, sys.stdout is the log.

    def say(step: str) -> None:
        seconds = time.perf_counter() - start
        print(f"{label} {step} after {seconds:,.0f} s", file=out, flush=True)

    row = ROW | dict(label=label, status="failed", scheme=VARIANTS[label].scheme,
                     fingerprint=lab.head["fingerprint"])
    with libraries_to(lab.output / "log.txt"):
        try:
            if lab.reference is None:
                lab.reference = measure_reference(lab)
                say("waited for the reference, scored")
            row |= checkpoint or quantize_variant(label, lab)
            say("quantized")
            begin = now(lab.device)
            model = place_model(
                lab.output / "checkpoints" / label, lab.options, lab.device)
            row["load_seconds"] = now(lab.device) - begin
            row |= measure_quality(
                model, lab.eval_ids, lab.tokenizer, lab.options, lab.reference)
            say("scored")
            model = None  # Two may not fit.
            free_memory()
            row |= benchmark_speed(label, lab)
            say("timed")
            row["status"] = "ok"
        except Exception as error:
            row["error"] = describe(error)
            shutil.rmtree(lab.output / f"checkpoints/{label}.partial", True)
            with contextlib.suppress(OSError):  # The disk may be full.
                traceback.print_exc()
    return row

# %% [markdown]
"""
## Tables and verdict

Every figure on the terminal, in `summary.md`, in the picture and in the model cards is
rendered from `results.json`. ± is half the interval; where it is lopsided, its two ends
stand in brackets, as do the least and greatest of a timing.

The verdict names a variant best where its range, widened by 1 %, shares no value with
another's, else several. All runs of a row follow each other: the range shows the jitter
of one process, not what another day or a warm GPU would add.

What a run shows at once is five figures beside the baseline's, each with its ratio:

- **MB** and **weights MB**: the first is what travels and fills a disk, the second what
  is taken from the GPU before the first token. Packed, the two agree; where a format
  has to be unpacked, they do not.
- **perplexity**, its ratio paired with the reference. A ratio of 1.01 is one percent
  more uncertainty a token. Where the interval holds 1, this text shows no difference.
- **KLD**, which has no ratio, since the reference's is 0. It is small where two models
  would mostly say the same, and it finds differences that perplexity hides.
- **tokens/s** of one sequence. Batches and prefill stand in the tables, and often rank
  the formats otherwise: read the row that is like your traffic.

Below stands where it ran (`runs_as`), since a figure of a format that was dequantized
says little about that format, and one completion of each. Read it: a model can keep its
perplexity and lose the thread.
"""

# %%
# Title, key (after @, of a batch size), digits, unit.
QUALITY = (
    ("MB", "weight_bytes", 1, 1e-6), ("size", "size_ratio", 3, 1),
    ("perplexity", "perplexity_interval", 2, 1), ("ratio", "perplexity_ratio", 4, 1),
    ("KLD", "kld", 5, 1), ("top-1 %", "top1_agreement", 1, 1),
    ("tokens", "divergence", 0, 1))
SPEED = (
    ("TTFT ms", "ttft_s", 1, 1000), ("latency s", "latency_s", 3, 1),
    ("tokens/s", "decode_tok_s", 1, 1), ("bandwidth %", "bandwidth_fraction@1", 0, 100))
COST = (
    ("weights MB", "weights_memory_bytes", 1, 1e-6),
    ("peak MB", "peak_memory_bytes", 1, 1e-6), ("quantize s", "quantize_seconds", 1, 1),
    ("load s", "load_seconds", 1, 1), ("compile s", "compile_seconds", 1, 1))

def list_tables(config: dict) -> list[tuple]:
    """Return the columns of each table; two batch sizes make one more."""
    columns = []
    for n in [n for n in config["batch_sizes"] if n > 1]:
        columns += [(f"batch {n}", f"tok_s@{n}", 0, 1),
                    (f"bandwidth {n} %", f"bandwidth_fraction@{n}", 0, 100)]
    batches = [columns[k : k + 4] for k in range(0, len(columns), 4)]
    return [QUALITY, SPEED, *batches, COST]

def read_figure(row: dict, key: str):
    """Return a figure of a row, after @ of a batch; None if there is none, or "OOM"."""
    name, _, batch = key.partition("@")
    if not batch:
        return row[name]
    entry = next((e for e in row["decode"] or () if e["batch"] == int(batch)), {})
    return entry.get("error") or entry.get(name)

def is_noisy(figure) -> bool:
    """Say whether a figure is a timing with samples too far apart to rank it."""
    return (isinstance(figure, dict) and "samples" in figure
            and figure["max"] > NOISE_LIMIT * figure["min"])

def format_figure(value: float | str | dict, digits: int, unit: float = 1) -> str:
    """Write a figure; of a noisy timing, which cannot be ranked, only its range."""
    if isinstance(value, str):
        return one_line(value)
    if not isinstance(value, dict):
        return f"{unit * value:,.{digits if abs(unit * value) < 1000 else 0}f}"
    middle, low, high = list(value.values())[:3]
    if low is None:
        return format_figure(middle, digits, unit)
    parts = middle, low, high, (high - low) / 2
    text, least, greatest, half = (format_figure(x, digits, unit) for x in parts)
    if is_noisy(value):
        return f"{least}–{greatest} noisy"
    if "samples" in value or abs(high + low - 2 * middle) > 0.1 * (high - low):
        return f"{text} ({least}–{greatest})"
    return f"{text} ± {half}"

# %%
def render_cell(row: dict, column: tuple) -> str:
    """Return a figure of a row as text; –: not measured."""
    figure = read_figure(row, column[1])
    if figure is None:
        return "failed" if row["status"] == "failed" else "–"
    return format_figure(figure, *column[2:])

def align_table(lines: list[list[str]]) -> str:
    """Return a Markdown table, aligned for the terminal; the first line is its head."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    aligned = []
    for first, *others in (lines[0], rule, *lines[1:]):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        aligned.append("| " + " | ".join([first.ljust(widths[0]), *cells]) + " |")
    return "\n".join(aligned)

def render_table(rows: list[dict], columns: tuple) -> str:
    """Return the figures of the rows in these columns."""
    lines = [["variant", *(title for title, *_ in columns)]]
    for row in rows:
        lines.append([row["label"], *(render_cell(row, column) for column in columns)])
    return align_table(lines)

def render_tables(results: dict, rows: list[dict]) -> str:
    """Return the tables of some rows, each below how its figures were measured."""
    config, tables = results["config"], list_tables(results["config"])
    first = next((row for row in rows if row["status"] == "ok"), dict(
        tokens_scored=0, kld=dict(tokens=0), prompt_tokens=0))
    captions = [
        f"Quality on {quote(Path(config['eval_text']).name)}: "
        f"{first['tokens_scored']:,} tokens in windows of {config['window']:,}; KLD "
        "(nats) and top-1 at "
        f"{first['kld']['tokens']:,}. ±: half a 95 % interval. size, ratio: bytes and "
        f"perplexity over the baseline's. tokens: until completions of {len(PROMPTS)} "
        f"prompts differ from the reference's, {config['new_tokens']} if never.",
        f"Speed of one sequence, median (least–greatest) of {config['repeats']}: TTFT "
        f"of {first['prompt_tokens']} tokens, latency of {config['new_tokens']} more; "
        "bandwidth: a step's bytes over its time, as a part of what copying reaches. "
        f"noisy: greatest over {NOISE_LIMIT} times the least, too noisy to rank.",
        *["Several sequences at once: tokens/s, bandwidth."] * (len(tables) - 3),
        "Cost: weights in memory after running, peak memory in a prefill or a step."]
    return "\n\n".join(f"{fill(caption)}\n\n{render_table(rows, columns)}"
                       for caption, columns in zip(captions, tables))

# %%
def relate(row: dict, base: dict, key: str) -> tuple[float | None, str]:
    """Return a figure over the baseline's, and as text; None where there is none."""
    figures = read_figure(row, key), read_figure(base, key)
    if row["status"] == "failed":
        return None, "failed"
    if any(map(is_noisy, figures)):
        return None, "too noisy to rank"
    mine, theirs = (next(iter(figure.values())) if isinstance(figure, dict) else figure
                    for figure in figures)
    if mine in (None, "OOM") or theirs in (None, "OOM", 0):
        return None, "–"
    return mine / theirs, f"{mine / theirs:.3f}"

def render_result(label: str, results: dict) -> str:
    """Return what came of a variant: a table beside the baseline, completions."""
    rows = {row["label"]: row for row in results["variants"]}
    row, base = rows.get(label), rows.get(BASELINE, ROW)
    if row is None:
        return f"{label} was not asked for; --variants adds it."
    if row["error"]:
        return fill(f"{label} failed: {quote(row['error'])}")
    shown = [base, row] if label != BASELINE and base["status"] == "ok" else [row]
    lines = [["", *(one["label"] for one in shown), "ratio"]]
    for column in (QUALITY[0], QUALITY[2], QUALITY[4], SPEED[2], COST[0]):
        ratio = relate(row, base, column[1])[1]
        if column is QUALITY[2]:  # Paired with the reference: its ± is narrow.
            ratio = render_cell(row, QUALITY[3])
        lines.append([column[0], *(render_cell(one, column) for one in shown), ratio])
    return "\n\n".join([align_table(lines), fill(f"Runs as: {row['runs_as']}"),
                        render_completions(shown, 0)])

# %%
def name_best(what: str, rows: list[dict], key: str, largest=False) -> str:
    """Say which variant is best at what; several, where their ranges share a value."""
    ranges, noisy = {}, []
    for row in rows:
        low = high = figure = read_figure(row, key)
        if isinstance(figure, dict):
            low, high = list(figure.values())[1:3]
        if is_noisy(figure):
            noisy.append(row["label"])
        elif low not in (None, "OOM"):
            ranges[row["label"]] = 0.99 * low, 1.01 * high
    bar = (max((low for low, _ in ranges.values()), default=0) if largest else
           min((high for _, high in ranges.values()), default=0))
    names = [label for label, (low, high) in ranges.items()
             if (high >= bar if largest else low <= bar)]
    return f"{what}: {' or '.join(names) or 'unknown'}" + (
        f"; too noisy to rank: {', '.join(noisy)}" if noisy else "")

def list_best(rows: list[dict]) -> list[str]:
    """Say for each goal which variants are best."""
    done = [row for row in rows if row["status"] == "ok"]
    if len(done) < 2:
        return []
    quantized = [row for row in done if row["label"] != BASELINE]
    batch = max(e["batch"] for row in done for e in row["decode"] if e["tok_s"])
    lines = [name_best("Smallest", done, "weight_bytes"),
             name_best("Closest to the reference by KLD", quantized, "kld"),
             name_best("Fastest for one sequence", done, "decode_tok_s", largest=True)]
    if batch > 1:
        lines.append(name_best(f"Fastest for a batch of {batch}", done,
                               f"tok_s@{batch}", largest=True))
    return lines

def render_verdict(rows: list[dict]) -> str:
    """Return what to take for what, what it costs, what to beware of: a list."""
    lines = list_best(rows)
    for row in rows:
        label, ratio = row["label"], row["perplexity_ratio"]
        if row["error"]:
            lines.append(f"{label} failed: {quote(row['error'])}")
        elif label != BASELINE and ratio["low"] is None:
            lines.append(f"{label}: too few windows, no difference can be claimed.")
        elif label != BASELINE and ratio["low"] <= 1 <= ratio["high"]:
            lines.append(f"{label} cannot be distinguished from the reference in "
                         f"perplexity, at most {ratio['high']:.4f} times; KLD "
                         f"{format_figure(row['kld'], 5)}.")
        elif label != BASELINE:
            lines.append(f"{label} multiplies perplexity by {format_figure(ratio, 4)}; "
                         f"KLD {format_figure(row['kld'], 5)}.")
        elif row["kld"]["mean"]:
            lines.append(f"Warning: {label} is not the reference, KLD "
                         f"{row['kld']['mean']:.1e}: that is the noise.")
        if row["rtn_fallbacks"]:
            lines.append(f"Warning: {label}, {row['rtn_fallbacks']} modules fell back "
                         "to round-to-nearest: more --dampening or chats may help.")
    return "\n".join(fill(line, "- ") for line in lines)

# %% [markdown]
"""
# Machinery: skip this at first reading

What follows makes the formats run packed and fast, keeps libraries and files in order,
and writes the report. Nothing in it changes what is measured.

## Packed Linears

Plain transformers unpacks a compressed checkpoint to 16 bits on its first forward, and
simulates the rounding of activations (`--execution emulated`): memory ends where
float16 is, and the extra rounding makes it slower. Here a Linear stays packed. By
format, GPU and number of tokens it takes one of these routes, and `runs_as` names them:

- **In registers**, for one token, where the time goes into reading weights: a Triton
  kernel unpacks them on the way into the product. float16 goes through the same kernel,
  so that variants differ in nothing but the format.
- **Tensor cores**, for several tokens: 8-bit times 8-bit, then scaled. INT8 from SM 7.5
  (T4), FP8 from SM 8.9.
- **Dequantized** otherwise: a 16-bit copy, one layer at a time.

Activations are rounded per token as compressed-tensors does it. On a CPU the logits
equal the emulated ones bit for bit.

A weight has the shape [outputs, inputs]: 16-bit, int8, the codes of FP8 as int8, or
eight INT4 to an int32. Its scale is [outputs, groups], one group unless INT4. A word of
a checkpoint's INT4 holds eight neighbours, the first in its lowest bits; here the n
words of a group hold inputs 0 to n - 1 in their lowest bits, then the next n, so that
neighbouring words meet neighbouring inputs. Kernels below SM 8.9 do not know FP8
(`native` is False): bit fields are moved instead, to the same values.

On a GPU, Linears that read the same input become one product: q, k and v, gate and up.
The first to be called computes for all, the others cut their slice from what it left.
"""

# %%
def read_e4m3(code: Tensor) -> Tensor:
    """Return float16 values of finite FP8 E4M3 codes held as int8: moves bit fields."""
    return ((code.to(torch.int16) << 7) & ~(1 << 14)).view(torch.float16) * 2**8

def round_e4m3(x: Tensor) -> Tensor:
    """Return x, within ±448, rounded to the nearest FP8 E4M3 value, ties to even."""
    power = (x.float().view(torch.int32) & 0x7F800000).view(torch.float32)
    step = power.clamp(min=2**-6) / 8  # Three bits follow the leading one.
    return (torch.round(x / step) * step).to(x.dtype)

def round_activations(kind: str, x: Tensor, native: bool) -> tuple[Tensor, Tensor]:
    """Return x over its scale, in 8 bits, and the scale [..., 1], one per token."""
    scale = x.abs().amax(-1, keepdim=True) / (127.5 if kind == "int8" else 448)
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    if kind == "int8":
        return (x / scale).clamp(-128, 127).round().to(torch.int8), scale
    x = (x / scale).clamp(-448, 448)
    return x.to(torch.float8_e4m3fn) if native else round_e4m3(x), scale

def regroup_int4(words: Tensor, groups: int) -> Tensor:
    """Return a checkpoint's INT4 words with the inputs of each group in our order."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    nibbles = (words[..., None] >> shifts & 15).view(len(words), groups, 8, -1)
    return (nibbles.transpose(2, 3) << shifts).sum(-1, dtype=torch.int32).flatten(1)

def dequantize(kind: str, weight: Tensor, scale: Tensor) -> Tensor:
    """Return the weight [out, in] of a PackedLinear in the dtype of its scale."""
    if kind == "int4":  # Stored with 8 added, scaled by groups.
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight.device)
        nibbles = weight.view(*scale.shape, 1, -1) >> shifts[:, None] & 15
        return ((nibbles - 8).to(scale.dtype) * scale[..., None, None]).flatten(1)
    return (read_e4m3(weight) if kind == "fp8" else weight).to(scale.dtype) * scale

# %%
Route = Enum("Route", "REGISTERS DENSE TENSOR_CORES DEQUANTIZED")
TENSOR_CORES_FROM = dict(int8=(7, 5), fp8=(8, 9), int4=(99, 0))  # SM; INT4: never.

# %%
class PackedLinear(torch.nn.Module):
    """Multiply by packed weights: int4, int8, fp8 or dense; sm (0, 0) is a CPU."""

    def __init__(self, kind: str, weight, scale, bias, sm: tuple[int, int]):
        super().__init__()
        self.kind, self.sm, self.native = kind, sm, sm == (0, 0) or sm >= (8, 9)
        for name, x in dict(weight=weight, scale=scale, bias=bias).items():
            setattr(self, name, x if x is None else torch.nn.Parameter(x.data, False))
        self.register_buffer("guard", weight.new_tensor(2.0**-10, dtype=torch.float32))

    def choose_route(self, tokens: int) -> Route:
        """Return how so many tokens are multiplied."""
        outputs, width = self.weight.shape
        if tokens == 1 and triton and width % 16 == 0 and self.sm > (0, 0):
            return Route.REGISTERS
        if self.kind == "dense":
            return Route.DENSE
        fits = tokens > 1 and width % 16 == 0 and outputs % 16 == 0
        has_cores = self.sm >= TENSOR_CORES_FROM[self.kind]
        return Route.TENSOR_CORES if fits and has_cores else Route.DEQUANTIZED

    def describe_route(self, tokens: int) -> str:
        """Return the route as `runs_as` names it, and why it is not a better one."""
        route, kind, dense = self.choose_route(tokens), self.kind, self.scale is None
        short = DTYPES[str((self.weight if dense else self.scale).dtype)[6:]]
        why = dict(int4="PyTorch multiplies no int4", int8="tensor cores need SM 7.5",
                   fp8="tensor cores need SM 8.9").get(kind)
        if kind != "int4" and any(size % 16 for size in self.weight.shape):
            why = "16 does not divide its width"
        if tokens == 1 and not triton:
            why = "no Triton"
        why = "a CPU" if self.sm == (0, 0) else why
        total = "int32" if kind == "int8" else "fp32"
        return {Route.REGISTERS: f"{short if dense else kind}→{total} in registers",
                Route.DENSE: short, Route.TENSOR_CORES: f"{kind} tensor cores",
                Route.DEQUANTIZED: f"dequantized to {short} ({why})"}[route]

    def forward(self, x: Tensor) -> Tensor:
        shape, dtype, kind, x_scale = x.shape, x.dtype, self.kind, None
        x = x.reshape(-1, shape[-1])
        route, has_dot = self.choose_route(len(x)), triton and self.sm >= (8, 0)
        if kind in ("int8", "fp8"):
            x, x_scale = round_activations(kind, x, self.native)
        if route is Route.DENSE:
            y = F.linear(x, self.weight, self.bias)
        elif route is Route.DEQUANTIZED:
            x = x if x_scale is None else x.to(dtype) * x_scale
            y = F.linear(x, dequantize(kind, self.weight, self.scale), self.bias)
        elif route is Route.REGISTERS or (kind == "int8" and has_dot):
            kind = "fp8_bits" if kind == "fp8" and not self.native else kind
            y = multiply(kind, x, self.weight, self.scale, x_scale, self.bias, dtype)
        else:
            y = multiply_8_bit(self, x, dtype)
            y = y * (x_scale.float() * self.scale.float().t())
            y = (y if self.bias is None else y + self.bias.float()).to(dtype)
        return y.view(*shape[:-1], -1)

# %%
class FusedSlice(torch.nn.Module):
    """Return outputs [begin, end) of a PackedLinear; the last slice drops them all."""

    def __init__(self, fused: PackedLinear, begin: int, end: int):
        super().__init__()
        self.fused, self.begin, self.end = fused, begin, end
        fused.latest = None, None

    def forward(self, x):
        latest_x, y = self.fused.latest
        y = y if latest_x is x else self.fused(x)
        is_last = self.end == len(self.fused.weight)
        self.fused.latest = (None, None) if is_last else (x, y)
        return y[..., self.begin : self.end]

def pack_linear(linear: torch.nn.Module, sm: tuple[int, int]) -> PackedLinear:
    """Return a PackedLinear; ValueError for formats that none of the recipes writes."""
    scheme = getattr(linear, "quantization_scheme", None)
    if not scheme:
        return PackedLinear("dense", linear.weight, None, linear.bias, sm)
    form, scale = scheme.weights, linear.weight_scale
    kind = "fp8" if form.type == "float" else f"int{form.num_bits}"
    ours = kind in TENSOR_CORES_FROM and form.symmetric
    if not ours or hasattr(linear, "weight_g_idx"):
        raise ValueError("this format runs with --execution emulated only")
    weight = (regroup_int4(linear.weight_packed.view(torch.int32), scale.shape[1])
              if kind == "int4" else linear.weight.view(torch.int8))
    return PackedLinear(kind, weight, scale, linear.bias, sm)

def pack_model(model, sm: tuple[int, int]) -> None:
    """Pack each quantized Linear, on a GPU all, and fuse those with the same input."""
    if hook := getattr(model, "ct_decompress_hook", None):
        hook.remove()
    for name, module in list(model.named_modules()):
        dense = sm > (0, 0) and isinstance(module, torch.nn.Linear)
        if dense or getattr(module, "quantization_scheme", None):
            model.set_submodule(name, pack_linear(module, sm))
            module._parameters.clear()  # Or a reference cycle would keep them.
    same_input = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    for parent, names in product(list(model.modules()), same_input if any(sm) else ()):
        parts = [getattr(parent, name, None) for name in names]
        if not all(isinstance(part, PackedLinear) for part in parts):
            continue
        if len({(p.kind, p.weight.shape[1], p.bias is None) for p in parts}) > 1:
            continue
        columns = zip(*([p.weight, p.scale, p.bias] for p in parts))
        tensors = [None if some[0] is None else torch.cat(some) for some in columns]
        fused, begin = PackedLinear(parts[0].kind, *tensors, sm), 0
        for name, part in zip(names, parts):
            setattr(parent, name, FusedSlice(fused, begin, begin + len(part.weight)))
            begin += len(part.weight)

# %%
def place_model(folder: Path, options: Options, device: torch.device):
    """Return a causal LM on the device, packed unless execution is emulated."""
    model = load_model(folder, options.dtype)
    with memory_for(f"loading {folder.name}", "a smaller --model or --device cpu"):
        model = model.to(device)
        if options.execution == "packed":
            cuda = device.type == "cuda"
            pack_model(model, torch.cuda.get_device_capability() if cuda else (0, 0))
    return model

# %% [markdown]
"""
## Kernels

For one token, `row_kernel` multiplies a row by any format. INT4 has a trick: read as
float32, an integer n below 2^24 is the number n * 2^-149. So the four bits at place i
of a word need no shift and no conversion, only a mask: what their place adds, 16^i, is
taken off the input beforehand, and a factor of 2^100 keeps the products normal. The 8
that is added to each stored weight is subtracted once, as 8 times the sum of inputs.

FP8 below SM 8.9 (`fp8_bits`) is converted by moving bit fields, as in `read_e4m3`; its
factor of 2^8 comes last. For INT8, `dp4a` makes four products and their sum in one
instruction. Where the rows of a program pass the end, the last row is done twice.

Several tokens take `int8_kernel` for INT8 from SM 8.0, else PyTorch's products, which
leave scales and bias to float32. PyTorch's FP8 product may be written in float16: both
factors are scaled by 2^-10 (`guard`), and the result is scaled back.

Tile sizes are the fastest of those tried on an H100; `tests/bench_decode.py --tune`
tries them on another GPU.

## Attention, cache and graphs

Attention of one row is that of [flash decoding](https://arxiv.org/abs/2311.01282): 64
keys to a program, then their results are combined. Of several sequences, the heads that
share a key stand in as rows of one product, so that no key is copied.

Keys and values lie in tensors of fixed size and place, or no CUDA graph could replay a
step: attention goes over all places, and a mask hides those not yet written.

All decoder layers are one function, compiled once for one row and once for many.
Compiled one by one, each layer's index is a constant, and dynamo's limit of
recompilations is soon reached. The very first prefill, which makes the cache, runs
uncompiled; every work is warmed up twice before it is recorded as a graph.
"""

# %%
@jit
def row_kernel(x, weight, scale, x_scale, bias, y, outputs, width, GROUP: tl.constexpr,
               KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), outputs - 1)
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
                bits = (w if i < 6 else high) & (15 << 4 * (i % 6))
                value = tl.load(x + at // GROUP * (8 * GROUP) + at % GROUP + i * GROUP,
                                mask=inside, other=0).to(tl.float32)
                part += bits.to(tl.float32, bitcast=True) * (
                    value * 2.0 ** (100 - 4 * (i % 6)))
                eights += value * (8 * 2.0**-49)
            total += (part - eights) * tl.load(
                scale + row[:, None] * (width // GROUP) + at // GROUP,
                mask=inside, other=0).to(tl.float32)
        else:
            value = tl.load(x + at, mask=inside, other=0.0)
            if KIND == "int8":
                total = tl.inline_asm_elementwise(
                    "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, value, total],
                    dtype=tl.int32, is_pure=True, pack=1)
            else:
                if KIND == "fp8":
                    w = w.to(tl.float8e4nv, bitcast=True).to(tl.float16)
                elif KIND == "fp8_bits":
                    w = ((w.to(tl.int16) << 7) & -16385).to(tl.float16, bitcast=True)
                total += w.to(tl.float32) * value.to(tl.float32)
    result = tl.sum(total, 1).to(tl.float32) * (
        2.0**49 if KIND == "int4" else 256.0 if KIND == "fp8_bits" else 1.0)
    if x_scale is not None:
        result *= tl.load(scale + row).to(tl.float32) * tl.load(x_scale)
    if bias is not None:
        result += tl.load(bias + row).to(tl.float32)
    tl.store(y + row, result)

# %%
@jit
def int8_kernel(x, weight, scale, x_scale, bias, y, tokens, outputs, width,
                M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    a = tl.program_id(0) * M + tl.arange(0, M)[:, None]
    b = tl.program_id(1) * N + tl.arange(0, N)[None, :]
    total = tl.zeros([M, N], tl.int32)
    for begin in range(0, width, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        i, j = at[None, :], at[:, None]
        left = tl.load(x + a % tokens * width + i, mask=i < width, other=0)
        right = tl.load(weight + b % outputs * width + j, mask=j < width, other=0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
    result = total.to(tl.float32) * tl.load(scale + b % outputs).to(tl.float32)
    result *= tl.load(x_scale + a % tokens).to(tl.float32)
    if bias is not None:
        result += tl.load(bias + b % outputs).to(tl.float32)
    tl.store(y + a * outputs + b, result, mask=(a < tokens) & (b < outputs))

@jit
def attend_kernel(query, keys, values, mask, y, tops, totals, scaling, length,
                  GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    head, part = tl.program_id(0), tl.program_id(1)
    at, column = part * BLOCK + tl.arange(0, BLOCK), tl.arange(0, SIZE)
    here = (head // GROUP * length + at[:, None]) * SIZE + column[None, :]
    inside = at[:, None] < length
    key = tl.load(keys + here, mask=inside, other=0).to(tl.float32)
    value = tl.load(values + here, mask=inside, other=0).to(tl.float32)
    q = tl.load(query + head * SIZE + column).to(tl.float32) * scaling
    masked = tl.load(mask + at, mask=at < length, other=-float("inf"))
    score = tl.sum(key * q[None, :], 1) + masked.to(tl.float32)
    top = tl.maximum(tl.max(score), -1e30)  # All may be masked.
    weight, place = tl.exp(score - top), head * tl.num_programs(1) + part
    tl.store(tops + place, top)
    tl.store(totals + place, tl.sum(weight))
    tl.store(y + place * SIZE + column, tl.sum(weight[:, None] * value, 0))

@jit
def combine_kernel(y, tops, totals, result, parts, SIZE: tl.constexpr,
                   PARTS: tl.constexpr):
    head, part, column = tl.program_id(0), tl.arange(0, PARTS), tl.arange(0, SIZE)
    place, inside = head * parts + part, part < parts
    top = tl.load(tops + place, mask=inside, other=-float("inf"))
    factor = tl.exp(top - tl.max(top))
    total = tl.sum(factor * tl.load(totals + place, mask=inside, other=0))
    value = tl.load(y + place[:, None] * SIZE + column[None, :], inside[:, None], 0)
    tl.store(result + head * SIZE + column, tl.sum(factor[:, None] * value, 0) / total)

# %%
def choose_tile(kind: str, outputs: int, width: int) -> tuple[int, int, int]:
    """Return rows, columns and warps of a program of row_kernel."""
    many, few = outputs > 8192, outputs < 2048
    if kind == "dense":
        return (2, 1024, 4) if width <= 2048 else (2, 2048, 8)
    if kind == "int4":
        small = (4, 128, 1) if many else (2, 128, 1)
        return small if many or width <= 128 else (2, 1024, 8) if few else (4, 512, 4)
    if kind == "int8" and width <= 256:
        return (16, 128, 8) if many else (2, 256, 1)
    if kind == "int8":
        return (2, 2048, 8) if few else (2, 512, 2)
    return (1, 2048, 4) if few and width > 2048 else (2, 1024, 2)

@torch.library.custom_op("quant_lab::multiply", mutates_args=())
def multiply(kind: str, x: Tensor, weight: Tensor, scale: Tensor | None,
             x_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x [n, in] times a packed weight, scaled, plus bias; n > 1: INT8 only."""
    tokens, outputs = len(x), len(weight)
    y = x.new_empty(tokens, outputs, dtype=dtype)
    if tokens > 1:  # The tile of a program, its warps and stages.
        m, n, block, warps, stages = (
            (16, 32, 256, 4, 4) if tokens <= 16 else (32, 32, 256, 4, 4) if tokens <= 64
            else (64, 128, 128, 4, 4) if tokens * outputs <= 2**21
            else (128, 128, 128, 4, 3))
        int8_kernel[(triton.cdiv(tokens, m), triton.cdiv(outputs, n))](
            x, weight, scale, x_scale, bias, y, tokens, outputs, x.shape[1], m, n,
            block, num_warps=warps, num_stages=stages)
        return y
    if kind == "int8":  # Four in a word.
        x, weight = x.view(torch.int32), weight.view(torch.int32)
    group = weight.shape[1] // scale.shape[1] if kind == "int4" else 1
    rows, block, warps = choose_tile(kind, *weight.shape)
    row_kernel[(triton.cdiv(outputs, rows),)](
        x, weight, scale, x_scale, bias, y, *weight.shape, group, kind, rows, block,
        num_warps=warps)
    return y

multiply.register_fake(lambda kind, x, weight, scale, x_scale, bias, dtype: (
    x.new_empty(len(x), len(weight), dtype=dtype)))

def multiply_8_bit(linear: PackedLinear, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 8-bit x [n, in] times the weight by PyTorch, in float32, unscaled."""
    if linear.kind == "fp8":
        guard, weight = linear.guard, linear.weight.view(x.dtype).t()
        y = torch._scaled_mm(x, weight, guard, guard, out_dtype=dtype)
        return y.float() / guard**2
    padding = 32 - len(x) if len(x) <= 16 else 0  # _int_mm wants more than 16 rows.
    y = torch._int_mm(F.pad(x, (0, 0, 0, padding)), linear.weight.t())
    return y[: len(x)].float()

# %%
@torch.library.custom_op("quant_lab::attend_row", mutates_args=())
def attend_row(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor,
               scaling: float) -> Tensor:
    """Return [1, 1, heads, size] for a query [1, heads, 1, size]; mask is added."""
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
    """Attend in transformers' interface; query, key, value [batch, heads, n, size]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    window = named.get("sliding_window") or math.inf
    if window < key.shape[2] or named.get("softcap") or named.get("s_aux") is not None:
        raise ValueError("speed with sliding windows, soft caps, sinks is not measured")
    if query.shape[2] > 1:  # The whole prompt: causal, and no mask.
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)
    if triton and query.is_cuda and len(key) == 1 and key.shape[3] in (64, 128, 256):
        return attend_row(query, key, value, attention_mask, scaling), None
    rows = query.reshape(len(key), key.shape[1], -1, query.shape[3])
    y = F.scaled_dot_product_attention(rows, key, value, attention_mask, scale=scaling)
    return y.reshape(len(y), 1, query.shape[1], -1), None

class LayerCache:
    """Hold keys and values of one layer in tensors that stay where they are."""

    def __init__(self, length: int):
        self.length, self.keys, self.values, self.position = length, None, None, None

    def update(self, keys, values, *_, **__):
        """Write keys and values [batch, heads, n, size]; return those of all places."""
        if self.keys is None:
            self.keys, self.values = (x.new_zeros(*x.shape[:2], self.length, x.shape[3])
                                      for x in (keys, values))
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        return self.keys, self.values

# %%
def compile_layers(model, compiled: bool) -> None:
    """Make all decoder layers one function, compiled for one row and for many."""
    from transformers import AttentionInterface
    AttentionInterface.register("quant_lab", attend)
    model.set_attn_implementation("quant_lab")
    layers = model.get_decoder().layers
    one_row = many_rows = eager = type(layers[0]).forward
    if compiled:
        torch._dynamo.reset()
        tuned = dict(coordinate_descent_tuning=True)
        one_row = torch.compile(eager, fullgraph=True, options=tuned)
        many_rows = torch.compile(eager, fullgraph=True)

    def run(layer, number, x, *inputs, past_key_values, **named):
        layer_cache = past_key_values[number]
        forward = one_row if x.shape[:2] == (1, 1) else many_rows
        forward = eager if layer_cache.keys is None else forward
        return forward(layer, x, *inputs, past_key_values=layer_cache, **named)

    for number, layer in enumerate(layers):
        layer.forward = partial(run, layer, number)

def record(work: Callable, rewind: Callable, device, compiled: bool):
    """Return the work, warmed up twice, and its peak memory (None on a CPU)."""
    for _ in range(2):
        rewind()
        work()
    rewind()
    if device.type == "cpu":
        return work, None
    torch.cuda.reset_peak_memory_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph) if compiled else contextlib.nullcontext():
        work()
    rewind()
    return graph.replay if compiled else work, torch.cuda.max_memory_allocated()
# %% [markdown]
"""
## Files and faults

A wrong input ends in one line on stderr that names it and the way out, with exit code
2. Files appear in one step, under their name or not at all. What the libraries print
goes to `log.txt`.
"""

# %%
def stop(*lines: str):
    """Say on stderr what is wrong with the input and the way out; exit with 2."""
    print("quant_lab: " + "\n".join(map(one_line, lines)), file=sys.stderr)
    raise SystemExit(2)

def one_line(text: str) -> str:
    """Return text on one line without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())

def describe(error: BaseException) -> str:
    """Return the root cause of an exception, on one line of at most 200 characters."""
    while error.__cause__:
        error = error.__cause__
    text = one_line(f"{type(error).__name__}: {error}").rstrip(". ")
    return textwrap.shorten(text, 200, placeholder=" ...")

@contextlib.contextmanager
def usable(flag: str, value, advice: str):
    """Turn any exception of the block into exit code 2 and a line that names both."""
    try:
        yield
    except Exception as error:
        stop(f"{flag} {value}: {describe(error)}; {advice}")

def read_json(file: Path) -> dict:
    """Return a JSON file's content; {} where there is none or it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}

def write_json(file: Path, content: dict) -> None:
    """Write strict JSON in one step: readers see the old content or the new."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    file.with_suffix(".partial").write_text(text + "\n", encoding="utf-8")
    file.with_suffix(".partial").replace(file)

def fingerprint(*parts) -> str:
    """Return 16 hexadecimal digits that change when any of the JSON-like parts does."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of a file, or of each in a folder, by name."""
    return {file.name: hashlib.file_digest(file.open("rb"), "sha256").hexdigest()
            for file in (folder.iterdir() if folder.is_dir() else [folder])
            if file.is_file()}

# %%
def free_memory() -> None:
    """Free the previous model, which is in reference cycles."""
    gc.collect()
    with contextlib.suppress(RuntimeError):  # A lost GPU is the row's to report.
        torch.cuda.empty_cache()

def lacks_memory(error: BaseException) -> bool:
    """Say whether an error is an allocator's refusal, of the GPU or of the host."""
    refusal = "out of memory|can(no|')t allocate memory|bad_alloc|ALLOC_FAILED"
    return (isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or bool(re.search(refusal, f"{error} {error.__cause__}", re.I)))

@contextlib.contextmanager
def memory_for(step: str, advice: str):
    """Turn a want of memory into a MemoryError that names the step and the way out."""
    try:
        yield
    except Exception as error:
        if not lacks_memory(error):
            raise
        raise MemoryError(
            f"{step} did not fit into memory: {advice} ({describe(error)})") from None

@contextlib.contextmanager
def libraries_to(log: Path):
    """Send what the libraries print, progress bars included, to the log."""
    with (log.open("a", encoding="utf-8") as stream,
          contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream)):
        yield

def show_progress(what: str, items) -> tqdm:
    """Return a bar for a terminal if the items take over 10 s; silent in a file."""
    out = sys.__stdout__  # Not the log.
    return tqdm(items, desc=what, delay=10, leave=False, ncols=100, file=out,
                disable=not (out and out.isatty()))

# %%
@contextlib.contextmanager
def llmcompressor_session(lab: Lab, model, passes: int):
    """Yield the warnings of llmcompressor, with its rough edges taken off."""
    from llmcompressor import reset_session
    from llmcompressor.pipelines import data_free, sequential
    from loguru import logger
    from torch.fx import _symbolic_trace
    for module in data_free.pipeline, sequential.pipeline:
        # Left alone, both take the first accelerator, whatever --device says.
        module.get_main_device = lambda: lab.device
    logging.getLogger("torch.fx").setLevel(logging.ERROR)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # Older models set a temperature without asking to sample.
        model.generation_config.do_sample = True
    traced, warnings = _symbolic_trace._wrapped_fns_to_patch, []
    before, layers = dict(traced), getattr(model.config, "num_hidden_layers", 1)
    bar = show_progress("calibrating", range(layers * passes))

    def follow(message: str):
        if layer := re.search(r"layers\.(\d+)\.", message):
            bar.update((int(layer[1]) - bar.n) % layers)

    logger.remove()
    logger.add(lab.output / "log.txt", level="INFO")
    logger.add(follow, level="INFO", format="{message}")
    logger.add(warnings.append, level="WARNING", format="{message}")
    try:
        yield warnings
    finally:
        logger.remove()
        bar.close()
        traced.clear()  # Or what was traced would keep the model for ever.
        traced.update(before)
        reset_session()

# %%
def run_apart(function: Callable[[], dict]) -> dict:
    """Return what the function returns in a process of its own, started anew."""
    spawn = multiprocessing.get_context("spawn")  # CUDA cannot be forked.
    with ProcessPoolExecutor(1, spawn, die_with_parent) as pool:
        return pool.submit(function).result()

def die_with_parent() -> None:
    """End this process as soon as its parent has ended; leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

def end_interrupted(*_) -> None:
    """On Ctrl-C, end at once, whatever runs, and say how to go on; exit code 130."""
    with contextlib.suppress(OSError):  # The reader of a pipe may be gone.
        os.write(1, b"\ninterrupted; finished rows are kept: run again to go on\n")
    os._exit(130)

def describe_machine(device: torch.device) -> dict:
    """Return what figures depend on: device, memory in bytes, threads, driver."""
    machine = dict(device=device.type, threads=torch.get_num_threads(), driver=None,
                   memory_bytes=psutil.virtual_memory().total, compute_capability=None)
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        return machine | dict(
            name=gpu.name, memory_bytes=gpu.total_memory,
            compute_capability=f"{gpu.major}.{gpu.minor}",
            driver=subprocess.getoutput(query).partition("\n")[0])
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = [*re.findall(r"model name\s*: (.+)", info), platform.machine()][0]
    return machine | dict(name=f"{name}, {os.cpu_count()} cores")

def list_versions() -> dict[str, str | None]:
    """Return versions of Python, CUDA and the packages that make the figures."""
    packages = ("torch", "transformers", "llmcompressor", "compressed-tensors",
                "accelerate", "datasets", "tokenizers", "safetensors")
    return {"python": platform.python_version(), "cuda": torch.version.cuda,
            **{p.replace("-", "_"): importlib.metadata.version(p) for p in packages}}

# %% [markdown]
"""
## Report

`summary.md`, `summary.png` and the model cards are written after each row, so a run may
be stopped after any of them.
"""

# %%
def quote(text: str) -> str:
    """Return foreign text for Markdown, as code if it holds anything special."""
    text = one_line(text).replace("`", "'")
    # What could begin a block stays behind the word before when lines are filled.
    text = re.sub(r" (?=[<#>~=+*_|-]|\d+[.)])", "\u00a0", text)
    return f"`{text}`" if re.search(r"[^\w\s.,:;()/'-]|://|www\.", text) else text

def fill(text: str, bullet: str = "") -> str:
    """Return a paragraph of at most 110 columns."""
    return textwrap.fill(text, 110, break_on_hyphens=False,
                         initial_indent=bullet, subsequent_indent=" " * len(bullet))

def render_card(results: dict) -> str:
    """Return what is run on what, as an indented block."""
    config, machine = results["config"], results["machine"]
    # A folder of this machine says nothing to others: of paths, only the last part.
    words = [re.sub(r"(^|=)[/~.].*/", r"\1", word) for word in results["command"]]
    gpu = (f"SM {machine['compute_capability']}, driver {machine['driver']}"
           if machine["driver"] else f"{machine['threads']} threads")
    facts = dict(
        model=f"{results['model_name']}, {config['dtype']}, {config['execution']}",
        command=shlex.join(words), versions=", ".join(
            f"{name} {v}" for name, v in results["versions"].items() if v),
        machine=f"{machine['name']}, {machine['memory_bytes'] / 2**30:.1f} GiB, {gpu}")
    return "\n".join(textwrap.fill(
        one_line(fact), 110, initial_indent=f"    {name:10}", break_on_hyphens=False,
        subsequent_indent=" " * 14) for name, fact in facts.items())

def render_completions(rows: list[dict], number: int) -> str:
    """Return variants' completions of a prompt side by side, indented as code."""
    done = [row for row in rows if row["divergence"]]
    width, columns = 112 // max(len(done), 1) - 3, []
    for row in done:
        one = row["divergence"]["completions"][number]
        text = textwrap.wrap(one_line(one["completion"]), width)
        columns.append([row["label"][:width], f"same tokens: {one['same_tokens']}",
                        "-" * width, *text])
    lines = [f"**{PROMPTS[number]}**", ""]
    for cells in zip_longest(*columns, fillvalue=""):
        lines.append("    " + " | ".join(cell.ljust(width) for cell in cells).rstrip())
    return "\n".join(lines)

def render_summary(results: dict) -> str:
    """Return summary.md."""
    rows = results["variants"]
    return "\n\n".join([
        f"# quant_lab: {quote(results['model_name'])}", render_card(results),
        f"Measured {results['created']}.", "![Loss, speed, bytes](summary.png)",
        "## Verdict", render_verdict(rows), "## Figures", render_tables(results, rows),
        "## Run as", "\n".join(fill(f"{row['label']}: {row['runs_as']}", "- ")
                               for row in rows), "## Greedy completions",
        *(render_completions(rows, n) for n in range(len(PROMPTS)))]) + "\n"

# %%
def draw_summary(results: dict):
    """Return the matplotlib figure of summary.png: loss, speed, bytes of each row."""
    from matplotlib.figure import Figure
    rows, batch = results["variants"], max(results["config"]["batch_sizes"])
    base = next((row for row in rows if row["label"] == BASELINE), ROW)
    speed, bytes_ = [SPEED[2], ("", f"tok_s@{batch}")], [QUALITY[0], COST[0]]
    names = "one sequence", f"batch of {batch}", "on disk", "in memory"
    figure = Figure(figsize=(13, 3 + 0.9 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (_, key, *_) in enumerate(speed + bytes_):
        if number == 1 and batch == 1:
            continue
        places = [place + 0.3 * (number % 2) - 0.15 for place in range(len(rows))]
        ratios, texts = zip(*(relate(row, base, key) for row in rows))
        axes = right if number > 1 else left
        bars = axes.barh(places, [ratio or 0 for ratio in ratios], 0.28, edgecolor="k",
                         color=("#1b3a57", "#9fc0dc")[number % 2], label=names[number])
        axes.bar_label(bars, texts, padding=3, bbox=dict(color="white", pad=0.5))
    for axes, title in (left, "Tokens/s (long is fast)"), (right, "Bytes"):
        axes.axvline(1, color="black", linestyle=":")
        axes.set_title(f"{title}, baseline = 1")
        axes.margins(x=0.25)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2,
                    frameon=False)
    left.set_yticks(range(len(rows)), [
        f"{row['label']}\nperplexity × {render_cell(row, QUALITY[3])}" for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    name = f"{results['model_name'][-60:]} on {results['machine']['name']}"
    figure.suptitle("\n".join([one_line(name), *list_best(rows)]), parse_math=False)
    return figure

# %%
def render_model_card(row: dict, results: dict) -> str:
    """Return README.md of a checkpoint's folder, in the format of the hub's cards."""
    from huggingface_hub import ModelCardData
    label, base = row["label"], results["base_model"]
    data = ModelCardData(
        base_model=base, library_name="transformers",
        base_model_relation="quantized" if base and label != BASELINE else None,
        tags=["compressed-tensors", "llmcompressor"] if label != BASELINE else None)
    rows = [one for one in results["variants"] if one["label"] in (BASELINE, label)]
    return (f"---\n{data.to_yaml()}\n---\n\n# {quote(results['model_name'])}, "
            f"{row['scheme']}\n\nWritten by llmcompressor; recipe.yaml says how. "
            "`vllm serve .` serves it. The licence is the original's.\n\n"
            f"{render_card(results)}\n\n{render_tables(results, rows)}\n")

def collect_results(lab: Lab) -> dict:
    """Return the content of results.json."""
    base, rows = lab.rows.get(BASELINE, ROW)["weight_bytes"], []
    for label in VARIANTS:
        if label in lab.rows:
            size = lab.rows[label]["weight_bytes"]
            ratio = size / base if size and base else None
            rows.append(lab.rows[label] | dict(size_ratio=ratio))
    created = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    return lab.head | dict(created=created, variants=rows)

def write_outputs(lab: Lab) -> None:
    """Write results.json and all that is rendered from it, or exit with 2."""
    results, output = collect_results(lab), lab.output
    with usable("--output-dir", output, "make room; what is finished is kept"):
        write_json(output / "results.json", results)
        for row in results["variants"]:
            card = output / "checkpoints" / row["label"] / "README.md"
            if row["status"] == "ok" and card.parent.is_dir():
                card.write_text(render_model_card(row, results), encoding="utf-8")
            else:
                card.unlink(missing_ok=True)
        (output / "summary.md").write_text(render_summary(results), encoding="utf-8")
        draw_summary(results).savefig(output / "summary.png", dpi=140)

def show(text: str) -> None:
    """Print Markdown; in a notebook, render it."""
    if IN_NOTEBOOK:
        from IPython.display import Markdown, display
        display(Markdown(text))
    else:
        print(f"\n{text}\n", flush=True)

# %% [markdown]
"""
# The runs

Here the lab runs. First the set-up: options, device, model and text, each refused with
one line if it cannot be used. The card says what is measured on what.
"""

# %%
def set_up(words: list[str]) -> Lab:
    """Return the lab of these command-line words, with the rows that are finished."""
    from filelock import FileLock
    options = parse_options(words)
    device, reason = choose_device(options)
    print(f"device       {device}: {reason}", flush=True)
    model_folder, tokenizer, context = open_model(options)
    eval_ids = load_evaluation(options, tokenizer, context)
    calibrated = any(VARIANTS[label].calibrated for label in options.variants)
    samples = load_calibration(options, tokenizer, context) if calibrated else []
    machine = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    slug = f"{Path(options.model).resolve().name}-{machine}"
    output = options.output_dir or "results/" + re.sub(r"[^A-Za-z0-9._]+", "-", slug)
    with usable("--output-dir", output, "name a folder that can be written to and that "
                "no other run, or open notebook, is using"):
        output = Path(output).expanduser()
        (output / "checkpoints").mkdir(parents=True, exist_ok=True)
        (output / "log.txt").touch()
        lock = FileLock(output / ".lock", timeout=0, is_singleton=True)
        lock.acquire()  # Two runs would disturb each other's timings, too.
    if options.fresh:
        (output / "results.json").unlink(missing_ok=True)
        for label in VARIANTS:
            shutil.rmtree(output / "checkpoints" / label, ignore_errors=True)
    with libraries_to(output / "log.txt"):
        head = describe_run(options, device, model_folder, eval_ids, words)
    rows = take_over(output, head)
    print(f"output       {output}; what the libraries say goes to log.txt there")
    show(render_card(head))
    return Lab(options, device, output, lock, model_folder, tokenizer, context,
               eval_ids, samples, head, rows)

if __name__ == "__main__":
    if not IN_NOTEBOOK and "ipykernel" not in sys.modules:
        signal.signal(signal.SIGINT, end_interrupted)
        sys.stdout.reconfigure(errors="replace")  # Completions may be in any script.
    LAB = set_up(read_words())

# %% [markdown]
"""
## Baseline

float16, saved and loaded again. Before it, the reference is scored: ratio 1, KLD 0 and
all tokens the same mean that the measurement repeats exactly. Anything else is noise,
and no difference smaller than that counts below.
"""

# %%
if __name__ == "__main__":
    run_variant("00_fp16_baseline", LAB)

# %% [markdown]
"""
## FP8_DYNAMIC

Half the bytes of every quantized Linear, in seconds and without data. Weights keep
three bits of mantissa, so expect a small but certain KLD. Speed: from SM 8.9 the tensor
cores take FP8; rounding the activations costs kernels of its own, which at 0.5B eats
what the smaller weights save for one sequence.
"""

# %%
if __name__ == "__main__":
    run_variant("01_fp8_dynamic", LAB)

# %% [markdown]
"""
## GPTQ W4A16

The smallest and, in quality, the dearest: sixteen levels for the weights of a group of
128. Activations stay 16-bit, so nothing is rounded while it runs: where bytes are what
one waits for (one sequence, a large model) it is the fastest. Prefill and batches wait
for arithmetic and have to unpack the weights first.
"""

# %%
if __name__ == "__main__":
    run_variant("02_gptq_w4a16", LAB)

# %% [markdown]
"""
## SmoothQuant + GPTQ W8A8

The bytes of FP8, but 256 evenly spaced levels and scales that fit the data: often the
closest to the reference, if SmoothQuant keeps outliers of the activations from wasting
the levels. Its integer tensor cores are older than those of FP8: a T4 has them.
"""

# %%
if __name__ == "__main__":
    run_variant("03_smoothquant_w8a8", LAB)

# %% [markdown]
"""
## On request

Recipes that `--variants` has to name. `rtn_w4a16` is the control of `02_gptq_w4a16`, in
the same format, but rounded to nearest in seconds. Compare their KLD: intervals that
share no value say that GPTQ did, or did not, earn its minutes.
"""

# %%
if __name__ == "__main__":
    for label in list(VARIANTS)[4:]:
        run_variant(label, LAB)

# %% [markdown]
"""
## Summary

All figures, then the verdict. Read the intervals before the order: what two variants
share cannot be ranked. And these are PyTorch's kernels on this machine: a server brings
others, and tasks of yours may mind what running text does not.
"""

# %%
if __name__ == "__main__":
    RESULTS = collect_results(LAB)
    show(render_tables(RESULTS, RESULTS["variants"]))
    if IN_NOTEBOOK:
        from IPython.display import Image, display
        display(Image(LAB.output / "summary.png"))
    print("wrote results.json, summary.md, summary.png, log.txt and checkpoints with "
          f"model cards\nto {LAB.output}")
    show("## Verdict\n\n" + render_verdict(RESULTS["variants"]))
    if not IN_NOTEBOOK and any(row["error"] for row in RESULTS["variants"]):
        sys.exit(1)
