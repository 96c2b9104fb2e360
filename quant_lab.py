# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   accelerator: GPU
#   colab: {gpuType: T4}
# ---

# %% [markdown]
"""# quant_lab: which quantization should I deploy?
A quantized model takes fewer bytes. Whether it is faster on your GPU, and what it lost,
has to be measured. This script writes a causal LM in float16 and as three checkpoints
(compressed-tensors, by llmcompressor), and measures bytes, quality, speed, memory.

    python quant_lab.py                        the four variants, on a GPU
    python quant_lab.py --demo                 the same code, any machine, two minutes
    python quant_lab.py --variants gptq --max-windows 20

Each run prints its variant beside the baseline; tables come after all, and last which
to deploy. `results.json` has every timing; beside it are summary, picture, checkpoints.
Every variant is compared with the *reference*: the model as it came. The *baseline* is
that model written and loaded again: what differs there is noise of the measurement."""

# %%
import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import time
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter, namedtuple
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import psutil
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
try:
    import triton
    from triton import jit, language as tl
except ImportError:  # Comes with PyTorch for GPUs only.
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda kernel: None
IN_NOTEBOOK = "__file__" not in globals()
OUTPUT = sys.stdout if IN_NOTEBOOK else sys.__stdout__  # sys.stdout may be the log.
HERE = Path.cwd() if IN_NOTEBOOK else Path(__file__).resolve().parent

# %% [markdown]
"""## Recipes
WxAy means weights of x bits and activations of y. SM is a GPU's compute capability.

| label | weights | activations | tensor cores |
| --- | --- | --- | --- |
| `01_fp8_dynamic` | FP8, a scale per output | FP8, per token | SM 8.9 (L4, H100) |
| `02_gptq_w4a16` | int4, a scale per 128 inputs | 16-bit | 16-bit, unpacked |
| `03_smoothquant_w8a8` | int8, a scale per output | int8, per token | SM 7.5 (T4) |

- [FP8](https://arxiv.org/abs/2209.05433) rounds weights to nearest. It needs no data:
  the scales of activations are found while the model runs (*dynamic*).
- [GPTQ](https://arxiv.org/abs/2210.17323) rounds input by input and makes up for each
  error in the weights not yet rounded, as calibration inputs weigh it. More *dampening*
  (of the matrix it inverts, on the diagonal) is safer and less exact.
- [SmoothQuant](https://arxiv.org/abs/2211.10438) first moves outliers to where they do
  less harm: activations are divided by a factor per channel, weights multiplied. Its
  GPTQ has `actorder=None`: vLLM 0.20 to 0.22 rejects a key of the default for W8A8.
- On request: `rtn_w4a16` rounds to nearest in GPTQ's format, as its control;
  [AWQ](https://arxiv.org/abs/2306.00978) does so after scaling up channels of the
  largest activations (its sums can overflow in float16: `--dtype bfloat16`). `w8a16`
  and `fp8_block`, DeepSeek-V3's, have no kernel here.

Embedding, `lm_head` and vision towers stay 16-bit. Groups are smaller where 128 does
not divide each width. To add a recipe, of any scheme, add an entry at the end: what
returns llmcompressor's modifiers (else weights are rounded to nearest), and `True` if
it looks at chats. What no kernel here implements runs *emulated*: unpacked."""

# %%
Variant = namedtuple("Variant", "scheme recipe calibrated", defaults=[None, False])
LINEAR = dict(targets="Linear", ignore=[
    "lm_head", "re:.*(embed_out|vision|visual|audio|multi_modal|projector).*"])
VARIANTS = {
    "00_fp16_baseline": Variant("FP16", lambda m, o: []),
    "01_fp8_dynamic": Variant("FP8_DYNAMIC"),
    "02_gptq_w4a16": Variant("W4A16", lambda m, o: [
        m.GPTQModifier(scheme="W4A16", dampening_frac=o.dampening, **LINEAR)], True),
    "03_smoothquant_w8a8": Variant("W8A8", lambda m, o: [
        m.SmoothQuantModifier(smoothing_strength=o.smoothing_strength),
        m.GPTQModifier(scheme="W8A8", dampening_frac=o.dampening, actorder=None,
                       **LINEAR)], True),
    "rtn_w4a16": Variant("W4A16"),
    "awq_w4a16": Variant("W4A16", lambda m, o: [
        m.AWQModifier(), m.QuantizationModifier(scheme="W4A16", **LINEAR)], True),
    "w8a16": Variant("W8A16"), "fp8_block": Variant("FP8_BLOCK"),
}
BASELINE, DEFAULT = "00_fp16_baseline", tuple(VARIANTS)[:4]

def build_recipe(label: str, options) -> list:
    from llmcompressor.modifiers import gptq, quantization, transform
    modifiers = SimpleNamespace(**vars(gptq) | vars(quantization) | vars(transform))
    scheme, recipe, _ = VARIANTS[label]
    return recipe(modifiers, options) if recipe else [
        modifiers.QuantizationModifier(scheme=scheme, **LINEAR)]

# %% [markdown]
"""## Options
What is typed wins over what `--demo` presets. Of a label a part is enough: `--variants
fp8 w4a16` looks among the four first, then among all; the baseline always runs, as all
stands beside it. A notebook takes its words from `%env QUANT_LAB_ARGS=--demo`."""

# %%
ULTRACHAT, WIKITEXT = "HuggingFaceH4/ultrachat_200k", "Salesforce/wikitext"
GROUPS, DTYPES = (128, 64, 32), ("float16", "bfloat16", "float32")
ROLES = dict(system="system", developer="system", user="user", human="user",
             prompt="user", text="user", assistant="assistant", gpt="assistant",
             completion="assistant", tool="tool", function="tool", observation="tool")
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
DEMO = dict(model="tests/tiny-qwen2", calibration_data="tests/demo/chats.jsonl",
            eval_text="tests/demo/eval.txt", calibration_samples=32,
            calibration_length=512, window=512, batch_sizes=(1, 8))

def option(default, remark: str, low=None, high=math.inf, choices=None):
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default or ""
    about = dict(help=f"{remark} [{shown}]".replace(" []", ""), low=low, high=high)
    return field(default=default, metadata=about | dict(choices=choices))

@dataclass(frozen=True)
class Options:
    model: str = option("Qwen/Qwen2.5-0.5B-Instruct", "hub id or folder of a causal LM")
    variants: tuple = option(DEFAULT, f"all, or parts of {', '.join(VARIANTS)}")
    plain_text: bool = option(False, "no chat template, for a base model")
    dtype: str = option("float16", "another if float16 overflows", choices=DTYPES)
    group_size: int = option(0, "of int4; 0: as large as fits", choices=(0, *GROUPS))
    dampening: float = option(0.01, "0.1 if modules fall back to rounding", 0, 1)
    smoothing_strength: float = option(0.8, "less leaves more to activations", 0, 1)
    device: str = option("auto", "cpu runs anywhere", choices=("auto", "cuda", "cpu"))
    gpus: int = option(0, "how many to use at most; 0: as many as needed", 0)
    execution: str = option("packed", "or in 16 bits", choices=("packed", "emulated"))
    vllm: str = option("", "python of an environment with vLLM, to measure there, too")
    tasks: tuple = option((), "names from lm-eval: arc_easy hellaswag gsm8k ...")
    task_limit: int = option(200, "documents a task, from its first on", 2)
    tasks_path: str = option("", "folder of tasks of your own, in lm-eval's YAML")
    demo: bool = option(False, "tiny model and text beside this: no GPU, no network")
    calibration_data: str = option(ULTRACHAT, "a .json(l) closer to your traffic")
    calibration_samples: int = option(256, "more if modules fall back to rounding", 1)
    calibration_length: int = option(1024, "tokens a sample; less to save memory", 8)
    seed: int = option(42, "to see what the choice of chats changes", 0, 2**32 - 1)
    eval_text: str = option(WIKITEXT, "a text file (UTF-8) of your domain")
    window: int = option(2048, "tokens; 2048 compares with papers", 2)
    max_windows: int = option(0, "20 for a quick look; 0 scores the whole text", 0)
    new_tokens: int = option(64, "length of the completions", 2)
    batch_sizes: tuple = option((1, 8, 32), "sequences decoded at once; 1 always is", 1)
    prompt_lengths: tuple = option((128, 512, 2048), "tokens to read: more TTFT", 1)
    repeats: int = option(5, "more if the range of the timings is wide", 1)
    no_compile: bool = option(False, "a quick look at speed; a CPU never compiles")
    output_dir: str = option("", "where to write, if not results/<model>-<device>")
    max_loss: float = option(2.0, "percent more perplexity you would accept", 0, 10**6)
    fresh: bool = option(False, "forget finished work in the output folder")

HELP_GROUPS = dict(model="what to run", calibration_data="data",
                   new_tokens="measurement", output_dir="output and advice")

# %%
def find_label(word: str) -> str:
    for labels in VARIANTS.keys() & {word}, DEFAULT, VARIANTS:
        matches = [label for label in labels if word.lower() in label]
        if len(matches) == 1:
            return matches[0]
    stop(f"--variants {word!r}: give all or a part of one of {', '.join(VARIANTS)}")

def parse_options(words: list[str]) -> Options:
    parser = ArgumentParser("quant_lab.py", "%(prog)s [options]", allow_abbrev=False,
                            description=re.sub("^# |[*`]", "", __doc__),
                            formatter_class=RawDescriptionHelpFormatter)
    parser.error = lambda message: stop(f"{message}; --help lists the options")
    flags = {"--" + f.name.replace("_", "-"): f for f in fields(Options)}
    forms = {bool: dict(action="store_true"), tuple: dict(nargs="+")}
    for flag, f in flags.items():
        if f.name in HELP_GROUPS:
            group = parser.add_argument_group(HELP_GROUPS[f.name])
        form = forms.get(f.type, dict(type=f.type, choices=f.metadata["choices"]))
        group.add_argument(flag, default=f.default, help=f.metadata["help"], **form)
    if "--demo" in words:
        parser.set_defaults(**DEMO)
    given = parser.parse_args(words)
    parts = ",".join(given.variants).split(",")
    labels = {BASELINE, *(VARIANTS if "all" in parts else map(find_label, parts))}
    given.variants = tuple(label for label in VARIANTS if label in labels)
    for name, always in dict(batch_sizes={1}, prompt_lengths=set()).items():
        numbers = ",".join(map(str, getattr(given, name)))
        with usable("--" + name.replace("_", "-"), numbers, "give whole numbers"):
            numbers = always.union(map(int, numbers.split(",")))
            setattr(given, name, tuple(sorted(numbers)))
    for flag, f in flags.items():
        value, low, high = getattr(given, f.name), f.metadata["low"], f.metadata["high"]
        least = value[0] if value and isinstance(value, tuple) else value
        if low is not None and not low <= least <= high:
            stop(f"{flag} {least}: not from {low} to {high}")
    return Options(**vars(given))

def choose_device(options: Options) -> torch.device:
    if options.device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", 0)
    if options.device == "cpu" or (options.demo and options.device == "auto"):
        return torch.device("cpu")
    stop("no CUDA GPU: try --demo, --device cpu or, in Colab, a runtime with a T4")

# %% [markdown]
"""## Model and text
From the hub comes the model's safetensors and tokenizer, the test split of WikiText,
the first of UltraChat's files (244 MB): by the hub's own client, which tries again, and
keeps what it got. Code of a model never runs.

*Calibration* chats, in the model's chat template, are what GPTQ and SmoothQuant look
at: 256 conversations, drawn with `--seed` from the first 1,024, each cut to 1,024
tokens; your own are a .jsonl or a JSON array of any of these:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}]}
    {"prompt": "...", "completion": "..."}
    {"text": "goes to the tokenizer as it is, without a template"}

A chat that the template refuses (over the order of roles, say) is left out and counted.
*Evaluation* text, which shares nothing with them, is scored. The demo scores an eighth
of the topics of Python's help; the rest, which trained its model, calibrates."""

# %%
def find_path(name: str) -> Path | None:
    paths = Path(os.path.expanduser(name)), HERE / name  # Here, or beside the script.
    return next(filter(os.path.exists, paths), None)

