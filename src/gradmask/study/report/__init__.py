"""What a study shows: the terminal's tables, and pages that are one file each."""

from gradmask.study.report.page import write_comparison_report, write_report
from gradmask.study.report.parts import Figure, Section, Table
from gradmask.study.report.terminal import print_summary

__all__ = [
    "Figure",
    "Section",
    "Table",
    "print_summary",
    "write_comparison_report",
    "write_report",
]
