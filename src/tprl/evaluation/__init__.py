"""Measuring pruners: intervals, result files, the terminal table and the HTML report."""
