"""Run the script as `python quant_lab.py WORDS` and die by SIGKILL at a step.

    python tests/kill.py EVENT PHASE NUMBER WORDS

dies before or after the call `NUMBER` (from 1) of a library's function that the script
calls there, or, `half`, once the file of weights is half written. The script itself is
run as it is.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(event: str, phase: str, number: str, *words: str) -> None:
    import statistics

    import llmcompressor
    import transformers.modeling_utils as modeling
    from transformers import GenerationMixin

    left = int(number)

    def wrap(name, owner, function, matches=lambda *arguments: True):
        real = getattr(owner, function)

        def wrapped(*arguments, **named):
            nonlocal left
            here = name == event and matches(*arguments)
            left -= here
            if here and not left and phase == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **named)
            if here and not left:
                if phase == "half":
                    file = Path(arguments[1])
                    os.truncate(file, file.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, function, wrapped)

    wrap("quantize", llmcompressor, "oneshot")
    wrap("save", modeling.PreTrainedModel, "save_pretrained")
    wrap("weights", modeling, "safe_save_file")
    wrap("rename", Path, "rename")
    wrap("complete", GenerationMixin, "generate")
    wrap("time", statistics, "median")
    wrap("note", Path, "replace", lambda path, _: path.name == "quant_lab.partial")
    wrap("results", Path, "replace", lambda path, _: path.name == "results.partial")
    script = str(ROOT / "quant_lab.py")
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
