"""Broken and hostile files: flipped and missing bytes, JSON with other values, tensors of other shapes.

A numpy generator chooses every mutation, so a seed reproduces it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from lmdist.storage.checksums import OWN_CHECKSUM, block_checksums, facts_of, own_checksum
from lmdist.storage.reading import write_json
from lmdist.text.data_folder import BLOCK_SUMS, BLOCKS, TOKEN_FILES

Random = np.random.Generator

DEEP = "[" * 5_000 + "]" * 5_000
# Values in place of expected ones. They are JSON texts, because Python's writer would not write some of them.
JUNK = [
    *("null", "true", "false", "0", "-1", "1", "2", "0.5", "-0.0", "1e400", "NaN", "-Infinity", "1e308", str(2**63)),
    *(str(10**12), str(10**400), "9" * 5_000, '""', '"x"', '"../../../etc/passwd"', '"/dev/zero"', '"a\\nb"', '"\\ud800"'),
    *('"\\u0000"', '"' + "x" * 5_000 + '"', "[]", "{}", "[[]]", '{"": null}', DEEP, "[" + "0," * 5_000 + "0]"),
]
NAMES = ["", ".", "..", "../vocab.txt", "/etc/passwd", "a/../vocab.txt", "a\nb", "x" * 300, "\0", "manifest.json", "vocab.txt"]


def damaged(data: bytes, random: Random) -> bytes:
    """Return bytes with one to four defects."""
    for _ in range(random.integers(1, 5)):
        start, end = sorted(random.integers(0, len(data) + 1, 2).tolist())
        end = min(end, start + int(random.choice([1, 2, 8, 100, 10_000])))
        match random.integers(6):
            case 0:  # a bit flips
                if data:
                    place = int(random.integers(len(data)))
                    data = data[:place] + bytes([data[place] ^ 1 << int(random.integers(8))]) + data[place + 1 :]
            case 1:  # the end is cut off
                data = data[:start]
            case 2:  # a piece is gone
                data = data[:start] + data[end:]
            case 3:  # a piece comes twice
                data = data[:end] + data[start:end] + data[end:]
            case 4:  # a piece is zeros, or all ones
                data = data[:start] + bytes([int(random.choice([0, 255]))]) * (end - start) + data[end:]
            case 5:  # a piece is noise
                data = data[:start] + random.bytes(end - start) + data[end:]
    return data


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) below a value."""
    found: list[tuple[Any, Any]] = []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += [(value, key), *places(inner)]
    return found


def other_json(text: str, random: Random) -> str:
    """Return a JSON object with one to three changes: a value removed, of another type, absurd, or under another name."""
    value = json.loads(text)
    for _ in range(random.integers(1, 4)):
        holder, key = one(places(value) or [([value], 0)], random)
        match random.integers(5):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[one(NAMES, random)] = holder.pop(key)
            case 2 if isinstance(holder, dict):
                holder[one(NAMES, random)] = copy.deepcopy(holder[key])
            case 3 if type(holder[key]) in (int, float):
                holder[key] = holder[key] * one([-1, 2, 1000], random) + one([-1, 0, 1], random)
            case _:
                holder[key] = f"@{random.integers(len(JUNK))}@"
    return re.sub(r'"@(\d+)@"', lambda found: JUNK[int(found[1])], json.dumps(value))


def other_tensors(data: bytes, random: Random) -> bytes:
    """Return a safetensors file with a tensor removed, renamed, reshaped, cast or not finite; or with another header."""
    if random.random() < 0.3:
        length = int.from_bytes(data[:8], "little")
        header = other_json(data[8 : 8 + length].decode(), random).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    tensors = safetensors.numpy.load(data)
    name = one(sorted(tensors), random)
    value = tensors.pop(name)
    match random.integers(6):
        case 0:
            tensors[one([*NAMES, "optimizer.1", "optimizer.x.step", "optimizer.-1.step", "optimizer.99.step"], random)] = value
        case 1:
            tensors[name] = value.reshape(one([(-1,), (1, *value.shape), value.shape[::-1]], random))
        case 2:
            tensors[name] = value.astype(one([np.float64, np.float16, np.int64, np.bool_, np.uint8], random))
        case 3:
            tensors[name] = np.zeros(one([(), (0,), (3, 0), (1,) * 20, (2, 3), (len(value.shape), 5)], random), np.float32)
        case 4:
            tensors[name] = np.where(random.random(value.shape) < 0.3, one([np.nan, np.inf, -np.inf], random), value)
            tensors[name] = tensors[name].astype(np.float32)
        case _:
            pass
    return safetensors.numpy.save(tensors)


