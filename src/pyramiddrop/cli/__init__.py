"""The command line: one file a verb, which reads arguments and shows results."""
