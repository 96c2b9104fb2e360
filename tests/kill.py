"""Run the script as `python quant_lab.py WORDS` again and again, ended at a step each time.

    python tests/kill.py "EVENT PHASE NUMBER, ..." WORDS

ends each run before or after call NUMBER (from 1) of a library's function that the script
calls at that step, by SIGKILL; PHASE half: once half of the file of weights is written;
interrupt: by Ctrl-C before the call. The script is run as it is, in forks of this process,
so the libraries are imported once. "ended CODE" is printed after each run.
"""

import os
import runpy
import signal
import statistics
import sys
from pathlib import Path

import datasets  # noqa: F401
import llmcompressor
import matplotlib.figure  # noqa: F401
import transformers
import transformers.modeling_utils as modeling

ROOT = Path(__file__).resolve().parents[1]
EVENTS = dict(
    quantize=(llmcompressor, "oneshot", None),
    save=(modeling.PreTrainedModel, "save_pretrained", None),
    weights=(modeling, "safe_save_file", None),
    rename=(Path, "rename", None),
    complete=(transformers.GenerationMixin, "generate", None),
    time=(statistics, "median", None),
    note=(Path, "replace", "quant_lab.partial"),
    results=(Path, "replace", "results.partial"))


def die_at(event: str, phase: str, number: int) -> None:
    """Let a call of the event's function end this process."""
    owner, name, file = EVENTS[event]
    real, left = getattr(owner, name), number

    def deadly(*inputs, **named):
        nonlocal left
        left -= file is None or inputs[0].name == file
        if not left and phase in ("before", "interrupt"):
            os.kill(os.getpid(), signal.SIGKILL if phase == "before" else signal.SIGINT)
        result = real(*inputs, **named)
        if not left:
            if phase == "half":
                weights = Path(inputs[1])
                os.truncate(weights, weights.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


def main(steps: str, *words: str) -> None:
    script = str(ROOT / "quant_lab.py")
    for step in steps.split(","):
        event, phase, number = step.split()
        if not (child := os.fork()):
            die_at(event, phase, int(number))
            sys.argv = [script, *words]
            runpy.run_path(script, run_name="__main__")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print("ended", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
