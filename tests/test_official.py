"""The library against the recorded numbers of the official code: kept sets, logits, tokens, loss and gradients."""

from __future__ import annotations

import pytest
import torch

from checks import method_of
from official import official_model, recorded
from pyramiddrop.hf.versions import output_cache
from tiny import IMPLEMENTATIONS, text_model


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@torch.no_grad()
def test_inference(attention: str) -> None:
    case = recorded("a_single_image")
    model = official_model("a_single_image", attention)
    visual, embeds = case.visual_mask(), case["inputs_embeds"]
    with method_of(case.rule)(model, visual_mask=visual) as trace:
        output = model(inputs_embeds=embeds, use_cache=True)
        kept = [stage.kept[0].tolist() for stage in trace.stages]
        scores = [getattr(stage, "scores", None) for stage in trace.stages]
        assert trace.lengths == [84, 84, 52, 52, 36, 36, 28, 28]
        generated = model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert kept == [case.kept(stage, 0) for stage in range(3)]
    for stage in range(3):
        if scores[stage] is not None:
            check_scores(scores[stage][0], case[f"stage{stage}_s0_scores"])
    held = [layer.keys.shape[-2] for layer in output_cache(output).layers]
    assert held == [84, 84, 52, 52, 36, 36, 28, 28]
    last_rows = [*range(6), *kept[-1], *range(70, 84)]
    torch.testing.assert_close(output.logits[0, last_rows], case["logits"][0], atol=3e-4, rtol=0)
    assert generated.sequences[0].tolist() == case["gen_tokens"].tolist()
    torch.testing.assert_close(torch.cat(generated.logits), case["gen_logits"], atol=3e-4, rtol=0)


def check_scores(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """The scores of the tokens that were alive, in order, wherever the library says more than that."""
    ours = ours[ours.isfinite()]
    if len(ours) == len(expected):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("logits", ["full", "kept"])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_training(attention: str, logits: str) -> None:
    case = recorded("d_train_padded")
    model = official_model("d_train_padded", attention).train()
    embeds = case["inputs_embeds"].requires_grad_()
    mask, labels = case["attention_mask"].long(), case["labels"]
    with method_of(case.rule, logits=logits)(model, visual_mask=case.visual_mask()) as trace:
        output = model(inputs_embeds=embeds, attention_mask=mask, labels=labels)
        output.loss.backward()
    for stage in range(3):
        for sample in range(2):
            assert trace.stages[stage].kept[sample].tolist() == case.kept(stage, sample)
    assert trace.lengths == [71, 71, 51, 51, 41, 41, 36, 36]
    assert case.loss is not None
    assert abs(output.loss.item() - case.loss) < 1e-4
    if logits == "full":
        check_training_logits(output.logits, trace, case)
    check_gradient(embeds.grad, case["grad_inputs_embeds"])
    names = [name for name in case.arrays if name.startswith("grad::")]
    assert len(names) == 8
    for name in names:
        parameter = name.removeprefix("grad::")
        owner = model if parameter.startswith("lm_head") else text_model(model)
        check_gradient(owner.get_parameter(parameter.removeprefix("model.")).grad, case[name])


def check_training_logits(logits: torch.Tensor, trace: object, case: object) -> None:
    """The logits of all rows that are left, sample by sample."""
    for sample, kept in enumerate(trace.stages[-1].kept):
        visual = case.visual_mask()[sample]
        rows = sorted([*kept.tolist(), *(~visual & case["attention_mask"][sample]).nonzero()[:, 0].tolist()])
        expected = case["logits"][sample][case["final_mask"][sample]]
        torch.testing.assert_close(logits[sample, rows], expected, atol=3e-4, rtol=0)


def check_gradient(ours: torch.Tensor | None, expected: torch.Tensor) -> None:
    """Within a thousandth of the largest."""
    assert ours is not None
    assert (ours - expected).abs().max() < 1e-3 * expected.abs().max()
