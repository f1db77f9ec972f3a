"""What text encoders do not read: MiniLM's kind, CLIP's kind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paris_ray.artifacts import VerifiedFolder
from paris_ray.bundle import Bundle
from paris_ray.encoders.inspection import TextInspector, is_blank, load_text_inspector
from paris_ray.errors import BundleError
from paris_ray.folders import Folder


def inspector(bundle: Bundle) -> TextInspector:
    encoder = bundle.parts["text_encoder"]
    return load_text_inspector(encoder, bundle.parts.get("tokenizer", encoder))


def test_minilm_tells_cut_and_unknown_text(tiny_bundle: Bundle) -> None:
    inspect = inspector(tiny_bundle).inspect
    report = inspect("a red cat")
    assert (report.num_tokens, report.max_tokens) == (5, 128)
    assert (report.unread, report.unknown, report.is_empty) == ("", (), False)
    assert inspect("a blob cat, blob").unknown == ("blob", ",")
    assert inspect("dog " * 126).unread == ""
    assert inspect("dog " * 126 + "red cat").unread == " red cat"
    assert inspect("").is_empty


def test_what_is_unread_changes_nothing(tiny_bundle: Bundle) -> None:
    long = "dog " * 126 + "red cat"
    read = long.removesuffix(inspector(tiny_bundle).inspect(long).unread)
    encode = tiny_bundle.text_encoder.encode
    assert encode([long]).pooled_text.equal(encode([read]).pooled_text)
    assert not encode([long]).pooled_text.equal(encode([read[: -len(" dog")]]).pooled_text)


def test_clip_knows_every_byte_and_reads_77_tokens(release_bundle: Bundle) -> None:
    inspect = inspector(release_bundle).inspect
    report = inspect("cat \U0001f431")
    assert (report.num_tokens, report.max_tokens, report.unknown) == (7, 77, ())
    assert inspect("cat " * 75).unread == ""
    assert inspect("cat " * 76).unread == " cat "
    assert inspect("  ").is_empty


REPOSITORY = Path(__file__).resolve().parents[2]
INSPECT = """
import sys
from paris_ray.encoders.inspection import load_text_inspector
from paris_ray.model_folder.layout import describe_bundle
from paris_ray.sampling_options import sampling_options
bundle = describe_bundle(sys.argv[1], loras={"mine": 1})
encoder = bundle.parts["text_encoder"]
inspector = load_text_inspector(encoder, bundle.parts.get("tokenizer", encoder))
options = sampling_options(bundle, routing="top-2", lora="mine")
assert "torch" not in sys.modules
print(inspector.inspect(sys.argv[2]).num_tokens, options.routing.top_k, options.loras)
"""


@pytest.mark.parametrize("encoder", ["minilm", "clip"])
def test_a_request_is_checked_without_torch(
    encoder: str, tiny_bundle: Bundle, release_bundle: Bundle
) -> None:
    bundle = {"minilm": tiny_bundle, "clip": release_bundle}[encoder]
    path = bundle.parts["router"].folder.uri.rpartition("/")[0]
    command = [sys.executable, "-c", INSPECT, path, "a red cat"]
    told = subprocess.run(
        command, check=True, cwd=REPOSITORY, env=os.environ, stdout=subprocess.PIPE, text=True
    ).stdout
    assert told.split()[:2] == [str(inspector(bundle).inspect("a red cat").num_tokens), "2"]
    assert told.strip().endswith("{1: 'mine'}")


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    Folder(tmp_path).write_json("config.json", {"model_type": "gpt2"})
    folder = VerifiedFolder(Folder(tmp_path), None)
    with pytest.raises(BundleError, match="model_type='gpt2', allowed: bert, clip_text_model"):
        load_text_inspector(folder, folder)


def test_blank_texts() -> None:
    assert all(map(is_blank, ("", " \n", "\u200b", "\u3164", "\0", "\ufe0f")))
    assert not any(map(is_blank, ("a", " . ", "\U0001f431", "e\u0301", "\u65e5")))
