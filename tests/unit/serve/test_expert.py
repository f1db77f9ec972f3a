"""One expert behind a handle, in this process: which texts travel, what is computed together."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
import torch

from paris_ray.bundle import Bundle, bundle_digest
from paris_ray.sampling.calls import ExpertCall
from paris_ray.sampling.local import LocalModels
from paris_ray.sampling_options import sampling_options
from serve.drawing import OtherVersionError
from serve.expert import (
    MAX_TEXTS,
    ExpertClient,
    ExpertServer,
    Floats,
    MissingTexts,
    Question,
)
from serve.source import BundleSource, LoRASource
from tests.expert_calls import answer_alone, first_expert_calls

INDEX = 1


class Handle:
    """Stands for a handle of some replicas, of which it asks any; keeps what each was asked."""

    def __init__(self, *servers: ExpertServer) -> None:
        self.servers = list(servers)
        self.sent: list[list[Question]] = [[] for _ in servers]
        self._chance = random.Random(0)
        self.velocity = self

    def options(self, **_: Any) -> "Handle":
        return self

    async def remote(self, question: Question) -> Floats | MissingTexts:
        replica = self._chance.randrange(len(self.servers))
        self.sent[replica].append(question)
        return await self.servers[replica].velocity(question)

    def texts_sent(self, replica: int = 0) -> list[int]:
        """How many texts came with each question."""
        return [len(question.new_texts) for question in self.sent[replica]]


@pytest.fixture
def new_server(tiny_bundle_path: Any) -> Callable[[], ExpertServer]:
    threads = torch.get_num_threads()
    return lambda: ExpertServer(
        BundleSource(str(tiny_bundle_path)), INDEX, threads=threads, max_rows=64
    )


def client_of(handle: Handle) -> ExpertClient:
    return ExpertClient(handle, handle.servers[0]._version)


def calls_of(
    bundle: Bundle, prompts: Sequence[str], guidance_scale: float = 2.0
) -> list[ExpertCall]:
    """One call a prompt, as the engine makes them."""
    options = sampling_options(bundle, routing="full", guidance_scale=guidance_scale)
    return [
        first_expert_calls(bundle, bundle.encode_text([prompt]), [seed], options)[INDEX]
        for seed, prompt in enumerate(prompts)
    ]


def test_a_text_is_sent_once(tiny_bundle: Bundle, new_server: Callable[[], ExpertServer]) -> None:
    handle = Handle(new_server())
    client, calls = client_of(handle), calls_of(tiny_bundle, ["a cat", "a dog", "a cat"])
    models = LocalModels(tiny_bundle)

    async def ask() -> None:
        for asked in (calls, calls, calls[:1], calls_of(tiny_bundle, ["red"], guidance_scale=1.0)):
            for call, answer in zip(asked, await client.ask(asked), strict=True):
                assert torch.equal(answer, answer_alone(models, call))

    asyncio.run(ask())
    assert handle.texts_sent() == [3, 0, 0, 1]  # two captions and the null text, then one more


def test_each_replica_gets_what_it_does_not_know(
    tiny_bundle: Bundle, new_server: Callable[[], ExpertServer]
) -> None:
    handle = Handle(new_server(), new_server())
    client, calls = client_of(handle), calls_of(tiny_bundle, ["a cat", "a dog"])
    models = LocalModels(tiny_bundle)

    async def ask() -> None:
        for _ in range(30):
            for call, answer in zip(calls, await client.ask(calls), strict=True):
                assert torch.equal(answer, answer_alone(models, call))

    asyncio.run(ask())
    for replica in (0, 1):
        assert sum(handle.texts_sent(replica)[:5]) >= 3
        assert sum(handle.texts_sent(replica)[5:]) == 0


def test_only_what_a_replica_forgot_is_sent_again(
    tiny_bundle: Bundle, new_server: Callable[[], ExpertServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.expert.MAX_TEXTS", 3)
    server = new_server()
    mine, theirs = Handle(server), Handle(server)
    client, other = client_of(mine), client_of(theirs)
    calls = calls_of(tiny_bundle, ["a cat", "a dog"])

    async def ask() -> None:
        before = await client.ask(calls)
        await other.ask(calls_of(tiny_bundle, ["red"]))  # the cat's text makes room for it
        for one, again in zip(before, await client.ask(calls), strict=True):
            assert torch.equal(one, again)

    asyncio.run(ask())
    assert mine.texts_sent() == [3, 0, 1]


def test_a_client_forgets_with_its_replica(
    tiny_bundle: Bundle, new_server: Callable[[], ExpertServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_TEXTS > 2 * 64  # the texts of the largest batch
    monkeypatch.setattr("serve.expert.MAX_TEXTS", 2)
    handle = Handle(new_server())
    client = client_of(handle)

    async def ask() -> None:
        for prompt in ("a cat", "a dog", "red", "a cat"):
            await client.ask(calls_of(tiny_bundle, [prompt]))

    asyncio.run(ask())
    assert handle.texts_sent() == [2, 1, 1, 1]  # no question was asked twice


def watch(
    server: ExpertServer, monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any]
) -> list[int]:
    """Let an expert compute by some function; return the sizes of its batches."""
    sizes: list[int] = []

    def counted(calls: Sequence[ExpertCall]) -> list[torch.Tensor]:
        sizes.append(len(calls))
        return answer(calls)

    monkeypatch.setattr(server._models, "answer", counted)
    return sizes


async def all_of(asked: Sequence[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*asked, return_exceptions=True)


def test_what_came_while_it_computed_is_computed_together(
    tiny_bundle: Bundle, new_server: Callable[[], ExpertServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_server()
    sizes = watch(server, monkeypatch, server._models.answer)
    calls = calls_of(tiny_bundle, ["a cat", "a dog", "red", "green", "blue"])
    models = LocalModels(tiny_bundle)
    answers = asyncio.run(all_of([client_of(Handle(server)).ask([call]) for call in calls]))
    for call, (answer,) in zip(calls, answers, strict=True):
        assert torch.equal(answer, answer_alone(models, call))
    assert sum(sizes) == 5
    assert len(sizes) <= 2


def test_a_pass_has_no_more_rows_than_allowed_and_none_for_nobody(
    tiny_bundle: Bundle, new_server: Callable[[], ExpertServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_server()
    monkeypatch.setattr(server._asked, "_most", 4)
    sizes = watch(server, monkeypatch, server._models.answer)
    calls = calls_of(tiny_bundle, ["a cat", "a dog", "red", "green", "blue"])  # guided: two rows

    async def ask() -> None:
        tasks = [asyncio.create_task(client_of(Handle(server)).ask([call])) for call in calls]
        await asyncio.sleep(0)  # all have asked, and nothing is computed yet
        tasks[1].cancel()
        answers = await all_of(tasks)
        assert isinstance(answers.pop(1), asyncio.CancelledError)
        for call, (answer,) in zip([calls[0], *calls[2:]], answers, strict=True):
            assert torch.equal(answer, answer_alone(LocalModels(tiny_bundle), call))

    asyncio.run(ask())
    assert max(sizes) == 2
    assert sum(sizes) == 4


def test_an_error_is_told_to_those_who_asked_and_to_nobody_later(
    tiny_bundle: Bundle, new_server: Callable[[], ExpertServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, errors = new_server(), [RuntimeError("out of memory")]
    compute = server._models.answer

    def answer(calls: Sequence[ExpertCall]) -> list[torch.Tensor]:
        if errors:
            raise errors.pop()
        return compute(calls)

    watch(server, monkeypatch, answer)
    client, (call,) = client_of(Handle(server)), calls_of(tiny_bundle, ["a cat"])

    async def ask() -> None:
        with pytest.raises(RuntimeError, match="out of memory"):
            await client.ask([call])
        (velocity,) = await client.ask([call])
        assert torch.equal(velocity, answer_alone(LocalModels(tiny_bundle), call))

    asyncio.run(ask())


def test_who_gave_up_does_not_disturb_the_others(
    tiny_bundle: Bundle, new_server: Callable[[], ExpertServer]
) -> None:
    server = new_server()
    calls = calls_of(tiny_bundle, ["a cat", "a dog", "red"])

    async def ask() -> None:
        tasks = [asyncio.create_task(client_of(Handle(server)).ask([call])) for call in calls]
        await asyncio.sleep(0)  # all have asked
        tasks[1].cancel()
        answers = await all_of(tasks)
        assert isinstance(answers[1], asyncio.CancelledError)
        for i in (0, 2):
            assert torch.equal(answers[i][0], answer_alone(LocalModels(tiny_bundle), calls[i]))

    asyncio.run(ask())


def test_an_expert_answers_nobody_who_means_another_version(
    tiny_bundle: Bundle, new_server: Callable[[], ExpertServer]
) -> None:
    """While Serve replaces replicas: a picture must not be drawn by two bundles."""
    handle, calls = Handle(new_server()), calls_of(tiny_bundle, ["a cat"])
    client = ExpertClient(handle, "another version")
    with pytest.raises(OtherVersionError):
        asyncio.run(client.ask(calls))
    assert not handle.servers[0]._texts


def test_a_version_is_all_but_the_device(tiny_bundle_path: Any) -> None:
    source = BundleSource(str(tiny_bundle_path)).pinned()
    assert source.digest == bundle_digest(str(tiny_bundle_path))
    assert source._replace(device="cuda").version == source.version
    lora = LoRASource("mine", "/loras/mine", INDEX, False, None)
    others = [{"digest": "0"}, {"uri": "/other"}, {"dtype": "bfloat16"}, {"loras": (lora,)}]
    versions = {source._replace(**change).version for change in others}
    assert len(versions - {source.version}) == len(others)
    with_lora = source._replace(loras=(lora,))
    assert with_lora.of_expert(INDEX).version == with_lora.version
    assert with_lora.of_expert(INDEX + 1).version == source.version


def test_one_bad_question_does_not_cost_the_others_their_answers(
    tiny_bundle: Bundle, new_server: Callable[[], ExpertServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_server()
    compute = server._models.answer
    calls = calls_of(tiny_bundle, ["a cat", "a dog", "red", "green"])

    def answer(asked: Sequence[ExpertCall]) -> list[torch.Tensor]:
        if any(call.text.keys == calls[2].text.keys for call in asked):
            raise RuntimeError("bad")
        return compute(asked)

    sizes = watch(server, monkeypatch, answer)
    answers = asyncio.run(all_of([client_of(Handle(server)).ask([call]) for call in calls]))
    assert isinstance(answers.pop(2), RuntimeError)
    for call, (given,) in zip([*calls[:2], calls[3]], answers, strict=True):
        assert torch.equal(given, answer_alone(LocalModels(tiny_bundle), call))
    assert max(sizes) > 1