def other_lines(data: bytes, random: Random) -> bytes:
    """Return a text with lines removed, duplicated, emptied or moved."""
    lines = data.split(b"\n")
    for _ in range(random.integers(1, 4)):
        first, second = random.integers(len(lines), size=2).tolist()
        match random.integers(5):
            case 0:
                lines.insert(first, lines[second])
            case 1:
                lines.insert(first, one([b"", b" ", b"\xff", b"\0", b"<unk>", b"<eos>", b"\r", "\u2028".encode()], random))
            case 2:
                lines[first], lines[second] = lines[second], lines[first]
            case 3:
                lines[first] = one([b"", b"new", b"x" * 100_000, lines[first] + b"\r"], random)
            case _:
                del lines[first:second]
                lines = lines or [b""]
    return b"\n".join(lines)


def with_correct_checksums(folder: Path, manifest: str) -> None:
    """Write the checksums of the existing files into a manifest, and its own if it has one, as an attacker would."""
    path = folder / manifest
    try:
        value = json.loads(path.read_bytes())
        for name, facts in value["files"].items():
            file = folder / name
            if file.parent == folder and file.is_file():
                facts |= facts_of(file)
        if "blocks" in value:
            sums = {file.name: block_checksums(file) for file in sorted(folder.glob(TOKEN_FILES)) if file.is_file()}
            write_json(folder / BLOCKS, {BLOCK_SUMS: sums})
            value["blocks"] = facts_of(folder / BLOCKS)
        if OWN_CHECKSUM in value:
            value[OWN_CHECKSUM] = own_checksum(value)
        path.write_text(json.dumps(value), encoding="utf-8")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        pass  # it is too broken to hold checksums


def mutated(folder: Path, manifest: str, others: dict[str, Callable[[bytes, Random], bytes]], random: Random) -> str:
    """Change one or two files of a folder, and return a description."""
    done = []
    for _ in range(random.integers(1, 3)):
        file = folder / one(sorted(path.name for path in folder.iterdir()), random)
        if not file.is_file():
            continue
        data, aware = file.read_bytes(), file.suffix == ".json" or file.suffix in others
        try:
            if aware and random.random() < 0.7:
                if file.suffix == ".json":
                    file.write_text(other_json(data.decode(), random), encoding="utf-8")
                else:
                    file.write_bytes(others[file.suffix](data, random))
                done.append(f"{file.name} has other values")
                continue
        except (ValueError, LookupError, RecursionError, SafetensorError):
            pass  # it is broken already: damage its bytes
        match random.integers(12):
            case 0:
                file.unlink()
                done.append(f"{file.name} is removed")
            case 1:
                file.unlink()
                file.mkdir()
                done.append(f"{file.name} is a folder")
            case _:
                file.write_bytes(damaged(data, random))
                done.append(f"{file.name} is damaged")
    if random.random() < 0.7:
        with_correct_checksums(folder, manifest)
        done.append("checksums are correct")
    return ", ".join(done)


def one(choices: list[Any], random: Random) -> Any:
    """Return one of some choices."""
    return choices[int(random.integers(len(choices)))]


def other_weights(data: bytes, random: Random) -> bytes:
    """Return a file of weights with NaN, infinite, huge or zero numbers, or of another length."""
    if random.random() < 0.2:
        return one([b"", data[:-1], data[: len(data) // 2], data + b"\0", data * 2], random)
    numbers = np.frombuffer(data[: len(data) // 4 * 4], np.uint32).copy()
    for _ in range(random.integers(1, 4)):
        start, end = sorted(random.integers(0, len(numbers) + 1, 2).tolist())
        end = min(end, start + one([1, 10, 300, 10_000], random))
        value = one([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e30, 7.0, 0.0, 1e-45], random)
        numbers[start:end] = np.float32(value).view(np.uint32)
    return numbers.tobytes() + data[len(numbers) * 4 :]
