"""Reports of a run: one self-contained HTML page, and rich tables for the terminal."""

from finescale.report.html import render_html, write_html
from finescale.report.tables import comparison_table, inspect_table, layer_table, summary_table

__all__ = ["comparison_table", "inspect_table", "layer_table", "render_html", "summary_table", "write_html"]
