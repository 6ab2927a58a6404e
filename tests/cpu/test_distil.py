"""The objective distil: its terms against brute force in fp64, its gradients, and what a split must not change."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tandem.algo.config import DistilConfig
from tandem.algo.distil import ESTIMATORS, Distil, distance, k1, k2, k3, matched, straight_through, taught
from tandem.algo.pack import count_prompts
from tandem.algo.spans import span_sums
from tandem.columns import Columns
from tandem.errors import CapacityError
from tandem.kernels.divergence import Divergence, divergence_reference, top_logprobs
from tandem.kernels.divergence import Head as Heads
from tandem.kernels.weight import Weight
from tandem.models.decoder import Decoder
from tandem.models.view import PackView
from tandem.train.config import LearnerConfig
from tandem.train.step import Learner
from tandem.types import Failure, Group, Prompt, Sample, Trajectory

TEXTS = ((5, 9, 2, 7, 3, 11), (5, 9, 4, 8, 1), (6, 2, 2, 13, 21, 34, 55), (5, 9, 2, 1))
PROMPT_TOKENS = 2


def samples(weights: Sequence[float] | None = None) -> list[Sample]:
    """Three texts of one prompt, which share its rows, and one of another."""
    found = []
    for number, tokens in enumerate(TEXTS):
        mask = [False] * PROMPT_TOKENS + [True] * (len(tokens) - PROMPT_TOKENS)
        columns = Columns.of(tokens=tokens, loss_mask=mask)
        if weights is not None:
            columns = columns.having(distil_weights=np.full(len(tokens), weights[number]))
        prompt = "q" if number == 2 else "p"
        found.append(Sample(f"{prompt}/{number}", prompt, columns))
    return found


def states(decoder: Decoder, tokens: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Of a text alone, at the rows that predict its trained tokens: behind each layer, and what the head reads."""
    rows, seen = torch.arange(PROMPT_TOKENS - 1, len(tokens) - 1), []
    with torch.no_grad():
        last = decoder.forward(
            torch.tensor(tokens), PackView([0, len(tokens)]), rows, watch=lambda _, hidden: seen.append(hidden[rows])
        )
    return seen, last


def learner_of(student: Decoder, teacher: Decoder, config: DistilConfig, **changes: Any) -> Learner:
    projectors: list[Weight] = changes.pop("projectors", [])
    layers = matched(len(student.layers), len(teacher.layers))
    objective = Distil(config, lambda: teacher, projectors, layers)
    return Learner(student, LearnerConfig(**{"lr": 0.0, "microbatch_tokens": 1000, **changes}), objective, 1)


def metrics(learner: Learner, chosen: Sequence[Sample]) -> dict[str, float]:
    report = learner.step(chosen, count_prompts(chosen))
    assert report is not None
    return report.measured.metrics


def logits(decoder: Decoder) -> list[Tensor]:
    """fp64, of each text."""
    return [states(decoder, tokens)[1].double() @ decoder.head.value.double().T for tokens in TEXTS]


def gradients(learner: Learner, chosen: Sequence[Sample]) -> dict[str, Tensor]:
    """Of a batch, before they are clipped or applied."""
    kept: dict[str, Tensor] = {}

    def keep(members: object, unit: float = 1.0) -> tuple[float, float]:
        kept.update({name: weight.grad.clone() for name, weight in learner.optimiser.model.weights()})  # type: ignore[union-attr]
        return 0.0, 0.0

    learner._apply = keep  # type: ignore[method-assign]
    learner.step(chosen, count_prompts(chosen))
    return kept


KINDS = ("forward", "reverse", "jensen_shannon", "skewed_forward", "skewed_reverse")


