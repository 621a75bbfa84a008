"""Figures, tables and pages of the studies."""
