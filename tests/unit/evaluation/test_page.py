"""The page of an evaluation."""

import numpy as np

from paris_ray.evaluation.page import evaluation_page

INTERVAL = {"mean": 0.123, "low": 0.1, "high": 0.2}


def split(**more: object) -> dict[str, object]:
    return {"captions": 3, "squared_error": INTERVAL, "by_cluster": [{"captions": 3}], **more}


def pairs(count: int, value: int) -> np.ndarray:
    return np.full((count, 2, 32, 32, 3), value, np.uint8)


def test_held_out_captions_come_first_with_their_pictures_and_numbers() -> None:
    facts = {
        "shown": split(caption_recall=INTERVAL, frechet_note="few rows"),
        "held_out": split(attributes={"all": INTERVAL}, frechet=1.25),
        "memorisation": {"0.05": 0.25},
        "held_out_losses": [[0.5, None], [0.75, 0.1]],
        "expert_usage": [0.25, 0.75],
    }
    report, grid = evaluation_page(
        facts, {"shown": pairs(3, 0), "held_out": pairs(2, 255)}, "by us"
    )
    text = report.decode()
    assert text.index("never shown") < text.index("trained on")
    for written in (
        "attribute right: all</td><td>0.1230</td><td>0.1000 to 0.2000",
        "(0: alike)</td><td>1.2500",
        "Frechet distance: few rows",
        "<td>0.5000</td><td></td>",
        "25.0% are at most as far from their nearest training picture as 5% of",
        "25.0%, 75.0%",
        "by us",
    ):
        assert written in text
    assert np.asarray(grid).min() == 255  # the first split's pictures, all of them


def test_the_router_stands_beside_its_baseline_with_a_diagram() -> None:
    level = {"accuracy": 0.75, "prototype_accuracy": 0.5, "ece": 0.2, "ece_calibrated": 0.0125}
    bins = {"counts": [0, 4], "confidence": [0.0, 0.7], "accuracy": [0.0, 0.75]}
    levels = {t: level | {"reliability": bins} for t in ("0.5", "1")}
    quality = {"rows": 4, "temperature": 1.5, "levels": levels}
    facts = {"shown": split(caption_recall=INTERVAL), "expert_usage": [1.0]}
    report, _ = evaluation_page(facts, {"shown": pairs(40, 7)}, None, quality)
    text = report.decode()
    assert "Of 4 held-out rows" in text
    assert "fitted temperature, 1.50" in text
    assert "<td>1</td><td>0.7500</td><td>0.5000</td><td>0.2000</td><td>0.0125</td>" in text
    assert 'alt="reliability"' in text


def test_without_held_out_rows_there_is_one_part() -> None:
    facts = {"shown": split(caption_recall=INTERVAL), "expert_usage": [1.0]}
    report, _ = evaluation_page(facts, {"shown": pairs(40, 7)}, None)
    assert b"never shown" not in report
    assert b"Held-out loss" not in report