def open_model(options: Options) -> tuple[Path, object, int, list[Tensor]]:
    """Return folder, tokenizer, context and PROMPTS as ids [1, n], or exit with 2."""
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForCausalLM, AutoTokenizer, utils
    from transformers.models.auto import modeling_auto
    utils.logging.set_verbosity_error()  # Warnings quote a model's files.
    utils.logging.disable_progress_bar()
    torch._logging.set_logs(all=40)  # Errors; compiling and tracing warn of much.
    with usable("--model", options.model, "give another causal LM: id or whole folder"):
        folder = find_path(options.model) or Path(snapshot_download(
            options.model, ignore_patterns=["*/*", "consolidated*"], allow_patterns=(
                "*.safetensors *.json *.txt *.model *.jinja README.md".split())))
        names = " ".join(file.name for file in folder.glob("*"))
        config = read_json(folder / "config.json")
        kind = (config.get("architectures") or [""])[0]
        causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        obstacles = {
            "a LoRA adapter: merge it first": "adapter_config.json" in names,
            "an embedding model, it writes no text": "modules.json" in names,
            "quantized already: use original": "quantization_config" in config,
            f"{kind}, no known causal LM": kind not in str(causal),
            "no safetensors; save_pretrained makes them": ".safetensors" not in names}
        for obstacle in [text for text, holds in obstacles.items() if holds]:
            stop(f"--model {options.model}: {obstacle}")
        model = AutoModelForCausalLM.from_pretrained(  # Opens each file.
            folder, device_map="meta", trust_remote_code=False, use_safetensors=True,
            dtype=options.dtype)
        size, free = model.get_memory_footprint(), psutil.virtual_memory().available
        if size > free:
            raise ValueError(f"{size / 1e9:.1f} GB of RAM, {free / 1e9:.1f} are free")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if options.plain_text:  # Turns without roles, begun as the tokenizer does.
            tokenizer.chat_template = tokenizer.decode(list_specials(tokenizer)) + (
                "{{ messages | map(attribute='content') | join('\n') }}")
        if not tokenizer("word").input_ids or not tokenizer.chat_template:
            raise ValueError("no tokenizer or chat template (base model: --plain-text)")
        prompts = [tokenizer.apply_chat_template(
            [dict(role="user", content=prompt)], add_generation_prompt=True,
            return_tensors="pt", return_dict=True).input_ids for prompt in PROMPTS]
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or 2**31
    if max(ids.shape[1] for ids in prompts) + options.new_tokens > context:
        stop(f"--new-tokens {options.new_tokens}: too many for a context of {context}")
    return folder, tokenizer, context, prompts

def fetch(source: str, files: str, column: str, rows: int | None = None) -> list:
    from huggingface_hub import snapshot_download
    from pyarrow.parquet import read_table
    folder = Path(snapshot_download(source, repo_type="dataset", allow_patterns=files))
    data = read_table(min(folder.glob(files), default=folder / files), columns=[column])
    return data[column][:rows].to_pylist()

# %%
def read_chat(entry: dict) -> list[dict] | str:
    """Return a chat's turns, or text as it is; ValueError if the format is unknown."""
    forms = "messages", "conversations", "prompt completion", "text"
    form, chat = next((f for f in forms if set(f.split()) <= entry.keys()), ""), []
    for key in form.split():
        is_list = isinstance(entry[key], list) and key != "text"
        for turn in entry[key] if is_list else [{"role": key, "content": entry[key]}]:
            role = ROLES.get(turn.get("role", turn.get("from")))
            content = turn.get("content", turn.get("value"))
            if isinstance(content, list):
                content = "\n".join(part["text"] for part in content)
            elif content is None and turn.get("tool_calls"):
                content = ""
            if role is None or not isinstance(content, str):
                raise ValueError(f"has a turn of {turn}")
            chat.append(turn | dict(role=role, content=content))
    if not any(turn["content"].strip() for turn in chat):
        raise ValueError(f"has {', '.join(entry) or 'no keys'}, and no chat")
    return chat[0]["content"] if form == "text" else chat

def read_chats(name: str) -> list:
    found, text = [], Path(find_path(name) or name).read_text("utf-8-sig")
    unit = "entry" if text.lstrip().startswith("[") else "line"
    lines = map(json.dumps, json.loads(text)) if unit == "entry" else text.split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip() or not text.strip():  # Of a blank file, line 1 is none.
            try:
                found.append(read_chat(json.loads(line)))
            except Exception as error:
                raise ValueError(f"{unit} {number}: {describe(error)}: {line[:80]}")
    return found

def load_calibration(options: Options, tokenizer, context: int) -> dict[str, list]:
    """Return the calibration chats' input_ids and attention_mask, a list of each."""
    source, wanted = options.calibration_data, options.calibration_samples
    length, samples, refused = min(options.calibration_length, context), [], Counter()
    advice = 'give a file of {"messages": [{"role": "user", "content": "..."}, ...]}'
    with usable("--calibration-data", source, advice):
        chats = (fetch(source, "data/train_sft-00000-*", "messages", 4 * wanted)
                 if source == ULTRACHAT else read_chats(source))
    random.Random(options.seed).shuffle(chats)
    for chat in chats:
        render = tokenizer if isinstance(chat, str) else tokenizer.apply_chat_template
        try:  # A template may refuse a system turn, or roles in this order.
            ids = render(chat, return_dict=True).input_ids[:length]
            if not ids:
                raise ValueError("nothing comes of it")
            samples.append(ids)
        except Exception as error:
            refused[describe(error)] += 1
        if len(samples) == wanted:
            break
    why = "".join(f"; the template refused {n}: {x}" for x, n in refused.items())
    if not samples:
        stop(f"--calibration-data {source}: no chat is left{why}")
    print(f"calibration  {len(samples)} of {wanted} chats of {source}{why}")
    return dict(input_ids=samples, attention_mask=[[1] * len(ids) for ids in samples])

# %%
def list_specials(tokenizer) -> list[int]:
    ids, bare = (tokenizer("hi", add_special_tokens=x).input_ids for x in (True, False))
    return ids[: ids.index(bare[0])] if bare else []

def load_evaluation(options: Options, tokenizer, context: int) -> tuple[Tensor, list]:
    """Return windows [n, tokens] of the text and the ids that begin each, or exit."""
    source, window, begin = options.eval_text, options.window, list_specials(tokenizer)
    with usable("--eval-text", source, "give a text file in UTF-8"):
        text = ("\n\n".join(fetch(source, "wikitext-2-raw-v1/test-*", "text"))
                if source == WIKITEXT else
                Path(find_path(source) or source).read_text("utf-8-sig"))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    size = window - len(begin)
    if window > context or not 0 < size <= len(ids):
        stop(f"--window {window}: at most {context} (context) or {len(ids)} ({source})")
    at = range(0, len(ids) - size + 1, size)[: options.max_windows or None]
    return torch.tensor([begin + ids[i : i + size] for i in at]), begin

# %% [markdown]
"""## Quantize
Load the model, build the recipe, `oneshot`, save, hash, rename. Each modifier of a
[llmcompressor](https://docs.vllm.ai/projects/llm-compressor) recipe takes its own pass
over the chats, layer by layer, up to eight of like length at once, cut to the shortest:
of 256 that costs 1.4 % of the tokens, and W4A16 takes a third of the time (H200).

**MB**: bytes of the safetensors, in 10^6. **quantize s**: the recipe with calibration,
without loading and saving. Layers whose matrix GPTQ cannot invert are rounded to
nearest; the notes count them. A checkpoint of which transformers does not read every
weight again fails."""

# %%
def quantize_variant(label: str, lab: SimpleNamespace) -> dict:
    from datasets import Dataset
    from llmcompressor import oneshot
    folder = lab.output / "checkpoints" / label
    draft, row = folder.with_suffix(".partial"), dict(notes=[], quantize_seconds=0)
    shutil.rmtree(draft, ignore_errors=True)
    chats = Dataset.from_dict(lab.samples) if VARIANTS[label].calibrated else None
    model = place_model(lab.model_folder, lab.options, torch.device("cpu"))
    recipe = build_recipe(label, lab.options)
    with llmcompressor_session(model) as log:
        if recipe:
            fit_groups(recipe, model, lab.options, row)
            fit_smoothing(recipe, model, row)
            start = now()
            oneshot(model=model, recipe=recipe, processor=lab.tokenizer, dataset=chats,
                    shuffle_calibration_samples=False,
                    batch_size=min(8, 1 + len(chats or ()) // 40))
            row["quantize_seconds"] = now() - start
        model.save_pretrained(draft)  # Adds recipe.yaml from the session.
    if label != BASELINE:
        config = read_json(draft / "config.json")
        form = config.get("quantization_config", dict(format="dense"))
        if form["format"] == "dense":
            raise ValueError("compressed-tensors packed no Linear layer of this model")
        kept = [name for name, module in model.named_modules() if isinstance(
            module, torch.nn.Linear) and not hasattr(module, "quantization_scheme")]
        form["ignore"] = sorted({*form["ignore"], *kept})  # By names in memory.
        write_json(draft / "config.json", config)
    lab.tokenizer.save_pretrained(draft)
    if lab.options.plain_text:  # The template is not the model's own.
        (draft / "chat_template.jinja").unlink(missing_ok=True)
    failed = re.findall(r"inversion failed for (\d+)/", "".join(log))
    row |= dict(rtn_fallbacks=sum(map(int, failed)), checkpoint=f"checkpoints/{label}")
    row["weight_bytes"] = sum(f.stat().st_size for f in draft.glob("*.safetensors"))
    write_json(draft / "quant_lab.json", dict(
        row=row, fingerprint=lab.marks[label], files=hash_files(draft)))
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)  # In one step: a checkpoint is there or it is not.
    return row

def read_checkpoint(label: str, lab: SimpleNamespace) -> dict | None:
    folder = lab.output / "checkpoints" / label
    note = read_json(folder / "quant_lab.json")
    fits = note.get("fingerprint") == lab.marks[label]
    if fits and note["files"].items() <= hash_files(folder).items():  # Not altered.
        return note["row"]

# %% [markdown]
"""## Quality
**Perplexity** follows the GPTQ paper. The text is tokenized once and cut into windows
that do not overlap, each begun with BOS where the tokenizer begins a text with it
(without, Gemma 3 270M has a perplexity of 36 instead of 21); every token but the first
of a window is scored, a tail shorter than a window is not. With the loss in nats of
token i given those before it in the window, perplexity = exp(mean loss). Compare it
with figures of the same protocol alone: protocols differ by more than recipes.

**Ratio**: perplexity over the reference's. Both score the very same tokens, so the
interval is that of the *paired* difference: how hard the text is cancels, and the
interval is far narrower than that of perplexity itself.

**KLD**: Kullback-Leibler divergence D(reference || variant) of the next-token
distributions, in nats, over the whole vocabulary. In perplexity a token that became
more likely pays for one that became less likely; in KLD both count, which makes it the
most sensitive figure here. What .015 nats mean: on text that the reference wrote itself
perplexity would rise by a factor of exp(.015), 1.5 % (the cost of a wrong code: Cover
and Thomas, *Elements of Information Theory*, theorem 5.4.3). It is taken at every
token, in float32 (off by some 1e-6). What waits in the host's memory are the
reference's last hidden states (0.54 GB at 0.5B; logits would be 90 GB), which its own
head turns into logits again. **Top-1**: how often the first choice agrees. **Tokens**:
of a greedy completion, until it differs from the reference's, the median of eight.

**The interval** of 95 % (±: its half) speaks for the choice of text, not for that of
chats (compare two seeds). What stands in one article errs together, so neither tokens
nor windows are independent: consecutive windows are joined into 4 to 10 blocks of three
or more, and the spread of the blocks is what counts: the standard error of a ratio of
sums over clusters (Cochran, *Sampling Techniques*, 1977, section 6.3) times Student's t
(Abramowitz and Stegun 26.7.5). Simulated with neighbours that correlate by 0.5, it
covers .93 at 20 windows and .94 at 146; below 12 there is none."""

# %%
CHUNK, FEWEST = 128, 12  # Tokens at once, or memory lacks; windows of an interval.

def find_decoder(model):
    decoder = model.get_decoder()
    return model.model if decoder is model else decoder  # Llama 4 returns itself.

def apply_head(model, output, hidden: Tensor) -> Tensor:
    """Return log-probabilities [n, vocabulary] of last hidden states [n, width]."""
    # By the model's own forward, which may scale or cap: its decoder returns these.
    output.last_hidden_state = hidden[None]
    with patch.object(find_decoder(model), "forward", lambda *_, **__: output):
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        logits = model(input_ids=ids, use_cache=False).logits[0]
    return F.log_softmax(logits, dim=-1, dtype=torch.float32)

def score_text(model, lab: SimpleNamespace):
    """Yield hidden states, log-probabilities [n, vocabulary], losses [n], in nats."""
    for ids in show_progress("scoring", lab.windows.to(lab.device)):
        output = find_decoder(model)(input_ids=ids[None], use_cache=False)
        rows = output.last_hidden_state[0, lab.unscored - 1 : -1].to(ids.device)
        for hidden, wanted in zip(rows.split(CHUNK), ids[lab.unscored :].split(CHUNK)):
            q = apply_head(model, output, hidden)
            if not q.amin().isfinite():
                raise FloatingPointError("logits are not finite: try another --dtype")
            yield hidden, q, F.nll_loss(q, wanted, reduction="none").double()

def complete_prompts(model, lab: SimpleNamespace) -> list[list[int]]:
    """Return greedy completions of lab.prompts, lists of ids, up to what ends each."""
    ends = model.generation_config.eos_token_id or lab.tokenizer.eos_token_id
    model.generation_config = type(model.generation_config)(
        eos_token_id=ends, pad_token_id=0)
    prompts = [ids.to(lab.device) for ids in lab.prompts]
    return [model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                           max_new_tokens=lab.options.new_tokens
                           )[0, ids.shape[1] :].tolist() for ids in prompts]

@torch.no_grad()
def measure_reference(lab: SimpleNamespace) -> SimpleNamespace:
    """Return losses, completions, hidden states of the text and the head they go to."""
    from accelerate.hooks import remove_hook_from_module
    model = place_model(lab.model_folder, lab.options, lab.device)
    states, losses = zip(*((hidden.cpu(), losses.cpu())
                           for hidden, _, losses in score_text(model, lab)))
    completions, decoder = complete_prompts(model, lab), find_decoder(model)
    output = decoder(input_ids=lab.windows[:1, :1].to(lab.device), use_cache=False)
    remove_hook_from_module(model, recurse=True)
    for part in [x for x in decoder.children() if isinstance(x, torch.nn.ModuleList)]:
        del part[:]  # What is left is the embedding and the head, and what follows it.
    return SimpleNamespace(losses=torch.cat(losses), states=states, head=model.cpu(),
                           output=output, completions=completions)

