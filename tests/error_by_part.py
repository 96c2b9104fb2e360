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
from collections import defaultdict
from pathlib import Path

import torch
from conftest import ROOT  # noqa: F401  Makes quant_lab known.
from transformers import AutoModelForCausalLM, AutoTokenizer

import quant_lab


def round_fp8(x):
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def round_int8(x):
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127.5
    return (x / scale).round().clamp(-128, 127) * scale


ROUNDERS = dict(FP8=round_fp8, INT8=round_int8)


def relate(x, rounded):
    return ((rounded - x).norm() / x.norm()).item()


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


class Experiment:
    def __init__(self, model, windows):
        self.model, self.windows = model, windows
        self.linears = {name: module for name, module in model.named_modules()
                        if isinstance(module, torch.nn.Linear) and "lm_head" not in name}
        self.weights = {name: x.weight.data.clone() for name, x in self.linears.items()}
        self.errors, self.peaks = defaultdict(list), defaultdict(list)
        self.wanted = [self.compute(window) for window in windows]
        for name, linear in self.linears.items():
            kind = name.rpartition(".")[2]
            for label, rounder in ROUNDERS.items():
                error = relate(linear.weight, rounder(linear.weight))
                self.errors[kind, label, "weights"].append(error)
        hooks = [x.register_forward_pre_hook(lambda _, inputs, name=name: self.note(
            name.rpartition(".")[2], inputs[0])) for name, x in self.linears.items()]
        self.compute(windows[0])
        for hook in hooks:
            hook.remove()

    def compute(self, window):
        return self.model(input_ids=window, use_cache=False).logits[0].cpu()

    def note(self, kind, x):
        self.peaks[kind].append((x.abs().amax(-1) / x.square().mean(-1).sqrt()).median().item())
        for label, rounder in ROUNDERS.items():
            self.errors[kind, label, "inputs"].append(relate(x, rounder(x)))

    def measure(self, rounder, what, kind=""):
        """Return KLD [windows, tokens] of rounding Linears whose names end in kind."""
        hooks = []
        for name, linear in self.linears.items():
            if not name.endswith(kind):
                continue
            if "weights" in what:
                linear.weight.data = rounder(self.weights[name])
            if "inputs" in what:
                hooks.append(linear.register_forward_pre_hook(
                    lambda _, inputs: (rounder(inputs[0]),)))
        kld = torch.stack([quant_lab.compare(wanted, self.compute(window))[0]
                           for wanted, window in zip(self.wanted, self.windows)])
        for hook in hooks:
            hook.remove()
        for name, linear in self.linears.items():
            linear.weight.data = self.weights[name]
        return kld


def render(kld):
    found = quant_lab.estimate(kld, name="mean")
    return f"{found['mean']:.4f} ± {(found['high'] - found['low']) / 2:.4f}"


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
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
                module.weight.data = dither(module.weight.data)
    experiment = Experiment(model.eval(), windows)

    def show(name, experiment, what):
        fp8, int8 = (experiment.measure(rounder, what) for rounder in ROUNDERS.values())
        print("|", " | ".join([name, render(fp8), render(int8), render(int8 - fp8)]), "|",
              flush=True)

    print("| rounded | FP8 | INT8 | difference |\n| --- | --: | --: | --: |")
    for what in (["weights"], ["inputs"], ["weights", "inputs"]):
        show(" and ".join(what), experiment, what)
    if given.dither:
        return
    smoothed = copy.deepcopy(model)
    smooth(smoothed, windows[0])
    smoothed = Experiment(smoothed, windows)
    smoothed.wanted = experiment.wanted
    show("both, smoothed", smoothed, what)
    print("\n| Linear | FP8 | INT8 | weights FP8 % | INT8 % | inputs FP8 % | INT8 % |"
          " largest input over RMS |\n| ---", "| --:" * 7, "|")
    for kind, peaks in experiment.peaks.items():
        kld = [render(experiment.measure(rounder, ["weights", "inputs"], kind))
               for rounder in ROUNDERS.values()]
        errors = [experiment.errors[kind, label, what]
                  for what in ("weights", "inputs") for label in ROUNDERS]
        cells = [*kld, *(f"{100 * sum(x) / len(x):.2f}" for x in errors),
                 f"{sum(peaks) / len(peaks):.1f}"]
        print(f"| {kind} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
