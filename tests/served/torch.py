"""Stand in for what `serve` asks of PyTorch; STAND_IN is described in vllm.py beside this."""

import json
import os
from types import SimpleNamespace

SAID = dict(version="0.26.0", gpu=True, notes=None, fails=[], hangs=[],
            writes={}, slower=1.0) | json.loads(os.environ.get("STAND_IN", "{}"))
cuda = SimpleNamespace(is_available=lambda: SAID["gpu"])
