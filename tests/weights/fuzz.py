"""Damages files of weights at random and reads them, in a process with little memory.

    PYTHONPATH=. python tests/weights/fuzz.py --cases 20000 [--seed 0]

Each case must end as a good reading or in one UserError: no other error, no call of what a
pickle names, no memory beyond what a process of this size may take.
"""

import argparse
import io
import os
import pickle
import random
import resource
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import flax.serialization
import numpy as np

from dalle_jax.errors import UserError
from dalle_jax.text.yttm_bpe import YTTMTokenizer
from dalle_jax.weights import sources
from dalle_jax.weights.msgpack_file import read_msgpack
from dalle_jax.weights.torch_file import read_torch
from dalle_jax.weights.torch_write import described_tensor, write_torch

GOLDEN = Path(__file__).parent.parent / "golden"
MEMORY = 2**31  # bytes above what the process has at the start
NUMBERS = (0, 1, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**63 - 1)


class Bait:
    """A pickle that calls a function which leaves a mark."""

    mark = ""

    def __reduce__(self):
        return random.choice(
            [
                (os.mkdir, (self.mark,)),
                (os.system, (f"mkdir {self.mark}",)),
                (eval, (f"__import__('os').mkdir({self.mark!r})",)),
                (getattr, ("text", "upper")),
            ]
        )


def seeds() -> list[bytes]:
    """Good files to start from: both containers of PyTorch, one of flax, one of YouTokenToMe."""
    files = [(GOLDEN / f"torch_{kind}.pt").read_bytes() for kind in ("zip", "older")]
    with tempfile.TemporaryDirectory() as folder:
        write_torch(
            Path(folder) / "x.ckpt",
            {"state_dict": {f"encoder.{i}.weight": np.ones((2, 3), np.float32) for i in range(4)}},
        )
        files.append((Path(folder) / "x.ckpt").read_bytes())
    tree = {"encoder": {f"conv_{i}": {"kernel": np.ones((2, 3), np.float32)} for i in range(4)}}
    files.append(flax.serialization.msgpack_serialize(tree))
    golden = np.load(GOLDEN / "weights" / "gpt" / "malevich-v3.npz")
    files.append(str(golden["bpe_model"]).encode())
    return files


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The file with one to four things wrong."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content))
        kind = rng.randrange(7)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[at:]
        elif kind == 2:  # a number of some width
            width = rng.choice((1, 2, 4, 8))
            content[at : at + width] = (rng.choice(NUMBERS) % 256**width).to_bytes(width, "little")
        elif kind == 3:
            del content[at : at + rng.randint(1, 64)]
        elif kind == 6:  # a number in words
            content[at:at] = b" %d " % rng.choice((*NUMBERS, -1, 10**30))
        elif kind == 4:
            content[at:at] = rng.randbytes(rng.randint(1, 16))
        else:
            other = rng.randrange(len(content))
            content[at : at + 32] = content[other : other + 32]
        if not content:
            content = bytearray(b"\0")
    return bytes(content)


def hostile(rng: random.Random) -> bytes:
    """A zip made to do harm: calls, bombs, odd names and views."""
    pickled = rng.choice(
        [
            lambda: pickle.dumps({"w": Bait()}, protocol=rng.randint(0, 5)),
            lambda: b"\x80\x02}(X\1\0\0\0w" + view(rng) + b"u.",
            lambda: b"\x80\x02" + rng.randbytes(rng.randint(0, 40)) + b".",
            lambda: b"\x80\x02(" + b"l" * rng.randint(0, 9) + b"t" * 2000 + b".",
            lambda: b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
        ]
    )()
    stream = io.BytesIO()
    pack = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(stream, "w", pack) as archive:
        root = rng.choice(("x", "..", "/etc", "x/../..", ""))
        archive.writestr(f"{root}/data.pkl", pickled)
        archive.writestr(f"{root}/data/0", bytes(rng.choice((4, 16, 2**20))))
        if rng.random() < 0.2:
            archive.writestr(f"{root}/constants.pkl", b"\x80\x02).")
    return stream.getvalue()


def view(rng: random.Random) -> bytes:
    """A tensor of odd sizes."""

    def number():
        return rng.choice((*NUMBERS, 2, 3, 4, -1, -(2**31)))

    axes = rng.randint(0, 4)
    shape, strides = ([number() for _ in range(axes)] for _ in range(2))
    key = rng.choice(("0", "1", "../0", "data.pkl"))
    kind = rng.choice(("FloatStorage", "HalfStorage", "BoolStorage", "QInt8Storage"))
    return described_tensor(key, kind, rng.choice((1, 4, number())), number(), shape, strides)


def read(path: Path, rng: random.Random) -> str:
    """Reads a file one way or the other; says how that ended."""
    try:
        if path.read_bytes()[:1].isdigit() or rng.random() < 0.1:
            tokenizer = YTTMTokenizer.from_file(path, rows=2**20)
            ids = tokenizer.encode(["рыжий кот\n\u2581😀 " * 9], length=40)
            tokenizer.decode(rng.sample(range(2**20), 40))
            tokenizer.decode(ids[0])
            return "tokenizer"
        if rng.random() < 0.6:
            packed = path.read_bytes()[:1] == b"\x81"
            content = read_msgpack(path) if packed else read_torch(path, shells=rng.random() < 0.5)
            for value in content.values():
                if isinstance(value, np.ndarray):
                    value.sum()
            return "read"
        source = rng.choice([name for name, s in sources.SOURCES.items() if s.kind == "codec"])
        files = [path] * len(sources.SOURCES[source].files)
        info, config, tensors = sources.open_source(source, files)
        sources.convert(info, config, tensors, files)
        return "imported"
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, str(error)
        assert "MemoryError" not in str(error), "it took memory that the file does not justify"
        return "refused"


def run(cases: int, seed: int) -> Counter:
    """Reads that many damaged files.

    Raises:
      AssertionError: if a pickle's call was made.
    """
    rng, good = random.Random(seed), seeds()
    random.seed(seed)
    ends: Counter = Counter()
    with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"):
        Bait.mark = str(Path(folder) / "ran")
        path = Path(folder) / "case.pt"
        for _ in range(cases):
            data = damaged(rng.choice(good), rng) if rng.random() < 0.7 else hostile(rng)
            path.unlink(missing_ok=True)
            path.write_bytes(data)
            ends[read(path, rng)] += 1
            assert not Path(Bait.mark).exists(), "a pickle was obeyed"
    return ends


def limit_memory() -> None:
    """Lets this process grow by `MEMORY`; beyond that Python raises MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    limit_memory()
    print(dict(run(options.cases, options.seed)))