# %%
def estimate(values: Tensor, scale=float, name="value", blocks: int = 0) -> dict:
    """Return the mean of values [windows, n] and its 95 % interval, by windows."""
    mean, windows = values.mean().item(), len(values)
    if windows < FEWEST and not blocks:
        return {name: scale(mean), "low": None, "high": None}
    blocks = blocks or min(10, max(4, windows // 5))
    places = torch.arange(windows) * blocks // windows
    sums = torch.bincount(places, weights=(values - mean).sum(1))
    n = blocks - 1  # Degrees of freedom; 1.960 is the normal distribution's.
    t = 1.960 + 2.372 / n + 2.822 / n**2 + 2.556 / n**3 + 1.589 / n**4
    half = t * (math.sqrt(sums.square().sum() * blocks / n) / values.numel())
    return {name: scale(mean), "low": scale(mean - half), "high": scale(mean + half)}

def raise_e(x: float) -> float:
    return math.exp(min(x, 709.0))  # Of more, e to the x is no float.

def compare(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return KLD [n], in nats, and if the likeliest agree, of log-probabilities."""
    return (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)

def compare_completions(mine: list, wanted: list, lab: SimpleNamespace) -> dict:
    completions = []
    for prompt, made, other in zip(PROMPTS, mine, wanted):
        same = len(os.path.commonprefix([made, other]))
        same = lab.options.new_tokens if made == other else same
        text = lab.tokenizer.decode(made, skip_special_tokens=True)
        completions.append(dict(prompt=prompt, completion=text, same_tokens=same))
    lengths = [one["same_tokens"] for one in completions]
    return dict(median=statistics.median(lengths), min=min(lengths), max=max(lengths),
                completions=completions)

@torch.no_grad()
def measure_quality(model, lab: SimpleNamespace) -> dict:
    reference, parts = lab.reference, []
    reference.head.to(lab.device)
    for (_, q, losses), state in zip(score_text(model, lab), reference.states):
        p = apply_head(reference.head, reference.output, state.to(lab.device))
        parts.append(torch.stack([losses, *compare(p, q)]).cpu())
    reference.head.cpu()
    losses, kld, agrees = torch.cat(parts, dim=1).view(3, len(lab.windows), -1)
    mine, perplexity = complete_prompts(model, lab), estimate(losses, raise_e)
    return dict(
        perplexity=perplexity["value"], perplexity_interval=perplexity,
        perplexity_ratio=estimate(losses - reference.losses.view_as(losses), raise_e),
        tokens_scored=losses.numel(), weights_memory_bytes=model.get_memory_footprint(),
        window_losses=losses.mean(1).tolist(), gpus=dict(quality=model.devices),
        top1_agreement=estimate(agrees, lambda x: min(100 * x, 100.0)),
        kld=estimate(kld, lambda x: max(x, 0.0), "mean") | dict(
            max=kld.max().item(), tokens=kld.numel(), windows=kld.mean(1).tolist()),
        divergence=compare_completions(mine, reference.completions, lab))

# %% [markdown]
"""## Tasks
Does it still do the task? `--tasks` names some of EleutherAI's
[lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness) (`pip
install lm-eval`), which asks and scores; `--tasks-path` is a folder with YAML of your
own. The model stays packed. It gets its chat template where it writes, and none where
likelihoods of choices are compared. A group is one task, all documents alike, as where
lm-eval weighs by size. Of several metrics, and filters, the last counts (`acc_norm`; of
gsm8k `flexible-extract`) that is a number from 0 to 1, better if greater.

All variants get the same documents, the first `--task-limit`. **Recovery**: the value
over the baseline's. **Lost**, **gained**: documents scored lower and higher than by the
baseline. **Difference**: the mean over documents of both scores', so how hard one is
cancels. Documents, unlike windows, are taken as independent: no blocks, but McNemar's
setting. Where few answers flip, a plain interval is too short: two documents are
imagined, one lost, one gained (Bonett and Price, *Journal of Educational and Behavioral
Statistics* 37, 2012); for a value four, two of them right (Agresti and Coull, *The
American Statistician* 52, 1998). A document changed since goes unnoticed: `--fresh`.

What the verdict calls a loss is one for all comparisons together. How many documents
would show one point stands beside it.

On a GPU, layers are compiled for choices (without a cache, which would tie each to its
number), else rounding activations takes four times as long as float16 (H200). Where the
model writes they are not, and 8-bit formats wait."""

# %%
def load_tasks(options: Options, log: Path) -> dict[str, list]:
    """Return tasks of lm-eval by the name asked for; those of a group together."""
    way_out = "pip install lm-eval; `lm-eval ls tasks` and --tasks-path have names"
    with usable("--tasks", " ".join(options.tasks), way_out), libraries_to(log):
        if options.tasks:
            from lm_eval.tasks import TaskManager
            manager = TaskManager(include_path=options.tasks_path or None)
        return {name: [*manager.load(name)["tasks"].values()] for name in options.tasks}

def do_task(lm, tasks: list, options: Options) -> dict:
    """Return lm-eval's metric and scores of the documents of tasks, in their order."""
    import lm_eval.evaluator
    start, writes = now(), all(x.OUTPUT_TYPE == "generate_until" for x in tasks)
    in_chat = writes and not options.plain_text
    with (torch.compiler.set_stance("force_eager" if writes else "default"),
          patch.multiple(lm_eval.evaluator, add_env_info=id, get_git_commit_hash=str)):
        found = lm_eval.simple_evaluate(
            lm, tasks=tasks, limit=options.task_limit, bootstrap_iters=0,
            apply_chat_template=in_chat, fewshot_as_multiturn=in_chat,
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False))
    seconds, samples = now() - start, sum(found["samples"].values(), [])
    last, is_better = samples[-1], tasks[-1].higher_is_better()
    metric = [x for x in last["metrics"] if is_better.get(x)
              and isinstance(last[x], (int, float)) and 0 <= last[x] <= 1][-1]
    samples = [x for x in samples if x["filter"] == last["filter"]]
    scores, key = [x[metric] for x in samples], f"{metric},{last['filter']}"
    total = sum(one[key] * one["sample_len"] for one in found["results"].values())
    if not math.isclose(sum(scores), total, abs_tol=1e-6) or max(scores) > 1:
        raise ValueError(f"{key} is not the mean over documents")
    return dict(metric=metric, filter=last["filter"], documents=len(scores),
                scores=scores, limit=options.task_limit, seconds=seconds)

def imagine(scores: Tensor, imagined: list) -> dict:
    """Return the mean of scores, and its interval with imagined ones among them."""
    x, least = torch.cat([scores, torch.tensor(imagined)]), min([0, *imagined])
    return estimate(x[:, None], lambda y: max(least, min(y, 1)), blocks=len(x)) | dict(
        value=scores.mean().item())

def compare_scores(mine: dict, base: dict | bool) -> dict:
    """Return value, recovery, flips, and the paired difference; False is no other."""
    scores, theirs = (torch.tensor(x["scores"]).double() for x in (mine, base or mine))
    gaps, mean = scores - theirs, theirs.mean().item()
    return imagine(scores, [0, 0, 1, 1]) | dict(
        recovery=100 * scores.mean().item() / mean if mean else None,
        difference=imagine(gaps, [-1, 1] if base else []),
        flips=dict(lost=(gaps < 0).sum().item(), gained=(gaps > 0).sum().item()))

# %%
def measure_tasks(label: str, lab: SimpleNamespace) -> None:
    row, base = lab.rows[label], lab.rows.get(BASELINE, ROW)["tasks"]
    done, folder, lm = row["tasks"], lab.output / "checkpoints" / label, None
    todo = [x for x in lab.tasks if (x in base or done is base)
            and done.get(x, {}).get("limit") != lab.options.task_limit]
    for name in todo:
        print(f"{label:20} does {name}", flush=True)
        row["notes"] = [x for x in row["notes"] if not x.startswith(f"no {name}: ")]
        with libraries_to(lab.output / "log.txt"):
            try:
                if lm is None:
                    from lm_eval.models.huggingface import HFLM
                    model = place_model(folder, lab.options, lab.device)
                    lm = HFLM(pretrained=model, tokenizer=str(folder), batch_size=8)
                    if model.devices == [0] and not lab.options.no_compile:
                        find_decoder(model).config.use_cache = False
                        for layer in getattr(find_decoder(model), "layers", ()):
                            layer.compile(dynamic=True)
                new = do_task(lm, lab.tasks[name], lab.options)
                done[name] = new | compare_scores(new, done is not base and base[name])
            except Exception as error:
                traceback.print_exc()
                row["notes"].append(f"no {name}: {quote(describe(error))}")
        write_outputs(lab)

# %% [markdown]
"""## Speed
A causal LM answers in two phases. *Prefill* reads the whole prompt at once: many rows
go through each weight, and arithmetic is what one waits for. *Decoding* then makes one
token a step: every step reads all weights for a single row, and bytes are what one
waits for. That is why fewer bits can make decoding faster and prefill slower.

A prompt of 512 tokens of the evaluation text is continued by exactly `--new-tokens`,
greedy, whatever the model's own settings ask for, so no variant ends early.

- **TTFT**: time to the first token, the prefill; timed for `--prompt-lengths`, too, as
  far as the context goes. **Latency**: that of 512 and all new tokens.
- **tokens/s**, **batch n**: tokens after the first over the seconds they take, for one
  sequence and for n, of different text.
- **weights**: parameters and buffers in memory afterwards. **Peak**: the allocator's,
  in a prefill or a step of one sequence (GPU only).
- **KV tokens**: how many tokens' keys and values fit into 90 % of the GPU beside that
  peak; **users**, of 8,192 tokens each. Bytes a token are those of a real cache of that
  length, windows that forget and states that do not grow included.

One warm-up, then `--repeats` runs; each look at the clock waits for the device. Shown
is the median (least-greatest). Where the greatest is over 1.3 times the least, the
machine was busy with something else: the figure is marked *noisy*, and not ranked.

Decoding is what servers do, as far as PyTorch goes: a static cache, tokens that never
leave the GPU, compiled decoder layers, prefill and step as CUDA graphs. Else hundreds
of kernels would each be started from Python, and at this size one would measure Python.
So a model whose layers do not compile has no speed on a GPU (sliding windows shorter
than the prompt, soft caps, states): a server may have. A CPU never compiles. And a
process's first three graphs replay up to 21 % faster than all do once a fourth is
recorded (H200; why is not known). Servers record dozens; so does this."""

# %%
NOISE_LIMIT = 1.3  # Greatest over least of a timing that can be ranked.

class Decoder:
    """Continue prompts [batch, n] in tensors of fixed size; if compiled, by graphs."""
    def __init__(self, model, prompts: Tensor, steps: int, compiled: bool):
        from transformers.cache_utils import Cache, StaticLayer
        self.model, self.start = model, prompts.shape[1]
        length = math.ceil((self.start + steps + 1) / 16) * 16  # SDPA wants that.
        layers = find_decoder(model).layers
        self.cache = Cache(layers=[StaticLayer(length) for _ in layers])
        size = 1, 1, length, length  # Over a row of what each place may see.
        self.masks = prompts.new_full(size, -math.inf, dtype=model.dtype).triu(1)
        self.token, self.prompts = prompts[:, -1:].clone(), prompts
        self.places = torch.arange(self.start, device=prompts.device)
        self.position = self.places[-1:] + 1
        self.prefill()  # Makes the tensors of the cache.
        self.run(min(2, steps))  # Compiles, and warms up.
        if prompts.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        if compiled and prompts.is_cuda:
            x = torch.zeros(1, device=prompts.device)
            for _ in range(16):  # As many as a server has: those of few replay faster.
                record(lambda: [x.add_(1) for _ in range(1000)])()
            if steps:
                self.step = record(self.step)
            if len(prompts) == 1:
                self.prefill = record(self.prefill)
    def advance(self, ids: Tensor, places: Tensor) -> None:
        output = self.model(
            input_ids=ids, attention_mask=self.masks[:, :, places], logits_to_keep=1,
            position_ids=places[None], past_key_values=self.cache)
        self.token.copy_(output.logits[:, -1:].argmax(-1))
    def prefill(self) -> None:
        self.advance(self.prompts, self.places)
    def step(self) -> None:
        self.advance(self.token, self.position)
        self.position += 1
    def run(self, steps: int) -> tuple[float, float]:
        """Return seconds to the first token, of the prefill, and to the last."""
        self.cache.reset()
        self.position.fill_(self.start)
        start = now()
        self.prefill()
        first = now()
        for _ in range(steps):
            self.step()
        return first - start, now() - start

def time_runs(model, prompts: Tensor, steps: int, repeats: int, compiled: bool) -> list:
    """Return seconds to the first and to the last token of each run; none if OOM."""
    with contextlib.suppress(torch.OutOfMemoryError):
        decoder = Decoder(model, prompts, steps, compiled)
        return [decoder.run(steps) for _ in range(1 + repeats)][1:]
    return []

def cut_prompts(lab: SimpleNamespace) -> Tensor:
    size = max(lab.options.batch_sizes), min(512, lab.context - lab.options.new_tokens)
    ids = lab.windows[:, lab.unscored :].flatten()
    return ids[torch.arange(math.prod(size)) % len(ids)].view(size)

# %%
CONTEXT = 8192  # Tokens of a user whose keys and values are to fit.

def now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()

def summarize(x: list[float]) -> dict | None:
    if x:
        return dict(median=statistics.median(x), min=min(x), max=max(x), samples=x)

def summarize_runs(batch: int, steps: int, runs: list) -> tuple[dict, dict]:
    itl = [(last - first) / steps for first, last in runs]
    return (dict(ttft_s=summarize([first for first, _ in runs]),
                 latency_s=summarize([last for _, last in runs])),
            dict(batch=batch, tok_s=summarize([batch / x for x in itl]),
                 itl_ms=summarize([1000 * x for x in itl])))

def record(work):
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    with torch.cuda.stream(stream), torch.cuda.graph(graph):  # Back, if it fails.
        work()
    return graph.replay

def count_kv_bytes(model, ids: Tensor) -> int | None:
    """Return bytes a token of a cache of CONTEXT, all kinds of layers; None if OOM."""
    from transformers.cache_utils import StaticCache
    with contextlib.suppress(torch.OutOfMemoryError):
        cache = StaticCache(model.config, CONTEXT)
        model(input_ids=ids, past_key_values=cache)  # Makes its tensors.
        held = tree_leaves([vars(layer) for layer in cache.layers])
        return round(sum(x.nbytes for x in held if isinstance(x, Tensor)) / CONTEXT)

@torch.no_grad()
def measure_speed(model, prompts: Tensor, options: Options, compiled: bool) -> dict:
    steps, decode, prefill = options.new_tokens - 1, [], []
    kv = count_kv_bytes(model, prompts[:1, :1])
    speed = dict(prompt_tokens=prompts.shape[1], decode=decode, prefill=prefill,
                 kv_bytes_per_token=kv)
    compile_layers(model, compiled)
    for batch in show_progress("timing", options.batch_sizes):
        runs = time_runs(model, prompts[:batch], steps, options.repeats, compiled)
        if not runs and batch == 1:
            raise MemoryError("out of memory: one sequence does not fit")
        waits, figures = summarize_runs(batch, steps, runs)
        decode.append(figures if runs else figures | dict(error="OOM"))
        speed = waits | speed  # Of the first batch, one sequence.
        if batch == 1 and prompts.is_cuda:
            peak = torch.cuda.max_memory_allocated()
            room = max(0, 0.9 * torch.cuda.get_device_properties(0).total_memory - peak)
            speed |= dict(peak_memory_bytes=peak, kv_tokens=kv and int(room / kv))
    for tokens in options.prompt_lengths:
        text = prompts.flatten().repeat(1 + tokens // prompts.numel())[None, :tokens]
        runs = time_runs(model, text, 0, options.repeats, compiled)
        prefill.append(dict(prompt_tokens=tokens, error=None if runs else "OOM",
                            ttft_s=summarize([x for x, _ in runs])))
    return speed

# %% [markdown]
"""## As served
What one deploys is a server, whose kernels may rank the formats in another order.
`--vllm PYTHON` names the interpreter of an environment that has vLLM (its pins differ
from llmcompressor's: it can never be this one). There each checkpoint, in a process of
its own, continues the same prompts, greedy, to the same length, without prefix caching.
TTFT is the time for one token; what `--new-tokens` take longer is decoding. Its log
says which kernels it chose and how many KV tokens fit in 80 % of the GPU.

Those are its engine's times, without HTTP and other requests (`vllm bench serve`). Its
completions are compared with this script's: one that reads a checkpoint wrongly differs
at once. The baseline is measured first, and again last: if the two differ by over 5 %,
in latency or decoding at any batch size, or cannot be compared, all counts as noisy."""

# %%
PATIENCE, DRIFT = 1200, 0.05  # Seconds for a checkpoint; between two baselines.
SERVED = dict.fromkeys("""engine kernel ttft_s latency_s decode kv_tokens divergence
    error drift tensor_parallel_size""".split())

def serve(model: str, prompts: list, chats: list, config: dict, gpus: int) -> None:
    """Print how vLLM continues lists of ids, round 0 to warm up; runs over there."""
    import time
    import vllm
    count = config["new_tokens"]
    llm = vllm.LLM(
        model=model, dtype=config["dtype"], seed=config["seed"],
        max_model_len=max(map(len, prompts + chats)) + count, tensor_parallel_size=gpus,
        enable_prefix_caching=False, gpu_memory_utilization=0.8)  # Some is taken here.
    def run(inputs, tokens, ignore_eos):
        inputs, start = [dict(prompt_token_ids=x) for x in inputs], time.perf_counter()
        outputs = llm.generate(inputs, vllm.SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=ignore_eos), use_tqdm=False)
        return time.perf_counter() - start, [x.outputs[0].text for x in outputs]
    rounds = [[[run(prompts[:n], tokens, True)[0] for tokens in (1, count)]
               for n in config["batch_sizes"]] for _ in range(1 + config["repeats"])]
    print("\nRESULT", json.dumps([rounds[1:], run(chats, count, False)[1]]), flush=True)

def run_there(exe: str, code: str, log: Path) -> str:
    """Return what code prints in another environment, logged; or say what failed."""
    exe = os.path.expanduser(exe)
    own = dict(PYTHONPATH="", VLLM_ENABLE_V1_MULTIPROCESSING="0",  # Its tools, too.
               PATH=f"{Path(exe).parent.absolute()}:{os.environ['PATH']}")
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(
            [exe, "-c", "import sys;exec(sys.stdin.read())"], input=code, text=True,
            stdout=stream, stderr=stream, timeout=PATIENCE, env=os.environ | own)
    said = log.read_text("utf-8", errors="replace").split("\nException ignored in")[0]
    if done.returncode:
        errors = re.findall(r"^[\w.]*(?:Error|Exception)\b.*(?:\n .*)*", said, re.M)
        raise ValueError((errors or [f"exit code {done.returncode}: {said[-99:]}"])[-1])
    return said

def find_engine(options: Options, log: Path) -> str:
    ask = "import torch, vllm; print(torch.cuda.is_available(), vllm.__version__)"
    with usable("--vllm", options.vllm, "give the python of an environment with vLLM"):
        sees_gpu, version = run_there(options.vllm, ask, log).split()[-2:]
        if sees_gpu == "False" or [*map(int, version.split(".")[:2])] < [0, 20]:
            raise ValueError(f"vLLM {version} (0.20 is the first); a GPU: {sees_gpu}")
    return f"vllm {version}"

# %%
def measure_served(label: str, lab: SimpleNamespace) -> dict:
    row, log = lab.rows[label], lab.output / f"vllm-{label}.log"
    gpus, n = range(torch.cuda.device_count())[: lab.options.gpus or None], 1
    while 2 * n <= len(gpus) and row["weight_bytes"] > 0.7 * n * find_free(0):
        n *= 2
    served = SERVED | dict(engine=lab.engine, tensor_parallel_size=n)
    given = json.dumps(dict(
        model=f"{lab.output}/checkpoints/{label}", prompts=cut_prompts(lab).tolist(),
        chats=[x[0].tolist() for x in lab.prompts], config=lab.head["config"], gpus=n))
    code = f"import json\n{inspect.getsource(serve)}\nserve(**json.loads({given!r}))"
    print(f"{label:20} in {lab.engine}, for {PATIENCE} s at most", flush=True)
    try:
        said = run_there(lab.options.vllm, code, log)
        rounds, texts = json.loads(re.search("^RESULT (.*)", said, re.M)[1])
    except Exception as error:
        return served | dict(error=f"{describe(error)}; {log.name} has more")
    sizes, steps = lab.options.batch_sizes, lab.options.new_tokens - 1
    waits, decode = zip(*map(summarize_runs, sizes, [steps] * len(sizes), zip(*rounds)))
    kernels = set(re.findall(r"(?:Selected|Using) (\w+) for CompressedTensors", said))
    room = re.search(r"KV cache size: ([\d,]+) tokens", said)
    here = [one["completion"] for one in row["divergence"]["completions"]]
    ids = [lab.tokenizer(x, add_special_tokens=False).input_ids for x in (texts, here)]
    return served | waits[0] | dict(
        decode=decode, kernel=" and ".join(sorted(kernels)) or None,
        kv_tokens=room and int(room[1].replace(",", "")),
        divergence=compare_completions(*ids, lab))

def serve_all(lab: SimpleNamespace) -> None:
    from accelerate.utils import release_memory
    release_memory()  # The server wants the GPU for itself.
    rows = [x for x in collect_results(lab)["variants"] if x["status"] == "ok"]
    for row in rows:
        row["served"] = measure_served(row["label"], lab)
    base = lab.rows.get(BASELINE)
    both = [base["served"], measure_served(BASELINE, lab)] if base in rows else []
    timings = [[one["latency_s"], *(x["itl_ms"] for x in one["decode"])]
               for one in both if not one["error"]]
    for row in rows if len(timings) == 2 else ():
        drifts = [abs(b["median"] / a["median"] - 1) for a, b in zip(*timings)]
        row["served"]["drift"] = max(drifts)
    write_outputs(lab)

# %% [markdown]
"""## Rows
A variant goes from recipe to row in three steps, each from a fresh load: quantized,
scored, timed. One that fails leaves a row with its reason; where only timing fails,
quality stays. Files are written after each row. A folder holds results of *one* set of
options, model files, texts, rendered prompts, versions, machine and number of threads:
a run that differs is refused and told by what. Where only a recipe changed, its row is
measured again when asked for; other changes of the script go unnoticed: `--fresh`. A
compiler that crashes ends the run: take `--no-compile`, another `--output-dir`."""

# %%
ROW = dict.fromkeys("""label status error scheme checkpoint weight_bytes
    quantize_seconds rtn_fallbacks group_size smoothing notes perplexity
    perplexity_interval perplexity_ratio tokens_scored window_losses kld top1_agreement
    divergence weights_memory_bytes peak_memory_bytes kv_bytes_per_token kv_tokens
    ttft_s latency_s prefill decode prompt_tokens runs_as served
    fingerprint""".split()) | dict(tasks={}, gpus={})
SCHEMA = 7  # Raised when keys go: older results are refused.
MAY_DIFFER = ("variants", "output_dir", "vllm", "tasks", "task_limit", "tasks_path",
              "max_loss", "fresh", "memory_bytes", "gpus")

def name_model(lab: SimpleNamespace) -> dict:
    from huggingface_hub import ModelCard
    name, card = lab.options.model, {}
    with contextlib.suppress(Exception):  # Not all have one, or one that can be read.
        card = ModelCard.load(lab.model_folder / "README.md").data.to_dict()
    local = lab.model_folder.resolve().name if find_path(name) else None
    return dict(model_name=local or name, license=card.get("license"),
                base_model=card.get("base_model") if local else name)

def describe_run(lab: SimpleNamespace, words: list[str]) -> dict:
    chats, prompts = lab.options.calibration_data, [x.tolist() for x in lab.prompts]
    inputs = dict(model_files=fingerprint(hash_files(lab.model_folder)),
                  eval_tokens=fingerprint(lab.windows.tolist()),
                  window_begin=lab.tokenizer.decode(lab.begin),
                  chats=fingerprint(hash_files(find_path(chats) or Path(chats))),
                  prompts_in_the_chat_template=fingerprint(prompts))
    versions = dict(python=sys.version.split()[0], cuda=torch.version.cuda)
    for package in "torch transformers llmcompressor compressed_tensors".split():
        versions[package] = importlib.metadata.version(package)
    cpus = re.findall(r"model name\s*: (.+)", subprocess.getoutput("cat /proc/cpuinfo"))
    machine = dict(name=f"{[*cpus, os.uname().machine][0]}, {os.cpu_count()} cores",
                   device=lab.device.type, threads=torch.get_num_threads(), driver=None,
                   compute_capability=None, gpus=[],
                   memory_bytes=os.sysconf("SC_PAGESIZE") * os.sysconf("SC_PHYS_PAGES"))
    if lab.device.type == "cuda":
        gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        gpus = [dict(name=x.name, memory_bytes=x.total_memory,
                     compute_capability=f"{x.major}.{x.minor}") for x in gpus]
        query = "nvidia-smi -i 0 --query-gpu=driver_version --format=csv,noheader"
        machine |= gpus[0] | dict(driver=subprocess.getoutput(query), gpus=gpus)
    config = json.loads(json.dumps(asdict(lab.options)))
    return name_model(lab) | dict(
        command=["python", "quant_lab.py", *words], schema=SCHEMA, config=config,
        inputs=inputs, machine=machine, versions=versions)

# %%
def take_over(lab: SimpleNamespace) -> None:
    file, way_out = lab.output / "results.json", "another keeps, --fresh drops"
    before = read_json(file)
    conditions = [(part, name, x) for part in "config inputs machine versions".split()
                  for name, x in lab.head[part].items() if name not in MAY_DIFFER]
    if file.exists() and before.get("schema") != SCHEMA:
        stop(f"--output-dir {lab.output}: old or broken results.json; {way_out} it")
    rows = [row for row in before.get("variants", ()) if row["status"] == "ok"]
    for part, name, new in conditions if rows else ():
        if (old := before[part].get(name)) != new:
            name = "--" + name.replace("_", "-") if part == "config" else name
            stop(f"--output-dir {lab.output}: {name} was {old}, is {new}; {way_out} it")
    lab.marks = dict.fromkeys(VARIANTS, "no recipe")
    for label, variant in VARIANTS.items():
        with libraries_to(lab.output / "log.txt"), contextlib.suppress(Exception):
            recipe = repr(build_recipe(label, lab.options)), variant.calibrated
            lab.marks[label] = fingerprint(SCHEMA, conditions, recipe)
    lab.rows = {row["label"]: ROW | dict(tasks={}) | row for row in rows}

def benchmark_speed(label: str, lab: SimpleNamespace) -> dict:
    options, prompts, is_base = lab.options, cut_prompts(lab), label == BASELINE
    try:
        folder = lab.output / "checkpoints" / label
        model = place_model(folder, options, lab.device, whole=True)
        compiled = lab.device.type == "cuda" and model.packs and not options.no_compile
        speed = measure_speed(model, prompts.to(model.device), options, compiled)
        packed = [m for m in model.modules() if isinstance(m, PackedLinear)
                  and (m.kind != "dense" or is_base)]  # lm_head says nothing.
        routes = dict.fromkeys(m.choose_route(n).value for m in packed
                               for n in (prompts.shape[1], *options.batch_sizes))
        routes = routes or ["16-bit" if is_base else "emulated in 16 bits"]
        how = [*routes, "compiled" if compiled else "not compiled"]
        return speed | dict(runs_as=", ".join(how))
    except Exception as error:
        traceback.print_exc()  # Goes to the log.
        return dict(runs_as=f"speed was not measured: {quote(describe(error))}")

def run_variant(label: str, lab: SimpleNamespace) -> None:
    if label in lab.options.variants:
        mark = lab.rows.get(label, ROW)["fingerprint"]
        if mark != lab.marks[label] or not read_checkpoint(label, lab):
            lab.rows[label] = measure_row(label, lab)
        write_outputs(lab)
        if lab.rows[label]["status"] == "ok":
            measure_tasks(label, lab)
    show(render_result(label, collect_results(lab)))

# %%
def measure_row(label: str, lab: SimpleNamespace) -> dict:
    folder, t0 = lab.output / f"checkpoints/{label}", time.monotonic()
    row = ROW | dict(label=label, status="failed", scheme=VARIANTS[label].scheme,
                     fingerprint=lab.marks[label], tasks={})
    out = sys.stdout  # Below, that is the log.
    def say(step: str) -> None:
        print(f"{label:20}{time.monotonic() - t0:7.0f} s  {step}", file=out, flush=True)
    with libraries_to(lab.output / "log.txt"):
        try:
            if lab.reference is None:
                say("scoring the reference")
                lab.reference = measure_reference(lab)
            say("quantizing")
            row |= read_checkpoint(label, lab) or quantize_variant(label, lab)
            say("scoring")
            row |= measure_quality(place_model(folder, lab.options, lab.device), lab)
            say("timing")
            row |= benchmark_speed(label, lab) | dict(status="ok")
            row["gpus"]["speed"] = row["gpus"]["quality"][:1] if row["ttft_s"] else []
        except Exception as error:
            tip = "; less --window, --calibration-length, a smaller --model"
            lacks_memory = re.search("memory|_alloc", describe(error), re.I)
            row["error"] = describe(error) + (tip if lacks_memory else "")
            shutil.rmtree(folder.with_suffix(".partial"), ignore_errors=True)
            with contextlib.suppress(OSError):  # The disk may be full.
                traceback.print_exc()
    return row

# %% [markdown]
"""## Tables and advice
± is half the interval; of a lopsided one, and of timings, ends stand in brackets. A run
shows five figures beside the baseline's, their ratios, what it ran as, and one
completion of each: read it, a model can keep its perplexity and lose the thread. Tables
are rows of title, key (after @, of a batch size), digits and unit.

A variant *qualifies* if the upper end of its interval is within `--max-loss` percent
more perplexity (of twelve windows or more). Of these, and the baseline, four goals name
the best: one user waiting (latency), many at once (the largest batch that fitted),
least memory, nothing may change (least KLD, the baseline left out). Those whose ranges,
widened by 1 %, meet the best one's cannot be told from it; the closest by KLD comes
first. KLD is compared window by window: the interval of the difference decides. What is
noisy is not ranked. Where `--vllm` tried all that is finished and did not drift, its
times decide, and its KV tokens; what it could not serve is left out. A range shows the
jitter of one process, not what another day or a warm GPU would add. For tasks, an error
of 5 % is shared by all comparisons (Bonferroni).

The advice is what most of the first three goals name, the first in a draw; on a CPU
memory alone counts. Where perplexity and what KLD is worth disagree, read."""

# %%
Cell = namedtuple("Cell", "word middle low high ranged noisy", defaults=[None] * 5)
QUALITY = (("MB", "weight_bytes", 1, 1e-6), ("ratio", "perplexity_ratio", 4, 1),
           ("perplexity", "perplexity_interval", 2, 1), ("KLD", "kld", 5, 1),
           ("top-1 %", "top1_agreement", 1, 1), ("tokens", "divergence", 0, 1))
SPEED = (("tokens/s", "tok_s@1", 1, 1), ("TTFT ms", "ttft_s", 1, 1000),
         ("latency s", "latency_s", 3, 1))
USERS = f"users of {CONTEXT:,}", "users", 0, 1
COST = (("weights MB", "weights_memory_bytes", 1, 1e-6),
        ("peak MB", "peak_memory_bytes", 1, 1e-6), ("KV tokens", "kv_tokens", 0, 1),
        USERS, ("quantize s", "quantize_seconds", 1, 1))
TASKS = (("task", "task", 0, 1), ("metric", "metric", 0, 1), ("of", "documents", 0, 1),
         ("value", "score", 3, 1), ("recovery %", "recovery", 1, 1),
         ("difference", "difference", 3, 1), ("lost", "lost", 0, 1),
         ("gained", "gained", 0, 1))
ROOM = (COST[2], ("GPUs", "tensor_parallel_size", 0, 1),
        ("same tokens", "divergence", 0, 1), ("kernel", "kernel", 0, 1))

def as_served(row: dict) -> dict:
    served = row.get("served") or SERVED
    failed = dict(status="failed") if served["error"] else {}
    drift = math.inf if served["drift"] is None else served["drift"]  # Not compared.
    return row | served | failed | dict(drift=drift, prefill=None)

def read_figure(row: dict, key: str) -> Cell:
    """Return a figure of a row, or a word that says why there is none."""
    figures = row | dict(users=row["kv_tokens"] and row["kv_tokens"] // CONTEXT)
    for one in (*(row["decode"] or ()), *(row["prefill"] or ())):
        size = one.get("batch") or one["prompt_tokens"]
        figures |= {f"{name}@{size}": one.get("error") or x for name, x in one.items()}
    x = figures.get(key)
    if x is None or isinstance(x, str):
        return Cell(x or ("failed" if row["status"] == "failed" else "–"))
    x = x if isinstance(x, dict) else dict(value=x, low=x, high=x)
    middle, low, high = list(x.values())[:3]
    noisy = "samples" in x and (high > NOISE_LIMIT * low or row.get("drift", 0) > DRIFT)
    return Cell("", middle, low, high, "min" in x, noisy)

def render_cell(row: dict, column: tuple) -> str:
    _, key, digits, unit = column
    word, middle, low, high, ranged, noisy = read_figure(row, key)
    places = digits if abs(middle or 0) * unit < 1000 else 0  # Of the ends, too.
    def write(x: float) -> str:
        x *= unit
        return f"{x:,.{places}f}" if abs(x) < 1e8 else f"{x:.1e}"
    if word or low is None or low == high:
        return word or write(middle)
    ends = f"{write(low)}–{write(high)}"
    if noisy:
        return f"{ends} noisy"
    if ranged or abs(high + low - 2 * middle) > 0.25 * (high - low):
        return f"{write(middle)} ({ends})"
    return f"{write(middle)} ± {write((high - low) / 2)}"

# %%
def render_table(columns: list[tuple], rows: list[dict], *more: list[str]) -> str:
    lines = [["variant", *(title for title, *_ in columns)]]
    lines += [[row["label"], *(render_cell(row, x) for x in columns)] for row in rows]
    first, *widths = [max(map(len, cells)) for cells in zip(*lines, *more)]
    lines.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in widths)])
    return "\n".join(
        f"| {' | '.join([name.ljust(first), *map(str.rjust, cells, widths)])} |"
        for name, *cells in (*lines, *more))

