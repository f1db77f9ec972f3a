"""What the Sampler sends to experts in other processes, and what it does without them."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError

from paris_ray.bundle import Bundle
from paris_ray.errors import ExpertsLostError, QueueFullError
from paris_ray.pictures import LoRARecord
from paris_ray.sampling import generate
from paris_ray.sampling.engine import Limits
from paris_ray.sampling_options import Routing, sampling_options
from serve.drawing import Drawing, DrawRequest, OtherVersionError, Partial, RequestCancelledError
from serve.expert import ExpertServer, Floats, MissingTexts, Question
from serve.opening import open_bundle
from serve.sampler import Sampler
from serve.source import BundleSource, LoRASource, Origin

pytestmark = pytest.mark.serve

SEEDS = [0, 1, 2]
LIMITS = Limits(lost_after_s=3)
IN_REQUEST: ContextVar[str | None] = ContextVar("in_request", default=None)


class Handle:
    """Stands for the handle of an expert: asks it in this process, and keeps what was sent."""

    def __init__(self, server: ExpertServer) -> None:
        self.server, self.sent, self.dies = server, [], False
        self.hangs = 0  # how many of the next questions get no answer
        self.bad_scale: float | None = None  # questions with this guidance cannot be computed
        self.failures: list[Callable[[], Exception]] = []  # of the next questions
        self.velocity = self

    def options(self, **_: Any) -> "Handle":
        return self

    async def remote(self, question: Question) -> Floats | MissingTexts:
        # Ray cancels the calls that are made in a request's context together with the request.
        assert IN_REQUEST.get() is None
        if self.dies:
            raise ActorDiedError
        self.sent.append(question)
        if self.hangs:
            self.hangs -= 1
            await asyncio.Event().wait()
        if self.failures:
            raise self.failures.pop(0)()
        if self.bad_scale in question.guidance_scale:
            raise RuntimeError("a bad question")
        return await self.server.velocity(question)


@pytest.fixture
def source(tiny_bundle_path: Path) -> BundleSource:
    return BundleSource(str(tiny_bundle_path))


@pytest.fixture
def handles(bundle: Bundle, source: BundleSource) -> list[Handle]:
    return [
        Handle(ExpertServer(source, k, threads=1, max_rows=64)) for k in range(bundle.num_experts)
    ]


def draw(
    source: BundleSource, handles: Sequence[Any], prompts: Sequence[str], **options: Any
) -> list[Drawing]:
    """Draw three pictures of each prompt, one request after the other."""
    own = {
        name: options.pop(name)
        for name in ("allow_degraded", "max_pictures_of_client")
        if name in options
    }
    lanes = [options.pop("lanes", 2)] * len(handles)
    sampler = Sampler(source, handles, threads=1, limits=LIMITS, lanes=lanes)
    requests = [
        DrawRequest(
            id=str(i),
            client="local",
            prompts=[prompt] * len(SEEDS),
            seeds=SEEDS,
            options=sampling_options(open_bundle(source), routing="full", **options),
            timeout_s=60,
            **own,
        )
        for i, prompt in enumerate(prompts)
    ]

    async def each() -> list[Drawing]:
        IN_REQUEST.set("the first")
        return [await sampler.draw(request) for request in requests]

    return asyncio.run(each())


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_text_is_sent_once_to_each_expert(
    bundle: Bundle, source: BundleSource, handles: list[Handle], guidance_scale: float
) -> None:
    prompts = ["a cat", "a dog", "a cat"]
    drawings = draw(source, handles, prompts, guidance_scale=guidance_scale)
    options = {"routing": "full", "guidance_scale": guidance_scale}
    for prompt, drawing in zip(prompts, drawings, strict=True):
        expected = generate(bundle, [prompt] * len(SEEDS), **options)
        np.testing.assert_array_equal(drawing.pictures, np.stack([np.asarray(e) for e in expected]))
    for handle in handles:
        sent = [key for question in handle.sent for key in question.new_texts]
        assert len(sent) == len(set(sent)) == 2 + (guidance_scale != 1.0)


def test_a_replica_that_does_not_know_a_text_gets_it(
    source: BundleSource, handles: list[Handle]
) -> None:
    first = draw(source, handles, ["a cat"])
    for k, handle in enumerate(handles):
        sampler_knows = handle.sent[0].new_texts
        assert sampler_knows
        handle.server._texts.clear()  # as another replica, or one that forgot
        assert isinstance(
            asyncio.run(handle.server.velocity(handle.sent[-1]._replace(new_texts={}))),
            MissingTexts,
        )
        handles[k].server = ExpertServer(source, k, threads=1, max_rows=64)
    again = draw(source, handles, ["a cat"])
    np.testing.assert_array_equal(again[0].pictures, first[0].pictures)


def test_a_lost_expert_is_drawn_without_and_named(
    source: BundleSource, handles: list[Handle]
) -> None:
    (whole,) = draw(source, handles, ["a cat"])
    handles[1].dies = True
    (degraded,) = draw(source, handles, ["a cat"])
    assert whole.missing_experts == []
    assert degraded.missing_experts == [1]
    weights = np.array(degraded.expert_weights)
    assert (weights[..., 1] == 0).all()
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)


def test_the_last_resort_draws_in_the_place_of_a_lost_expert(
    seeded_bundle_path: Path, source: BundleSource, handles: list[Handle]
) -> None:
    (without,) = draw(source, handles, ["a cat"])
    source = BundleSource(str(seeded_bundle_path))
    handles = [Handle(ExpertServer(source, k, threads=1, max_rows=64)) for k in range(4)]
    (whole,) = draw(source, handles, ["a cat"])
    np.testing.assert_array_equal(whole.pictures, without.pictures)
    assert (whole.missing_experts, whole.last_resort, handles[3].sent) == ([], False, [])

    handles[1].dies = True
    (stood_in,) = draw(source, handles, ["a cat"])
    assert (stood_in.missing_experts, stood_in.last_resort) == ([1], True)
    assert handles[3].sent
    assert (stood_in.pictures != whole.pictures).any()
    assert (np.array(stood_in.expert_weights)[..., 1] > 0).any()

    (undeployed,) = draw(source, handles[:3], ["a cat"])
    assert (undeployed.missing_experts, undeployed.last_resort) == ([1], False)


def test_a_request_may_insist_on_every_expert(source: BundleSource, handles: list[Handle]) -> None:
    handles[1].dies = True
    with pytest.raises(ExpertsLostError, match="expert 1 is lost"):
        draw(source, handles, ["a cat"], allow_degraded=False)


def test_a_client_has_no_more_pictures_than_its_quota(
    source: BundleSource, handles: list[Handle]
) -> None:
    with pytest.raises(QueueFullError, match="the most at once are 2"):
        draw(source, handles, ["a cat"], max_pictures_of_client=2)
    assert len(draw(source, handles, ["a cat"], max_pictures_of_client=3)) == 1


def test_what_hangs_is_asked_again(source: BundleSource, handles: list[Handle]) -> None:
    (whole,) = draw(source, handles, ["a cat"])
    handles[1].hangs = 1
    (again,) = draw(source, handles, ["a cat"])
    assert again.missing_experts == []
    np.testing.assert_array_equal(again.pictures, whole.pictures)


@pytest.mark.parametrize(("lanes", "times"), [(2, 2), (3, 1)])
def test_many_lanes_wait_longer_for_an_answer(
    source: BundleSource, handles: list[Handle], lanes: int, times: int
) -> None:
    """Their batches may wait for one replica: a late answer there is no hang, and not asked again.

    So an expert that hangs is asked `times` times for each picture before it is given up.
    """
    handles[1].hangs = 99
    (degraded,) = draw(source, handles, ["a cat"], lanes=lanes)
    assert degraded.missing_experts == [1]
    assert sum(len(question.t) for question in handles[1].sent) == times * len(SEEDS)


def test_half_of_a_batch_that_failed_has_not_failed_as_long(
    source: BundleSource, handles: list[Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does the time count in which its expert answered, if only with an error."""
    (whole,) = draw(source, handles, ["a cat"])
    skipped = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + skipped[0])
    monkeypatch.setattr("serve.sampler.time", clock)

    def later(error: Exception) -> Exception:
        skipped[0] += 0.7 * LIMITS.lost_after_s
        return error

    before = len(handles[1].sent)
    handles[1].failures = [lambda: later(RuntimeError("bad")), lambda: later(ActorDiedError())]
    (again,) = draw(source, handles, ["a cat"])
    sizes = [len(question.t) for question in handles[1].sent[before:]]
    assert sizes[:2] == [3, 1]  # the batch, and the half that its expert died with
    assert again.missing_experts == []
    np.testing.assert_array_equal(again.pictures, whole.pictures)


