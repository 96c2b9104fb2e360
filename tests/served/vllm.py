"""Stand in for vLLM on a CPU: the calls that `serve` makes, on a clock of its own.

The clock goes on by what `seconds` says. STAND_IN is JSON: "version", "gpu" (false: none),
"notes" (a file that gets a line a checkpoint), "fails", "hangs" (labels), "writes"
(by label, what it makes of chats), "slower" (a factor the second time).
"""

import atexit
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

from torch import SAID

__version__ = SAID["version"]
CLOCK = [100.0]
time.perf_counter = lambda: CLOCK[0]


def seconds(label: str, batch: int, tokens: int, call: int) -> float:
    """Return what a call takes: the first of a process twice as long, others not quite alike."""
    pace = dict.fromkeys(["01_fp8_dynamic", "03_smoothquant_w8a8"], 0.5).get(label, 1.0)
    return pace * (0.02 + 0.01 * (tokens - 1)) * (1 + batch / 100) * (
        2 if call == 1 else 1 + call % 3 / 1000)


class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos):
        assert temperature == 0, "greedy"
        self.max_tokens, self.ignore_eos = max_tokens, ignore_eos


class LLM:
    def __init__(self, model, dtype, max_model_len, seed, enable_prefix_caching,
                 gpu_memory_utilization, tensor_parallel_size):
        assert Path(model, "config.json").exists(), f"no checkpoint in {model}"
        self.label, self.limit, self.calls, self.factor = Path(model).name, max_model_len, 0, 1.0
        if SAID["notes"]:
            notes = Path(SAID["notes"])
            before = notes.read_text() if notes.exists() else ""
            self.factor = SAID["slower"] if f'"{self.label}"' in before else 1.0
            notes.write_text(before + json.dumps(dict(
                label=self.label, dtype=dtype, max_model_len=max_model_len, seed=seed,
                caching=enable_prefix_caching, part=gpu_memory_utilization,
                gpus=tensor_parallel_size,
                path=os.environ["PYTHONPATH"], tools=os.environ["PATH"].split(":")[0],
                multiprocessing=os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"])) + "\n")
        if self.label in SAID["hangs"]:
            time.sleep(60)
        print("INFO 01-01 [cuda.py:1] Using FLASH_ATTN attention backend", flush=True)
        if self.label in SAID["fails"]:  # As a configuration that pydantic refuses.
            atexit.register(print, "Exception ignored in: <function LLM.__del__>\n"
                            "AttributeError: what comes after an error says nothing")
            raise ValueError("1 validation error\n  no kernel for this one")
        if not self.label.startswith("00"):
            verb = "Using" if "w4a16" in self.label else "Selected"
            print(f"INFO 01-01 [x.py:1] {verb} StandInKernel for CompressedTensorsWNA16")
        print("INFO 01-01 [kv.py:1] GPU KV cache size: 12,345 tokens")
        print("Capturing graphs: 100%|####| 2/2", end="\r")  # A bar ends no line.

    def generate(self, inputs, settings, use_tqdm):
        self.calls += 1
        ids, tokens = [one["prompt_token_ids"] for one in inputs], settings.max_tokens
        assert max(map(len, ids)) + tokens <= self.limit, "longer than max_model_len"
        CLOCK[0] += self.factor * seconds(self.label, len(ids), tokens, self.calls)
        texts = [] if settings.ignore_eos else SAID["writes"].get(self.label, [])
        return [SimpleNamespace(outputs=[SimpleNamespace(text=text)])
                for text in texts or ["?"] * len(ids)]
