"""Published claims about where sparse networks come from, each as a small experiment with its figures.

  python -m experiments.studies.claims shuffle
  python -m experiments.studies.claims gradient_flow
  python -m experiments.studies.claims collapse
  python -m experiments.studies.claims connected
  python -m experiments.studies.claims rewind
  python -m experiments.studies.claims edge_popup
  python -m experiments.studies.claims planted
  python -m experiments.studies.claims soup
  python -m experiments.studies.claims swamp
  python -m experiments.studies.claims activate
  python -m experiments.studies.claims random_search
  python -m experiments.studies.claims ceag

Each prints its table and writes it to `--out`; all seeds of a row train at once.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Sequence

from experiments.report.page import markdown_table
from experiments.studies.claims_before_training import (
    collapse,
    edge_popup,
    gradient_flow,
    random_search_,
    shuffle,
)
from experiments.studies.claims_groups import ceag
from experiments.studies.claims_over_runs import (
    activate,
    connected,
    planted,
    rewind,
    soup,
    swamp,
)
from experiments.studies.claims_tables import Rows

# (experiment, seeds, steps)
CLAIMS: dict[str, tuple[Callable[[Sequence[int], int], Rows], int, int]] = {
    "shuffle": (shuffle, 5, 1500),
    "gradient_flow": (gradient_flow, 5, 0),
    "collapse": (collapse, 5, 0),
    "connected": (connected, 3, 500),
    "rewind": (rewind, 3, 500),
    "edge_popup": (edge_popup, 3, 1500),
    "planted": (planted, 5, 2000),
    "soup": (soup, 5, 1000),
    "swamp": (swamp, 3, 1000),
    "activate": (activate, 5, 1000),
    "random_search": (random_search_, 10, 1000),
    "ceag": (ceag, 3, 800),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("claim", choices=sorted(CLAIMS))
    parser.add_argument("--seeds", type=int, help="runs of each row")
    parser.add_argument("--steps", type=int, help="of each training")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/claims"))
    args = parser.parse_args(argv)
    run, seeds, steps = CLAIMS[args.claim]
    seeds, steps = args.seeds or seeds, args.steps or steps
    started = time.monotonic()
    rows = run(list(range(seeds)), steps)
    facts = {"claim": args.claim, "seeds": seeds, "steps": steps}
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n"
    (args.out / f"{args.claim}.json").write_text(text)
    names = list(rows[0])
    print(f"\n{run.__doc__}\n")
    print(markdown_table(names, [[str(row[n]) for n in names] for row in rows]))
    print(f"\n{seeds} seeds, {steps} steps, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
