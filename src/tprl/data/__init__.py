"""Datasets: samples together with their official score."""