def render_tables(results: dict, rows: list[dict]) -> str:
    config, begin = results["config"], results["inputs"]["window_begin"]
    done = max([ROW, *rows], key=lambda x: (bool(x["kld"]), x["prompt_tokens"] or 0))
    parts = [fill(
        f"{quote(Path(config['eval_text']).name)} {done['tokens_scored'] or 0:,} tokens"
        f" in windows of {config['window']:,}, BOS {quote(begin) or 'none'}; ±: half a "
        f"95 % interval; times: median (least–greatest) of {config['repeats']}, of "
        f"{config['new_tokens']} tokens after {done['prompt_tokens'] or 0}.")]
    batches = [(f"batch {n} tok/s", f"tok_s@{n}", 0, 1) for n in config["batch_sizes"]]
    lengths = [(f"TTFT of {n:,} ms", f"ttft_s@{n}", 1, 1000)
               for n in config["prompt_lengths"]]
    tables = QUALITY, SPEED, batches[1:], lengths, COST
    parts += [render_table(x, rows) for x in tables if x]
    if served := [as_served(row) for row in rows if row.get("served")]:
        drift = max(row["drift"] for row in served)
        drift = f"{100 * drift:.1f} % off" if drift < math.inf else "not compared"
        parts.append(f"Served by {served[0]['engine']}; baseline again last: {drift}.")
        parts += [render_table(x, served) for x in (SPEED, batches[1:], ROOM) if x]
    if scores := list_scores(rows):
        parts += ["Tasks, by lm-eval, paired by document:", render_table(TASKS, scores)]
    return "\n\n".join(parts)

