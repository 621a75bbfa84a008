"""The command line: one file a verb, which reads arguments and shows results.

A verb imports what it needs inside its functions, so that no verb loads what only another one needs.
"""
