"""Do the findings of ExPLAIND's paper (arXiv 2505.20076) hold here? One command a finding.

    python benchmarks/reproduce.py fidelity     # the kernel machine against the model, by nodes a step
    python benchmarks/reproduce.py pruning      # kernel influence against magnitude and random, the paper's protocol
    python benchmarks/reproduce.py grokking     # components over training, kernel against decay, layers swapped in time
    python benchmarks/reproduce.py steps        # how few steps of training make up the predictions

Each trains what it needs under --out (and reuses it), prints tables in Markdown and takes less than 30 minutes on two cores by
default; --write puts them into docs/reproduction.md. The paper's own sizes: --help says which option brings them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from reproduction import fidelity, grokking, pruning, steps
from reproduction.common import DOCUMENT, write_section

from prunekit.measure import machine

EXPERIMENTS = {"fidelity": fidelity, "pruning": pruning, "grokking": grokking, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="experiment", required=True)
    for name, experiment in EXPERIMENTS.items():
        command = commands.add_parser(name, help=(experiment.__doc__ or "").splitlines()[0])
        command.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="run folders (default: %(default)s)")
        command.add_argument("--write", action="store_true", help=f"put the tables into {DOCUMENT.name}")
        experiment.options(command)
    chosen = parser.parse_args()
    started = time.process_time()
    text = EXPERIMENTS[chosen.experiment].run(chosen)
    words = [word for word in sys.argv[1:] if word != "--write"]
    text += (
        f"\n`python benchmarks/reproduce.py {' '.join(words)}`, {machine()}: {time.process_time() - started:.0f} processor "
        "seconds (training not counted where its run was there)."
    )
    print(text)
    if chosen.write:
        write_section(DOCUMENT, chosen.experiment, text)


if __name__ == "__main__":
    main()
