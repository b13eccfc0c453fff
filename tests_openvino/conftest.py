"""No network, one thread."""

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TPRL_QUESTIONS": os.environ.get("TPRL_QUESTIONS", "40"),
}
