"""Pictures, tables and pages of what a run kept and what it cost."""