def list_scores(rows: list[dict]) -> list[dict]:
    lines = [row | task | task["flips"] | dict(
        task=name, score={key: task[key] for key in ("value", "low", "high")})
        for row in rows for name, task in row["tasks"].items()]
    return sorted(lines, key=lambda line: line["task"])

def judge_tasks(rows: list[dict]) -> str:
    """Say which losses are certain, and how many documents would show one of 0.01."""
    found = [line for line in list_scores(rows) if line["label"] != BASELINE]
    wider = statistics.NormalDist().inv_cdf(1 - 0.025 / max(1, len(found))) / 1.96
    certain, needed = [], 0
    for x in found:
        value, low, high = x["difference"].values()
        needed = max(needed, x["documents"] * (wider * (high - low) / 0.02) ** 2)
        if low + high < -wider * (high - low):
            certain.append(f"{name_variant(x['label'])} in {x['task']} ({value:+.3f})")
    return found and fill(
        f"Tasks: of {len(found)} comparisons these show a loss, at 95 % for all: "
        f"{', '.join(certain) or 'none'}. To see .01: up to {needed:,.0f} documents.")

def relate(row: dict, base: dict, key: str) -> float:
    mine, theirs = read_figure(row, key), read_figure(base, key)
    gpus = {x.get("tensor_parallel_size") for x in (row, base) if mine.ranged}
    is_sure = mine.middle and theirs.middle and not (mine.noisy or theirs.noisy)
    return mine.middle / theirs.middle if is_sure and len(gpus) < 2 else 0

# %%
def render_notes(results: dict) -> str:
    lines, most = [], results["config"]["max_loss"]
    for row in results["variants"]:
        error, fell = row["error"], row["rtn_fallbacks"]
        unserved = (row["served"] or SERVED)["error"]
        notes = [error and f"failed: {quote(error)}", *(row["notes"] or []),
                 fell and f"warning: {fell} modules fell back to rounding: --dampening",
                 unserved and f"not served: {quote(unserved)}",
                 row["runs_as"] and f"runs as: {row['runs_as']}"]
        if row["status"] == "ok" and row["label"] != BASELINE:
            up, kld = find_loss(row), 100 * (raise_e(row["kld"]["mean"]) - 1)
            why = f"perplexity {up:+.1f} % at most, {most:g} % allowed; KLD {kld:.1f} %"
            notes.append(why if up < math.inf else "too few windows for an interval")
        name, notes = name_variant(row["label"]), filter(None, notes)
        lines.append(fill(f"{name}: {'; '.join(notes)}", "- "))
    return "\n".join(lines)

def render_result(label: str, results: dict) -> str:
    rows = {row["label"]: row for row in results["variants"]}
    if label not in rows:
        return f"{label} was not asked for; --variants adds it."
    row, base = rows[label], rows.get(BASELINE, ROW)
    if row["error"]:
        return fill(f"{label} failed: {quote(row['error'])}")
    shown = [row] if row is base or base["status"] != "ok" else [base, row]
    columns = QUALITY[0], QUALITY[1], QUALITY[3], SPEED[0], COST[0]
    ratios = [relate(row, base, key) for _, key, *_ in columns]
    ratios = ["over it", *(f"{x:.3f}" if x else "–" for x in ratios)]
    table = render_table(columns, shown, ratios)
    return "\n\n".join([table, fill(f"Runs as: {row['runs_as']}"),
                        render_completions(shown, 0)])

