"""Train SAM-Path with Dynamic Focal Attention: from images and masks to a checkpoint."""

import os

# Huge pages for torch's large arrays on the CPU: without them a step spends a third of its time
# on page faults. torch reads this at its first allocation. Linux only, harmless elsewhere.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
