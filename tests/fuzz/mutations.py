"""How a valid file becomes a hostile one: its bytes, its numbers, or what its format means.

A mutation is a function of a seeded generator and the bytes of a file. Those of a format keep it
well-formed, so that what it says is read, not only that it is damaged.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

Mutation = Callable[[Random, bytes], bytes]

LARGE = (0, 1, 127, 128, 255, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
OUTSIDE = "../outside/secret.png"  # from the folder of the input; `Guard` watches it
TEXTS = (
    *("", "\0", "..", OUTSIDE, f"../{OUTSIDE}", "/etc/passwd", "a/../../outside/secret.png", "~/x"),
    *("${oc.env:HOME}", "%n%s", "A" * 100_000, "\u202e\ufeff", "-1", "nan", "file:///etc/passwd"),
)
NUMBERS = (
    *("null", "true", "false", "0", "-1", "1", "2", "3", "1.5", "-0.0", "1e-320", "1e308", "1e999"),
    *("NaN", "Infinity", "-Infinity", "65537", "2147483648", "-9223372036854775808"),
    *("9223372036854775807", "18446744073709551616", "9" * 400, "9" * 4299, "9" * 5000, "1e400"),
)


# Of any file


def flip(rng: Random, content: bytes) -> bytes:
    """A few bits or bytes."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8)) if content else 0):
        changed[rng.randrange(len(changed))] ^= rng.choice((1 << rng.randrange(8), 255))
    return bytes(changed)


def cut(rng: Random, content: bytes) -> bytes:
    """Only how it begins, or begins and ends."""
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[rng.randrange(start, len(content) + 1) :] * rng.randrange(2)


def number(rng: Random, content: bytes) -> bytes:
    """A number that may be a length, a size or an offset."""
    order, kind = rng.choice("<>"), rng.choice("BHIQ")
    value = rng.choice(LARGE) & ((1 << 8 * struct.calcsize(kind)) - 1)
    return _over(rng, content, struct.pack(order + kind, value))


def splice(rng: Random, content: bytes) -> bytes:
    """A piece, once or often, in a place where it was not."""
    start = rng.randrange(len(content) + 1)
    piece = content[start : start + rng.choice((1, 4, 12, 64, 1000))]
    place = rng.randrange(len(content) + 1)
    return content[:place] + piece * rng.choice((1, 1, 2, 100, 2000)) + content[place:]


def _over(rng: Random, content: bytes, patch: bytes) -> bytes:
    # Headers are at the beginning of most files, and of some at the end.
    most = max(1, len(content) - len(patch) + 1)
    start = rng.choice((rng.randrange(most), rng.randrange(min(most, 64)), most - 1))
    return content[:start] + patch + content[start + len(patch) :]


BYTES: Sequence[Mutation] = (flip, cut, number, splice)


# Of documents


def edit_json(rng: Random, content: bytes) -> bytes:
    """One value of a document that is another one, missing, twice or somewhere else."""
    return edited(rng, json.loads(content)).encode("utf-8", "surrogatepass")


def edit_lines(rng: Random, content: bytes) -> bytes:
    """One document of several, a line each."""
    lines = content.splitlines()
    chosen = rng.randrange(len(lines))
    lines[chosen] = edit_json(rng, lines[chosen]).replace(b"\n", b" ")
    return b"\n".join(lines) + b"\n"


def edited(rng: Random, document: Any) -> str:
    """Return a parsed document with a change, as JSON, which may be none in the end."""
    holder, key = rng.choice(list(_places(document)) or [({"": document}, "")])
    mark, text = "<here>", hostile_text(rng, holder[key])
    change = rng.randrange(8)
    if change == 0:
        del holder[key]
    elif change == 1 and isinstance(holder, dict):
        holder[rng.choice((f"{key}x", "__class__", "auto_map", *TEXTS[:8]))] = holder.pop(key)
    elif change == 2:
        other_holder, other = rng.choice(list(_places(document)))
        holder[key] = json.loads(json.dumps(other_holder[other]))
    elif change == 3 and isinstance(holder, dict):
        twin = f"{json.dumps(key)}: {json.dumps(holder[key])}, {json.dumps(key)}: {text}"
        holder.pop(key)
        return "{" + twin + ", " + json.dumps(holder)[1:] if holder else "{" + twin + "}"
    else:
        holder[key] = mark
    return json.dumps(document, indent=rng.choice((None, 1))).replace(json.dumps(mark), text)


def hostile_text(rng: Random, value: Any) -> str:
    """Return JSON to stand in the place of a value."""
    match rng.randrange(6):
        case 0:
            return json.dumps(rng.choice(TEXTS))
        case 1:
            return nested(rng)
        case 2:
            return rng.choice(('"\\ud800"', "[]", "{}", '[""]', f"[{'0,' * 50_000}0]", '{"a": {}}'))
        case 3 if isinstance(value, int | float) and not isinstance(value, bool):
            return json.dumps(rng.choice((value + 1, value - 1, -value, value * 2, value * 1000)))
        case 4 if isinstance(value, str) and value:
            changed = flip(rng, value.encode("utf-8", "surrogatepass"))
            return json.dumps(changed.decode(errors="replace"))
        case _:
            return rng.choice(NUMBERS)