def name_variant(label: str) -> str:
    words = re.sub(r"^\d+_", "", label).replace("smoothquant", "SmoothQuant").split("_")
    return " ".join(word.upper() if len(word) < 5 or re.search(r"\d", word) else word
                    for word in words)

def find_loss(row: dict) -> float:
    """Return by how many percent perplexity rises at most, 0 for the baseline."""
    high = row["perplexity_ratio"]["high"] or math.inf
    return 0.0 if row["label"] == BASELINE else 100 * (high - 1)

def choose_rows(results: dict) -> tuple[list[dict], dict, str]:
    """Return finished rows by KLD, the baseline, and whose times decide, "" if none."""
    rows = [dict(row) for row in results["variants"] if row["status"] == "ok"]
    rows.sort(key=lambda row: row["kld"]["mean"])
    served = [row for row in map(as_served, rows) if row["status"] == "ok"]
    loop = "this script's loop" if results["machine"]["device"] == "cuda" else ""
    if served and all(x["served"] for x in rows) and served[0]["drift"] <= DRIFT:
        rows, loop = served, served[0]["engine"]
    return rows, next((row for row in rows if row["label"] == BASELINE), ROW), loop

# %%
def advise(results: dict) -> list[dict]:
    """Return for each goal what to take, why, and what cannot be told from it."""
    (rows, base, loop), advice = choose_rows(results), []
    rows = [row for row in rows if find_loss(row) <= results["config"]["max_loss"]]
    others = [row for row in rows if row is not base] or rows
    for row in others:  # Paired, to the closest of them.
        klds = [x["kld"]["windows"] for x in (others[0], row)]
        row["gap"] = estimate(torch.tensor(klds).double().diff(dim=0).T)
    sizes = [x["batch"] for row in rows for x in row["decode"] or () if x["tok_s"]]
    n = max(sizes, default=1)
    loop = loop or "this script, on a CPU, where no format has kernels"
    goals = (  # Name, rows, what is to be least, what is shown.
        ("one user waiting", rows, "latency_s", (f"s in {loop}", *SPEED[2][1:])),
        ("many at once", rows, f"itl_ms@{n}", (
            f"tokens/s in batches of {n}, in {loop}", f"tok_s@{n}", 0, 1)),
        ("least memory", rows, COST[0][1], ("MB of weights", *COST[0][1:])),
        ("nothing may change", others, "gap", ("nats of KLD", *QUALITY[3][1:])))
    for goal, among, key, column in goals:
        figures = [(row, read_figure(row, key)) for row in among]
        sure = [(row, x) for row, x in figures if x.low is not None and not x.noisy]
        bar = 1.01 * min((x.high for _, x in sure), default=0)
        best, why = [row for row, x in sure if 0.99 * x.low <= bar], []
        for row in best[:1]:
            why.append(f"{render_cell(row, column)} {column[0]}")
            if row is not base and relate(row, base, column[1]):
                why.append(f"{relate(row, base, column[1]):.2f} times the baseline's")
        why += [f"too noisy to rank: {row['label']}" for row, x in figures if x.noisy]
        label, *ties = [row["label"] for row in best] or [None]
        advice.append(dict(goal=goal, variant=label, ties=ties,
                           why="; ".join(why) or "nothing that could be ranked"))
    return advice

def choose_variant(results: dict) -> tuple[str | None, str]:
    """Return what most goals name, and how it differs from the baseline."""
    rows, base, loop = choose_rows(results)
    named = [label for one in advise(results)[0 if loop else 2 : 3]
             for label in (one["variant"], *one["ties"]) if label]
    pick = max(named, key=named.count, default=None)  # Of a draw, the first.
    config, chosen = results["config"], [row for row in rows if row["label"] == pick]
    if not chosen or chosen[0] is base:
        lead = f"Keep {config['dtype']}, nothing wins within {config['max_loss']:g} %"
        return pick, lead if rows else "Nothing was measured"
    keys = {"size": "weight_bytes", "perplexity": "perplexity_ratio",
            f"latency in {loop}": loop and "latency_s"}
    ratios = {name: relate(chosen[0], base, key) for name, key in keys.items()}
    words = [f"{name} {100 * x - 100:+.1f} %" for name, x in ratios.items() if x]
    return pick, ", ".join([name_variant(pick), *words])

def render_advice(results: dict, folder="checkpoints") -> str:
    lines, (pick, sentence) = [], choose_variant(results)
    for one in advise(results):
        names = map(name_variant, [one["variant"] or "unknown", *one["ties"]])
        line = f"{one['goal']}: **{' or '.join(names)}**, {one['why']}"
        lines.append(fill(line, "- "))
    command = [f"    vllm serve {folder}/{pick}"] if pick else []
    parts = "\n".join(lines), judge_tasks(results["variants"]), fill(f"**{sentence}.**")
    return "\n\n".join(filter(None, [*parts, *command]))

# %% [markdown]
"""# Machinery: skip this at first reading

## Fitting recipes to a model

*Groups* of int4 weights share a scale: 128 inputs where that divides every width, else
64 or 32 (SmolLM2 is 576 wide). A scale has 16 bits, so a weight takes 4.125, 4.25 or
4.5 bits; the smaller the group, the closer its scale fits.

*Experts*: llmcompressor takes the experts of a layer apart into Linears. transformers
unpacks them to 16 bits when it loads, and leaves out the rounding of their activations,
or does not know their names: such a row fails, as its figures would be others.

*Smoothing*: llmcompressor names the norms to smooth, and the Linears that read them, by
the model's class, or takes those of Llama. For some classes that changes the model:
another norm feeds these Linears, or something else reads the norm, too. So a list names
the classes built like Llama, or like Gemma 2 and 3, which have norms after attention
and MLP, too; others are not smoothed, and the notes say so. Tests hold each of the list
to this: smoothing alone changes no logits."""

# %%
def fit_groups(recipe: list, model, options: Options, row: dict) -> None:
    from compressed_tensors.utils import match_named_modules
    sizes = [options.group_size] if options.group_size else GROUPS
    for modifier in [m for m in recipe if hasattr(m, "resolved_config")]:
        groups = modifier.resolved_config.config_groups
        for weights, targets in [(x.weights, x.targets) for x in groups.values()]:
            if not weights or weights.strategy != "group" or weights.group_size != 128:
                continue
            linears = match_named_modules(model, targets, modifier.ignore)
            widths = sorted({linear.in_features for _, linear in linears})
            fits = [n for n in sizes if math.gcd(n, *widths) == n]
            if not fits:
                raise ValueError(f"no group of {sizes} divides {widths}: take FP8")
            row["group_size"] = weights.group_size = fits[0]
            modifier.config_groups, modifier.scheme = groups, None
            row["notes"] += [f"groups of {fits[0]}"] if fits[0] < 128 else []

SMOOTHED = """BitNet Cwm DiffLlama Ernie4_5 Gemma Gemma2 Gemma3 Granite Helium Llama
HunYuanDenseV1 HyperCLOVAX Ministral Ministral3 Mistral Qwen2 Qwen3 SeedOss SmolLM3
""".split()  # Models' classes, without ForCausalLM.

def fit_smoothing(recipe: list, model, row: dict) -> None:
    from compressed_tensors.utils import match_named_modules
    name, at = type(model).__name__.partition("For")[0], r"re:.*model\.layers.*"
    second = "pre_feedforward" if name in ("Gemma2", "Gemma3") else "post_attention"
    known = [[[f"{at}{x}_proj" for x in "qkv"], f"{at}input_layernorm"],
             [[f"{at}gate_proj", f"{at}up_proj"], f"{at}{second}_layernorm"]]
    for smoother in [m for m in recipe if hasattr(m, "smoothing_strength")]:
        smoother.mappings = smoother.mappings or (known if name in SMOOTHED else [])
        norms = list(match_named_modules(model, [x for _, x in smoother.mappings]))
        row["smoothing"] = dict(pairs=len(norms))
        row["notes"] += [] if norms else ["no norm could be smoothed"]

# %% [markdown]
"""## Packed Linears
Plain transformers unpacks a compressed checkpoint to 16 bits on its first forward, and
simulates the rounding of activations (`--execution emulated`). Here a Linear stays
packed. By format, GPU and number of tokens it takes a route, which `runs_as` names:

- **In registers**, for one token: a Triton kernel unpacks weights on the way into the
  product. Float16 goes through it, too: cuBLAS takes 33 % longer for a step (H200).
- **Tensor cores**, for several tokens: 8-bit times 8-bit (INT8 from SM 7.5, FP8 from SM
  8.9), or 16 bits times INT4 that is unpacked on the way (SM 8.0, groups from 64 on, up
  to 128 tokens, and one).
- **Dequantized** otherwise: a 16-bit copy, one layer at a time; so INT4 on a T4. FP8
  below SM 8.9 does not compile: no speed. Activations are rounded per token as
  compressed-tensors does it: on a CPU the logits equal the emulated ones.

A model with any other format (static or no rounding of activations, scales by blocks
or of whole tensors, zero points) is emulated: quality is right, memory and speed not.

*Larger than the first GPU*: what does not fit it, beside a window's activations, logits
and the reference's head, is spread by accelerate for quality and tasks: over as many as
it takes (`--gpus` limits them), and the rest into host memory, which is copied for each
window and token (printed). Such a variant has no speed here. `--vllm` gets a power of
two, of which weights take up to .7; where numbers differ, times have no ratio.

A weight has the shape [outputs, inputs]: 16-bit, int8, the codes of FP8 as int8, or
four INT4 to an int16. Its scale is [outputs, groups], one group unless INT4. A word of
a checkpoint's INT4 holds eight neighbours, the first in its lowest bits; here the n
int16 of a group hold inputs 0 to n - 1 in their lowest bits, then the next n, so that
neighbours in memory meet neighbouring inputs."""

# %%
def find_free(gpu: int) -> int:
    """Return how many bytes this process may still take on a GPU."""
    free, total = torch.cuda.mem_get_info(gpu)
    return int(min(free, total * torch.cuda.get_per_process_memory_fraction(gpu)))

def map_devices(model, options: Options) -> dict:
    """Return accelerate's device map that leaves room for a window and a head."""
    from accelerate import infer_auto_device_map
    (n, width), size = model.get_input_embeddings().weight.shape, model.dtype.itemsize
    room = n * (24 * CHUNK + 2 * size * width) + 64 * size * width * options.window
    if model.get_memory_footprint() + room <= find_free(0):
        return {"": 0}
    gpus = range(torch.cuda.device_count())[: options.gpus or None]
    memory = {i: find_free(i) - room for i in gpus} | dict(cpu=2**60)
    return infer_auto_device_map(model, memory, model._no_split_modules)

def place_model(folder: Path, options: Options, device: torch.device, whole=False):
    """Return a causal LM on its `devices`; `packs` tells if its Linears stay packed."""
    from accelerate import dispatch_model
    from accelerate.utils import release_memory
    from compressed_tensors.offload import remove_dispatch
    from transformers import AutoModelForCausalLM
    release_memory()  # Of models in reference cycles.
    sm = torch.cuda.get_device_capability() if device.type == "cuda" else (0, 0)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=options.dtype, output_loading_info=True, use_safetensors=True)
    model.eval()
    quantized = [m for m in model.modules() if hasattr(m, "quantization_scheme")]
    files = map(partial(safe_open, framework="pt"), folder.glob("*.safetensors"))
    wanted = sum(key.endswith(".weight_scale") for file in files for key in file.keys())
    unread = report["unexpected_keys"] if wanted else ()  # Others have some, rightly.
    if lost := [*report["missing_keys"], *unread]:
        raise ValueError(f"{len(lost)} weights are lost in {folder.name}: {min(lost)}")
    if len(quantized) < wanted:
        raise ValueError("transformers unpacks experts, and rounds no inputs of theirs")
    model.packs = options.execution == "packed" and all(map(find_kind, quantized))
    if quantized and not model.packs:
        model.hf_quantizer.compressor.decompress_model(model)
        remove_dispatch(model)
        for parameter in [p for p in model.parameters() if p.dtype == torch.bfloat16]:
            parameter.data = parameter.data.to(getattr(torch, options.dtype))  # NVFP4.
        for linear in [m for m in quantized if isinstance(m, torch.nn.Linear)]:
            linear.forward = partial(forward_rows, linear.forward)
    if model.packs:
        pack_model(model, sm)
    spread = device.type == "cuda" and not whole
    device_map = map_devices(model, options) if spread else {"": device.type}
    model.devices = [*dict.fromkeys(device_map.values())]
    if len(model.devices) == 1:
        return model.to(device)
    for linear in [m for m in model.modules() if isinstance(m, PackedLinear)]:
        linear.forward = partial(forward_there, linear.forward)
    dispatch_model(model, device_map, main_device=0)
    away = sum(x.nbytes for x in model.parameters() if x.is_meta) / 1e9
    print(f"{'':29}on {model.devices}, {away:.1f} GB copied for each window and token",
          file=OUTPUT, flush=True)
    return model