def test_a_drawing_tells_what_drew_it(
    tiny_bundle_path: Path, lora_path: Path, bundle: Bundle
) -> None:
    lora = LoRASource("mine", str(lora_path), None, False, None).pinned(1)
    source = BundleSource(str(tiny_bundle_path), dtype="bfloat16", loras=(lora,)).pinned()
    assert source.digest is not None
    sampler = Sampler(source, None, threads=1, limits=LIMITS)
    opened = open_bundle(source)

    async def messages(lora: str | None) -> list[Partial | Drawing]:
        request = DrawRequest(
            id="a",
            client="local",
            prompts=["a cat"],
            seeds=[0],
            options=sampling_options(opened, lora=lora),
            timeout_s=60,
            partial_images=1,
        )
        return [message async for message in sampler.stream(request)]

    async def each() -> list[list[Partial | Drawing]]:
        return [await messages(name) for name in ("mine", None)]

    for name, told in zip(("mine", None), asyncio.run(each()), strict=True):
        assert [type(message) for message in told] == [Partial, Drawing]
        record = None if name is None else LoRARecord(expert=1, sha256=lora.sha256, merge=False)
        origin = Origin(bundle=source.digest, dtype="bfloat16", lora=record)
        assert {message.origin for message in told} == {origin}


@pytest.mark.parametrize(
    "change",
    [
        {"allowed_experts": frozenset({99})},
        {"loras": {1: "unknown"}},
        {"routing": Routing("top-k", top_k=99)},
    ],
)
def test_a_request_checked_against_another_bundle_is_not_begun(
    source: BundleSource, handles: list[Handle], change: dict[str, Any]
) -> None:
    """While Serve replaces replicas, an Ingress may know experts and adapters that this has not."""
    sampler = Sampler(source, handles, threads=1, limits=LIMITS, lanes=[2] * len(handles))
    request = DrawRequest(
        id="a",
        client="local",
        prompts=["a cat"],
        seeds=[0],
        options=replace(sampling_options(open_bundle(source)), **change),
        timeout_s=60,
    )
    with pytest.raises(OtherVersionError):
        asyncio.run(sampler.draw(request))
    assert not any(handle.sent for handle in handles)


