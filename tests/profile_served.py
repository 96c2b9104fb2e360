"""Print what a step of vLLM's engine consists of: its kernels, their time, the wall clock's.

    serve/bin/python tests/profile_served.py CHECKPOINT

For one sequence and for 32, a prompt of 512 tokens: TTFT and the time of a step, as the lab takes
them, then the kernels of 20 steps (a run of 21 tokens less one of 1), by CUDA time, on average.
"""

import os
import sys
import time
from collections import Counter

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # The profiler sees one process.
import torch  # noqa: E402
import vllm  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

STEPS = 20


def main(checkpoint: str) -> None:
    llm = vllm.LLM(model=checkpoint, dtype="float16", max_model_len=640,
                   enable_prefix_caching=False, seed=42)

    def run(batch, tokens):
        """Return the seconds that a batch takes for so many tokens each."""
        settings = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        inputs, start = [dict(prompt_token_ids=[*range(1000, 1512)])] * batch, time.perf_counter()
        llm.generate(inputs, settings, use_tqdm=False)
        return time.perf_counter() - start

    def trace(batch, tokens):
        """Return microseconds and number of the kernels of a run, by name."""
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            run(batch, tokens)
        spent, number = Counter(), Counter()
        for event in seen.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                spent[event.name] += event.self_device_time_total
                number[event.name] += 1
        return spent, number

    for batch in (1, 32):
        for _ in range(3):
            run(batch, 1), run(batch, 64)
        first, last = (sorted(run(batch, n) for _ in range(5))[2] for n in (1, 64))
        print(f"batch {batch}: TTFT {1000 * first:.2f} ms, "
              f"step {1000 * (last - first) / 63:.3f} ms")
        (before, few), (spent, number) = trace(batch, 1), trace(batch, STEPS + 1)
        spent.subtract(before)
        number.subtract(few)
        print(f"batch {batch}: {sum(number.values()) / STEPS:.0f} kernels a step, "
              f"busy {sum(spent.values()) / STEPS:.0f} us a step")
        for name, us in spent.most_common(14):
            print(f"  {us / STEPS:8.1f} us {number[name] / STEPS:6.1f} x {name[:110]}")


if __name__ == "__main__":
    main(sys.argv[1])
