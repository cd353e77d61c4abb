"""Figures, tables and the HTML report: what people read. Made from the records of runs, never from models."""

from wideberth.reports.evaluations import alike, all_evaluations, differing_protocols, render_records
from wideberth.reports.figures import extremes, margin_distribution, radius_histogram, trade_off, training_curves
from wideberth.reports.html import write_report
from wideberth.reports.records import NoRecords
from wideberth.reports.tables import comparison, render
from wideberth.reports.verdicts import costs, robustness_curve, survival

__all__ = [
    "NoRecords",
    "alike",
    "all_evaluations",
    "comparison",
    "costs",
    "differing_protocols",
    "extremes",
    "margin_distribution",
    "radius_histogram",
    "render",
    "render_records",
    "robustness_curve",
    "survival",
    "trade_off",
    "training_curves",
    "write_report",
]
