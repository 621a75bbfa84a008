"""The figures, tables and pages of the studies."""
