"""Run the lab as on smaller GPUs: each may take so many GB (10^9 bytes), and no more.

    python tests/limit_memory.py 12 --model FOLDER --variants gptq

PyTorch's allocator holds this process to it; what vLLM takes, in a process of its own, is
not limited, but `--vllm` counts its GPUs by the same figure.
"""

import runpy
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).resolve().parents[1] / "quant_lab.py"


def limit(gigabytes: float) -> None:
    """Let this process take so many bytes of each GPU (10^9, of what is there at most)."""
    for gpu in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(gpu).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1, gigabytes * 1e9 / total), gpu)


if __name__ == "__main__":
    limit(float(sys.argv.pop(1)))
    sys.argv[0] = str(SCRIPT)
    runpy.run_path(str(SCRIPT), run_name="__main__")
