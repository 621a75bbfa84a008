"""The checks: each a small function on a subject, under a name, with what the untouched model must be able to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from checks import CLOSE, generated, method_of
from conformance.against import same_forward, same_generation, same_kept, same_output, same_training
from conformance.expected import Spoken, learn, oracle_generation, spoken
from conformance.subject import Batch, Subject, subject_of
from masked_oracle import Call, masked
from pyramiddrop import FastV
from pyramiddrop.hf.versions import cache_argument, output_cache
from reference import Rule
from removed_rows_oracle import removed
from zoo import Member
from zoo.pieces import IGNORED, Row

STATIC = {"cache_implementation": "static", "disable_compile": True}


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: of the column.
        says: what is asserted, in a sentence for the page.
        run: raises where it does not hold.
        needs: abilities of the untouched model, as in `Member.cannot`; "video": the family takes videos.
    """

    name: str
    says: str
    run: Callable[[Subject], None]
    needs: tuple[str, ...]

    def impossible(self, member: Member) -> str | None:
        """Why the untouched model cannot do what is checked, or None where it can."""
        if "video" in self.needs and member.video is None:
            return "takes no video"
        return next((member.cannot[need] for need in self.needs if need in member.cannot), None)


CHECKS: dict[str, Check] = {}


def check(name: str, says: str, *needs: str) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Put a function into the list."""

    def add(run: Callable[[Subject], None]) -> Callable[[Subject], None]:
        CHECKS[name] = Check(name, says, run, needs)
        return run

    return add


# --- Nothing changes ------------------------------------------------------------------------------------------------


def keep_all(subject: Subject) -> Rule:
    """The rule that drops nothing."""
    return Rule(subject.setup.layers, [1.0] * len(subject.setup.layers))


@check("keep 1", "keep = 1 leaves forward, generate, loss and gradients as they are, bit for bit")
def identity(subject: Subject) -> None:
    model, method = subject.model, method_of(keep_all(subject))
    for specs in subject.prompts:
        batch = subject.batch(specs)
        vanilla = everything(subject, batch)
        with method(model):
            assert_identical(everything(subject, batch), vanilla)
    if subject.can("training"):
        model.train()
        for specs in subject.lessons:
            batch = subject.batch(specs, "right", labels=True)
            vanilla = learn(model, batch)
            with method(model):
                assert_identical(learn(model, batch), vanilla)


@check("removed", "taking the method off restores hooks, configuration and the very same outputs")
def restored(subject: Subject) -> None:
    model, batch = subject.model, subject.batch(subject.prompts[-1])
    vanilla = everything(subject, batch)  # (the first call puts hooks of Transformers' own on the model)
    before = footprint(model)
    with method_of(subject.setup.rule())(model):
        patched = everything(subject, batch)
    assert footprint(model) == before
    assert_identical(everything(subject, batch), vanilla)
    assert not torch.equal(patched[0], vanilla[0]), "the method did nothing"


def everything(subject: Subject, batch: Batch) -> list[Any]:
    """Logits of a forward, and tokens and logits of a generation where the model can."""
    with torch.no_grad():
        found = [subject.model(**batch.inputs).logits]
    if subject.can("generate"):
        output = generated(subject.model, batch.inputs, 3)
        found += [output.sequences, *output.logits]
    return found


def assert_identical(ours: Any, expected: Any) -> None:
    """Tensors, and lists and dicts of tensors, are equal to the last bit."""
    torch.testing.assert_close(ours, expected, atol=0, rtol=0, equal_nan=True)


def footprint(model: PreTrainedModel) -> dict[str, Any]:
    """What a method could leave behind."""
    modules = dict(model.named_modules())
    return {
        "hooks": {name: [len(m._forward_pre_hooks), len(m._forward_hooks)] for name, m in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "config": model.config.to_dict(),
        "keys": list(model.state_dict()),
    }


# --- Staged drop is the oracle --------------------------------------------------------------------------------------


@check("prefill", "a staged drop keeps the sets, and gives the logits, of the masked oracle")
def prefill(subject: Subject) -> None:
    for batch in prefill_batches(subject):
        same_forward(subject, subject.setup.rule(), batch)


@check("last layer", 'the same with rank_layer="last": the stage\'s own last layer ranks')
def rank_by_the_layer_before(subject: Subject) -> None:
    for batch in prefill_batches(subject):
        same_forward(subject, subject.setup.rule(rank_layer="last"), batch)


@check("FastV", "one early drop, ranked by the layer before it")
def fastv(subject: Subject) -> None:
    method = FastV(layer=subject.setup.fastv, keep=0.5)
    for batch in prefill_batches(subject):
        same_forward(subject, subject.setup.fastv_rule, batch, method)


def prefill_batches(subject: Subject) -> list[Batch]:
    """A single prompt, and a mixed batch padded on either side."""
    sides = [side for side in ("left", "right") if subject.can("batch") and subject.can(f"{side}_padding")]
    return [subject.batch([[5, "image", 7]]), *(subject.batch(subject.mixed, side) for side in sides)]


@check("generate", "greedy tokens with a KV cache, and what they are chosen from, are the oracle's", "generate")
def greedy(subject: Subject) -> None:
    for specs in subject.prompts:
        same_generation(subject, subject.setup.rule(), subject.batch(specs))


@check(
    "no cache",
    "use_cache=False ranks the prompt again at each step, by the prompt's own last token",
    "generate",
    "use_cache",
)
def uncached(subject: Subject) -> None:
    for specs in subject.prompts:
        same_generation(subject, subject.setup.rule(), subject.batch(specs), use_cache=False)


@check("beams", "beam search finds the oracle's sequences and scores", "generate", "beams")
def beams(subject: Subject) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    prompts = subject.prompts if subject.can("image_beams") else [subject.prompts[0]]
    for specs in prompts:
        same_generation(subject, subject.setup.rule(), subject.batch(specs), **options)


@check("static cache", "a StaticCache gives the same tokens", "generate", "static_cache")
def static_cache(subject: Subject) -> None:
    for specs in subject.prompts:
        same_generation(subject, subject.setup.rule(), subject.batch(specs), ours=STATIC)


@check("training", "loss and every gradient are the oracle's; several answers, rows without a label", "training")
def training(subject: Subject) -> None:
    for specs in subject.lessons:
        same_training(subject, subject.setup.rule(), subject.batch(specs, "right", labels=True))


@check("checkpointing", "gradient checkpointing, reentrant or not, changes neither", "training", "checkpointing")
def checkpointing(subject: Subject) -> None:
    batch = subject.batch(subject.lessons[-1], "right", labels=True)
    for reentrant in (True, False) if subject.can("reentrant") else (False,):
        same_training(subject, subject.setup.rule(), batch, {"use_reentrant": reentrant})
        subject.model.gradient_checkpointing_disable()


# --- Ways to feed it ------------------------------------------------------------------------------------------------


@check("batch", "a row's result does not depend on its mates, with left and with right padding", "batch")
@torch.no_grad()
def batch_is_singles(subject: Subject) -> None:
    specs, model = [*subject.mixed, [60]], subject.model  # the long text keeps the rectangle from shrinking
    with method_of(subject.setup.rule())(model) as trace:
        for side in ("left", "right"):
            if subject.can(f"{side}_padding"):
                same_as_alone(subject, subject.batch(specs, side), trace)


def same_as_alone(subject: Subject, batch: Batch, trace: Any) -> None:
    """Each row of a batch has the kept sets and the logits that it has alone."""
    together = subject.model(**batch.inputs).logits
    kept = [[columns.tolist() for columns in stage.kept] for stage in trace.stages]
    for number, single in enumerate(subject.apart(batch)):
        alone = subject.model(**single.inputs).logits[0]
        offset = int(batch.valid[number].long().argmax())
        for stage, expected in zip(trace.stages, kept, strict=True):
            assert [column + offset for column in stage.kept[0].tolist()] == expected[number]
        survives = survivors(trace, len(alone))
        torch.testing.assert_close(together[number, offset : offset + len(alone)][survives], alone[survives], **CLOSE)


def survivors(trace: Any, length: int) -> Tensor:
    """(length,) which columns of the only sample were never dropped."""
    alive = torch.ones(length, dtype=torch.bool)
    alive[trace.visual_columns[0]] = False
    alive[trace.stages[-1].kept[0]] = True
    return alive


@check("images", "several images in a row, also side by side", "images")
def several_images(subject: Subject) -> None:
    for spec in ([4, "image", "image", 3], [2, "image", 3, "image", 1, "image", 4]):
        batch = subject.batch([spec])
        same_forward(subject, subject.setup.rule(), batch)
        if subject.can("generate"):
            same_generation(subject, subject.setup.rule(), batch)


@check("per image", "per_image=True gives each image its own quota", "images")
def per_image(subject: Subject) -> None:
    rule = subject.setup.rule(per_image=True)
    same_forward(subject, rule, subject.batch([[2, "image", 3, "image", 1, "image", 4]]))
    if subject.can("batch") and subject.can("left_padding"):
        same_forward(subject, rule, subject.batch(subject.mixed))


@check("video", "the frames of a video are one pool; a video beside an image", "video")
def video(subject: Subject) -> None:
    specs = [
        [5, "video", 7],
        *([[3, "image", 2, "video", 4]] if subject.can("images") and subject.can("mixed") else []),
    ]
    for spec in specs:
        batch = subject.batch([spec])
        same_forward(subject, subject.setup.rule(), batch)
        if subject.can("generate"):
            same_generation(subject, subject.setup.rule(), batch)


@check("per frame", "per_frame=True gives each image and each frame of a video its own quota", "video")
def per_frame(subject: Subject) -> None:
    rule = subject.setup.rule(per_image=True)  # of what the batch numbers
    method = method_of(rule, per_image=False, per_frame=True)
    specs: list[list[object]] = [[5, "video", 7]]
    if subject.can("images") and subject.can("mixed"):
        specs.append([3, "image", 2, "video", 4])
    batches = [subject.batch([spec], by_frame=True) for spec in specs]
    if subject.can("batch") and subject.can("left_padding"):
        batches.append(subject.batch([[2, "video", 3], [9, "video", 1], [7]], by_frame=True))
    for batch in batches:
        same_forward(subject, rule, batch, method)
    if subject.can("generate"):
        with method(subject.model) as forward, torch.no_grad():
            subject.model(**batches[-1].inputs)
        with method(subject.model) as trace:  # whose forwards are not told how many frames a video has
            generated(subject.model, batches[-1].inputs, 1)
        same_kept(trace, [stage.kept for stage in forward.stages])


@check("eager", "eager attention and SDPA agree with each other on sets, logits and tokens", "sdpa")
def eager_is_sdpa(subject: Subject) -> None:
    batch = subject.batch(subject.prompts[-1])
    outputs = []
    for attention in ("eager", "sdpa"):
        other = subject_of(subject.member, attention)
        with method_of(subject.setup.rule())(other.model) as trace:
            found = everything(other, batch)
        kept = [[columns.tolist() for columns in stage.kept] for stage in trace.stages]
        alive = batch.valid & ~batch.prompt.visual
        outputs.append((kept, [found[0][alive], *found[1:]]))
    assert outputs[0][0] == outputs[1][0]
    torch.testing.assert_close(outputs[0][1], outputs[1][1], **CLOSE)


# --- Going on -------------------------------------------------------------------------------------------------------


@check("second turn", "a further question on top of the cache", "generate", "second_turn")
def second_turn(subject: Subject) -> None:
    converse(subject, [6])


@check("new image", "a further turn with an image of its own, ranked by its own last token", "generate", "second_turn")
def second_image(subject: Subject) -> None:
    converse(subject, [2, "image", 5])


def converse(subject: Subject, further: Sequence[object]) -> None:
    """Two turns on one cache."""
    model, rule = subject.model, subject.setup.rule()
    first, more = subject.batch([[5, "image", 7]]), subject.batch([further], seed=2)
    said = oracle_generation(subject, rule, first, 3, {})
    whole, long = continued(subject, first, more, said.tokens[0].tolist())
    expected = (oracle_of_all if subject.setup.removed else oracle_on_cache)(subject, first, more, whole, long)
    method = method_of(rule)
    with method(model):
        ours = generated(model, first.inputs, 3)
    same_output(ours, said)
    with method(model) as trace:  # a cache may outlive the block
        output = generated(model, long | cache_argument(output_cache(ours)), 3)
    same_output(output, expected)
    if more.prompt.visual.any():
        same_kept(trace, expected.kept)


def oracle_on_cache(subject: Subject, first: Batch, more: Batch, whole: Call, long: Call) -> Spoken:
    """Both turns on a cache that holds the full length."""
    with masked(subject.model, subject.setup.rule(), first.prompt) as oracle:
        cache = output_cache(generated(subject.model, first.inputs, 3))
        oracle.prompt = more.prompt.later(cache.get_seq_length(), long["input_ids"].shape[1])
        return spoken(generated(subject.model, long | cache_argument(cache), 3), oracle)


def oracle_of_all(subject: Subject, first: Batch, more: Batch, whole: Call, long: Call) -> Spoken:
    """The whole conversation as one sequence, computed anew at each step, with each turn's own queries."""
    length, new = long["input_ids"].shape[1], more.prompt.visual.shape[1]
    second = more.prompt.later(length - new, length)
    with removed(subject.model, subject.setup.rule(), first.prompt, second) as oracle:
        return spoken(generated(subject.model, whole, 3, use_cache=False), oracle)


def continued(subject: Subject, first: Batch, more: Batch, answer: list[int]) -> tuple[Call, Call]:
    """The conversation so far as one prompt; and for `generate` on a cache: all tokens, the new turn's images alone."""
    old, new = first.rows[0], more.rows[0]
    row = Row(
        old.ids + answer + new.ids,
        old.types + [0] * len(answer) + new.types,
        old.labels + [IGNORED] * len(answer) + new.labels,
        old.pieces + new.pieces,
    )
    whole = subject.collate([row], [[0] * len(row.ids)]).inputs
    shape = whole["input_ids"].shape
    per_token = {name: tensor for name, tensor in whole.items() if tensor.shape == shape}
    return whole, per_token | {name: tensor for name, tensor in more.inputs.items() if name not in per_token}
