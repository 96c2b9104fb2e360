"""Say what of a format's loss comes from rounding weights, what from inputs, and where.

    python tests/error_by_part.py --model FOLDER --text FILE

Each Linear's weights (a scale an output), its inputs (a scale a token), or both are rounded
to FP8 (E4M3) or INT8, to the nearest, without GPTQ. KLD in nats, to the model before, with
half a 95 % interval, over windows spread over the text; the last column is INT8's less FP8's,
paired by token. Errors are relative: the root of the mean square of what rounding changes,
over that of what is rounded. float32, on a GPU if there is one.

The row "smoothed" does what SmoothQuant does before: what q, k, v and gate, up read is
divided, by channel, by max|input|^s / max|weight|^(1-s), s = 0.8, and their weights are
multiplied by it (paper, section 4; maxima of inputs over the first window).

--dither is for weights that were restored from Q4_1, sixteen levels for each 32 of a row:
each weight moves within its level, evenly at random, and what comes out is the model that
all is compared to. If the levels favoured one format, that would show.
"""

import argparse
import copy
import sys
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quant_lab  # noqa: E402

FORMATS, BOTH = ("fp8", "int8"), ("weights", "inputs")


def round_to(kind, x):
    """Return x rounded as the lab rounds activations: a scale for each row of the last axis."""
    rounded, scale = quant_lab.round_activations(kind, x, native=True)
    return rounded.to(x.dtype) * scale


def find_linears(model):
    return {name: module for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name}


def dither(weight):
    """Return weights [outputs, inputs] moved at random within the levels of each 32."""
    groups = weight.unflatten(-1, (-1, 32))
    step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    return (groups + step * (torch.rand_like(groups) - 0.5)).flatten(-2)


@torch.no_grad()
def smooth(model, window, strength=0.8):
    """Move outliers of what q, k, v and gate, up read into their weights."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))):
            seen = []
            hook = norm.register_forward_hook(lambda _, inputs, output: seen.append(output[0]))
            model(input_ids=window, use_cache=False)
            hook.remove()
            weights = torch.cat([reader.weight for reader in readers]).abs().amax(0)
            scale = seen[0].abs().amax(0).clamp(min=1e-5) ** strength / weights.clamp(
                min=1e-5) ** (1 - strength)
            norm.weight /= scale
            for reader in readers:
                reader.weight *= scale


def score(model, windows):
    return [model(input_ids=window, use_cache=False).logits[0].log_softmax(-1).cpu()
            for window in windows]


def measure(model, windows, wanted, kind, what, ending=""):
    """Return KLD [windows, tokens] of rounding Linears whose names end so."""
    weights, hooks = {}, []
    for name, linear in find_linears(model).items():
        if not name.endswith(ending):
            continue
        if "weights" in what:
            weights[linear] = linear.weight.data
            linear.weight.data = round_to(kind, linear.weight.data)
        if "inputs" in what:
            hooks.append(linear.register_forward_pre_hook(
                lambda _, inputs: (round_to(kind, inputs[0]),)))
    kld = torch.stack([quant_lab.compare(*pair)[0]
                       for pair in zip(wanted, score(model, windows))])
    for hook in hooks:
        hook.remove()
    for linear, weight in weights.items():
        linear.weight.data = weight
    return kld


def find_errors(model, window):
    """Return, by the last part of a Linear's name, its errors in % and peaks over RMS."""
    errors, peaks, hooks = defaultdict(list), defaultdict(list), []

    def note(part, what, x):
        for kind in FORMATS:
            error = (round_to(kind, x) - x).norm() / x.norm()
            errors[part, what, kind].append(100 * error.item())

    def note_inputs(part, x):
        note(part, "inputs", x)
        peaks[part].append((x.abs().amax(-1) / x.square().mean(-1).sqrt()).median().item())

    for name, linear in find_linears(model).items():
        part = name.rpartition(".")[2]
        note(part, "weights", linear.weight)
        hooks.append(linear.register_forward_pre_hook(
            lambda _, inputs, part=part: note_inputs(part, inputs[0])))
    score(model, [window])
    for hook in hooks:
        hook.remove()
    return errors, peaks


def render(kld):
    found = quant_lab.estimate(kld, name="mean")
    return f"{found['mean']:.4f} ± {(found['high'] - found['low']) / 2:.4f}"


def show_row(*cells):
    print("|", " | ".join(cells), "|", flush=True)


@torch.no_grad()
def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal LM")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--dither", action="store_true")
    given = parser.parse_args(words)
    if given.windows < quant_lab.FEWEST:
        parser.error(f"--windows {given.windows}: an interval needs {quant_lab.FEWEST}")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).to(device)
    ids = AutoTokenizer.from_pretrained(given.model)(
        given.text.read_text(encoding="utf-8")).input_ids
    if len(ids) < given.windows * given.window:
        parser.error(f"--text {given.text}: {len(ids)} tokens are too few")
    begins = [n * (len(ids) - given.window) // given.windows for n in range(given.windows)]
    windows = [torch.tensor(ids[n : n + given.window], device=device)[None] for n in begins]
    if given.dither:
        for linear in find_linears(model).values():
            linear.weight.data = dither(linear.weight.data)
    wanted = score(model, windows)

    def show_formats(name, model, what):
        fp8, int8 = (measure(model, windows, wanted, kind, what) for kind in FORMATS)
        show_row(name, render(fp8), render(int8), render(int8 - fp8))

    print("| rounded | FP8 | INT8 | difference |\n| --- | --: | --: | --: |")
    for what in (("weights",), ("inputs",), BOTH):
        show_formats(" and ".join(what), model, what)
    if given.dither:
        return
    smoothed = copy.deepcopy(model)
    smooth(smoothed, windows[0])
    show_formats("both, smoothed", smoothed, BOTH)
    print("\n| Linear | FP8 | INT8 | weights FP8 % | INT8 % | inputs FP8 % | INT8 % |"
          " largest input over RMS |\n| --- |" + " --: |" * 7)
    errors, peaks = find_errors(model, windows[0])
    for part in peaks:
        kld = [measure(model, windows, wanted, kind, BOTH, part) for kind in FORMATS]
        means = [sum(x) / len(x) for x in (
            errors[part, what, kind] for what in BOTH for kind in FORMATS)]
        show_row(part, *map(render, kld), *(f"{x:.2f}" for x in means),
                 f"{sum(peaks[part]) / len(peaks[part]):.1f}")


if __name__ == "__main__":
    main()
