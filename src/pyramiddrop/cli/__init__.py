"""The command line: one file a verb, which reads arguments and shows results; and examples for each `--help`.

A verb imports what it needs inside its functions, so that no verb loads what only another one needs.
"""

#: Each example fits into 80 columns.
EXAMPLES: dict[str, tuple[str, str]] = {
    "demo": ("pyramiddrop demo", "pyramiddrop demo --questions 2 --output runs/demo"),
    "visualize": (
        "pyramiddrop visualize --output kept.html kept.png",
        'pyramiddrop visualize --image a.png --prompt "Why?" --model ID_OR_DIR',
    ),
    "generate": (
        'pyramiddrop generate --image a.png --prompt "Which digit is white?" --compare',
        'pyramiddrop generate --model ID_OR_DIR --image a.png --prompt "Why?" --lam 0.4',
    ),
    "cost": ("pyramiddrop cost --shape llava-next-7b", "pyramiddrop cost --method pyramiddrop:lam=0.4 fastv:layer=3"),
    "plan": ("pyramiddrop plan --average-tokens 192", "pyramiddrop plan --percent 50 --shape llava-next-7b --stages 4"),
    "bench": ("pyramiddrop bench", "pyramiddrop bench --shape small --batch 1,4 --repeats 3"),
    "eval": (
        "pyramiddrop eval --tasks reader --limit 60 --percent 50",
        "pyramiddrop eval --data mine.json --model ID_OR_DIR --output runs/mine",
    ),
    "serve": (
        "pyramiddrop serve llava-hf/llava-1.5-7b-hf --lam 0.5 --port 8000",
        "pyramiddrop serve ID_OR_DIR --method fastv --show-command",
    ),
    "train": (
        "pyramiddrop train --model ID_OR_DIR --data train.json --output runs/mine",
        "pyramiddrop train --model ID_OR_DIR --data a.json --output out --recipe lora",
    ),
    "families": ("pyramiddrop families", "pyramiddrop families qwen2_5_vl"),
    "methods": ("pyramiddrop methods", "pyramiddrop methods --json"),
    "study": (
        "pyramiddrop study redundancy --tasks reader --limit 60",
        "pyramiddrop study tradeoff --data mine.json --model ID_OR_DIR",
    ),
    "redundancy": (
        "pyramiddrop study redundancy --tasks reader --limit 60",
        "pyramiddrop study redundancy --data mine.json --layers 2,8,16 --keep 0.5,0.25",
    ),
    "tradeoff": (
        "pyramiddrop study tradeoff --tasks reader --limit 60 --percent 40 60",
        "pyramiddrop study tradeoff --data mine.json --method pyramiddrop fastv",
    ),
    "ablation": (
        "pyramiddrop study ablation --tasks reader --limit 60",
        "pyramiddrop study ablation --data mine.json --lam 0.3,0.5,0.7",
    ),
}


def examples(verb: str) -> str:
    """The end of a verb's help, in which Typer turns an empty line into a line break."""
    return "\n\n".join(["Examples:", *EXAMPLES[verb]])
