"""Time decoding of random models, format by format and kernel by kernel, on a GPU.

No checkpoint is needed and none is made: the weights are random, in the formats of the
recipes. A change of the packed execution shows here first; --sweep tries other tile
sizes than those of `row_shape`:

    python tests/bench_decode.py --shape 0.5b
    python tests/bench_decode.py --shape 7b --kinds plain int4 --profile 20
    python tests/bench_decode.py --shape 7b --sweep
"""

import argparse
import itertools
import math
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path[:0] = map(str, (Path(__file__).resolve().parents[1], Path(__file__).parent))
import quant_lab  # noqa: E402
from make_checkpoint import SHAPES  # noqa: E402

KINDS = "plain", "fp8", "int8", "int4"


def random_linear(kind: str, rows: int, width: int, bias, device, sm,
                  dtype=torch.float16):
    """A PackedLinear of a format with random weights, groups of 128 in INT4."""
    make = dict(dtype=dtype, device=device)
    scale = torch.rand(rows, width // 128 if kind == "int4" else 1, **make) / 5000 + 1e-5
    if kind == "plain":
        return quant_lab.PackedLinear(
            kind, torch.randn(rows, width, **make) / 50, None, bias, sm)
    if kind == "int4":
        weight = torch.randint(-2**31, 2**31, (rows, width // 8), dtype=torch.int32,
                               device=device)
    else:  # Of FP8 the codes up to 240, positive and negative.
        weight = torch.randint(-120, 120, (rows, width), dtype=torch.int8, device=device)
    return quant_lab.PackedLinear(kind, weight, scale, bias, sm)


def random_model(shape: str, kind: str, device):
    """A Qwen2 of a shape in float16, packed, its decoder layers in the format."""
    sm = torch.cuda.get_device_capability() if device.type == "cuda" else (0, 0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with device:
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPES[shape])).eval()
    torch.set_default_dtype(torch.float32)
    for name, linear in list(model.named_modules()):
        if kind != "plain" and type(linear) is torch.nn.Linear and name != "lm_head":
            packed = random_linear(kind, *linear.weight.shape, linear.bias, device, sm)
            model.set_submodule(name, packed)
    quant_lab.pack_model(model, sm)
    return model


def time_graph(acts: list, repeats=9) -> float:
    """Median microseconds of one of the acts, replayed as a CUDA graph."""
    acts[0]()
    torch.cuda.synchronize()
    graph, samples = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for act in acts:
            act()
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(1000 * start.elapsed_time(end) / len(acts))
    return statistics.median(samples[1:])


def sweep(shape: str, kind: str, device) -> None:
    """Print, for each product of a decoder layer, the fastest shapes of row_kernel.

    Copies of the weight take turns, of 120 MB in all, more than a cache holds.
    """
    s = SHAPES[shape]
    hidden, inner = s["hidden_size"], s["intermediate_size"]
    kv = hidden // s["num_attention_heads"] * s["num_key_value_heads"]
    sm, chosen = torch.cuda.get_device_capability(), quant_lab.row_shape
    for rows, width in ((hidden + 2 * kv, hidden), (hidden, hidden), (2 * inner, hidden),
                        (hidden, inner)):
        first = random_linear(kind, rows, width, None, device, sm)
        copies = [first, *(random_linear(kind, rows, width, None, device, sm)
                           for _ in range(min(40, int(1.2e8 // first.weight.nbytes))))]
        x, scale, found = torch.randn(1, width, device=device).half(), None, []
        row = x
        if kind in ("fp8", "int8"):
            row, scale = quant_lab.quantize(kind, x, first.native)
        name = "codes" if kind == "fp8" and not first.native else kind
        acts = [partial(quant_lab.multiply, name, row, m.weight, m.scale, scale, None,
                        torch.float16) for m in copies]
        for tried in itertools.product(
                (1, 2, 4, 8), (128, 256, 512, 1024, 2048), (1, 2, 4, 8)):
            if 4 <= tried[0] * tried[1] / (32 * tried[2]) <= 64:
                quant_lab.row_shape = lambda *_: tried
                found.append((time_graph(acts), tried))
        quant_lab.row_shape = chosen
        now = time_graph(acts)
        dense = torch.nn.functional.linear
        library = math.nan if kind != "plain" else time_graph(
            [partial(dense, x, m.weight) for m in copies])
        print(f"{kind:6} {rows:6} x {width:6}  as chosen {now:6.1f} us, PyTorch's own "
              f"{library:6.1f} us;", ", ".join(
                  f"{tried} {us:.1f}" for us, tried in sorted(found)[:5]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=(1, 8, 32))
    parser.add_argument("--prompt", type=int, default=512, help="its tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", type=int, default=0,
                        help="print so many kernels of a prefill and of a step")
    parser.add_argument("--sweep", action="store_true", help="try shapes of row_kernel")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    options = quant_lab.Options(new_tokens=args.new_tokens, repeats=args.repeats,
                                batch_sizes=tuple(args.batch_sizes))
    print(quant_lab.describe_machine(device)["name"], "torch", torch.__version__,
          f"copy {quant_lab.measure_bandwidth(device) / 1e12:.3f} TB/s")
    for kind in args.kinds:
        if args.sweep:
            sweep(args.shape, kind, device)
            continue
        model = random_model(args.shape, kind, device)
        prompt = torch.arange(args.prompt, device=device)[None] % 1000 + 1000
        speed = quant_lab.measure_speed(model, prompt, options, cuda)
        print(f"{kind:6} {speed['weights_memory_bytes'] / 1e6:8,.0f} MB  "
              f"TTFT {1000 * speed['ttft_s']['median']:7.2f} ms", *(
                  f" batch {d['batch']}: {d['itl_ms']['median']:.3f} ms, "
                  f"{100 * d['bandwidth_fraction']:.0f} % of copying"
                  if d["itl_ms"] else f" batch {d['batch']}: OOM"
                  for d in speed["decode"]), flush=True)
        if args.profile:
            with torch.no_grad():
                decoder = quant_lab.Decoder(model, prompt, args.new_tokens, cuda)
                decoder.run(1)
                for act in (decoder.prefill, decoder.step):
                    with torch.profiler.profile() as profile:
                        act()
                        quant_lab.now(device)
                    print(profile.key_averages().table(
                        sort_by=f"self_{device.type}_time_total", max_name_column_width=70,
                        row_limit=args.profile))
        del model


if __name__ == "__main__":
    main()
