"""Runs `hylo demo` as a user would and keeps its report, with its time and its peak memory as a whole process.

.venv/bin/python benchmarks/demo.py --name demo-cpu
"""

import argparse
import json
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="demo-cpu", help="of the result files")
    name = parser.parse_args().name
    hylo = Path(sys.executable).with_name("hylo")
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "demo"
        start = time.monotonic()
        subprocess.run([hylo, "demo", "--output", run], check=True)
        seconds = time.monotonic() - start
        report = json.loads((run / "report" / "report.json").read_text())
        shutil.copyfile(run / "report" / "report.png", RESULTS / f"{name}.png")
    unit = 1 if sys.platform == "darwin" else 1024
    report["command"] = shlex.join(["python", "benchmarks/demo.py", "--name", name])
    report["process"] = {
        "seconds": round(seconds, 1),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["process"]))
    kl = [scores["kl"] for name, scores in report["scores"].items() if name != "base"]
    if sorted(kl, reverse=True) != kl or kl[-1] > 0.4 * kl[0] or report["cache_ratio"] > 0.1:
        sys.exit(f"KL must fall at every step and end 60 % below its start, with a tenth of the cache: {kl}")


if __name__ == "__main__":
    main()
