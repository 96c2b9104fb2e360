"""Time decoding of random models, format by format and kernel by kernel, on a GPU.

No checkpoint is needed and none is made: the weights are random, in the formats of the
recipes. A change of the packed execution shows here first; --tune tries other tile
sizes than those of `TILES`, one after the other in the model's own step (alone, in a
loop, a kernel is fed by other caches and another choice is the fastest):

    python tests/bench_decode.py --shape 0.5b
    python tests/bench_decode.py --shape 7b --kinds dense int4 --profile 20
    python tests/bench_decode.py --shape 7b --kinds fp8 --tune 60
"""

import argparse
import itertools
import math
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.utils import release_memory
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path[:0] = map(str, (Path(__file__).resolve().parents[1], Path(__file__).parent))
import quant_lab  # noqa: E402
from make_checkpoint import SHAPES  # noqa: E402

KINDS = "dense", "fp8", "int8", "int4"


def random_linear(kind: str, rows: int, width: int, bias, device, sm,
                  dtype=torch.float16, group=128):
    """Return a PackedLinear with random weights; the group is that of INT4."""
    make = dict(dtype=dtype, device=device)
    scale = torch.rand(rows, width // group if kind == "int4" else 1, **make) / 5000 + 1e-5
    if kind == "dense":
        return quant_lab.PackedLinear(
            kind, torch.randn(rows, width, **make) / 50, None, bias, sm)
    if kind == "int4":
        weight = torch.randint(-2**15, 2**15, (rows, width // 4), dtype=torch.int16,
                               device=device)
    else:  # Of FP8 the codes up to 240, positive and negative.
        weight = torch.randint(-119, 120, (rows, width), dtype=torch.int8, device=device)
        weight -= 9 * (weight < 0) if kind == "fp8" else 0
    return quant_lab.PackedLinear(kind, weight, scale, bias, sm)


def random_model(shape: str, kind: str, device):
    """Return a Qwen2 of a shape in float16, its decoder layers packed in the format."""
    sm = torch.cuda.get_device_capability() if device.type == "cuda" else (0, 0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with device:
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPES[shape])).eval()
    torch.set_default_dtype(torch.float32)
    for name, linear in list(model.named_modules()):
        if kind != "dense" and type(linear) is torch.nn.Linear and name != "lm_head":
            packed = random_linear(kind, *linear.weight.shape, linear.bias, device, sm)
            model.set_submodule(name, packed)
    quant_lab.pack_model(model, sm)
    return model


@torch.no_grad()
def tune(kind: str, model, prompts, seconds: float) -> None:
    """Print the fastest shapes of row_kernel, the nearest to the present tried first."""
    quant_lab.compile_layers(model, True)
    before, begin, found = quant_lab.TILES[kind], time.perf_counter(), []

    def milliseconds(shape) -> float:
        quant_lab.TILES[kind] = shape
        torch._dynamo.reset()  # What is compiled has chosen its tiles.
        decoder, samples = quant_lab.Decoder(model, prompts[:1], 64, True), []
        for _ in range(3):
            first, last = decoder.run(60)
            samples.append((last - first) / 60)
        return 1000 * min(samples)

    print(f"as chosen {milliseconds(before):.4f} ms a step")
    for shape in sorted(
            itertools.product((1, 2, 4, 8, 16), (128, 256, 512, 1024, 2048), (1, 2, 4, 8)),
            key=lambda other: sum(abs(math.log2(a / b)) for a, b in zip(other, before))):
        if time.perf_counter() - begin > seconds:
            break
        if 1 <= shape[0] * shape[1] / (32 * shape[2]) <= 64:
            found.append((milliseconds(shape), shape))
    print(f"{before} was chosen; of {len(found)} tried", ", ".join(
        f"{shape} {ms:.4f}" for ms, shape in sorted(found)[:6]), flush=True)


def bench(kind: str, args: argparse.Namespace) -> None:
    """Print the figures of a random model in a format."""
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    options = quant_lab.Options(new_tokens=args.new_tokens, repeats=args.repeats,
                                batch_sizes=tuple(args.batch_sizes), prompt_lengths=())
    model = random_model(args.shape, kind, device)
    prompts = torch.randint(1000, 2000, (max(args.batch_sizes), args.prompt), device=device)
    if args.tune and kind not in quant_lab.TILES:
        return print(f"{kind:6} has no row_kernel: multiply_tiles chooses its tiles")
    if args.tune:
        with patch.dict(quant_lab.TILES):  # Other formats keep theirs.
            return tune(kind, model, prompts, args.tune)
    speed = quant_lab.measure_speed(model, prompts, options, cuda)
    print(f"{kind:6} {model.get_memory_footprint() / 1e6:8,.0f} MB  "
          f"TTFT {1000 * speed['ttft_s']['median']:7.2f} ms", *(
              f" batch {d['batch']}: {d['itl_ms']['median']:.3f} ms" if d["itl_ms"]
              else f" batch {d['batch']}: {d['error']}" for d in speed["decode"]), flush=True)
    if args.profile:
        with torch.no_grad():
            decoder = quant_lab.Decoder(model, prompts[:1], args.new_tokens, cuda)
            for steps in 0, 1:  # The prefill alone, then with a step.
                decoder.run(steps)
                with torch.profiler.profile() as profile:
                    decoder.run(steps)
                print(profile.key_averages().table(
                    sort_by=f"self_{device.type}_time_total", max_name_column_width=70,
                    row_limit=args.profile))


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
    parser.add_argument("--tune", type=float, default=0,
                        help="try shapes of row_kernel for so many seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(name, "torch", torch.__version__, flush=True)
    for kind in args.kinds:
        release_memory()
        try:
            bench(kind, args)
        except Exception as error:  # The other formats may fit.
            print(f"{kind:6} failed: {quant_lab.describe(error)}", flush=True)


if __name__ == "__main__":
    main()
