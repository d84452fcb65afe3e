"""Does a training survive what can happen to its processes?

    uv run python scripts/chaos.py                 # ten minutes
    uv run python scripts/chaos.py --smoke         # two

Trainings of CartPole by the command line `embodied-rl train`, one after the other, in this process's children, on a
private Ray cluster and on one of several nodes; into each, at random moments, faults by real signals (see
fault_injection/faults.py): SIGKILL of simulator processes, rollout workers, learner ranks, Ray nodes and the run
itself, which is then resumed; a full /dev/shm; processes that stand still for seconds, or for ever. What must hold of
every training is in fault_injection/bookkeeping.py. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from fault_injection.campaign import Campaign

SMOKE = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="no training begins after them")
    parser.add_argument("--smoke", action="store_true", help=f"the same as --minutes {SMOKE:g}")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the victims")
    parser.add_argument("--iterations", type=int, default=100, help="of every training; fewer on a slow machine")
    parser.add_argument("--only", metavar="TEXT", default="", help="trainings whose name or faults contain this")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the runs there")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON object to this file")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that nothing is left behind
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "150")  # for a machine with other work
    folder = options.keep or Path(tempfile.mkdtemp(prefix="embodied_rl-chaos-"))
    until = time.monotonic() + 60 * (SMOKE if options.smoke else options.minutes)
    try:
        with Campaign(folder, options.seed, options.iterations) as campaign:
            campaign.run(until, options.only)
            found = campaign.result()
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))
    return 0 if found["all_held"] else 1


if __name__ == "__main__":
    sys.exit(main())
