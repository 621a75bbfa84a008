"""ms-swift, in an environment of its own (`.ci/swift`). Where it is not installed, what needs it is skipped."""

from __future__ import annotations

import os
from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("swift") else ["test_*.py"]
os.environ["CUDA_VISIBLE_DEVICES"] = ""