def nested(rng: Random) -> str:
    """Return lists or mappings in each other: so many that parsers, or only writers, give up."""
    depth = rng.choice((10, 100, rng.randrange(200, 400), rng.randrange(900, 1000), 100_000))
    begin, end = rng.choice((("[", "]"), ('{"a":', "}")))
    return begin * depth + "1" + end * depth


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every mapping or list of a document with each of its keys or positions."""
    todo = [document]
    while todo:
        holder = todo.pop()
        if isinstance(holder, dict | list):
            pairs = holder.items() if isinstance(holder, dict) else enumerate(holder)
            for key, value in pairs:
                yield holder, key
                todo.append(value)


def edit_yaml(rng: Random, content: bytes) -> bytes:
    """A configuration: as JSON, which YAML is, or with what only YAML has."""
    import yaml

    if rng.random() < 0.7:
        return edited(rng, yaml.safe_load(content)).encode("utf-8", "surrogatepass")
    return content + rng.choice(_YAML)(rng)


def _laughs(rng: Random) -> bytes:
    """Text that names stand for, nine times each: of 9 levels it would be 9 ** 9 texts."""
    lines = ["l0: &l0 [lol]"]
    for level in range(1, rng.choice((3, 6, 9, 30))):
        names = ", ".join([f"*l{level - 1}"] * 9)
        lines.append(f"l{level}: &l{level} [{names}]")
    return "\n".join(lines).encode()


_YAML: Sequence[Callable[[Random], bytes]] = (
    _laughs,
    lambda rng: b"experts: &e {'0': *e}",
    lambda rng: b'seed: !!python/object/apply:os.system ["true"]',
    lambda rng: b"<<: {seed: 1}",
    lambda rng: b"seed: 1\nseed: 2",
    lambda rng: f"run_dir: {nested(rng)}".encode(),
    lambda rng: f"experts: {nested(rng)}".encode(),
    lambda rng: f"seed: {rng.choice(NUMBERS)}".encode(),
    lambda rng: rng.choice(
        (b"run_dir: \xff\xfe", b"\0", b"\t- x", b"---\n...\n---\n", b"? [a]\n: b")
    ),
    lambda rng: b"run_dir: ${oc.env:HOME}\nseed: ${oc.decode:'[1'}",
    lambda rng: b"run_dir: ${run_dir}\ntraining: ${training}",
    lambda rng: b"seed: 2001-12-14t21:59:43.10-05:00\nrun_dir: 190:20:30",
    lambda rng: b"run_dir: " + b"${" * rng.choice((10, 1000)) + b"}" * rng.choice((10, 1000)),
)


# Of weights


def edit_safetensors(rng: Random, content: bytes) -> bytes:
    """The header of a file of tensors: what it says, or how long it says to be."""
    size = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + size], content[8 + size :]
    if rng.random() < 0.1:
        return rng.choice(LARGE).to_bytes(8, "little") + header + body
    changed = edit_json(rng, header)
    return len(changed).to_bytes(8, "little") + changed + body


def other_tensors(rng: Random, content: bytes) -> bytes:
    """A well-formed file of which one tensor is of other shape, type, values or name."""
    import safetensors.torch
    import torch

    tensors = safetensors.torch.load(content)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    changes: Sequence[Callable[[], Mapping[str, Any]]] = (
        dict,
        lambda: {name: tensor.flatten()},
        lambda: {name: tensor[None]},
        lambda: {name: tensor[:0] if tensor.dim() else tensor},
        lambda: {name: tensor.repeat(2, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor},
        lambda: {name: torch.full_like(tensor, rng.choice((0, -1, 1)))},
        lambda: {name: torch.full(tensor.shape, rng.choice((float("nan"), float("inf"), 1e38)))},
        lambda: {name: tensor.to(rng.choice((torch.float64, torch.float16, torch.bfloat16)))},
        lambda: {name: tensor.to(rng.choice((torch.int64, torch.uint8, torch.bool)))},
        lambda: {name: tensor.to(rng.choice((torch.float8_e4m3fn, torch.complex64)))},
        lambda: {rng.choice((f"{name}x", name.upper(), *TEXTS[:6])): tensor},
        lambda: {name: tensor, f"{name}.more": tensor.clone()},
    )
    tensors |= rng.choice(changes)()
    contiguous = {key: value.contiguous().clone() for key, value in tensors.items()}
    return bytes(safetensors.torch.save(contiguous, metadata={"format": "pt"}))
