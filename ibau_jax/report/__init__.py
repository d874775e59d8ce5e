"""The report of a run: what came of it, for a person to read. One HTML file that needs nothing else, nor JavaScript."""

from ibau_jax.report.conclusion import Conclusion, conclude
from ibau_jax.report.evidence import Evidence, gather
from ibau_jax.report.page import render

__all__ = ["Conclusion", "Evidence", "conclude", "gather", "render"]
