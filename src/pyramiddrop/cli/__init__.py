"""The command line: one file a verb, which reads arguments and shows results.

Imports of what a verb needs stand inside its functions, so that no verb loads what only another one needs.
"""
