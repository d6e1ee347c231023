"""The page of results from the figures of ``speed.py``: docs/performance.md and its plots.

    python tests/bench/report.py speed.json [long.json curve.json decode.json cpu.json]

Each table stands between ``<!-- name -->`` and ``<!-- end -->`` in the page, and is replaced where
the files have rows for it. A row that several files have is the last one's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from timing import plots
from timing.page import filled, merged, sections

DOCS = Path(__file__).resolve().parents[2] / "docs"


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("files", nargs="+", type=Path)
    options.add_argument("--page", type=Path, default=DOCS / "performance.md")
    options.add_argument("--plots", type=Path, default=DOCS / "img", help="the folder of the plots")
    options = options.parse_args()
    parts = merged([json.loads(file.read_text()) for file in options.files])
    options.page.write_text(filled(options.page.read_text(), sections(parts)))
    if "speed" in parts:
        options.plots.mkdir(exist_ok=True)
        plots.over_floor(parts["speed"], options.plots / "over_floor.svg")
        plots.against_time(parts["speed"], options.plots / "against_time.svg")


if __name__ == "__main__":
    main()
