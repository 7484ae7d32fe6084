"""The plots of scripts/compare: what their legends say."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASELINE = "baseline (grpc.aio + multiprocessing.Queue)"


def legend(svg):
    """The names beside the dots above the plot, in order."""
    return re.findall(r'<circle cx="[0-9]+" cy="44" [^>]*/><text [^>]*>([^<]*)</text>', svg)


def dots(series, points):
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import compare_plot
    finally:
        sys.path.pop(0)
    rows = [("case", [compare_plot.Point(name, 10, 1, 100, "10") for name in points])]
    return compare_plot.dots("title", str, series, rows)


def test_a_series_has_one_entry_in_the_legend():
    assert legend(dots(["a", "b", "c", "b"], ["b", "a"])) == ["a", "b"]
    assert legend(dots(["a", "a", "b"], ["a", "b", "a"])) == ["a", "b"]


def test_the_plots_in_the_documentation_name_each_server_once():
    for name in ("latency", "throughput"):
        names = legend((ROOT / "docs" / f"benchmarks-{name}.svg").read_text())
        assert len(names) == len(set(names)) == 4 and BASELINE in names, names