def test_a_bad_call_costs_its_own_request_alone(
    source: BundleSource, handles: list[Handle]
) -> None:
    scales = [2.0, 3.0, 4.0, 5.0]
    expected = [draw(source, handles, ["a cat"], guidance_scale=scale)[0] for scale in scales]
    handles[1].bad_scale = scales[2]
    sampler = Sampler(source, handles, threads=1, limits=LIMITS, lanes=[2] * len(handles))
    bundle = open_bundle(source)

    def request(scale: float) -> DrawRequest:
        options = sampling_options(bundle, routing="full", guidance_scale=scale)
        return DrawRequest(
            id=str(scale),
            client="local",
            prompts=["a cat"] * len(SEEDS),
            seeds=SEEDS,
            options=options,
            timeout_s=60,
        )

    async def all_at_once() -> list[Any]:
        asked = [sampler.draw(request(scale)) for scale in scales]
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(all_at_once())
    assert isinstance(answers.pop(2), RuntimeError)
    del expected[2]
    for answer, alone in zip(answers, expected, strict=True):
        assert isinstance(answer, Drawing), answer
        np.testing.assert_array_equal(answer.pictures, alone.pictures)
    batches = [len(question.t) for question in handles[1].sent]
    assert max(batches) > len(SEEDS)  # they did share batches


def test_a_cancelled_request_does_not_wait_for_the_text_encoder(
    source: BundleSource, handles: list[Handle], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = Sampler(source, handles, threads=1, limits=LIMITS, lanes=[2] * len(handles))
    encode, may_go_on, encoded = sampler._encode, threading.Event(), []

    def slowly(requests: Sequence[DrawRequest]) -> Any:
        encoded.append([request.id for request in requests])
        assert may_go_on.wait(60)
        return encode(requests)

    monkeypatch.setattr(sampler, "_encode", slowly)
    options = sampling_options(open_bundle(source), routing="full")
    first, second = (
        DrawRequest(
            id=name, client="local", prompts=[name], seeds=[0], options=options, timeout_s=60
        )
        for name in ("a cat", "a dog")
    )

    async def cancel_the_second() -> tuple[Drawing, int | None]:
        drawing = asyncio.create_task(sampler.draw(first))
        while not encoded:
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(sampler.draw(second))
        await asyncio.sleep(0.05)
        step = await sampler.cancel("local", "a dog")
        with pytest.raises(RequestCancelledError):
            await waiting  # while the encoder still has the first
        assert not drawing.done()
        may_go_on.set()
        return await drawing, step

    drawn, step = asyncio.run(cancel_the_second())
    assert (len(drawn.pictures), step) == (1, 0)
    assert encoded == [["a cat"]]
