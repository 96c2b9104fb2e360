"""Run the lab on another NVIDIA GPU as if it were a T4 of Colab, and say what that took.

    python tests/rehearse_t4.py --model FOLDER [other options of quant_lab.py]

- PyTorch reports a T4 to Python: capability 7.5, no bfloat16, 40 multiprocessors, 15 GB of
  memory, of which no more is given. What PyTorch's own C++ and cuBLAS choose is for the GPU
  there is.
- Triton compiles for SM 7.5, with 64 KB of shared memory a program. Its PTX is assembled for
  the GPU there is, as drivers do with PTX that is older than the GPU.
- PyTorch's flash and cuDNN attention, which a T4 lacks, are switched off.
- Two cores; the run ends if its resident memory, with its children's, is seen above the 12.7 GB
  of Colab's host. Inductor compiles in this process, where Colab's would start two more.

It does not show a T4's speed. What the clock says of one stands at the end: as if all that the
GPU does took as many times longer as its memory is slower, with the host going on meanwhile, and
with the host waiting.
"""

import os
import runpy
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch

CORES, HOST, GPU = 2, 12.7e9, 15e9
BANDWIDTH = 320  # GB/s of its memory, by its data sheet.
OWN = {"row_kernel", "tile_kernel"}  # tile_kernel is no T4's.
SHARED = 65_536  # Bytes that a program may have.
T4 = dict(major=7, minor=5, total_memory=int(GPU), multi_processor_count=40,
          max_threads_per_multi_processor=1024, L2_cache_size=4 << 20,
          shared_memory_per_block_optin=SHARED, shared_memory_per_multiprocessor=SHARED)


def assemble_for(capability: int):
    """Make Triton assemble what it compiles for SM 7.5 for that SM (90, say).

    Returns the names of the kernels so far, and a function that undoes it.
    """
    from triton.backends.nvidia.compiler import CUDABackend
    assemble, names = CUDABackend.make_cubin, []

    def make_cubin(self, source, metadata, options, compiled_for):
        assert compiled_for == 75 and ".target sm_75" in source, "not for a T4"
        names.append(metadata["name"])
        return assemble(self, source, metadata, options, capability)

    CUDABackend.make_cubin = make_cubin
    return names, lambda: setattr(CUDABackend, "make_cubin", assemble)


def pretend() -> tuple[str, list[str], float]:
    """Make PyTorch and Triton take the GPU for a T4.

    Returns its name, the kernels to come, and how many times faster its memory is.
    """
    from triton.testing import get_dram_gbps
    faster = get_dram_gbps() / BANDWIDTH
    real = torch.cuda.get_device_properties(0)
    known = {name: getattr(real, name) for name in dir(real) if name[0] != "_"}
    known |= T4 | dict(name=f"{real.name} as a T4")
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(**known)
    torch.cuda.get_device_capability = lambda device=None: (T4["major"], T4["minor"])
    torch.cuda.get_device_name = lambda device=None: known["name"]
    torch.cuda.is_bf16_supported = lambda *_, **__: False
    torch.cuda.set_per_process_memory_fraction(GPU / real.total_memory)
    torch.cuda.mem_get_info = torch.accelerator.get_memory_info = lambda *_, **__: (
        int(GPU) - torch.cuda.memory_reserved(), int(GPU))
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config
    from triton.runtime import driver
    config.compile_threads = 1  # Workers would not know of the T4.
    CudaInterface.get_device_properties = staticmethod(torch.cuda.get_device_properties)
    sizes = driver.active.utils.get_device_properties
    driver.active.get_device_capability = torch.cuda.get_device_capability
    driver.active.utils.get_device_properties = lambda device: sizes(device) | dict(
        max_shared_mem=SHARED, multiprocessor_count=T4["multi_processor_count"])
    return real.name, assemble_for(10 * real.major + real.minor)[0], faster


def watch(peak: dict, faster: float) -> None:
    """Note the most memory seen, of this process with its children; end it above Colab's.

    And the seconds that the GPU was busy (NVML), and what they are to a T4.
    """
    this, last = psutil.Process(), time.time()
    while True:
        peak["looks"] += 1
        spent, busy = time.time() - last, torch.cuda.utilization() / 100
        last += spent
        peak["busy"] += spent * busy
        peak["overlapping"] += spent * max(1, faster * busy)
        total = 0
        for process in [this, *this.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.Error:
                pass
        peak["host"] = max(peak["host"], total)
        peak["gpu"] = max(peak["gpu"], torch.cuda.memory_reserved())  # Asks no driver.
        if total > HOST:
            print(f"out of memory: {total / 1e9:.1f} GB of the host, Colab has {HOST / 1e9}",
                  file=sys.__stderr__, flush=True)  # sys.stdout may be the lab's log.
            os._exit(137)
        time.sleep(0.2)


def main() -> int:
    """Run the lab with the options given; return its exit code."""
    if not torch.cuda.is_available():
        sys.exit("rehearse_t4: needs an NVIDIA GPU")
    torch.cuda.utilization()  # Fails here, if nvidia-ml-py is missing, not in a thread.
    begin, code = time.time(), "no"
    peak = dict.fromkeys(("host", "gpu", "looks", "busy", "overlapping"), 0)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    torch.set_num_threads(CORES)
    for name in "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR":  # A T4's keys, other code.
        os.environ[name] = tempfile.mkdtemp()
    card, kernels, faster = pretend()
    threading.Thread(target=watch, args=[peak, faster], daemon=True).start()
    sys.argv[0] = str(Path(__file__).parents[1] / "quant_lab.py")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        minutes, busy = (time.time() - begin) / 60, peak["busy"] / 60
        own = ", ".join(sorted(set(kernels) & OWN))
        print(f"\nRehearsed on {card}: capability 7.5, {len(kernels)} kernels that Triton compiled "
              f"for SM 7.5 ({own} among them) and assembled for this GPU, {CORES} cores. Exit code "
              f"{code}, {minutes:.1f} minutes. The most of {peak['looks']} looks: "
              f"{peak['host'] / 1e9:.1f} of {HOST / 1e9} GB of the host's memory, "
              f"{peak['gpu'] / 1e9:.1f} of {GPU / 1e9:.0f} GB of the GPU's, by PyTorch's count. "
              f"The GPU was busy for {busy:.1f} minutes; {faster:.1f} times slower, as memory is, "
              f"the whole takes {peak['overlapping'] / 60:.1f} minutes if the host goes on "
              f"meanwhile, {minutes + (faster - 1) * busy:.1f} if it waits.", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