# %%
def forward_there(forward, x: Tensor) -> Tensor:
    with torch.cuda.device_of(x):  # Triton launches kernels on the current device.
        return forward(x)

def forward_rows(forward, x: Tensor) -> Tensor:
    # Of two dimensions, compressed-tensors 0.19 would scale all tokens alike.
    return forward(x.reshape(1, -1, x.shape[-1])).view(*x.shape[:-1], -1)

def round_activations(kind: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x over its scale, in 8 bits, and the scale [..., 1], one per token."""
    scale = x.abs().amax(-1, keepdim=True) / (127.5 if kind == "int8" else 448)
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    if kind == "int8":
        return (x / scale).clamp(-128, 127).round().to(torch.int8), scale
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale

def dequantize(kind: str, weight: Tensor, scale: Tensor) -> Tensor:
    """Return the weight [out, in] of a PackedLinear in the dtype of its scale."""
    if kind == "int4":  # Stored with 8 added, scaled by groups.
        shifts = torch.arange(0, 16, 4, dtype=torch.int16, device=weight.device)
        nibbles = weight.view(*scale.shape, 1, -1) >> shifts[:, None] & 15
        return ((nibbles - 8).to(scale.dtype) * scale[..., None, None]).flatten(1)
    if kind == "fp8":
        weight = weight.view(torch.float8_e4m3fn)
    return weight.to(scale.dtype) * scale

FORMATS = dict(  # Of weights and of activations; what the kernels implement.
    int4=[("int", 4, "group", True, False), None],
    int8=[("int", 8, "channel", True, False), ("int", 8, "token", True, True)],
    fp8=[("float", 8, "channel", True, False), ("float", 8, "token", True, True)])

def find_kind(module: torch.nn.Module) -> str | None:
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None:  # Some routers are Linears of another forward.
        return "dense" if type(module).forward is torch.nn.Linear.forward else None
    forms = [x and (x.type, x.num_bits, x.strategy, x.symmetric, x.dynamic)
             for x in (scheme.weights, scheme.input_activations)]
    if scheme.output_activations or hasattr(module, "weight_g_idx"):
        return None
    return next((kind for kind, those in FORMATS.items() if those == forms), None)

def pack_model(model, sm: tuple[int, int]) -> None:
    if hook := getattr(model, "ct_decompress_hook", None):
        hook.remove()  # It would unpack all when the model first runs.
    for name, layer in list(model.named_modules()):
        kind, scale = find_kind(layer), getattr(layer, "weight_scale", None)
        if not kind or (kind == "dense" and not any(sm)):
            continue
        if kind == "int4":
            shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=scale.device)
            nibbles = layer.weight_packed[..., None] >> shifts & 15
            nibbles = nibbles.view(*scale.shape, 4, -1).transpose(2, 3)
            weight = (nibbles << shifts[:4]).sum(-1).to(torch.int16).flatten(1)
        else:
            weight = layer.weight if kind == "dense" else layer.weight.view(torch.int8)
        model.set_submodule(name, PackedLinear(kind, weight, scale, layer.bias, sm))
        layer._parameters.clear()  # Or a reference cycle would keep them.

# %%
Route = Enum("Route", dict(DENSE="16-bit", DEQUANTIZED="dequantized",
                           REGISTERS="in registers", TENSOR_CORES="tensor cores"))
TENSOR_CORES_FROM = dict(int4=(8, 0), int8=(7, 5), fp8=(8, 9), dense=(99, 0))  # SM

class PackedLinear(torch.nn.Module):
    """Multiply by packed weights: int4, int8, fp8 or dense; sm (0, 0) is a CPU."""
    def __init__(self, kind: str, weight, scale, bias, sm: tuple[int, int]):
        super().__init__()
        self.kind, self.sm = kind, sm
        for name, x in dict(weight=weight, scale=scale, bias=bias).items():
            is_new = x is not None and not isinstance(x, torch.nn.Parameter)
            setattr(self, name, torch.nn.Parameter(x, False) if is_new else x)
        self.fits = bool(triton) and any(sm) and weight.shape[1] % 16 == 0 and (
            kind != "int4" or scale.dtype.itemsize == 2
            and weight.shape[1] // scale.shape[1] in (16, 32, 64))
    def choose_route(self, tokens: int) -> Route:
        has_cores = self.sm >= TENSOR_CORES_FROM[self.kind]
        in_tiles = tokens <= 128 if self.kind == "int4" else tokens > 1
        if self.fits and has_cores and in_tiles and len(self.weight) % 16 == 0:
            return Route.TENSOR_CORES
        has_row = self.kind in ("dense", "int8") or (self.kind == "fp8" and has_cores)
        if self.fits and tokens == 1 and has_row:  # Else Triton does not know FP8.
            return Route.REGISTERS
        return Route.DENSE if self.kind == "dense" else Route.DEQUANTIZED
    def forward(self, x: Tensor) -> Tensor:
        shape, dtype, kind, x_scale = x.shape, x.dtype, self.kind, None
        x = x.reshape(-1, shape[-1]).contiguous()
        route = self.choose_route(len(x))
        if kind in ("int8", "fp8"):
            x, x_scale = round_activations(kind, x)
        if route in (Route.DENSE, Route.DEQUANTIZED):
            x = x if x_scale is None else x.to(dtype) * x_scale
            weight = self.weight if kind == "dense" else dequantize(
                kind, self.weight, self.scale).to(dtype)
            return F.linear(x, weight, self.bias).view(*shape[:-1], len(self.weight))
        if route is Route.REGISTERS:
            y = multiply_row(kind, x, self.weight)
        elif kind == "fp8":
            guard = x_scale.new_full((), 2.0**-10, dtype=torch.float32)
            y = torch._scaled_mm(x, self.weight.view(x.dtype).t(), guard, guard,
                                 out_dtype=dtype).float() * 2**20
        elif self.sm < (8, 0):  # PyTorch wants more than 16 rows.
            padded = F.pad(x, (0, 0, 0, max(0, 32 - len(x))))
            y = torch._int_mm(padded, self.weight.t())[: len(x)]
        else:
            y = multiply_tiles(kind, x, self.weight, self.scale).float()
        y = y if x_scale is None else y * x_scale.float()
        y = y if kind in ("dense", "int4") else y * self.scale.float().t()
        y = y if self.bias is None else y + self.bias.float()
        return y.to(dtype).view(*shape[:-1], len(self.weight))

# %% [markdown]
"""## Kernels
For one token `row_kernel` multiplies a row by 16-bit, FP8 or INT8 weights; `dp4a` makes
four products of INT8 and their sum in one instruction. For several tokens,
`tile_kernel` multiplies a tile of weights by one of inputs, while the next are being
read. INT4 is put behind the bits of 1024 (of 128 in bfloat16), where a float's last bit
counts 1. Where outputs are too few to occupy a GPU, programs share a row's inputs, and
their sums are added later. Sums of FP8's products can be too large for 16 bits: they go
there divided by 2^20 (`guard`), and back in float32, where scales and bias follow.

Attention of one row is written out and left to the compiler; for several sequences, the
heads that share a key are rows of one product, so that no key is copied. Keys and
values lie in tensors of fixed size, or no CUDA graph could replay a step: a mask hides
what is not yet written. All layers are one function, compiled once for each shape: one
by one, each layer's index would be a constant, and dynamo's limit soon reached."""

# %%
@jit
def row_kernel(x, weight, y, outputs, width, KIND: tl.constexpr, ROWS: tl.constexpr,
               BLOCK: tl.constexpr):
    row = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), outputs - 1)
    line, column = weight + row[:, None] * width, tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.int32 if KIND == "int8" else tl.float32)
    for begin in range(0, width, BLOCK):
        at = begin + column
        w = tl.load(line + at, mask=at < width, other=0)
        if KIND == "int8":
            value = tl.load(x + at, mask=at < width, other=0)
            total = tl.inline_asm_elementwise(
                "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, value, total],
                dtype=tl.int32, is_pure=True, pack=1)
        else:
            value = tl.load(x + at, mask=at < width, other=0.0)
            if KIND == "fp8":
                w = w.to(tl.float8e4nv, bitcast=True).to(tl.float16)
            total += w.to(tl.float32) * value.to(tl.float32)
    tl.store(y + row, tl.sum(total, 1).to(tl.float32))

@jit
def tile_kernel(x, weight, scale, y, tokens, outputs, width, span, KIND: tl.constexpr,
                TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[None, :]
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    line, first = row % outputs, tl.program_id(2) * span
    half: tl.constexpr = x.dtype.element_ty
    base: tl.constexpr = 0x43004300 if half == tl.bfloat16 else 0x64006400
    eight: tl.constexpr = 136.0 if half == tl.bfloat16 else 1032.0
    x += token % tokens * (width * (4 if KIND == "int4" else 1))
    total = tl.zeros([ROWS, TOKENS], tl.int32 if KIND == "int8" else tl.float32)
    for begin in range(first, tl.minimum(first + span, width), BLOCK):
        column = begin + tl.arange(0, BLOCK)
        at, to = column[None, :], column[:, None]
        w = tl.load(weight + line * width + at, mask=at < width, other=0)
        if KIND == "int8":
            value = tl.load(x + to, mask=to < width, other=0)
            total = tl.dot(w, value, total, out_dtype=tl.int32)
        else:
            part = tl.zeros([ROWS, TOKENS], tl.float32)
            for i in tl.static_range(4):
                bits = tl.inline_asm_elementwise(
                    "{.reg .b32 t; shr.b32 t, $1, $2;"
                    " lop3.b32 $0, t, 0xf000f, $4, 0xea;}", "=r,r,r,r,r,r",
                    [w, 4 * i, base], dtype=tl.int16, is_pure=True, pack=2)
                value = tl.load(x + 3 * begin + to + i * BLOCK)
                part = tl.dot(bits.to(half, bitcast=True) - eight, value, part)
            total += part * tl.load(scale + line * (width // BLOCK) + begin // BLOCK)
    tl.store(y + (tl.program_id(2) * tokens + token) * outputs + row, total,
             mask=(row < outputs) & (token < tokens))

TILES = dict(dense=(2, 1024, 4), int8=(2, 256, 1), fp8=(2, 1024, 2))  # And warps.

# %%
def multiply_row(kind: str, x: Tensor, weight: Tensor) -> Tensor:
    y = x.new_empty(1, len(weight), dtype=torch.float32)
    rows, block, warps = TILES[kind]
    if kind == "int8":  # Words of four bytes.
        x, weight = x.view(torch.int32), weight.view(torch.int32)
    row_kernel[triton.cdiv(len(weight), rows),](
        x, weight, y, *weight.shape, kind, rows, block, num_warps=warps)
    return y

def multiply_tiles(kind: str, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return x [n, in] times a weight [n, out], in float32 if of INT8."""
    tokens, (outputs, width) = len(x), weight.shape
    n = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    rows = 64 if n == 16 or outputs < 2048 else 128
    block = width // scale.shape[1] if kind == "int4" else 128
    programs = triton.cdiv(tokens, n), triton.cdiv(outputs, rows)
    parts = max(1, min(8, width // (4 * block), 2**14 // n // math.prod(programs)))
    span = triton.cdiv(width, parts * block) * block
    dtype = scale.dtype if parts == 1 and kind == "int4" else torch.float32
    y = x.new_empty(parts, tokens, outputs, dtype=dtype)
    tile_kernel[*programs, parts](  # Those that share weights follow each other.
        x, weight, scale, y, tokens, outputs, width, span, kind, n, rows, block,
        num_stages=4 if n == 64 else 3)
    return y[0] if parts == 1 else y.sum(0)

def attend(module, query, key, value, attention_mask, scaling, **named):
    """Attend in transformers' interface; query, key, value [batch, heads, n, size]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    window = named.get("sliding_window") or math.inf
    if window < key.shape[2] or named.get("softcap") or named.get("s_aux") is not None:
        raise ValueError("no kernel for sliding windows, soft caps, sinks")
    if query.shape[2] > 1:  # The whole prompt: causal, and no mask.
        key, value = (x[:, :, : query.shape[2]] for x in (key, value))
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)
    q = query.reshape(len(key), key.shape[1], -1, query.shape[3])
    if len(key) > 1:
        y = F.scaled_dot_product_attention(q, key, value, attention_mask, scale=scaling)
    else:  # As a formula, or too few programs would share one sequence's keys.
        score = (q.float()[:, :, :, None] * key[:, :, None]).sum(-1) * scaling
        weight = (score + attention_mask).softmax(-1)
        y = (weight[..., None] * value[:, :, None]).sum(3).to(query.dtype)
    return y.reshape(len(y), 1, query.shape[1], -1), None

def compile_layers(model, compiled: bool) -> None:
    from transformers import AttentionInterface
    AttentionInterface.register("quant_lab", attend)
    model.set_attn_implementation("quant_lab")
    layers = find_decoder(model).layers
    eager = type(layers[0]).forward
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 99  # Shapes and kinds of layers.
    fast = torch.compile(eager, fullgraph=True, dynamic=False, options=dict(
        combo_kernels=next(model.parameters()).is_cuda))  # Launches small ones as one.
    def run(layer, number, x, *inputs, past_key_values, **named):
        layer_cache = past_key_values.layers[number]
        forward = fast if compiled and layer_cache.is_initialized else eager
        return forward(layer, x, *inputs, past_key_values=layer_cache, **named)
    for number, layer in enumerate(layers):
        layer.forward = partial(run, layer, number)

# %% [markdown]
"""## Files, faults, report
A wrong input ends in one line on stderr that names it and the way out, with exit code
2. JSON and checkpoints appear in one step or not at all. What the libraries print goes
to `log.txt`, tracebacks of failed rows too. What comes from outside (names, errors,
completions) is foreign text, and stays text."""

# %%
def stop(line: str):
    print("quant_lab: " + one_line(line), file=sys.stderr)
    raise SystemExit(2)

def one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())

def describe(error: BaseException) -> str:
    while error.__cause__:
        error = error.__cause__
    says_it = isinstance(error, (ValueError, OSError, ArithmeticError)) and str(error)
    text = str(error) if says_it else f"{type(error).__name__}: {error}"
    return textwrap.shorten(one_line(text).rstrip(". "), 200, placeholder=" ...")

@contextlib.contextmanager
def usable(flag: str, value, advice: str):
    try:
        yield
    except Exception as error:
        stop(f"{flag} {value}: {describe(error)}; {advice}")

def read_json(file: Path) -> dict:
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        return dict(json.loads(file.read_text(encoding="utf-8")))
    return {}

def write_json(file: Path, content: dict) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    file.with_suffix(".partial").write_text(text + "\n", encoding="utf-8")
    file.with_suffix(".partial").replace(file)

def fingerprint(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

def hash_files(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.file_digest(file.open("rb"), "sha256").hexdigest()
            for file in (folder, *folder.glob("*")) if file.is_file()}

@contextlib.contextmanager
def libraries_to(log: Path):
    with (log.open("a", encoding="utf-8") as stream,
          contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream)):
        yield

def show_progress(what: str, items) -> tqdm:
    log = dict(mininterval=60, maxinterval=60, bar_format="{l_bar}{bar}{r_bar}\n")
    return tqdm(items, what, file=OUTPUT, delay=10, **{} if OUTPUT.isatty() else log)

def fill(text: str, bullet: str = "") -> str:
    return textwrap.fill(text, 110, break_on_hyphens=False,
                         initial_indent=bullet, subsequent_indent=" " * len(bullet))

def show(text: str) -> None:
    if IN_NOTEBOOK:
        from IPython.display import Markdown, display
        display(Markdown(text))
    else:
        print(f"\n{text}\n", flush=True)

# %%
@contextlib.contextmanager
def llmcompressor_session(model):
    from llmcompressor import create_session
    from loguru import logger
    lines = []
    logger.configure(handlers=[dict(sink=lines.append, level="INFO"),
                               dict(sink=sys.stdout, level="INFO")])
    # What torch.fx traced would keep the model; and settings are saved as they came.
    with (create_session(), patch.dict(torch.fx._symbolic_trace._wrapped_fns_to_patch),
          patch.object(type(model.generation_config), "validate")):
        yield lines

def quote(text: str) -> str:
    text = one_line(text).replace("`", "'")
    # What could begin a block stays behind the word before when lines are filled.
    text = re.sub(r" (?=[<#>~=+*_|-]|\d+[.)])", "\u00a0", text)
    return f"`{text}`" if re.search(r"[^\w\s.,:;()/'-]|://|www\.|\b_", text) else text

def render_card(results: dict) -> str:
    config, machine = results["config"], results["machine"]
    words = [re.sub(r"(^|=)[/~.].*/(?=.)", r"\1", x) for x in results["command"]]
    versions = results["versions"] | dict(driver=machine["driver"])
    facts = dict(
        model=f"{results['model_name']}, {config['dtype']}, {config['execution']}",
        command=shlex.join(words),
        versions=", ".join(f"{name} {x}" for name, x in versions.items() if x),
        machine=f"{machine['name']}, {machine['memory_bytes'] / 2**30:.1f} GiB, "
                f"{machine['threads']} threads")
    return "\n".join(fill(one_line(x), f"    {name:10}") for name, x in facts.items())

def render_summary(results: dict) -> str:
    return "\n\n".join([
        f"# quant_lab: {quote(results['model_name'])}", render_card(results),
        f"Written {results['created']}.", "## Which to deploy", render_advice(results),
        "![Quality, size, speed and memory](summary.png)",
        "## Figures", render_tables(results, results["variants"]),
        "## Notes", render_notes(results), "## Greedy completions",
        *(render_completions(results["variants"], n) for n in range(8))]) + "\n"

def render_model_card(row: dict, results: dict) -> str:
    from huggingface_hub import EvalResult, ModelCardData
    title = f"{results['model_name']}, {row['scheme']}"
    is_base = row["label"] == BASELINE
    text = Path(results["config"]["eval_text"]).name
    result = EvalResult("text-generation", text, text, "perplexity", row["perplexity"])
    data = ModelCardData(
        base_model=results["base_model"], license=results["license"], model_name=title,
        library_name="transformers", eval_results=[result],
        tags=None if is_base else ["compressed-tensors", "llmcompressor"])
    rows = [x for x in results["variants"] if x["label"] in (BASELINE, row["label"])]
    about = (f"Recovery of perplexity: {100 / row['perplexity_ratio']['value']:.2f} %. "
             "Licence and uses are those of the original. `vllm serve .` serves it.")
    return "\n\n".join([f"---\n{data.to_yaml()}\n---", f"# {quote(title)}", fill(about),
                        render_card(results), render_tables(results, rows)]) + "\n"

# %%
def render_completions(rows: list[dict], number: int) -> str:
    lines = [f"**{PROMPTS[number]}**\n"]
    for row in [row for row in rows if row["divergence"]]:
        one = row["divergence"]["completions"][number]
        lines.append(fill(f"{row['label']}, {one['same_tokens']} tokens the same: "
                          f"{quote(one['completion'])}", "- "))
    return "\n".join(lines)

def draw_summary(results: dict):
    from matplotlib.figure import Figure
    rows, most = results["variants"], results["config"]["max_loss"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for k, row in enumerate(rows):
        name, mark, color = name_variant(row["label"]), "osD^vP*X"[k % 8], f"C{k}"
        if row["status"] != "ok":
            axes.plot([], " ", label=f"{name}, failed")
            continue
        size, kld = row["weight_bytes"] / 1e6, read_figure(row, "kld")
        more = 100 * row["perplexity_ratio"]["value"] - 100
        axes.plot([size] * 3, [kld.low, kld.middle, kld.high], mark + "-", color=color,
                  ms=9, mfc=color if find_loss(row) <= most else "white", markevery=[1],
                  label=f"{name}, {size:,.1f} MB\nperplexity {more:+.1f} %")
    figure.legend(loc="outside right", labelspacing=1.2)
    axes.set_yscale("symlog", linthresh=1e-5)
    axes.set(ylabel="KLD to original, nats", ylim=(-2e-6, None),
             xlabel=f"MB on disk; hollow: not surely within {most:g} % perplexity")
    figure.suptitle(textwrap.fill(choose_variant(results)[1], 78), fontsize=12)
    facts = results["model_name"][-30:], results["machine"]["name"], results["created"]
    figure.supxlabel(one_line(", ".join(facts)), fontsize=9, parse_math=False)
    return figure

def collect_results(lab: SimpleNamespace) -> dict:
    rows = [lab.rows[label] for label in VARIANTS | lab.rows if label in lab.rows]
    run = lab.head | dict(created=time.strftime("%FT%TZ", time.gmtime()), variants=rows)
    return run | dict(advice=advise(run))

def write_outputs(lab: SimpleNamespace) -> None:
    results, output = collect_results(lab), lab.output
    with usable("--output-dir", output, "make room; what is finished is kept"):
        write_json(output / "results.json", results)
        (output / "summary.md").write_text(render_summary(results), "utf-8")
        for row in results["variants"]:
            card = output / "checkpoints" / Path(row["label"]).name / "README.md"
            if row["status"] == "ok" and card.parent.is_dir():
                card.write_text(render_model_card(row, results), "utf-8")
        draw_summary(results).savefig(output / "summary.png", dpi=140)

# %% [markdown]
"""# The runs
Here the lab runs. First the set-up: options, device, model and text, each refused with
one line if it cannot be used."""

# %%
def set_up(words: list[str]) -> SimpleNamespace:
    options = parse_options(words)
    lab = SimpleNamespace(options=options, samples={}, reference=None)
    lab.device = choose_device(options)
    lab.model_folder, lab.tokenizer, lab.context, lab.prompts = open_model(options)
    lengths = tuple(n for n in options.prompt_lengths if n <= lab.context)
    lab.options = replace(options, prompt_lengths=lengths)
    lab.windows, lab.begin = load_evaluation(options, lab.tokenizer, lab.context)
    lab.unscored = max(1, len(lab.begin))  # Tokens at the begin of a window.
    if any(VARIANTS[label].calibrated for label in options.variants):
        lab.samples = load_calibration(options, lab.tokenizer, lab.context)
    lab.head = describe_run(lab, words)
    device = lab.head["machine"]["name"] if lab.device.type == "cuda" else "cpu"
    slug = re.sub(r"[^\w.]+", "-", f"{Path(options.model).resolve().name}-{device}")
    output = options.output_dir or f"results/{slug}"
    with usable("--output-dir", output, "name another that can be written to"):
        lab.output = Path(output).expanduser()
        lab.output.mkdir(parents=True, exist_ok=True)
        lab.engine = options.vllm and find_engine(options, lab.output / "vllm.log")
        lab.tasks = load_tasks(options, lab.output / "log.txt")
        if options.fresh:
            (lab.output / "results.json").unlink(missing_ok=True)
            for label in VARIANTS:
                shutil.rmtree(lab.output / "checkpoints" / label, ignore_errors=True)
        take_over(lab)
    print(f"output       {output}; after Ctrl-C the same command goes on where it was")
    show(render_card(lab.head))
    return lab

if __name__ == "__main__":
    if not IN_NOTEBOOK and "ipykernel" not in sys.modules:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ends at once, whatever runs.
        sys.stdout.reconfigure(errors="replace")  # Completions may be in any script.
    WORDS = shlex.split(os.environ.get("QUANT_LAB_ARGS", ""))
    LAB = set_up(WORDS if IN_NOTEBOOK else sys.argv[1:])

# %% [markdown]
"""## Baseline
The model in `--dtype`, saved and loaded again. A ratio of 1, a KLD of 0 and all tokens
the same show that the measurement repeats exactly; else it is noise, and no difference
smaller than that counts below."""

# %%
if __name__ == "__main__":
    run_variant("00_fp16_baseline", LAB)

# %% [markdown]
"""## FP8_DYNAMIC
Half the bytes of every quantized Linear, in seconds and without data. Three bits of
mantissa put weights off by 2.6 % (RMS), whatever the scale: expect a small but certain
KLD. Rounding activations costs kernels, which at 0.5B eats what is saved."""

# %%
if __name__ == "__main__":
    run_variant("01_fp8_dynamic", LAB)

# %% [markdown]
"""## GPTQ W4A16
The smallest, and it costs the most quality: sixteen levels for the weights of a group
of 128. Where bytes are what one waits for (one sequence, a large model) it is the
fastest; prefill and batches wait for arithmetic and have to unpack weights first."""

# %%
if __name__ == "__main__":
    run_variant("02_gptq_w4a16", LAB)

# %% [markdown]
"""## SmoothQuant + GPTQ W8A8
The bytes of FP8, but 256 evenly spaced levels: weights are off by about 1 % where rows
have no outliers. Activations have some, and the largest of a token sets the step:
SmoothQuant moves them into the weights. So this is often the closest (README: why). Its
integer tensor cores are older than those of FP8: a T4 has them."""

# %%
if __name__ == "__main__":
    run_variant("03_smoothquant_w8a8", LAB)

# %% [markdown]
"""## On request
`--variants` has to name these. `rtn_w4a16`, rounded to nearest in seconds, is the
control of `02_gptq_w4a16`: compare their KLD to see whether GPTQ earned its minutes."""

# %%
if __name__ == "__main__":
    for label in list(VARIANTS)[4:]:
        if label in LAB.rows or label in LAB.options.variants:
            run_variant(label, LAB)

# %% [markdown]
"""## In a server
With `--vllm`, all that is finished once more, where it would be deployed. Where the two
disagree, the server is right about the server, and the loop above about the format:
what it costs with little around it. Of a small model one sees the host, whose pace
changes: let nothing else run there. It takes `python -m venv serve`, `serve/bin/pip
install vllm`, then the same command with `--vllm serve/bin/python`."""

# %%
if __name__ == "__main__":
    if LAB.engine:
        serve_all(LAB)

# %% [markdown]
"""## Summary
Read the intervals before the order: what two variants share cannot be ranked. And tasks
may mind what running text does not. Another `--max-loss` needs no new run."""

# %%
if __name__ == "__main__":
    RESULTS = collect_results(LAB)
    show(render_tables(RESULTS, RESULTS["variants"]))
    if IN_NOTEBOOK:
        from IPython.display import Image, display
        display(Image(LAB.output / "summary.png"))
        for number in range(1, 8):
            show(render_completions(RESULTS["variants"], number))
    show(render_notes(RESULTS))
    show("## Which to deploy\n\n" + render_advice(RESULTS, LAB.output / "checkpoints"))
    if not IN_NOTEBOOK and any(row["error"] for row in RESULTS["variants"]):
        sys.exit(1)
