"""Measurements of speed and of exactness."""