@pytest.mark.parametrize("temperature", [1.7, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_brute_force(make_decoder: Callable[..., Decoder], kind: str, temperature: float) -> None:
    """The teacher reads other rows than the student, T^2 is forgotten, or the mean is of another number of tokens."""
    student, teacher = make_decoder(), make_decoder(seed=1, width=48, layers=3)
    config = DistilConfig("t", divergence=kind, temperature=temperature, weight=0.5, text_weight=0.3)  # type: ignore[arg-type]
    found = metrics(learner_of(student, teacher, config), samples())
    how = Divergence(kind, config.share, temperature)
    pairs = list(zip(logits(student), logits(teacher), strict=True))
    values = torch.cat([divergence_reference(x, y, how) for x, y in pairs])
    targets = [torch.tensor(tokens[PROMPT_TOKENS:])[:, None] for tokens in TEXTS]
    nll, teachers, texts = (
        -torch.cat([(x / t).log_softmax(-1).gather(1, target)[:, 0] for x, target in zip(of, targets, strict=True)])
        for of, t in (
            ([x for x, _ in pairs], temperature),
            ([y for _, y in pairs], temperature),
            ([x for x, _ in pairs], 1.0),
        )
    )
    assert found["tokens"] == len(values) == 14
    assert found["divergence"] == pytest.approx(float(values.mean()), rel=1e-5)
    assert found["nll"] == pytest.approx(float(nll.mean()), rel=1e-5)
    assert found["teacher_nll"] == pytest.approx(float(teachers.mean()), rel=1e-5)
    assert found["text_loss"] == pytest.approx(float(texts.mean()), rel=1e-5)
    assert found["loss"] == pytest.approx(float(0.5 * temperature**2 * values.mean() + 0.3 * texts.mean()), rel=1e-5)


def test_gradients_are_those_of_finite_differences(make_decoder: Callable[..., Decoder]) -> None:
    """A term of the loss has no gradient, or another's: distributions, texts, both kinds of hidden states."""
    student, teacher = make_decoder(), make_decoder(seed=1)
    for config in (
        DistilConfig("t", divergence="jensen_shannon", text_weight=0.5, hidden="layers", hidden_loss="mse"),
        DistilConfig("t", divergence="reverse", top_k=9, hidden="last", hidden_weight=3.0),
        DistilConfig("t", divergence="k3", temperature=1.5),
    ):
        chosen = samples([1.0, -0.5, 1.0, 2.0]) if config.hidden != "none" else samples()
        found = gradients(learner_of(student, teacher, config), chosen)
        generator = torch.Generator().manual_seed(3)
        for name in ("layers.1.down", "layers.0.qkv", "norm", "head"):
            weight = dict(student.weights())[name]
            step = torch.randn(weight.value.shape, generator=generator)
            step = step / step.norm()
            losses = []
            for size in (2e-2, -2e-2):
                weight.value += size * step
                student.repack()
                losses.append(metrics(learner_of(student, teacher, config), chosen)["loss"])
                weight.value -= size * step
            student.repack()
            slope = (losses[0] - losses[1]) / 4e-2
            assert float((found[name] * step).sum()) == pytest.approx(slope, rel=0.03, abs=3e-4), (config, name)


@pytest.mark.parametrize(
    "config",
    [
        DistilConfig("t", temperature=2.0, text_weight=0.5),
        DistilConfig("t", divergence="reverse", hidden="layers", layers_at_once=1, on_policy=True, bad_weight=-0.5),
        DistilConfig("t", top_k=7, hidden="last", hidden_loss="mse"),
        DistilConfig("t", divergence="k1+"),
    ],
    ids=("whole", "layers", "top", "tokens"),
)
def test_equal_gradients_of_any_split(make_decoder: Callable[..., Decoder], config: DistilConfig) -> None:
    """A microbatch's mean takes the batch's place, or the teacher's states are of the microbatch before."""
    student, teacher = make_decoder(), make_decoder(seed=1, layers=3)
    chosen = [
        dataclasses.replace(one, id=f"{name}/{one.id}", prompt_id=f"{name}{one.prompt_id}")
        for name in "ab"
        for one in samples([1.0, -0.5, 1.0, 2.0])
    ]
    whole = gradients(learner_of(student, teacher, config), chosen)
    counts = []
    for rows, shared in ((1000, True), (14, True), (5, False)):
        learner = learner_of(student, teacher, config, microbatch_tokens=rows, share_prefix=shared)
        counts.append(len(learner._pack(chosen, count_prompts(chosen))))
        for name, gradient in gradients(learner, chosen).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=f"{name}, {counts}")
    assert counts[0] == 1 and counts[1] in (2, 3) and counts[2] == 8, counts


def test_the_rest_is_one_token(make_decoder: Callable[..., Decoder]) -> None:
    """What the top k leave is forgotten or counted to each; renormalised, the student's mass beside them counts."""
    student, teacher = make_decoder(), make_decoder(seed=1)
    k = 6
    for rest in ("bucket", "none"):
        config = DistilConfig("t", divergence="jensen_shannon", top_k=k, rest=rest, temperature=1.5)  # type: ignore[arg-type]
        found = metrics(learner_of(student, teacher, config), samples())
        values = []
        for x, y in zip(logits(student), logits(teacher), strict=True):
            p, q = (x / 1.5).softmax(-1), (y / 1.5).softmax(-1)
            q, at = q.topk(k)
            p = p.gather(1, at)
            if rest == "bucket":
                p, q = (torch.cat([of, 1 - of.sum(-1, keepdim=True)], 1) for of in (p, q))
            p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
            values.append(divergence_reference(p.log(), q.log(), Divergence("jensen_shannon", 0.5)))
        assert found["divergence"] == pytest.approx(float(torch.cat(values).mean()), rel=1e-4)
    whole = dataclasses.replace(config, top_k=97, rest="bucket")
    every = metrics(learner_of(student, teacher, whole), samples())["divergence"]
    full = metrics(learner_of(student, teacher, dataclasses.replace(whole, top_k=0)), samples())["divergence"]
    assert every == pytest.approx(full, rel=1e-4)


def test_estimators_by_hand() -> None:
    """A clamp is missing or on the wrong side, or straight-through keeps the gradient of its value."""
    own = torch.tensor([-1.0, -2.0, -40.0], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([-1.5, -1.0, -1.0], dtype=torch.float64)
    d = 0.5, -1.0, -39.0  # log p - log q
    assert k1(own, other).tolist() == pytest.approx(d)
    assert k2(own, other).tolist() == pytest.approx([0.125, 0.5, 760.5])
    assert k3(own, other).tolist() == pytest.approx([math.exp(-0.5) + 0.5 - 1, math.e - 1 - 1, 10.0])
    for plus, value in (("k1+", k1), ("k3+", k3)):
        found = ESTIMATORS[plus](own, other)
        assert found.tolist() == value(own, other).tolist()
        assert torch.autograd.grad(found.sum(), own)[0].tolist() == pytest.approx(d)
    assert torch.autograd.grad(k3(own, other).sum(), own)[0].tolist() == pytest.approx(
        [1 - math.exp(-0.5), 1 - math.e, 0]
    )
    assert straight_through(k2)(own, other).tolist() == k2(own, other).tolist()


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_distances(kind: str) -> None:
    """A distance or its gradient is not that of autograd over the definition."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(5, 7, generator=generator, dtype=torch.float64).requires_grad_()
    other = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    wanted = (
        1 - torch.nn.functional.cosine_similarity(own, other) if kind == "cosine" else ((own - other) ** 2).mean(-1)
    )
    weights = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    (slope,) = torch.autograd.grad((weights * wanted).sum(), own)
    leaf = own.detach().float().requires_grad_()
    found = distance(kind, leaf, other.float())
    found.backward(weights.float())
    torch.testing.assert_close(found.detach().double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hidden", ["last", "layers"])
def test_hidden_states_of_the_right_layers(make_decoder: Callable[..., Decoder], hidden: str) -> None:
    """A layer is drawn to another than the one as deep, chunks of layers lose one, or signs of weights are mixed up."""
    student, teacher = make_decoder(), make_decoder(seed=1, layers=5)
    weights = [1.0, -0.5, 1.0, 2.0]
    config = DistilConfig("t", weight=0.0, hidden=hidden, hidden_loss="mse", hidden_weight=2.0)  # type: ignore[arg-type]
    values, signs = [], []
    for tokens, weight in zip(TEXTS, weights, strict=True):
        (own, last), (others, others_last) = states(student, tokens), states(teacher, tokens)
        pairs = [(own[0], others[2]), (own[1], others[4])] if hidden == "layers" else [(last, others_last)]
        gaps = [((a.double() - b.double()) ** 2).mean(-1) for a, b in pairs]
        values.append(torch.stack(gaps).mean(0))
        signs.append(torch.full_like(values[-1], weight))
    value, sign = torch.cat(values), torch.cat(signs)
    for at_once in (1, 2, 4) if hidden == "layers" else (4,):
        asked = dataclasses.replace(config, layers_at_once=at_once)
        found = metrics(learner_of(student, teacher, asked), samples(weights))
        assert found["loss"] == pytest.approx(float(2.0 * (sign * value).mean()), rel=1e-5)
        assert found["hidden_positive"] == pytest.approx(float(value[sign > 0].mean()), rel=1e-5)
        assert found["hidden_negative"] == pytest.approx(float(value[sign < 0].mean()), rel=1e-5)
    assert "hidden_negative" not in metrics(learner_of(student, teacher, config), samples())


def test_a_projector_learns_and_is_saved(make_decoder: Callable[..., Decoder], tmp_path: Any) -> None:
    """Unequal widths are compared without a projector, it gets no gradient, or a checkpoint forgets it."""
    from safetensors.torch import load_file

    from tandem.models.checkpoint import open_checkpoint
    from tandem.train.checkpoint import RunState, seal

    student, teacher = make_decoder(), make_decoder(seed=1, width=48)
    config = DistilConfig("t", weight=0.0, hidden="last", hidden_loss="mse")

    def made() -> Learner:
        own = Weight(torch.randn(48, 32, generator=torch.Generator().manual_seed(5)) / 6, matrix=True)
        return learner_of(make_decoder(), teacher, config, projectors=[own], lr=1e-2)

    learner = made()
    before = next(learner.objective.weights())[1].value.clone()  # type: ignore[attr-defined]
    first = metrics(learner, samples())["hidden_positive"]
    gaps = []
    for tokens in TEXTS:
        own, other = states(student, tokens)[1].double(), states(teacher, tokens)[1].double()
        gaps.append(((own @ before.double().T - other) ** 2).mean(-1))
    assert first == pytest.approx(float(torch.cat(gaps).mean()), rel=1e-5)
    for _ in range(20):
        last = metrics(learner, samples())["hidden_positive"]
    after = next(learner.objective.weights())[1].value  # type: ignore[attr-defined]
    assert last < 0.8 * first and not torch.equal(after, before)
    tokenizer = open_checkpoint("new:").load_tokenizer()
    learner.save(tmp_path, tokenizer, RunState(21, learner.updates, "w", {}))
    seal(tmp_path)
    saved = load_file(tmp_path / "optimiser-00001.safetensors")
    assert torch.equal(saved["master/projector.0"], learner.optimiser.state["projector.0"][0])
    again = made()
    again.load(tmp_path)
    assert torch.equal(next(again.objective.weights())[1].value, after)  # type: ignore[attr-defined]
    assert metrics(again, samples())["loss"] == metrics(learner, samples())["loss"]


def test_head_s_log_probs_only_where_asked(
    make_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's head is multiplied twice a microbatch, once for log-probs that nobody reads or that are there."""
    import tandem.train.score as scoring

    asked: list[int] = []
    token_logprobs = scoring.token_logprobs
    monkeypatch.setattr(scoring, "token_logprobs", lambda *a, **k: asked.append(1) or token_logprobs(*a, **k))
    for weight in (0.0, 1.0):
        metrics(learner_of(make_decoder(), make_decoder(seed=1), DistilConfig("t", text_weight=weight)), samples())
    assert not asked
    metrics(learner_of(make_decoder(), make_decoder(seed=1), DistilConfig("t", top_k=4, text_weight=1.0)), samples())
    assert len(asked) == 1


@pytest.mark.parametrize(
    "config",
    [
        DistilConfig("t", text_weight=1.0, hidden="layers", on_policy=False),
        DistilConfig("t", top_k=5, hidden="last"),
        DistilConfig("t", divergence="k2"),
    ],
    ids=("layers", "top", "tokens"),
)
def test_what_is_held_out_is_asked_of_the_teacher(make_decoder: Callable[..., Decoder], config: DistilConfig) -> None:
    """A corpus's held-out tasks are measured without the teacher, which ends the run, or otherwise than others."""
    student, teacher = make_decoder(), make_decoder(seed=1, layers=3)
    chosen = samples()
    measured = learner_of(student, teacher, config, microbatch_tokens=14).measure(chosen, count_prompts(chosen))
    assert measured == pytest.approx(metrics(learner_of(student, teacher, config), chosen), rel=1e-6)


def test_a_teacher_of_fewer_positions(make_decoder: Callable[..., Decoder]) -> None:
    """A text beyond the teacher's positions reads past its tables."""
    learner = learner_of(make_decoder(), make_decoder(seed=1, max_position=5), DistilConfig("t"))
    with pytest.raises(CapacityError, match="q/2.* has 6 tokens and the teacher 5 positions"):
        metrics(learner, samples())


def test_what_is_sampled_is_all_learned() -> None:
    """A trajectory that earned what its siblings did is left out, a failed one is in, or good ones are pushed away."""
    columns = Columns.of(tokens=(5, 9, 2), loss_mask=(False, False, True), logprobs=(0.0, 0.0, -1.0))
    trajectories = tuple(
        Trajectory(f"p/{n}", "p", columns, reward=reward, failure=failure)
        for n, (reward, failure) in enumerate([(1.0, None), (1.0, None), (0.0, None), (0.0, Failure("reward", "nan"))])
    )
    config = DistilConfig("t", on_policy=True, hidden="last", bad_weight=-0.25)
    found = taught(config, [Group(Prompt("p", ()), trajectories)])
    assert [one.id for one in found.samples] == ["p/0/0", "p/1/0", "p/2/0"] and found.count("failed") == 1
    assert [one.columns["distil_weights"][2] for one in found.samples] == [1.0, 1.0, -0.25]
    assert found.prompts[0].tokens == 3


def test_matched_layers() -> None:
    """The last layer is not drawn to the teacher's last, or one is drawn to none."""
    assert matched(6, 30) == (4, 9, 14, 19, 24, 29) and matched(1, 7) == (6,) and matched(3, 3) == (0, 1, 2)
    assert all(
        matched(own, other)[-1] == other - 1 and min(matched(own, other)) >= 0
        for own in range(1, 9)
        for other in range(1, 9)
    )


def test_stored_is_as_live(make_decoder: Callable[..., Decoder]) -> None:
    """Log-probs that come as columns give another loss than the teacher that they are of."""
    student, teacher = make_decoder(), make_decoder(seed=1)

    class Held:
        def filled(self, chosen: Sequence[Sample]) -> tuple[Sample, ...]:
            found = []
            for one, tokens in zip(chosen, [TEXTS[int(one.id.split("/")[1])] for one in chosen], strict=True):
                ids, logq = top_logprobs(Heads(states(teacher, tokens)[1], teacher.head), 8, 1.0, 97)
                rest = (1 - logq.double().exp().sum(-1, keepdim=True)).log().float()
                mask = one.columns["loss_mask"]
                ids_TK, logprobs_TK = np.zeros((len(mask), 8), np.int32), np.zeros((len(mask), 9), np.float32)
                ids_TK[mask], logprobs_TK[mask] = ids.numpy(), torch.cat([logq, rest], 1).numpy()
                columns = one.columns.having(teacher_ids=ids_TK, teacher_logprobs=logprobs_TK)
                found.append(dataclasses.replace(one, columns=columns))
            return tuple(found)

    config = DistilConfig("t", top_k=8)
    live = gradients(learner_of(student, teacher, config), samples())
    learner = Learner(student, LearnerConfig(lr=0.0), Distil(dataclasses.replace(config, top_k=0), Held), 1)
    for name, gradient in gradients(learner, samples()).items():
        torch.testing.assert_close(gradient, live[name], rtol=1e-4, atol=1e-6)


def test_spans_by_hand(make_decoder: Callable[..., Decoder]) -> None:
    """Log-probs of two spans, or of two samples, are added, a token in no span counts, or a span has another's sum."""
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], dtype=torch.float64, requires_grad=True)
    spans, sample = torch.tensor([0, 0, 1, -1, 0, 1, 1]), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    sums, places = span_sums(values, spans, sample)
    assert sums.tolist() == [3.0, 4.0, 16.0, 96.0] and places.tolist() == [1, 2, 4, 6]
    (sums * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert values.grad.tolist() == [1.0, 1.0, 2.0, 0.0, 3.0, 4.0, 4.0]  # type: ignore[union-attr]

    student, chosen = make_decoder(), samples()
    parts = {4: [0, 0, 1, 1], 3: [0, 1, -1], 5: [0, 0, 0, 0, 1], 2: [0, 0]}
    filled, wanted = [], []
    for one, tokens in zip(chosen, TEXTS, strict=True):
        numbers = parts[len(tokens) - PROMPT_TOKENS]
        own = states(student, tokens)[1].double() @ student.head.value.double().T
        own = own.log_softmax(-1).gather(1, torch.tensor(tokens[PROMPT_TOKENS:])[:, None])[:, 0].tolist()
        teacher = np.zeros(len(numbers))
        for number in range(max(numbers) + 1):
            at = [place for place, span in enumerate(numbers) if span == number]
            teacher[at[-1]] = -1.5 * len(at)
            wanted.append(0.5 * (sum(own[place] for place in at) - teacher[at[-1]]) ** 2)
        values_T = {"spans": [-1] * PROMPT_TOKENS + numbers, "span_logprobs": [0.0] * PROMPT_TOKENS + teacher.tolist()}
        filled.append(dataclasses.replace(one, columns=one.columns.having(**values_T)))
    objective = Distil(DistilConfig("t", divergence="k2", spans=True), lambda: pytest.fail("it has scored before"))
    for rows in (1000, 6):
        found = metrics(Learner(student, LearnerConfig(lr=0.0, microbatch_tokens=rows), objective, 1), filled)
        assert found["loss"] == pytest.approx(sum(wanted) / 14, rel=1e-5)
