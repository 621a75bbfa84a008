"""lmms-eval 0.7 under any method: `lmms-eval --model pyramiddrop`, or `run.run_tasks`. Needs the extra `eval`."""
